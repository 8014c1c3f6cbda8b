"""Scores of directions of a vector w for a function of it: estimated and measured, in one table."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.attribution.curvature import Curvature
from mechsvd.attribution.directions import HESSIAN, RANDOM
from mechsvd.attribution.objective import Part, require_parts
from mechsvd.fields import require_between, require_declared, require_finite
from mechsvd.linalg.subspace import require_orthonormal, rounding
from mechsvd.results import Provenance, Result, result

ORDERS = ("eigenvalue", "projection", "measured")
Order = Literal["eigenvalue", "projection", "measured"]


@result
class Attribution(Result):
    """Scores of orthonormal directions u of a vector w for a function f.

    The directions are eigenvectors of the Hessian of f at w, or Ritz vectors, by falling
    |eigenvalue|. `.bases` also holds the scores in other bases.

    Attributes:
        objective: what f is.
        over: one line that says what w is.
        parts: name and shape of each piece of w, in order.
        vectors: the directions u as columns.
        eigenvalues: λ, or uᵀHu where u is no eigenvector.
        residuals: ‖Hu − λu‖ from an exact product, rounding included. An eigenvalue lies within
            this distance of λ.
        projections: u·w.
        slopes: u·∇f.
        integrated: (u·w) ∫₀¹ u·∇f(tw) dt, the path integral from 0 (integrated gradients); NaN
            where f(0) is not finite.
        measured: f(w) − f(w − u uᵀw), the cost of removing the direction from w.
        value, baseline: f(w) and f(0).
        path_error: |path integral of the whole gradient − (f(w) − f(0))|, the quadrature error.
        noise_floor: rounding noise of f(w); measured scores are exact up to about this.
        tolerance: a pair is converged if its residual is at most this times |λ|.
        products: Hessian-vector products used to find the directions.
        basis: where the directions come from: "largest", "from_w", "from_gradient" or "from_both"
            (see `hessian_attribution`), or "given".
        norm: ‖w‖; None in a file of an older version.
        beside: attributions of the same function in other bases, by name: the given bases and
            random directions.

    Example:
        >>> attribution.eigenvalues.shape, bool(attribution.converged.all())
        (torch.Size([4]), True)
    """

    objective: str
    over: str
    parts: tuple[Part, ...]
    vectors: Float[Tensor, "entry direction"]
    eigenvalues: Float[Tensor, " direction"]
    residuals: Float[Tensor, " direction"]
    projections: Float[Tensor, " direction"]
    slopes: Float[Tensor, " direction"]
    integrated: Float[Tensor, " direction"]
    measured: Float[Tensor, " direction"]
    value: float
    baseline: float
    path_error: float = 0.0
    noise_floor: float = 0.0
    tolerance: float = 1e-4
    products: int = 0
    basis: str = "given"
    norm: float | None = None
    beside: "tuple[tuple[str, Attribution], ...]" = ()
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_parts(self.parts, len(self.vectors))
        for name, other in self.beside:
            if len(other.vectors) != len(self.vectors):
                raise ValueError(
                    f"`beside` holds directions {name!r:.40} of {len(other.vectors)} entries, "
                    f"but w has {len(self.vectors)}."
                )

    def _require_values(self) -> None:
        require_finite(
            self, "vectors", "eigenvalues", "residuals", "projections", "slopes", "value"
        )
        # the other fields may hold NaN or inf: f may not be finite at w = 0 or without a direction
        require_between(
            self, ["residuals", "path_error", "noise_floor", "tolerance", "products", "norm"], 0
        )
        if len(self):
            require_orthonormal(self.vectors, rounding(self.vectors.dtype), "`vectors`")

    def __len__(self) -> int:
        """Number of directions."""
        return len(self.measured)

    @property
    def bases(self) -> "dict[str, Attribution]":
        """This attribution and those in other bases, by name, the Hessian's first.

        `figures.accumulated_scores` takes them.
        """
        return {HESSIAN: self, **dict(self.beside)}

    @property
    def control(self) -> "Attribution":
        """The attribution to random directions.

        Raises:
            KeyError: this attribution is itself in one of the other bases.
        """
        return dict(self.beside)[RANDOM]

    @property
    def linear(self) -> Float[Tensor, " direction"]:
        """First-order estimate of `measured`: (u·w)(u·∇f); a complete basis sums to w·∇f."""
        return self.projections * self.slopes

    @property
    def quadratic(self) -> Float[Tensor, " direction"]:
        """Second-order estimate of `measured`: linear − ½λ(u·w)²."""
        return self.linear - self.eigenvalues * self.projections.square() / 2

    @property
    def share(self) -> Float[Tensor, " direction"]:
        """Measured scores as shares of f(w) − f(0); NaN if that is zero or not finite."""
        whole = self.value - self.baseline
        return self.measured / (whole if whole and math.isfinite(whole) else torch.nan)

    @property
    def held(self) -> Float[Tensor, " direction"]:
        """Share of ‖w‖² that each direction holds, (u·w)² / ‖w‖².

        All directions of a complete basis hold 1 together, and so do those from w. NaN if w is 0,
        or ‖w‖ is unknown.
        """
        return self.projections.square() / ((self.norm or 0) ** 2 or torch.nan)

    @property
    def converged(self) -> Bool[Tensor, " direction"]:
        """Whether each direction is an eigenvector within the tolerance.

        Eigenvalues near 0 do not converge, because rounding hides them.
        """
        return self.residuals <= self.tolerance * self.eigenvalues.abs()

    @property
    def is_noise(self) -> Bool[Tensor, " direction"]:
        """Whether each measured score is within the noise floor."""
        return self.measured.abs() <= self.noise_floor

    def order(self, by: Order = "eigenvalue") -> Int[Tensor, " direction"]:
        """The numbers of the directions, the first in an order first.

        Args:
            by: "eigenvalue" is the order of the directions themselves; the Hessian's fall by
                |eigenvalue|. "projection" falls by |u·w|, and "measured" by the measured score,
                with undefined ones last.

        Raises:
            ValueError: there is no such order.
        """
        if by not in ORDERS:
            raise ValueError(f"`order` is {by!r:.40}, but must be one of {list(ORDERS)}.")
        if by == "eigenvalue":
            return torch.arange(len(self))
        keys = self.projections.abs() if by == "projection" else self.measured
        return keys.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)

    def error(self, estimate: str) -> Float[Tensor, " direction"]:
        """Relative error of an estimate, |estimate − measured| / |measured|.

        Args:
            estimate: "linear", "quadratic" or "integrated".
        """
        if estimate not in ("linear", "quadratic", "integrated"):
            raise ValueError(
                f"`estimate` is {estimate!r}, but must be 'linear', 'quadratic' or 'integrated'."
            )
        error = (getattr(self, estimate) - self.measured).abs()
        return error / torch.where(self.measured != 0, self.measured.abs(), torch.nan)

    def part(self, name: str) -> Float[Tensor, "direction ..."]:
        """One piece of every direction, such as the change of one weight matrix.

        Returns:
            The direction is the first axis, then the shape of the piece.

        Raises:
            KeyError: w has no such piece.
        """
        sizes = [torch.Size(shape).numel() for _, shape in self.parts]
        names = [name for name, _ in self.parts]
        if name not in names:
            more = " and more" if len(names) > 8 else ""
            raise KeyError(f"w has no part {name!r}: it has {names[:8]}{more}.")
        place = names.index(name)
        return self.vectors.split(sizes)[place].T.reshape(len(self), *self.parts[place][1])

    def to_pandas(self, order: Order = "eigenvalue") -> Any:
        """One row per direction, with its scores; the index is the number of the direction.

        The columns are eigenvalue, projection, held (the share of ‖w‖²), slope, linear,
        quadratic, integrated, measured, share (of f(w) − f(0)), residual, converged, is_noise,
        the relative errors linear_error and quadratic_error, and nearer: the better one of the
        linear and quadratic estimates.

        Args:
            order: of the rows; see `order`.
        """
        import pandas as pd

        places = self.order(order).numpy()
        columns: dict[str, Any] = {
            "eigenvalue": self.eigenvalues,
            "projection": self.projections,
            "held": self.held,
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
        return table.assign(nearer=linear.where(table.quadratic_error.notna())).iloc[places]

    def __repr__(self) -> str:
        top = ", ".join(f"{value:.3g}" for value in self.eigenvalues[:4].tolist()) + (
            ", …" if len(self) > 4 else ""
        )
        near = {
            name: int((self.error(name) <= 0.1)[~self.is_noise].sum())
            for name in ("linear", "quadratic")
        }
        loud = int((~self.is_noise).sum())
        return (
            f"Attribution of the {self.objective} {self.value:.4g} (at w = 0: "
            f"{self.baseline:.3g}) to {len(self)} directions of {len(self.vectors):,} entries"
            f"{f', which hold {float(self.held.sum()):.3g} of ‖w‖²' if self.norm else ''}\n"
            f"  eigenvalues {top}; {int(self.converged.sum())} converged after {self.products} "
            f"products with the Hessian; of {loud} scores above "
            f"the noise, {near['linear']} within 10 % of the linear estimate, "
            f"{near['quadratic']} of the quadratic\n"
            f"  on {self._origin('a function')}"
        )


def score_directions(
    curvature: Curvature,
    vectors: Float[Tensor, "entry direction"],
    path: Float[Tensor, " entry"],
    baseline: float,
    unit: float = 1.0,
    **header: Any,
) -> Attribution:
    """Compute all scores of some directions, in float64 from values in the model's dtype.

    Args:
        path: the mean gradient on the path from 0.
        baseline: f(0).
        unit: unit of f; everything measured in f is multiplied by it.
        header: the fields that describe f, and what is known of the other bases.
    """
    w, f = curvature.w.detach(), curvature.function
    point, slope, path = (x.detach().cpu().double() for x in (w, curvature.gradient, path))
    product, exact = curvature.products(vectors).cpu().double(), vectors.cpu().double()
    eigenvalues, projections = (exact * product).sum(dim=0), point @ exact
    # projections in float64, because f is steep along some directions
    parts = vectors * projections.to(w)
    # the first column removes nothing: f(w) comes from the same batch
    changes = torch.cat([torch.zeros_like(parts[:, :1]), parts], dim=1)
    values = f.at(lambda rows: w - changes[:, rows].mT, changes.shape[1]).cpu().double()
    value, removed = float(values[0]), values[1:]
    integrated = projections * (path @ exact) * (1 if math.isfinite(baseline) else torch.nan)
    return Attribution(
        norm=float(point.norm()),
        vectors=vectors.cpu(),
        eigenvalues=eigenvalues * unit,
        residuals=(product - exact * eigenvalues).norm(dim=0) * unit,
        projections=projections,
        slopes=slope @ exact * unit,
        integrated=integrated * unit,
        measured=(value - removed) * unit,
        value=value * unit,
        baseline=baseline * unit,
        path_error=abs(float(point @ path) - (value - baseline)) * unit,
        **header,
    )
