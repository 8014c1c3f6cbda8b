"""Eigenpairs of a symmetric matrix that is known whole, or only by its products with vectors. Tensors only."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.linalg.decomposition import eigh_or_again
from mechsvd.linalg.subspace import at_least_single, signs

Products = Callable[[Float[Tensor, "entry n"]], Float[Tensor, "entry n"]]
PROBE = 4  # blocks that look for copies of what was found
BLOCK = 4  # vectors a step: their products share a pass, and few enough that the subspace grows where it should


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenvectors as columns, by falling size of the eigenvalue; the entry largest in size is positive in each.

    Attributes:
        products: how many products with a vector it took.
    """

    values: Float[Tensor, " pair"]
    vectors: Float[Tensor, "entry pair"]
    products: int


def dense_eigenpairs(matrix: Float[Tensor, "entry entry"], pairs: int) -> Eigenpairs:
    """The eigenpairs largest in size of a matrix, which is made symmetric first; solved in float64."""
    exact = matrix.cpu().double()
    values, vectors = eigh_or_again(((exact + exact.T) / 2)[None])
    return _largest(values[0], vectors[0].to(matrix), pairs, len(matrix))


def lanczos(
    products: Products,
    start: Float[Tensor, "entry block"],
    pairs: int,
    *,
    tolerance: float,
    max_products: int,
) -> Eigenpairs:
    """The eigenpairs largest in size, from both ends of the spectrum: block Lanczos, fully reorthogonalised, with thick restart.

    Every new block is made orthogonal to all before it, so no eigenvalue comes back as a ghost; when the subspace is full, it
    restarts from the best Ritz vectors. It is done when each residual ‖Hu − λu‖ is at most `tolerance`·|λ|, or what rounding
    allows. Of an eigenvalue that many directions share, a block sees one direction for each of its vectors: so random blocks are
    added, until one brings no new eigenvalue among the largest; or the products are spent.

    Args:
        start: random vectors; their number is the size of a block.
        max_products: at least one for each pair is used.

    Reference: Wu, Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000,
    doi:10.1137/S0895479898334605.
    """
    entries, block = start.shape
    space = _Krylov(start.new_empty(capacity(pairs, block), entries), block)
    following, used, settled, probed = torch.linalg.qr(start).Q.mT, 0, None, 0
    while True:
        following, coupling = space.extend(following, products)
        used += block
        values, vectors = space.ritz()
        residuals = (coupling @ vectors[space.size - block : space.size]).norm(dim=0)[:pairs]
        floor = 10 * torch.finfo(start.dtype).eps * values[0].abs()
        allowed = (tolerance * values[:pairs].abs()).clamp(min=floor)
        done = space.size >= pairs and bool((residuals <= allowed).all()) and used >= probed
        is_new = settled is None or bool(((values[:pairs] - settled).abs() > allowed).any())
        if (done and not is_new) or (used + block > max_products and space.size >= pairs):
            return _largest(values[:pairs], space.combine(vectors[:, :pairs]).mT, pairs, used)
        if done:
            settled, probed, following = values[:pairs], used + PROBE * block, space.random_block()
        if space.size + block > len(space.rows):
            space.restart(values, vectors, keep=2 * pairs)


def capacity(pairs: int, block: int = BLOCK) -> int:
    """Vectors that Lanczos holds at most; with fewer entries than that the matrix itself is smaller."""
    return 4 * (pairs + block)


class _Krylov:
    """An orthonormal basis as rows, and the matrix in it."""

    def __init__(self, rows: Float[Tensor, "capacity entry"], block: int):
        self.rows, self.block, self.size = rows, block, 0
        self.matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        self.coupled = 0  # the product of the next block has parts along the rows from here on, and elsewhere only rounding
        self.generator = torch.Generator().manual_seed(
            0x5EED
        )  # not the seed that the start may have come from

    def extend(self, following: Tensor, products: Products) -> tuple[Tensor, Tensor]:
        """Add a block; give the next one, and the triangle by which the product of this one reaches into it."""
        first, self.size = self.size, self.size + self.block
        self.rows[first : self.size] = following
        basis = self.rows[: self.size]
        rest = products(following.mT).mT
        inside = torch.zeros(self.block, self.size, dtype=rest.dtype, device=rest.device)
        for start in (self.coupled, 0):  # along its neighbours, then once more along everything
            part = rest @ basis[start:].mT
            rest = torch.addmm(rest, part, basis[start:], alpha=-1)
            inside[:, start:] += part
        self.matrix[first : self.size, : self.size] = inside.cpu().double()
        self.matrix[: self.size, first : self.size] = inside.mT.cpu().double()
        self.coupled = first
        return self._orthonormal(rest)

    def _orthonormal(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        following, coupling = torch.linalg.qr(rest.mT)
        coupling = coupling.cpu().double()
        sizes, scale, eps = (
            coupling.diagonal().abs(),
            self.matrix.abs().max(),
            torch.finfo(rest.dtype).eps,
        )
        spent = sizes <= 100 * eps * scale
        if (
            spent.any()
        ):  # some products stay inside, up to rounding: go on from random vectors in their place
            following[:, spent.to(following.device)] = self.random(int(spent.sum())).to(following)
            coupling[spent] = 0
        if (
            sizes <= eps**0.5 * scale
        ).any():  # what is left is small beside its rounding, which points anywhere
            following = self.outside(following)
        return following.mT, coupling

    def random_block(self) -> Float[Tensor, "block entry"]:
        """Random directions outside the space."""
        return self.outside(self.random(self.block).to(self.rows)).mT

    def random(self, count: int) -> Float[Tensor, "entry count"]:
        """Random vectors, the same ones in the same run."""
        return torch.randn(self.rows.shape[1], count, generator=self.generator, dtype=torch.float64)

    def outside(self, vectors: Float[Tensor, "entry n"]) -> Float[Tensor, "entry n"]:
        """Orthonormal vectors that span what of these lies outside the space."""
        basis = self.rows[: self.size]
        for _ in range(2):
            vectors = torch.linalg.qr(vectors - basis.mT @ (basis @ vectors)).Q
        return vectors

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenpairs of the matrix in the basis, by falling size."""
        small = self.matrix[: self.size, : self.size]
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        order = _by_size(values)
        return values[order], vectors[:, order]

    def combine(self, vectors: Float[Tensor, "size n"]) -> Float[Tensor, "n entry"]:
        """Combinations of the rows."""
        return vectors.mT.to(self.rows) @ self.rows[: self.size]

    def restart(self, values: Tensor, vectors: Tensor, keep: int) -> None:
        """Keep the best Ritz vectors only."""
        self.rows[:keep] = self.combine(vectors[:, :keep])
        self.matrix.zero_()
        self.matrix[:keep, :keep] = values[:keep].diag()
        self.size, self.coupled = keep, 0


def _by_size(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """By falling size; of two alike the positive one first."""
    falling = values.argsort(descending=True)
    return falling[values[falling].abs().argsort(descending=True, stable=True)]


def _largest(values: Tensor, vectors: Tensor, pairs: int, products: int) -> Eigenpairs:
    order = _by_size(values)[:pairs]
    chosen = vectors[:, order.to(vectors.device)]
    return Eigenpairs(
        values[order], (chosen * signs(chosen)).to(at_least_single(chosen.dtype)), products
    )
