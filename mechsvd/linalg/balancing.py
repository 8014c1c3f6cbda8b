"""Balanced directions: those that are both written and read.

Tensors only.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.linalg.contrasts import orthonormal
from mechsvd.linalg.svd import eigh_or_again


def balanced_basis(
    directions: Float[Tensor, "d_model rank"],
    sizes: Float[Tensor, " rank"],
    reads: Float[Tensor, "d_model d_model"],
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, " rank"]]:
    """Order the space of some writes by how much is both written and read.

    With the second moment W = V diag(s²) Vᵀ of the writes and R of the reads, the Hankel singular
    values are the roots of the eigenvalues of W R. Its eigenvectors are the directions of balanced
    truncation. They are not orthogonal; here they are made so, one after the other, so that the
    first k span the first k eigenvectors for every k.

    Args:
        directions, sizes: V and s.
        reads: R.

    Returns:
        Orthonormal columns, and the Hankel singular values, largest first.

    Reference: Moore, Principal component analysis in linear systems: controllability,
        observability, and model reduction, IEEE Trans. Automat. Contr. 26 (1981).
    """
    root = directions.double() * sizes.double()
    inner = root.mT @ reads.double() @ root
    squares, vectors = eigh_or_again(((inner + inner.mT) / 2)[None])
    modes = root @ vectors[0].flip(-1)
    # of equal length, so that small ones are as exact as large ones
    lengths = modes.norm(dim=0)
    basis = orthonormal(modes / torch.where(lengths > 0, lengths, 1.0))
    return basis, squares[0].flip(0).clamp(min=0).sqrt()
