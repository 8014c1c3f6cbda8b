"""Eigenpairs of a symmetric matrix, given whole or by its products with vectors.

Tensors only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.linalg.subspace import at_least_single, signs, widest
from mechsvd.linalg.svd import eigh_or_again

Products = Callable[[Float[Tensor, "entry n"]], Float[Tensor, "entry n"]]
PROBE = 4  # random blocks that look for further copies of the eigenvalues
BLOCK = 4  # vectors per step: they share a pass, and are few enough for the subspace to grow well


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenvectors as columns, largest eigenvalue in size first.

    In each, the entry largest in size is positive.

    Attributes:
        products: number of products with a vector that it took.
    """

    values: Float[Tensor, " pair"]
    vectors: Float[Tensor, "entry pair"]
    products: int


def dense_eigenpairs(matrix: Float[Tensor, "entry entry"], pairs: int) -> Eigenpairs:
    """The eigenpairs largest in size of a matrix, made symmetric first, in float64."""
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
    """The eigenpairs largest in size, positive or negative, by block Lanczos.

    It is fully reorthogonalised, with thick restart. Every new block is made orthogonal to all
    earlier ones, so no eigenvalue returns as a ghost. When the subspace is full, it restarts from
    the best Ritz vectors. It stops when each residual ‖Hu − λu‖ is at most
    `tolerance`·|λ|, or as small as rounding allows.

    If many directions share an eigenvalue, a block sees only one of them per vector. So random
    blocks are added until they bring no new eigenvalue among the largest, or until the products
    are spent.

    Args:
        start: random vectors; their number is the block size.
        max_products: at least one per pair is used.

    Reference: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
    2000, doi:10.1137/S0895479898334605.
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


def ritz_pairs(products: Products, start: Float[Tensor, "entry block"], pairs: int) -> Eigenpairs:
    """All Ritz pairs of the Krylov space that grows from some vectors, by block Lanczos.

    The space spans the start, the matrix times the start, and so on. It is fully reorthogonalised
    and never restarts, so it holds the start: the parts of the start along all Ritz vectors add up
    to the start. The matrix is diagonal on the space, also where a pair has not converged. The
    vectors are in double precision, whatever the precision of the products.

    Args:
        start: columns that are not zero. One that depends on the others is left out.
        pairs: dimension of the space, at least that of the start.

    Returns:
        The pairs, largest in size first. They are fewer if the matrix maps the space to itself;
        then all have converged.

    Reference: Golub and Van Loan, Matrix Computations, 4th ed., section 10.3.
    """
    wide = widest(start.device)
    following = _independent(start).mT
    block, entries = following.shape
    size = min(max(pairs, block), entries)
    rows = torch.empty(size, entries, dtype=wide, device=start.device)
    space = _Krylov(rows, block, start.dtype)
    while space.size < size:
        following, coupling = space.extend(
            following[: size - space.size], lambda v: products(v.to(start.dtype)).to(wide)
        )
        if not coupling.any():
            break
    values, vectors = space.ritz()
    return _largest(values, space.combine(vectors).mT, space.size, space.size)


def _independent(vectors: Float[Tensor, "entry n"]) -> Float[Tensor, "entry rank"]:
    """Orthonormal columns that span the same, in double precision."""
    wide = vectors.to(widest(vectors.device))
    basis, triangle = torch.linalg.qr(wide / wide.norm(dim=0))
    return basis[:, triangle.diagonal().abs() > 100 * torch.finfo(vectors.dtype).eps]


def capacity(pairs: int, block: int = BLOCK) -> int:
    """The most vectors that Lanczos holds; a matrix with fewer rows is smaller itself."""
    return 4 * (pairs + block)


class _Krylov:
    """An orthonormal basis as rows, and the matrix in that basis.

    Args:
        dtype: of the products, if it is another one than that of the rows.
    """

    def __init__(
        self,
        rows: Float[Tensor, "capacity entry"],
        block: int,
        dtype: torch.dtype | None = None,
    ):
        self.rows, self.block, self.size = rows, block, 0
        self.eps = torch.finfo(dtype or rows.dtype).eps
        self.matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        # from this row on, the next block's product has parts along the rows; before, only rounding
        self.coupled = 0
        # not a seed that the start is likely to come from
        self.generator = torch.Generator().manual_seed(0x5EED)

    def extend(self, following: Tensor, products: Products) -> tuple[Tensor, Tensor]:
        """Add a block; return the next one, and the triangle that couples the two."""
        first, self.size = self.size, self.size + len(following)
        self.rows[first : self.size] = following
        basis = self.rows[: self.size]
        rest = products(following.mT).mT
        inside = torch.zeros(len(following), self.size, dtype=rest.dtype, device=rest.device)
        for start in (self.coupled, 0):  # along its neighbours, then again along everything
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
            self.eps,
        )
        spent = sizes <= 100 * eps * scale
        if spent.any():  # products inside the space, up to rounding: random vectors replace them
            following[:, spent.to(following.device)] = self.random(int(spent.sum())).to(following)
            coupling[spent] = 0
        # a remainder this small may be mostly rounding noise, which points anywhere
        if (sizes <= eps**0.5 * scale).any():
            following = self.outside(following)
        return following.mT, coupling

    def random_block(self) -> Float[Tensor, "block entry"]:
        """Random directions outside the space."""
        return self.outside(self.random(self.block).to(self.rows)).mT

    def random(self, count: int) -> Float[Tensor, "entry count"]:
        """Random vectors, the same in every run."""
        return torch.randn(self.rows.shape[1], count, generator=self.generator, dtype=torch.float64)

    def outside(self, vectors: Float[Tensor, "entry n"]) -> Float[Tensor, "entry n"]:
        """Orthonormal vectors that span the part of `vectors` outside the space."""
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
    """By falling size; of two of equal size, the positive one first."""
    falling = values.argsort(descending=True)
    return falling[values[falling].abs().argsort(descending=True, stable=True)]


def _largest(values: Tensor, vectors: Tensor, pairs: int, products: int) -> Eigenpairs:
    order = _by_size(values)[:pairs]
    columns = vectors[:, order.to(vectors.device)]
    return Eigenpairs(
        values[order], (columns * signs(columns)).to(at_least_single(columns.dtype)), products
    )
