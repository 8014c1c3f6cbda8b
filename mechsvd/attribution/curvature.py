"""The curvature of a function at a point: exact Hessian-vector products, the whole Hessian, and its eigenpairs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.engine.batches import progress_bar, run_batches
from mechsvd.engine.memory import free_bytes
from mechsvd.linalg.eigenpairs import BLOCK, Eigenpairs, capacity, dense_eigenpairs, lanczos
from mechsvd.linalg.subspace import widest

DENSE = 2048  # entries up to which the whole Hessian is made
VECTOR_ENTRIES = 4_000_000  # of all vectors whose products share a pass: more leaves the cache and takes fresh pages


@dataclass(frozen=True)
class Function:
    """A scalar function f of a vector, by rows, and the point at which it is looked at.

    Attributes:
        values: of each row; differentiable.
        relative_to: None where f is `values`; else f is exp(values − relative_to), in float64, which float32 would overflow.
        size: rows that fit into one pass without gradients.
        halve: gives a smaller size when memory runs out; see `halving`.
    """

    values: Callable[[Float[Tensor, "row entry"]], Float[Tensor, " row"]]
    point: Float[Tensor, " entry"]
    size: int
    halve: Callable[[int], int]
    progress: bool | None = False
    relative_to: float | None = None

    def f(self, values: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Of `values`, f itself."""
        if self.relative_to is None:
            return values
        return (values.to(widest(values.device)) - self.relative_to).exp()

    @property
    def backward_size(self) -> int:
        """Rows that fit into one backward pass, which holds several times as much."""
        return max(1, min(self.size // 4, self.forward_size))

    @property
    def forward_size(self) -> int:
        """Rows that fit into one forward pass, each with a w of its own."""
        return max(1, min(self.size, VECTOR_ENTRIES // len(self.point)))

    @property
    def at_zero(self) -> float:
        """The function at w = 0."""
        return float(self.at(lambda rows: torch.zeros_like(self.point)[None], 1))

    def at(
        self, row: Callable[[Tensor], Float[Tensor, "row entry"]], count: int
    ) -> Float[Tensor, " row"]:
        """The function at so many points, which are made when they are needed from their numbers."""
        with torch.no_grad():
            found = run_batches(
                lambda rows: self.f(self.values(row(rows))),
                torch.arange(count),
                self.forward_size,
                self.halve,
                False,
            )
        return torch.cat(found)

    def rise(self, direction: Float[Tensor, " entry"], step: float) -> float:
        """How much f rises from one step behind the point to one before it: its slope, from values alone."""
        ends = self.at(
            lambda rows: self.point + (1.0 - 2.0 * rows.to(self.point))[:, None] * step * direction,
            2,
        )
        return float(ends[0] - ends[1])

    def path_gradient(self, steps: int) -> Float[Tensor, " entry"]:
        """The mean gradient on the way from 0 to the point, ∫₀¹ ∇f(tw) dt, by Gauss–Legendre quadrature.

        Reference: Sundararajan, Taly, Yan, Axiomatic attribution for deep networks, 2017, arXiv:1703.01365.
        """
        from numpy.polynomial.legendre import leggauss

        nodes, weights = (torch.from_numpy(each).to(self.point) / 2 for each in leggauss(steps))

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

        parts = run_batches(run, torch.arange(steps), self.backward_size, self.halve, False)
        return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class Curvature:
    """Value, gradient and Hessian of a function at its point; the gradient's graph is kept and serves all products.

    Forward-over-reverse products cost four times as much as these on a CPU, and need a forward pass each.

    Reference: Pearlmutter, Fast exact multiplication by the Hessian, 1994, doi:10.1162/neco.1994.6.1.147.
    """

    function: Function
    w: Float[Tensor, " entry"]
    value: Float[Tensor, ""]
    gradient: Float[Tensor, " entry"]

    def products(
        self, vectors: Float[Tensor, "entry n"], progress: bool | None = False
    ) -> Float[Tensor, "entry n"]:
        """Hessian times each column: by the whole Hessian where it was made, and else several in one backward pass."""
        if "hessian" in vars(self):
            return self.hessian @ vectors
        if not self.gradient.requires_grad:  # f is linear in w, or does not depend on it
            return torch.zeros_like(vectors)
        order, f, rows = torch.arange(vectors.shape[1]), self.function, vectors.mT
        parts = run_batches(
            lambda some: self._backward(rows[some]),
            order,
            f.backward_size,
            f.halve,
            progress,
            "Hessian",
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
                "The Hessian of f is not finite at w, so it has no eigenvectors; f must be smooth there."
            )
        return products


def backward(
    outputs: Float[Tensor, " output"], w: Float[Tensor, " entry"], rows: Float[Tensor, "n output"]
) -> Float[Tensor, "n entry"]:
    """The gradient with respect to w of each combination of the outputs, several in one backward pass; the graph is kept."""
    one = len(rows) == 1  # a batched backward pass costs more than a plain one
    (slopes,) = torch.autograd.grad(
        outputs,
        w,
        rows[0] if one else rows,
        retain_graph=True,
        is_grads_batched=not one,
        allow_unused=True,
    )
    return w.new_zeros(len(rows), len(w)) if slopes is None else slopes.view(len(rows), len(w))


def differentiate(function: Function) -> Curvature:
    """Value and gradient of a function at its point, ready for Hessian-vector products.

    Raises:
        ValueError: the value or the gradient is NaN or inf.
    """
    w = function.point.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function.f(function.values(w[None]))[0]
        gradient = torch.zeros_like(w)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, w, create_graph=True, materialize_grads=True)
    for what, found in (("f is", value), ("The gradient of f is", gradient)):
        if not found.isfinite().all():
            raise ValueError(
                f"{what} not finite at w, so nothing can be attributed; a model in half precision may do in float32."
            )
    return Curvature(function, w, value.detach(), gradient)


def eigenpairs(
    curvature: Curvature, pairs: int, *, tolerance: float, max_products: int, seed: int
) -> Eigenpairs:
    """The Hessian's eigenpairs largest in size: from the whole Hessian where w is short, and else by Lanczos.

    Raises:
        MemoryError: Lanczos's vectors do not fit.
    """
    entries = len(curvature.w)
    if entries <= max(DENSE, capacity(pairs)):
        return dense_eigenpairs(curvature.hessian, pairs)
    needed, free = (
        capacity(pairs) * entries * curvature.w.element_size(),
        free_bytes(curvature.w.device),
    )
    if needed > free:
        raise MemoryError(
            f"{pairs} eigenpairs of {entries:,} entries need {capacity(pairs)} vectors, {needed / 2**30:,.1f} GiB, but "
            f"{free / 2**30:,.1f} GiB are free; choose fewer weights by a narrower pattern, or fewer `pairs`."
        )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(entries, BLOCK, generator=generator, dtype=torch.float64).to(curvature.w)
    with progress_bar(max_products, "Hessian, at most", curvature.function.progress) as bar:

        def products(vectors: Tensor) -> Tensor:
            bar.update(vectors.shape[1])
            return curvature.products(vectors)

        return lanczos(products, start, pairs, tolerance=tolerance, max_products=max_products)
