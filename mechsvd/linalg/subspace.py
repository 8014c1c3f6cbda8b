"""Orthonormal bases of subspaces of the residual stream."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.checks import real_tensor, with_plain_arguments
from mechsvd.fields import require_declared
from mechsvd.results import Provenance, Result, require_kind, require_same_model, result


@result
class Subspace(Result):
    """A subspace of the residual stream, with an orthonormal basis as columns.

    Raises:
        ValueError: the columns are not orthonormal, not finite, or more than `d_model`. `span`
            builds a good basis.

    Example:
        >>> line = ms.Subspace(torch.eye(3)[:, :1])
        >>> line.rank, line.complement().rank
        (1, 2)
    """

    basis: Float[Tensor, "d_model rank"]
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_orthonormal(self.basis)

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    def complement(self) -> "Subspace":
        """Everything orthogonal to it, of rank `d_model` − `rank`.

        Example:
            >>> Subspace(torch.eye(3)[:, :1]).complement().rank
            2
        """
        basis = self.basis.to(at_least_single(self.basis.dtype))
        return Subspace(complete(basis)[:, self.rank :], self.source)

    def to_pandas(self) -> Any:
        """One row per dimension of the residual stream, one column per direction."""
        import pandas as pd

        return (
            pd.DataFrame(self.basis.cpu().numpy(), columns=range(self.rank))
            .rename_axis("dimension")
            .reset_index()
        )

    def __repr__(self) -> str:
        origin = self._origin("bare tensors")
        return (
            f"Subspace of rank {self.rank} in {self.d_model} dimensions\n"
            f"  from {origin}\n"
            f"  dtype {self.basis.dtype}"
        )


@with_plain_arguments
def span(
    vectors: Any,
    source: Provenance | None = None,
    *,
    rows: bool = False,
) -> Subspace:
    """Build the subspace that some vectors span, with an orthonormal basis.

    Args:
        vectors: columns of any length, dependent or not, "d_model n": a tensor or an array.
        source: the model they come from, if any.
        rows: the vectors are rows "n d_model", as in the decoder of a dictionary or in `W_out`. A
            square matrix does not show which they are.

    Returns:
        A subspace in the dtype of the vectors (at least float32). Its `.rank` is their numerical
        rank: left singular vectors above `max(d_model, n) · eps · σ₁`.

    Raises:
        ValueError: the vectors are not a finite matrix, or are all zero.

    Example:
        >>> ms.span(torch.tensor([[3.0, 0.0, 0.0]]), rows=True).basis.flatten().abs().tolist()
        [1.0, 0.0, 0.0]
    """
    vectors = real_tensor("vectors", vectors, "d_model n")
    require_matrix(vectors)
    vectors = vectors.T if rows else vectors
    dtype = at_least_single(vectors.dtype)
    left, sizes, _ = torch.linalg.svd(vectors.cpu().double(), full_matrices=False)
    kept = sizes > max(vectors.shape) * torch.finfo(dtype).eps * sizes[:1]
    if not kept.any():
        raise ValueError(
            "`vectors` are none or all zero, so they span nothing; at least one must be non-zero."
        )
    return Subspace(left[:, kept].to(vectors.device, dtype), source)


@plain
def union(subspaces: Sequence[Subspace]) -> Subspace:
    """The smallest subspace that holds all of some subspaces.

    The basis of the first stays as it is and comes first; then comes what each of the others adds.
    Orthogonal subspaces are so put one after the other.

    Returns:
        A subspace, with the source of the first if all have the same model.

    Raises:
        TypeError: something else than subspaces.
        ValueError: none, or of other dimensions or models.

    Example:
        >>> ms.union([svd.subspace(3), ms.Subspace(torch.eye(128)[:, :2])]).rank
        5
    """
    if not isinstance(subspaces, Sequence) or not subspaces:
        raise TypeError("`subspaces` must be a list of at least one Subspace.")
    for one in subspaces:
        require_kind(one, Subspace)
        require_same_model(subspaces[0].source, one.source, "The subspaces")
    if len(widths := {one.d_model for one in subspaces}) > 1:
        raise ValueError(f"The subspaces lie in different dimensions: {sorted(widths)}.")
    basis = subspaces[0].basis.to(at_least_single(subspaces[0].basis.dtype))
    for one in subspaces[1:]:
        new = one.basis.to(basis)
        new = new - basis @ (basis.T @ new)
        left, sizes, _ = torch.linalg.svd(new.cpu().double(), full_matrices=False)
        added = left[:, sizes > 1e-3].to(basis)  # sines of angles
        basis = torch.cat([basis, added], dim=1)
    return Subspace(basis, subspaces[0].source)


def complete(basis: Float[Tensor, "d_model rank"]) -> Float[Tensor, "d_model d_model"]:
    """Extend an orthonormal basis to the whole residual stream.

    The given directions stay first.
    """
    rank = basis.shape[1]
    full, _ = torch.linalg.qr(basis, mode="complete")
    return torch.cat([basis, full[:, rank:]], dim=1)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype for projections: float32, or that of the data if wider.

    A projection in bfloat16 would leave 0.15–5 % in place.
    """
    return torch.promote_types(dtype, torch.float32)


def widest(device: torch.device) -> torch.dtype:
    """The widest float dtype of a device: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def signs(directions: Float[Tensor, "d_model rank"]) -> Float[Tensor, " rank"]:
    """The sign of each column's entry largest in size: times it, that entry is positive."""
    largest = directions.abs().argmax(dim=0, keepdim=True)
    return directions.gather(0, largest).sign().flatten()


def require_matrix(vectors: Any) -> None:
    """Refuse anything but a finite float matrix; it may have no columns."""
    real_tensor("basis", vectors, "d_model rank")
    if vectors.ndim != 2 or not vectors.is_floating_point() or vectors.shape[0] == 0:
        raise ValueError(
            "A basis must be a float matrix of shape [d_model, rank], "
            f"but it is {vectors.dtype} of shape {list(vectors.shape)}."
        )
    if not vectors.isfinite().all():
        columns = (~vectors.isfinite()).any(dim=0).nonzero().flatten().tolist()
        raise ValueError(f"A basis must be finite, but columns {columns[:5]} hold NaN or inf.")


def rounding(dtype: torch.dtype) -> float:
    """How far BᵀB may be from the identity in a basis rounded to a dtype."""
    return max(1e-3, 2 * torch.finfo(dtype).eps)


def require_orthonormal(basis: Tensor, tolerance: float = 1e-3, name: str = "A basis") -> None:
    """Refuse a basis whose columns are not orthonormal, naming the worst pair."""
    require_matrix(basis)
    d_model, rank = basis.shape
    if rank > d_model:
        raise ValueError(
            "A basis holds directions as columns, [d_model, rank], "
            f"but its shape is {[d_model, rank]}: more directions than dimensions. "
            "Is it transposed?"
        )
    gram = (
        (basis.T.to(at_least_single(basis.dtype)) @ basis.to(at_least_single(basis.dtype)))
        .cpu()
        .double()
    )
    error = (gram - torch.eye(rank, dtype=gram.dtype)).abs()
    if rank and error.max() > tolerance:
        i, j = divmod(int(error.argmax()), rank)
        raise ValueError(
            f"{name} must have orthonormal columns, but BᵀB differs from the identity by "
            f"{error.max():.2g} at columns ({i}, {j}) (duplicate, zero or unnormalised vectors?); "
            "`mechsvd.span(vectors)` builds a good basis."
        )
