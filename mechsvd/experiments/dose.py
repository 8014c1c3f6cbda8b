"""Dose and response: the metric against the gain of one direction, next to random directions."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import require_whole, whole_numbers
from mechsvd.edits.baselines import Baseline, require_baseline
from mechsvd.edits.gates import Gate
from mechsvd.engine.measurement import Measurement
from mechsvd.engine.metrics import AnyMetric
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import rows_called
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, warn_other_sites
from mechsvd.fields import require_declared, require_finite, require_length
from mechsvd.linalg.comparison import random_subspace
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

GAINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@result
class DoseResponse(Result):
    """The effect of giving single directions other gains, for several texts.

    Attributes:
        directions, singular_values: of the decomposition.
        gains: 1 leaves the direction as it is, 0 removes it.
        effects: in `unit`; damage is positive.
        random_effects: of random directions with changes of equal energy; direction i has its own.
        noise_floor: the largest over the texts; see `measure`.
        seed: of the random directions.

    Example:
        >>> response.summary().columns.tolist()[:4]
        ['direction', 'singular_value', 'slope', 'r_squared']
    """

    directions: Int[Tensor, " direction"]
    singular_values: Float[Tensor, " direction"]
    gains: Float[Tensor, " gain"]
    effects: Float[Tensor, "task direction gain"]
    random_effects: Float[Tensor, "task direction gain"]
    metric: str
    unit: str
    noise_floor: float
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "gains", self.effects.shape[2], "column of `effects`")

    def _require_values(self) -> None:
        require_finite(self, "singular_values", "gains", "noise_floor")

    def to_pandas(self) -> Any:
        """One row per text, direction and gain: effect, random_effect, linear.

        `linear` is the line through the clean run that fits the text's effects best.
        """
        import pandas as pd

        tasks, count, gains = self.effects.shape
        return pd.DataFrame(
            {
                "task": torch.arange(tasks).repeat_interleave(count * gains).numpy(),
                "direction": self.directions.repeat_interleave(gains).repeat(tasks).numpy(),
                "gain": self.gains.repeat(tasks * count).numpy(),
                "effect": self.effects.flatten().numpy(),
                "random_effect": self.random_effects.flatten().numpy(),
                "linear": self._line(self.effects).flatten().numpy(),
            }
        )

    def summary(self) -> Any:
        """How linear each direction is, in the mean over the texts.

        Columns: direction, singular_value, slope (effect per unit of gain), r_squared of a line
        through the clean run (1: linear; it can be below 0), departure (the largest distance from
        the line, in the unit), and random_r_squared and random_departure of the random direction.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "direction": self.directions.numpy(),
                "singular_value": self.singular_values.numpy(),
                "slope": self._slope(self.effects).mean(dim=0).numpy(),
                "r_squared": self._fit(self.effects).mean(dim=0).numpy(),
                "departure": self._departure(self.effects).mean(dim=0).numpy(),
                "random_r_squared": self._fit(self.random_effects).mean(dim=0).numpy(),
                "random_departure": self._departure(self.random_effects).mean(dim=0).numpy(),
            }
        )

    def __repr__(self) -> str:
        own, random = (
            float(self._fit(effects).nanmedian()) for effects in (self.effects, self.random_effects)
        )
        tasks, count, gains = self.effects.shape
        return (
            f"DoseResponse of {count} directions at {gains} gains from "
            f"{float(self.gains.min()):g} to {float(self.gains.max()):g}, {tasks} text(s)\n"
            f"  `{self.metric}`: median R² of a line through clean {own:.3f}, "
            f"random directions of equal energy {random:.3f}\n"
            f"  on {self._origin()}"
        )

    def _slope(self, effects: Tensor) -> Float[Tensor, "task direction"]:
        dose = self.gains.to(effects) - 1
        return (effects * dose).sum(dim=-1) / dose.square().sum()

    def _line(self, effects: Tensor) -> Float[Tensor, "task direction gain"]:
        line = self._slope(effects)[..., None] * (self.gains.to(effects) - 1)
        return line + 0.0  # no −0 at gain 1

    def _departure(self, effects: Tensor) -> Float[Tensor, "task direction"]:
        return (effects - self._line(effects)).abs().amax(dim=-1)

    def _fit(self, effects: Tensor) -> Float[Tensor, "task direction"]:
        left = (effects - self._line(effects)).square().sum(dim=-1)
        whole = effects.square().sum(dim=-1)
        return 1 - left / torch.where(whole > 0, whole, torch.nan)


@runs_model(RunOptions)
def dose_response(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition,
    directions: Iterable[int] | Int[Tensor, " direction"] | None = None,
    gains: Iterable[float] | Float[Tensor, " gain"] = GAINS,
    *,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> DoseResponse:
    """Measure how the metric answers to the gain of single directions, and how linearly.

    Next to each direction stands a random one, whose gains change the decomposed writes by the
    same energy: the sum of squared changes over all writes.

    Args:
        directions: numbers of directions; the first 16 by default. All gains of all of them share
            forward passes.
        gains: of each direction, one at a time; the others keep 1.
        metric: the log-probability by default, which may be linear; a divergence is not.
        baseline: the point at gain 0; see `gate`. The random directions share it.
        seed: of the random directions.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Raises:
        TypeError, ValueError: as `measure`; directions out of range or repeated; gains that are
            not finite, or only 1.

    Example:
        >>> response = ms.dose_response(model, task, svd, [0, 1], gains=[0.0, 1.0, 2.0])
        >>> response.effects.shape
        torch.Size([1, 2, 3])
    """
    require_decomposition(svd)
    chosen, tasks = valid_directions(svd, directions), as_tasks(tasks)
    doses = _valid_gains(gains)
    require_baseline(baseline, svd.d_model, svd.source)
    seed = require_whole("seed", seed)
    random = random_subspace(svd.d_model, len(chosen), seed).basis.to(svd.directions)
    sizes = svd.singular_values[chosen.to(svd.singular_values.device)]
    energy = (svd.singular_values[:, None] * (svd.directions.T @ random)).norm(dim=0)
    ratio = sizes / torch.where(energy > 0, energy, 1.0)
    own = _doses(svd.directions, chosen, doses.repeat(len(chosen), 1), svd, baseline)
    stretched = 1 + (doses[None] - 1) * ratio.cpu()[:, None]
    other = _doses(random, torch.arange(len(chosen)), stretched, svd, baseline)
    found: list[tuple[Measurement, Measurement]] = []
    with open_session(model, tasks, **options) as session, rows_called("doses"):
        for task in tasks:
            measured = measure(model, task, own, metric=metric, noise_floor=True, **options)
            found.append((measured, measure(model, task, other, metric=metric, **options)))
        source = session.provenance(session.sites)
        warn_other_sites(svd, session.sites)
    first = found[0][0]
    effects, random_effects = (
        torch.stack([pair[i].effect.view(len(chosen), len(doses)) for pair in found])
        for i in (0, 1)
    )
    return DoseResponse(
        chosen,
        sizes.cpu(),
        doses,
        effects,
        random_effects,
        first.metric,
        first.unit,
        max(measured.noise_floor or 0.0 for measured, _ in found),
        seed,
        source,
    )


def _doses(
    basis: Float[Tensor, "d_model rank"],
    directions: Int[Tensor, " direction"],
    gains: Float[Tensor, "direction gain"],
    svd: Decomposition,
    baseline: Baseline | None,
) -> Gate:
    """A stack where each edit gives one direction another gain."""
    rows = basis.new_ones(gains.numel(), basis.shape[1])
    chosen = directions.repeat_interleave(gains.shape[1])
    rows[torch.arange(gains.numel()), chosen] = gains.flatten().to(basis)
    return Gate(basis, rows, 1.0, svd.source, baseline)


def valid_directions(svd: Decomposition, directions: Any) -> Int[Tensor, " direction"]:
    """Numbers of different directions; the first 16 for None.

    Raises:
        TypeError, ValueError: anything else.
    """
    if directions is None:
        return torch.arange(min(16, svd.rank))
    chosen = whole_numbers("directions", directions)
    if len(chosen.unique()) < len(chosen) or chosen.min() < 0 or chosen.max() >= svd.rank:
        raise ValueError(
            f"`directions` are {chosen.tolist()!s:.60}, but must be different ones from 0 to "
            f"{svd.rank - 1}."
        )
    return chosen


def _valid_gains(gains: Any) -> Float[Tensor, " gain"]:
    listed = gains if isinstance(gains, Tensor) else [*gains]
    try:
        doses = torch.as_tensor(listed, dtype=torch.float64).cpu()
    except (TypeError, ValueError) as error:
        raise TypeError(f"`gains` must be a list of numbers, but is {gains!r:.40}.") from error
    if doses.ndim != 1 or not doses.isfinite().all() or not (doses != 1).any():
        raise ValueError(
            f"`gains` must be finite numbers, not only 1, but are {listed!r:.60}; "
            "1 leaves a direction as it is."
        )
    return doses
