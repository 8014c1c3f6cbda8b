"""Balanced directions: those that are both written and read.

Tensors only.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.linalg.contrasts import orthonormal
from mechsvd.linalg.svd import eigh_or_again

UNREAD = 1e-12  # of the largest Hankel singular value; below it a mode is not read


def balanced_basis(
    directions: Float[Tensor, "d_model rank"],
    sizes: Float[Tensor, " rank"],
    reads: Float[Tensor, "d_model d_model"],
    side: str = "write",
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, " rank"]]:
    """Order directions by how much is both written and read along them.

    With the second moment W = V diag(s²) Vᵀ of the writes and R of the reads, the Hankel singular
    values are the roots of the eigenvalues of W R. Balanced truncation has two sets of modes: the
    eigenvectors of W R are written, and those of R W are read. Neither are orthogonal; here they
    are made so one after the other, so that the first k span the first k modes for every k.

    Args:
        directions, sizes: V and s.
        reads: R.
        side: "write" or "read": which modes. A mode that is not read at all has a written side
            only.

    Returns:
        Orthonormal columns, and the Hankel singular values, largest first.

    Raises:
        ValueError: another side.

    Reference: Moore, Principal component analysis in linear systems: controllability,
        observability, and model reduction, IEEE Trans. Automat. Contr. 26 (1981).
    """
    if side not in ("read", "write"):
        raise ValueError(f"`side` is {side!r:.40}, but must be 'write' or 'read'.")
    root, moment = directions.double() * sizes.double(), reads.double()
    inner = root.mT @ moment @ root
    squares, vectors = eigh_or_again(((inner + inner.mT) / 2)[None])
    hankel = squares[0].flip(0).clamp(min=0).sqrt()
    written = root @ vectors[0].flip(-1)
    is_read = hankel > UNREAD * hankel[0]
    modes = torch.where(is_read, moment @ written, written) if side == "read" else written
    # of equal length, so that small ones are as exact as large ones
    lengths = modes.norm(dim=0)
    return orthonormal(modes / torch.where(lengths > 0, lengths, 1.0)), hankel
