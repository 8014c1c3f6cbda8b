"""Subspaces exchanged with TransformerLens's own tools."""

from typing import Any

from mechsvd.ambient import plain
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.projection import directions_of_subspace_basis, to_subspace_basis
from mechsvd.results import Provenance, require_kind


@plain
def to_transformer_lens(subspace: Subspace) -> Any:
    """Give a subspace to TransformerLens's tools, as its `SubspaceBasis`.

    `projection_kernel` takes the whole, and `SubspaceInterchange` its `.basis`. The provenance
    stays behind, because a `SubspaceBasis` has no place for it. `projection_kernel` refuses a
    float32 basis next to a float64 one, so give both in one dtype.

    Returns:
        A `transformer_lens.tools.analysis.SubspaceBasis` with the same tensor, directions as
        columns [d_model, rank]. Its singular values are 1: those of the basis, not of the writes.

    Raises:
        TypeError: not a `Subspace`; of a decomposition, take `svd.subspace(rank)`.
        ValueError: a subspace without directions, or less orthonormal than TransformerLens
            requires (about 10 · d_model · ε).
        ImportError: this version of TransformerLens has no `SubspaceBasis`.

    Example:
        >>> ms.to_transformer_lens(mine).basis.shape
        torch.Size([128, 32])
    """
    require_kind(subspace, Subspace)
    return to_subspace_basis(subspace.basis)


@plain
def from_transformer_lens(basis: Any, source: Provenance | None = None) -> Subspace:
    """Take a `SubspaceBasis` of TransformerLens as a subspace.

    Its singular values, tolerance and measured rank describe the matrix that it was taken from,
    not the subspace, and stay behind. Nothing in it tells whether its dimensions are those of the
    residual stream.

    Args:
        basis: as `orthonormal_subspace` gives.
        source: the model that the directions come from, such as `svd.source`; if it is given,
            using them in another model is refused.

    Returns:
        A subspace with the same tensor, in its dtype and on its device.

    Raises:
        TypeError: another object, such as a bare tensor, which `Subspace` takes.
        ValueError: a basis that is complex, not finite, not orthonormal, or of another shape than
            its other fields say.
        ImportError: this version of TransformerLens has no `SubspaceBasis`.

    Example:
        >>> ms.from_transformer_lens(ms.to_transformer_lens(mine)).rank
        32
    """
    return Subspace(directions_of_subspace_basis(basis), source)
