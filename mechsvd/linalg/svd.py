"""The singular value decomposition of many vectors at once, in float64."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def thin_svd(
    vectors: Float[Tensor, "batch sample d_model"],
) -> tuple[
    Float[Tensor, "batch sample r"], Float[Tensor, "batch r"], Float[Tensor, "batch d_model r"]
]:
    """The thin SVD in float64; of a tall matrix, by `eigh` of its Gram matrix.

    The Gram matrix costs a tenth of the SVD of a tall matrix. In float64 it is more accurate than
    an SVD in float32. It loses singular values below about 1e-8 σ₁, and `numerical_rank` leaves
    those out.

    Returns:
        Left singular vectors, singular values (falling), directions as columns.
    """
    sample, d_model = vectors.shape[-2:]
    largest = float(vectors.abs().max()) if vectors.numel() else 0.0
    if largest and not 1e-100 < largest < 1e100:  # their squares leave float64
        left, sizes, directions = thin_svd(vectors / largest)
        return left, sizes * largest, directions
    if sample <= d_model:
        left, sizes, right = _svd(vectors)
        return left, sizes, right.mT
    squares, directions = eigh_or_again(vectors.mT @ vectors)
    sizes, directions = squares.flip(-1).clamp(min=0).sqrt(), directions.flip(-1)
    # at a singular value of zero the left vector is undefined; dividing by 1 leaves it zero
    left = vectors @ directions / torch.where(sizes > 0, sizes, 1.0)[..., None, :]
    return left, sizes, directions


def require_representable(sizes: Float[Tensor, " r"]) -> None:
    """Refuse singular values that are too large for their dtype.

    Raises:
        ValueError: saying so.
    """
    if not sizes.isfinite().all():
        raise ValueError(
            f"The singular values are too large for {sizes.dtype}; divide the writes by a constant, "
            "or give them in float64."
        )


def numerical_rank(sizes: Float[Tensor, " r"], shape: torch.Size) -> int:
    """The number of singular values that can be told from zero."""
    # what a float64 Gram matrix can tell from zero; the thin SVD could tell more, but the rank of
    # a sample must not depend on the method. Rounding adds up like a random walk, so that beyond a
    # million vectors the bound n · eps would leave out directions that are well above it
    cutoff = sizes[0] * (min(max(shape), 10**6) * torch.finfo(torch.float64).eps) ** 0.5
    return int((sizes > cutoff).sum())


def _svd(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.linalg.svd(vectors, full_matrices=False)
    except torch.linalg.LinAlgError:
        from scipy.linalg import svd

        left, sizes, right = _once_more(
            lambda matrix: svd(matrix, full_matrices=False, lapack_driver="gesvd"), vectors
        )
        return left, sizes, right


def eigh_or_again(
    gram: Float[Tensor, "batch n n"],
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Rising eigenvalues, and eigenvectors, of symmetric matrices.

    A second driver takes over where the first does not converge.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        from scipy.linalg import eigh

        values, vectors = _once_more(lambda matrix: eigh(matrix, driver="ev"), gram)
    return values, vectors


def _once_more(solve: Callable[[Any], tuple[Any, ...]], matrices: Tensor) -> list[Tensor]:
    """Solve each matrix on the CPU with scipy's slower, more robust driver."""
    from scipy.linalg import LinAlgError

    try:
        solved = [solve(matrix.cpu().numpy()) for matrix in matrices]
    except LinAlgError as error:
        raise RuntimeError(
            f"The SVD of a matrix of shape {list(matrices.shape[1:])} did not converge, "
            f"nor with a second driver ({error}); are the writes of a sensible size?"
        ) from error
    return [
        torch.stack([torch.from_numpy(part.copy()) for part in parts]).to(matrices.device)
        for parts in zip(*solved, strict=True)
    ]
