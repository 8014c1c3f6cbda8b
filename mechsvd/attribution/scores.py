"""What the components of a vector w are worth to a function of it: estimates beside what is measured, in one table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsvd.attribution.curvature import Curvature
from mechsvd.attribution.objective import Part, require_parts
from mechsvd.fields import require_between, require_declared, require_finite
from mechsvd.linalg.subspace import require_orthonormal, rounding
from mechsvd.results import Provenance, Result, result

HESSIAN, RANDOM = "Hessian", "random"  # names of the bases that are always there
_IN_UNITS = (
    "eigenvalues", "residuals", "slopes", "integrated", "measured", "value", "baseline", "path_error",
)  # fmt: skip


@result
class Attribution(Result):
    """How a function f of a vector w is made up of components: the parts of w along orthonormal directions u.

    The directions are eigenvectors of the Hessian of f at w, by falling size of the eigenvalue; in `.bases` there are others.

    Attributes:
        objective: what f is.
        over: what w is, in a line.
        parts: what the entries of w are, in their order: name and shape of each piece.
        vectors: the directions u as columns.
        eigenvalues: λ, or uᵀHu where u is no eigenvector.
        residuals: ‖Hu − λu‖, by an exact product, rounding included: λ is no further than this from an eigenvalue.
        projections: u·w, how much of w each direction holds.
        slopes: u·∇f.
        integrated: (u·w) ∫₀¹ u·∇f(tw) dt, the path integral from 0 (integrated gradients); NaN where f(0) is not finite.
        measured: f(w) − f(w − u uᵀw), what removing the component costs.
        value, baseline: f(w) and f(0).
        path_error: by how much the path integral of the whole gradient misses f(w) − f(0): its quadrature's error.
        noise_floor: how far f(w) moves for no reason; measured scores are good to about this.
        tolerance: a pair is converged when its residual is at most this times |λ|.
        products: Hessian-vector products that finding the directions took.
        beside: the same function's components in other bases, by name: those that were given, and random directions.
    """

    objective: str
    over: str
    parts: tuple[Part, ...]
    vectors: Float[Tensor, "entry component"]
    eigenvalues: Float[Tensor, " component"]
    residuals: Float[Tensor, " component"]
    projections: Float[Tensor, " component"]
    slopes: Float[Tensor, " component"]
    integrated: Float[Tensor, " component"]
    measured: Float[Tensor, " component"]
    value: float
    baseline: float
    path_error: float = 0.0
    noise_floor: float = 0.0
    tolerance: float = 1e-4
    products: int = 0
    beside: "tuple[tuple[str, Attribution], ...]" = ()
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_parts(self.parts, len(self.vectors))
        for name, other in self.beside:
            if len(other.vectors) != len(self.vectors):
                raise ValueError(
                    f"`beside` holds directions {name!r:.40} of {len(other.vectors)} entries, but w has {len(self.vectors)}."
                )

    def _require_values(self) -> None:
        require_finite(
            self, "vectors", "eigenvalues", "residuals", "projections", "slopes", "value"
        )
        # the others are NaN or inf where f is, at w = 0 or without a component
        require_between(
            self, ["residuals", "path_error", "noise_floor", "tolerance", "products"], 0
        )
        if len(self):
            require_orthonormal(self.vectors, rounding(self.vectors.dtype), "`vectors`")

    def __len__(self) -> int:
        """Number of components."""
        return len(self.measured)

    @property
    def bases(self) -> "dict[str, Attribution]":
        """This attribution and those in other bases, by name, the Hessian's first: as `figures.accumulated_scores` takes them."""
        return {HESSIAN: self, **dict(self.beside)}

    @property
    def control(self) -> "Attribution":
        """The same for random directions.

        Raises:
            KeyError: this is one of the other bases itself.
        """
        return dict(self.beside)[RANDOM]

    @property
    def linear(self) -> Float[Tensor, " component"]:
        """First-order estimate of `measured`: (u·w)(u·∇f). Over a complete basis they sum to w·∇f."""
        return self.projections * self.slopes

    @property
    def quadratic(self) -> Float[Tensor, " component"]:
        """Second-order estimate of `measured`: linear − ½λ(u·w)²."""
        return self.linear - self.eigenvalues * self.projections.square() / 2

    @property
    def share(self) -> Float[Tensor, " component"]:
        """Each measured score as a share of f(w) − f(0); NaN where that is zero or unknown."""
        whole = self.value - self.baseline
        return self.measured / (whole if whole and math.isfinite(whole) else torch.nan)

    @property
    def converged(self) -> Bool[Tensor, " component"]:
        """Whether each direction is an eigenvector to within the tolerance; eigenvalues near 0 drown in rounding, and are not."""
        return self.residuals <= self.tolerance * self.eigenvalues.abs()

    @property
    def is_noise(self) -> Bool[Tensor, " component"]:
        """Which measured scores are no larger than the numerical noise."""
        return self.measured.abs() <= self.noise_floor

    def error(self, estimate: str) -> Float[Tensor, " component"]:
        """By how much an estimate ("linear", "quadratic" or "integrated") misses the measured score, relative to its size."""
        if estimate not in ("linear", "quadratic", "integrated"):
            raise ValueError(
                f"`estimate` is {estimate!r}, but must be 'linear', 'quadratic' or 'integrated'."
            )
        missed = (getattr(self, estimate) - self.measured).abs()
        return missed / torch.where(self.measured != 0, self.measured.abs(), torch.nan)

    def part(self, name: str) -> Float[Tensor, "component ..."]:
        """One piece of every direction, the first axis being the component, such as the change of one weight matrix.

        Raises:
            KeyError: w has no such piece.
        """
        sizes = [torch.Size(shape).numel() for _, shape in self.parts]
        names = [name for name, _ in self.parts]
        if name not in names:
            raise KeyError(
                f"w has no part {name!r}: it has {names[:8]}{' and more' if len(names) > 8 else ''}."
            )
        place = names.index(name)
        return self.vectors.split(sizes)[place].T.reshape(len(self), *self.parts[place][1])

    def to_pandas(self) -> Any:
        """One row a component: eigenvalue, projection, slope, linear, quadratic, integrated, measured, share, residual, …

        The last columns say whether the pair converged, whether the measured score is noise, by how much (relatively) each
        estimate misses it, and which of linear and quadratic is nearer.
        """
        import pandas as pd

        columns: dict[str, Any] = {
            "eigenvalue": self.eigenvalues,
            "projection": self.projections,
            "slope": self.slopes,
            "linear": self.linear,
            "quadratic": self.quadratic,
            "integrated": self.integrated,
            "measured": self.measured,
            "share": self.share,
            "residual": self.residuals,
            "converged": self.converged,
            "is_noise": self.is_noise,
            "linear_error": self.error("linear"),
            "quadratic_error": self.error("quadratic"),
        }
        table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        linear = (table.linear_error <= table.quadratic_error).map(
            {True: "linear", False: "quadratic"}
        )
        return table.assign(nearer=linear.where(table.quadratic_error.notna()))

    def __repr__(self) -> str:
        top = ", ".join(f"{value:.3g}" for value in self.eigenvalues[:4].tolist()) + (
            ", …" if len(self) > 4 else ""
        )
        near = {
            name: int((self.error(name) <= 0.1)[~self.is_noise].sum())
            for name in ("linear", "quadratic")
        }
        return (
            f"Attribution of the {self.objective} {self.value:.4g} (at w = 0: {self.baseline:.3g}) to {len(self)} components of "
            f"{len(self.vectors):,} entries\n"
            f"  eigenvalues {top}; {int(self.converged.sum())} converged; of {int((~self.is_noise).sum())} scores above the "
            f"noise, {near['linear']} within 10 % of the linear estimate, {near['quadratic']} of the quadratic\n"
            f"  on {self._origin('a function')}"
        )


@dataclass(frozen=True)
class Scores:
    """The scores of the components of w along some directions, in the units of f; see `Attribution`."""

    vectors: Float[Tensor, "entry component"]
    eigenvalues: Float[Tensor, " component"]
    residuals: Float[Tensor, " component"]
    projections: Float[Tensor, " component"]
    slopes: Float[Tensor, " component"]
    integrated: Float[Tensor, " component"]
    measured: Float[Tensor, " component"]
    value: float
    baseline: float
    path_error: float


def score_components(
    curvature: Curvature,
    vectors: Float[Tensor, "entry component"],
    path: Float[Tensor, " entry"],
    baseline: float,
) -> Scores:
    """All scores of some directions, in float64 from what the model's dtype gave.

    Args:
        path: the mean gradient on the way from 0.
        baseline: f(0).
    """
    w, f = curvature.w.detach(), curvature.function
    point, slope, path = (each.detach().cpu().double() for each in (w, curvature.gradient, path))
    product, exact = curvature.products(vectors).cpu().double(), vectors.cpu().double()
    eigenvalues, projections = (exact * product).sum(dim=0), point @ exact
    parts = vectors * projections.to(
        w
    )  # from projections in float64: f is steep along some directions
    some = torch.cat(
        [torch.zeros_like(parts[:, :1]), parts], dim=1
    )  # first nothing is removed: w itself, in the same batch
    values = f.at(lambda rows: w - some[:, rows].mT, some.shape[1]).cpu().double()
    value, removed = float(values[0]), values[1:]
    return Scores(
        vectors=vectors.cpu(),
        eigenvalues=eigenvalues,
        residuals=(product - exact * eigenvalues).norm(dim=0),
        projections=projections,
        slopes=slope @ exact,
        integrated=projections * (path @ exact) * (1 if math.isfinite(baseline) else torch.nan),
        measured=value - removed,
        value=value,
        baseline=baseline,
        path_error=abs(float(point @ path) - (value - baseline)),
    )


def attribution_of(
    scores: Mapping[str, Scores], unit: float, products: int, **header: Any
) -> Attribution:
    """Make the attribution of the Hessian's scores, and of those in other bases beside it.

    Args:
        scores: by the name of the basis, the Hessian's among them.
        unit: of f, by which all scores are multiplied.
        products: that finding the Hessian's directions took.
        header: what is known about f: objective, over, parts, tolerance, noise_floor, source.
    """

    def attribution(scores: Scores, **more: Any) -> Attribution:
        columns = {field.name: getattr(scores, field.name) for field in fields(scores)}
        return Attribution(
            **columns | {name: columns[name] * unit for name in _IN_UNITS}, **header, **more
        )

    others = tuple((name, attribution(each)) for name, each in scores.items() if name != HESSIAN)
    return attribution(scores[HESSIAN], products=products, beside=others)
