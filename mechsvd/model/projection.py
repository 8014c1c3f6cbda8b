"""TransformerLens's `SubspaceBasis`, from a bare tensor of directions and back."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def to_subspace_basis(basis: Float[Tensor, "d_model rank"]) -> Any:
    """Describe orthonormal columns as TransformerLens does.

    The other fields are those of the SVD of the basis itself, with TransformerLens's default
    tolerance. The basis is not turned, as `orthonormal_subspace` would do.

    Raises:
        ImportError: this version of TransformerLens has no `SubspaceBasis`.
        ValueError: no columns, or columns less orthonormal than TransformerLens requires.
    """
    d_model, rank = basis.shape
    if rank == 0:
        raise ValueError(
            "`subspace` has no directions, but a SubspaceBasis of TransformerLens needs at least 1."
        )
    wide = torch.float64 if basis.dtype == torch.float64 else torch.float32
    tolerance = d_model * torch.finfo(wide).eps
    gram = basis.to(wide).mT @ basis.to(wide)
    error = float((gram - torch.eye(rank, dtype=wide, device=gram.device)).abs().max())
    if error > 10 * tolerance:  # what `projection_kernel` allows
        raise ValueError(
            f"`subspace` is orthonormal to {error:.2g}, but TransformerLens requires "
            f"{10 * tolerance:.2g} of {basis.dtype}; `mechsvd.span(subspace.basis)` is closer."
        )
    return _subspace_basis()(
        basis=basis,
        singular_values=torch.ones(rank, dtype=wide, device=basis.device),
        rank=rank,
        measured_rank=rank,
        rtol=tolerance,
        threshold=tolerance,
        input_shape=(d_model, rank),
    )


def directions_of_subspace_basis(value: Any) -> Float[Tensor, "d_model rank"]:
    """The directions of a `SubspaceBasis`, as columns.

    Raises:
        ImportError: this version of TransformerLens has no `SubspaceBasis`.
        TypeError: another object.
        ValueError: its basis is no real float matrix, or disagrees with its other fields.
    """
    if not isinstance(value, _subspace_basis()):
        raise TypeError(
            f"`basis` must be a SubspaceBasis of TransformerLens, but is {type(value).__name__}; "
            "of orthonormal columns [d_model, rank], take `mechsvd.Subspace(columns)`."
        )
    basis = value.basis
    if not isinstance(basis, Tensor) or basis.ndim != 2 or not basis.is_floating_point():
        described = (
            f"{basis.dtype} of shape {list(basis.shape)}"
            if isinstance(basis, Tensor)
            else type(basis).__name__
        )
        raise ValueError(
            "`basis.basis` must be a real float matrix [d_model, rank] of directions as columns, "
            f"but is {described}."
        )
    declared = (value.input_shape[0], value.rank)
    if tuple(basis.shape) != declared:
        raise ValueError(
            f"`basis.basis` has shape {list(basis.shape)}, but its `input_shape` and `rank` say "
            f"{list(declared)}. Is it transposed or cut?"
        )
    return basis


def _subspace_basis() -> Any:
    try:
        from transformer_lens.tools.analysis import SubspaceBasis
    except ImportError as error:
        raise ImportError(
            "This version of TransformerLens has no `SubspaceBasis`, but 3.9.0 and 4.3.0 have it: "
            "`pip install 'transformer-lens>=4.3'`."
        ) from error
    return SubspaceBasis
