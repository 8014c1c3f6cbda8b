"""Directions that are large in one group of vectors and small in the others.

Tensors only.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.linalg.subspace import signs
from mechsvd.linalg.svd import eigh_or_again


def second_moment(
    vectors: Float[Tensor, "*batch sample d_model"], *, unit: bool = False
) -> Float[Tensor, "*batch d_model d_model"]:
    """The sum of the outer products of some vectors, in float64; nothing is centred.

    Args:
        unit: scale each vector to length 1 first, so that large ones do not count more. A vector
            of zero stays zero. The trace is then the number of vectors.
    """
    exact = vectors.to("cpu" if vectors.device.type == "mps" else vectors.device).double()
    if unit:
        sizes = exact.norm(dim=-1, keepdim=True)
        exact = exact / torch.where(sizes > 0, sizes, 1.0)
    return exact.mT @ exact


def special_directions(
    own: Float[Tensor, "*batch d_model d_model"],
    others: Float[Tensor, "*batch other d_model d_model"],
    count: int,
    damping: float = 0.05,
) -> tuple[Float[Tensor, "*batch d_model count"], Float[Tensor, "*batch count"]]:
    """The directions that are large in one group, compared with the mean of the other groups.

    They are the top generalised eigenvectors of (C, B + damping · mean eigenvalue of B · I), with
    the group's second moment C and the mean B of the others'. Each second moment is divided by its
    trace first, so every group counts the same. The damping keeps directions out that the others
    do not use but the group hardly uses either.

    Returns:
        Orthonormal columns: the first j span the first j eigenvectors, for every j. And the
        eigenvalues, largest first: the ratio of the two along each eigenvector.

    Raises:
        ValueError: a group without any vector but zero.

    Reference: Abid et al., Exploring patterns enriched in a dataset with contrastive principal
        component analysis, 2018, doi:10.1038/s41467-018-04608-8. They take the difference of the
        covariances; the generalised eigenvectors need no weight between them.
    """
    first, second = _normalised(own), _normalised(others).mean(dim=-3)
    d_model = second.shape[-1]
    floor = damping / d_model * torch.eye(d_model, dtype=second.dtype, device=second.device)
    root = torch.linalg.cholesky(second + floor)
    half = torch.linalg.solve_triangular(root, first, upper=False)
    inner = torch.linalg.solve_triangular(root, half.mT, upper=False)
    values, vectors = _largest((inner + inner.mT) / 2, count)
    return orthonormal(torch.linalg.solve_triangular(root.mT, vectors, upper=True)), values


def top_directions(
    moment: Float[Tensor, "*batch d_model d_model"], count: int
) -> Float[Tensor, "*batch d_model count"]:
    """The first singular directions of the vectors with this second moment."""
    return orthonormal(_largest(moment, count)[1])


def orthonormal(
    vectors: Float[Tensor, "*batch d_model count"],
) -> Float[Tensor, "*batch d_model count"]:
    """Orthonormal columns: the first j span the first j vectors, for every j.

    In each, the entry largest in size is positive.
    """
    columns = torch.linalg.qr(vectors).Q
    flat = columns.reshape(-1, *columns.shape[-2:])
    return torch.stack([one * signs(one) for one in flat]).view(columns.shape)


def _largest(
    matrices: Float[Tensor, "*batch d d"], count: int
) -> tuple[Float[Tensor, "*batch count"], Float[Tensor, "*batch d count"]]:
    """The largest eigenvalues of symmetric matrices, falling, and their eigenvectors."""
    batch, d = matrices.shape[:-2], matrices.shape[-1]
    values, vectors = eigh_or_again(matrices.reshape(-1, d, d))
    return (
        values.flip(-1)[:, :count].reshape(*batch, count),
        vectors.flip(-1)[..., :count].reshape(*batch, d, count),
    )


def _normalised(moments: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    traces = moments.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    if not (traces > 0).all():
        raise ValueError(
            "A group has no vector but zero, so nothing is special to it; "
            "leave out the sites that write nothing."
        )
    return moments / traces[..., None, None]
