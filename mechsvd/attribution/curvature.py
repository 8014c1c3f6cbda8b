"""Curvature of a function at a point: Hessian-vector products, the Hessian, eigenpairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.engine.batches import independent, run_batches
from mechsvd.engine.memory import free_bytes
from mechsvd.engine.progress import progress_bar
from mechsvd.linalg.eigenpairs import (
    BLOCK,
    Eigenpairs,
    Products,
    capacity,
    dense_eigenpairs,
    lanczos,
    ritz_pairs,
)
from mechsvd.linalg.subspace import widest

DENSE = 2048  # entries up to which the whole Hessian is computed,
WHOLE = 16  # if it takes no more than this many products per pair that is wanted
# Entries of all vectors in one pass; more leave the cache and need fresh memory pages.
VECTOR_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Function:
    """A scalar function f of a vector w, and the point of interest.

    Attributes:
        values: one value per row; differentiable.
        point: the w at which f is differentiated.
        size: rows that fit into one pass without gradients.
        halve: gives a smaller size when memory runs out; see `halving`.
        relative_to: if None, f is `values`. Otherwise f is exp(values − relative_to).
            This is in float64, because float32 would overflow.
    """

    values: Callable[[Float[Tensor, "row entry"]], Float[Tensor, " row"]]
    point: Float[Tensor, " entry"]
    size: int
    halve: Callable[[int], int]
    progress: bool | None = False
    relative_to: float | None = None

    def f(self, values: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Convert `values` to f."""
        if self.relative_to is None:
            return values
        return (values.to(widest(values.device)) - self.relative_to).exp()

    @property
    def backward_size(self) -> int:
        """Rows that fit into one backward pass, which needs several times the memory."""
        return max(1, min(self.size // 4, self.forward_size))

    @property
    def forward_size(self) -> int:
        """Rows that fit into one forward pass, with one w per row."""
        return max(1, min(self.size, VECTOR_ENTRIES // len(self.point)))

    @property
    def at_zero(self) -> float:
        """Value of f at w = 0."""
        return float(self.at(lambda rows: torch.zeros_like(self.point)[None], 1))

    def at(
        self,
        row: Callable[[Tensor], Float[Tensor, "row entry"]],
        count: int,
        progress: bool | None = False,
        what: str = "points",
    ) -> Float[Tensor, " row"]:
        """Values of f at `count` points; `row` makes points from their numbers when needed."""
        with torch.no_grad():
            batches = run_batches(
                lambda rows: self.f(self.values(row(rows))),
                torch.arange(count),
                self.forward_size,
                self.halve,
                progress,
                what,
                restored=independent,
            )
        return torch.cat(batches)

    def rise(self, direction: Float[Tensor, " entry"], step: float) -> float:
        """Rise of f from `point - step * direction` to `point + step * direction`."""
        ends = self.at(
            lambda rows: self.point + (1.0 - 2.0 * rows.to(self.point))[:, None] * step * direction,
            2,
        )
        return float(ends[0] - ends[1])

    def path_gradient(self, steps: int) -> Float[Tensor, " entry"]:
        """Mean gradient on the straight path from 0 to the point, ∫₀¹ ∇f(tw) dt.

        The integral is by Gauss–Legendre quadrature.

        Reference: Sundararajan, Taly, Yan, Axiomatic attribution for deep networks, 2017,
            arXiv:1703.01365.
        """
        from numpy.polynomial.legendre import leggauss

        nodes, weights = (torch.from_numpy(x).to(self.point) / 2 for x in leggauss(steps))

        def run(rows: Tensor) -> Tensor:
            points = ((nodes + 0.5)[rows, None] * self.point).requires_grad_()
            with torch.enable_grad():
                values = self.values(points)
            if not values.requires_grad:
                return torch.zeros_like(self.point, dtype=widest(points.device))
            (slopes,) = torch.autograd.grad(values.sum(), points, materialize_grads=True)
            wide = slopes.to(widest(points.device))
            outer = (
                torch.ones_like(values) if self.relative_to is None else self.f(values.detach())
            )  # df/dvalues
            return (weights[rows] * outer).to(wide) @ wide

        parts = run_batches(
            run,
            torch.arange(steps),
            self.backward_size,
            self.halve,
            False,
            restored=independent,
        )
        return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class Curvature:
    """Value, gradient and Hessian of a function at its point.

    The gradient's graph is kept and serves all products.
    Forward-over-reverse products cost four times as much on a CPU.
    They also need one forward pass per product.

    Reference: Pearlmutter, Fast exact multiplication by the Hessian, 1994,
        doi:10.1162/neco.1994.6.1.147.
    """

    function: Function
    w: Float[Tensor, " entry"]
    value: Float[Tensor, ""]
    gradient: Float[Tensor, " entry"]

    def products(
        self, vectors: Float[Tensor, "entry n"], progress: bool | None = False
    ) -> Float[Tensor, "entry n"]:
        """Multiply the Hessian by each column.

        This uses the whole Hessian if it was computed.
        Otherwise one backward pass computes several products.
        """
        if "hessian" in vars(self):
            return self.hessian @ vectors
        if not self.gradient.requires_grad:  # f is linear in w, or does not depend on it
            return torch.zeros_like(vectors)
        order, f, rows = torch.arange(vectors.shape[1]), self.function, vectors.mT
        parts = run_batches(
            lambda chosen: self._backward(rows[chosen]),
            order,
            f.backward_size,
            f.halve,
            progress,
            "Hessian",
            restored=independent,
        )
        return torch.cat(parts).mT

    @cached_property
    def hessian(self) -> Float[Tensor, "entry entry"]:
        """The whole Hessian; symmetric up to rounding."""
        return self.products(
            torch.eye(len(self.w), dtype=self.w.dtype, device=self.w.device), self.function.progress
        )

    def _backward(self, rows: Float[Tensor, "n entry"]) -> Float[Tensor, "n entry"]:
        products = backward(self.gradient, self.w, rows)
        if not products.sum().isfinite():
            raise ValueError(
                "The Hessian of f is not finite at w, so it has no eigenvectors; "
                "f must be smooth there."
            )
        return products


def backward(
    outputs: Float[Tensor, " output"], w: Float[Tensor, " entry"], rows: Float[Tensor, "n output"]
) -> Float[Tensor, "n entry"]:
    """Gradient with respect to w of each linear combination of the outputs.

    One backward pass computes all rows. The graph is kept.
    """
    is_single = len(rows) == 1  # a batched backward pass costs more than a plain one
    (slopes,) = torch.autograd.grad(
        outputs,
        w,
        rows[0] if is_single else rows,
        retain_graph=True,
        is_grads_batched=not is_single,
        allow_unused=True,
    )
    return w.new_zeros(len(rows), len(w)) if slopes is None else slopes.view(len(rows), len(w))


def differentiate(function: Function) -> Curvature:
    """Compute value and gradient at the point, ready for Hessian-vector products.

    Raises:
        ValueError: the value or the gradient is NaN or inf.
    """
    w = function.point.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function.f(function.values(w[None]))[0]
        gradient = torch.zeros_like(w)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, w, create_graph=True, materialize_grads=True)
    for what, tensor in (("f is", value), ("The gradient of f is", gradient)):
        if not tensor.isfinite().all():
            raise ValueError(
                f"{what} not finite at w, so nothing can be attributed; "
                "if the model is in half precision, try float32."
            )
    return Curvature(function, w, value.detach(), gradient)


def takes_whole(entries: int, pairs: int) -> bool:
    """Whether the whole Hessian, one product per entry, is cheaper than Lanczos.

    Lanczos took 6 to 13 products per pair where it was measured. The whole one is exact, so it may
    cost a little more.
    """
    return entries <= capacity(pairs) or entries <= min(DENSE, WHOLE * pairs)


def eigenpairs(
    curvature: Curvature, pairs: int, *, tolerance: float, max_products: int, seed: int
) -> Eigenpairs:
    """Compute the Hessian's eigenpairs with the largest |eigenvalue|.

    By cost: from the whole Hessian, or by Lanczos; see `takes_whole`.

    Raises:
        MemoryError: the vectors of Lanczos do not fit.
    """
    entries = len(curvature.w)
    if takes_whole(entries, pairs):
        return dense_eigenpairs(curvature.hessian, pairs)
    _require_memory(curvature, pairs, capacity(pairs), curvature.w.dtype)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(entries, BLOCK, generator=generator, dtype=torch.float64).to(curvature.w)
    with _counted(curvature, max_products) as products:
        return lanczos(products, start, pairs, tolerance=tolerance, max_products=max_products)


def pairs_from(curvature: Curvature, start: Float[Tensor, "entry start"], pairs: int) -> Eigenpairs:
    """Compute the Hessian's Ritz pairs in the Krylov space of some vectors; see `ritz_pairs`.

    Raises:
        MemoryError: the vectors of Lanczos do not fit.
    """
    _require_memory(curvature, pairs, pairs, widest(curvature.w.device))
    with _counted(curvature, pairs) as products:
        return ritz_pairs(products, start, pairs)


def _require_memory(curvature: Curvature, pairs: int, vectors: int, dtype: torch.dtype) -> None:
    """Refuse Lanczos vectors that do not fit into memory."""
    entries, free = len(curvature.w), free_bytes(curvature.w.device)
    needed = vectors * entries * dtype.itemsize
    if needed > free:
        raise MemoryError(
            f"{pairs} eigenpairs of {entries:,} entries need {vectors} vectors, "
            f"{needed / 2**30:,.1f} GiB, but {free / 2**30:,.1f} GiB are free; "
            "choose fewer weights by a narrower pattern, or fewer `pairs`."
        )


@contextmanager
def _counted(curvature: Curvature, most: int) -> Iterator[Products]:
    """The products with the Hessian, behind a progress bar."""
    with progress_bar(most, "Hessian, at most", curvature.function.progress) as bar:

        def products(vectors: Tensor) -> Tensor:
            bar.update(vectors.shape[1])
            return curvature.products(vectors)

        yield products
