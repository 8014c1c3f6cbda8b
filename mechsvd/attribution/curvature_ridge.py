"""Ridge on the coefficients of w in a Hessian eigenbasis: flat directions shrink first."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.attribution.chosen import choose, kind_of
from mechsvd.attribution.curvature import Function
from mechsvd.attribution.directions import HESSIAN
from mechsvd.attribution.functions import Kind, require_one_function, task_function
from mechsvd.attribution.objective import Over
from mechsvd.attribution.scores import Attribution
from mechsvd.checks import is_number
from mechsvd.engine.metrics import AnyMetric
from mechsvd.engine.passes import clean_noise
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.fields import require_between, require_declared, require_finite
from mechsvd.linalg.shrinkage import (
    LEFT,
    evenly_spaced_strengths,
    require_strengths,
    ridge_gains,
)
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, require_kind, result

STEPS = 64  # number of strengths by default


@result
class CurvatureRidge(Result):
    """What is left of f when ridge regression shrinks the parts of w, for several strengths.

    Attributes:
        alphas: strengths, in the unit of an eigenvalue.
        eigenvalues: λ of the directions, which fall in size.
        shares: share of ‖w‖² that each direction holds.
        ridge_values: f of the shrunken w.
        clip_values: f if only the first directions are kept, from none to all.
        values: f(w).
        rest: gain of the part of w outside the directions.
        noise_floor: rounding noise of f(w).
        objective, over: what f and w are.

    Example:
        >>> shrunk.to_pandas().columns.tolist()[:3]
        ['kind', 'alpha', 'effective_directions']
    """

    alphas: Float[Tensor, " strength"]
    eigenvalues: Float[Tensor, " direction"]
    shares: Float[Tensor, "task direction"]
    ridge_values: Float[Tensor, "task strength"]
    clip_values: Float[Tensor, "task kept"]
    values: Float[Tensor, " task"]
    noise_floor: Float[Tensor, " task"]
    rest: float
    objective: str
    over: str
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        if self.clip_values.shape[1] != len(self.eigenvalues) + 1:
            raise ValueError(
                f"`clip_values` must have one column more than the {len(self.eigenvalues)} "
                f"directions, but have {self.clip_values.shape[1]}."
            )

    def _require_values(self) -> None:
        require_finite(self, "alphas", "eigenvalues", "shares", "values", "noise_floor", "rest")
        require_between(self, ["alphas", "shares", "noise_floor"], 0)

    @property
    def gains(self) -> Float[Tensor, "strength direction"]:
        """|λ| / (|λ| + α) per strength and direction; 1 at strength 0."""
        return curvature_gains(self.eigenvalues, self.alphas)

    @property
    def effective_directions(self) -> Float[Tensor, " strength"]:
        """Sum of the gains, the effective number of directions.

        Few effective directions may be many directions with small gains; see `directions_left`.
        """
        return self.gains.sum(dim=1)

    @property
    def directions_left(self) -> Int[Tensor, " strength"]:
        """Number of directions whose gain is above 0.1."""
        return (self.gains > LEFT).sum(dim=1)

    def to_pandas(self) -> Any:
        """One row per strength, then one per number of kept directions.

        The columns are kind ("ridge" or "clip"), alpha (NaN for clips), effective_directions,
        directions_left, held (‖v‖² / ‖w‖² of what is left) and value (f). With several tasks the
        first column is `task`.
        """
        import pandas as pd

        count = len(self.eigenvalues)
        kept = torch.arange(count + 1)
        clips = torch.ones(count + 1, count).tril(-1).double()
        tables = []
        for task, shares in enumerate(self.shares):
            outside = self.rest**2 * (1 - shares.sum()).clamp(min=0)
            for kind, gains, alphas, effective, left, values in (
                ("ridge", self.gains, self.alphas, self.effective_directions,
                 self.directions_left, self.ridge_values),
                ("clip", clips, torch.full((count + 1,), torch.nan), kept.double(), kept,
                 self.clip_values),
            ):  # fmt: skip
                columns = {
                    "alpha": alphas,
                    "effective_directions": effective,
                    "directions_left": left,
                    "held": gains.square() @ shares + outside,
                    "value": values[task],
                }
                table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
                table.insert(0, "kind", kind)
                table.insert(0, "task", task)
                tables.append(table)
        whole = pd.concat(tables, ignore_index=True)
        return whole if len(self.values) > 1 else whole.drop(columns="task")

    def __repr__(self) -> str:
        ridge, clip = self.ridge_values[0], self.clip_values[0]
        return (
            f"CurvatureRidge over {len(self.alphas)} strengths on {len(self.eigenvalues)} "
            f"directions, {len(self.values)} text(s)\n"
            f"  {self.objective} {float(self.values[0]):.4g} clean, {float(ridge[0]):.4g} to "
            f"{float(ridge[-1]):.4g} shrunken, {float(clip[0]):.4g} to {float(clip[-1]):.4g} "
            "clipped\n"
            f"  on {self._origin()}"
        )


def curvature_gains(
    eigenvalues: Float[Tensor, " direction"], alphas: Float[Tensor, " strength"]
) -> Float[Tensor, "strength direction"]:
    """The gains |λ| / (|λ| + α); 1 where both are 0."""
    gains = ridge_gains(eigenvalues.double().abs().sqrt(), alphas.double())
    return gains.nan_to_num(nan=1.0)


@runs_model(RunOptions)
def shrink_by_curvature(
    model: Model,
    task: Task | Sequence[Task],
    over: Over,
    attribution: Attribution,
    alphas: Iterable[float] | Float[Tensor, " strength"] | None = None,
    *,
    rest: float = 0.0,
    objective: Kind | None = None,
    metric: AnyMetric | None = None,
    **options: Unpack[RunOptions],
) -> CurvatureRidge:
    """Shrink each part of w by |λ| / (|λ| + α), as ridge regression does, and measure f.

    The coefficient u·w of an eigenvector u with eigenvalue λ becomes |λ| / (|λ| + α) · u·w. This
    v minimises Σ |λ| (u·v − u·w)² + α ‖v‖²: its derivative along u, 2|λ|(u·v − u·w) + 2α u·v, is 0
    there. It is ridge regression with the Hessian in place of the Gram matrix. Where f is least at
    w, as a divergence is, the first term is twice what f rises by, to second order. The slope of f
    is not in it.

    `shrink` is the other ridge. It scales what every write holds of a direction by s²/(s² + α),
    where s² is the energy of the writes, whatever f is. Here the coefficients are of w, and
    directions along which f is flat shrink first, however much of w they hold.

    Args:
        task: one, or several, for which the same directions of w are shrunken.
        over: what w is; see `hessian_attribution`.
        attribution: its directions and their eigenvalues are used, in the order of |λ|. From w
            they hold all of w. Another of its `bases` has uᵀHu for λ.
        alphas: strengths, in the unit of an eigenvalue. By default 64, with evenly spaced
            effective numbers of directions; the last one is 0, which shrinks nothing.
        rest: gain of the part of w outside the directions; 0 drops it, as `sweep_ridge` does, and
            1 keeps it.
        objective, metric: what f is, by default that of the attribution.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Returns:
        f for each strength, next to f if only the first directions are kept, from none to all.

    Raises:
        TypeError: strengths that are not numbers, or no attribution.
        ValueError: a strength below 0, NaN or inf, or the attribution is of another w or model.

    Reference: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 2nd ed.,
        eq. 3.44, for a general Gram matrix.

    Example:
        >>> shrunk = ms.shrink_by_curvature(model, task, svd, attribution, [0.0, 1.0])
        >>> shrunk.ridge_values.shape
        torch.Size([1, 2])
    """
    require_kind(attribution, Attribution)
    require_one_function(objective, metric)
    if not is_number(rest):
        raise ValueError(f"`rest` is {rest!r:.40}, but must be a finite number.")
    texts, kind = as_tasks(task), kind_of(attribution, objective, metric)
    order = attribution.eigenvalues.abs().argsort(descending=True, stable=True)
    eigenvalues = attribution.eigenvalues[order]
    strengths = _default_strengths(eigenvalues) if alphas is None else require_strengths(alphas)
    gains = torch.cat(
        [
            curvature_gains(eigenvalues, strengths),
            torch.ones(len(order) + 1, len(order), dtype=torch.float64).tril(-1),
        ]
    )
    found, floors = [], []
    with open_session(model, texts, gradients=True, **options) as session:
        for text in texts:
            f = task_function(session, text, over, kind, metric)
            chosen = choose(
                replace(attribution, beside=()),
                order.tolist(),
                "eigenvalue",
                f.function.point,
                f.objective.over,
                session.required_source,
            )
            vectors = chosen[HESSIAN].vectors
            found.append(_measure(f.function, vectors, gains, float(rest), f.unit))
            floors.append(clean_noise(session, text, f.metric) * f.unit)
        source = session.provenance()
    values = torch.stack([value for value, _ in found])
    return CurvatureRidge(
        strengths,
        eigenvalues,
        torch.stack([shares for _, shares in found]),
        values[:, 1 : len(strengths) + 1],
        values[:, len(strengths) + 1 :],
        values[:, 0],
        torch.tensor(floors, dtype=torch.float64),
        float(rest),
        f.name,
        f.objective.over,
        source,
    )


def _measure(
    f: Function,
    vectors: Float[Tensor, "entry direction"],
    gains: Float[Tensor, "row direction"],
    rest: float,
    unit: float,
) -> tuple[Float[Tensor, " value"], Float[Tensor, " direction"]]:
    """f(w) and f of w under each row of gains, in one loop; and the shares of ‖w‖²."""
    w = f.point.detach()
    held = w.cpu().double() @ vectors.cpu().double()
    outside = w - vectors @ held.to(w)
    # w itself, unchanged, is the first row
    changes = torch.cat([torch.zeros_like(held)[None], (gains - 1) * held])
    off = torch.cat([torch.zeros(1), torch.full((len(gains),), rest - 1.0)]).to(w)
    point = lambda rows: w + changes[rows].to(w) @ vectors.mT + off[rows, None] * outside  # noqa: E731
    values = f.at(point, len(changes), f.progress, "strengths").cpu().double() * unit
    norm = w.cpu().double().square().sum()
    return values, held.square() / (norm or torch.nan)


def _default_strengths(eigenvalues: Float[Tensor, " direction"]) -> Float[Tensor, " strength"]:
    """Evenly spaced in the effective number of the directions with curvature."""
    sizes = eigenvalues.double().abs()
    curved = sizes[sizes > torch.finfo(torch.float64).eps * sizes.max()]
    if not len(curved):
        raise ValueError("All eigenvalues are 0, so there is no curvature to shrink by.")
    return evenly_spaced_strengths(curved.sqrt(), STEPS)
