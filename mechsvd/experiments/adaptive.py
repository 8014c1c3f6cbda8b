"""A sweep of few ranks, placed where the curve bends, with the measured error of what lies between."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_number, once, require_whole
from mechsvd.edits.baselines import Baseline
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import MeasureOptions, open_session
from mechsvd.experiments.sweeps import RankSweep, join_sweeps, sweep_rank
from mechsvd.fields import require_declared, require_finite
from mechsvd.linalg.decomposition import Decomposition, require_decompositions
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, require_kind, result

FIRST = 9  # evenly spaced ranks to begin with
FLOOR = 1e-7  # nats; below it the curve is rounding


@result
class AdaptiveSweep(Result):
    """A sweep of few ranks, and how far the curve between them is from the truth.

    Attributes:
        sweep: by rising rank; all that was measured.
        checked: random ranks that were left out at first, and measured at the end.
        predicted: their KL divergence from the curve before, in nats per token.
        measured: their KL divergence.

    Example:
        >>> few.interpolated([50]).shape
        torch.Size([1])
    """

    sweep: RankSweep
    checked: Int[Tensor, " check"]
    predicted: Float[Tensor, " check"]
    measured: Float[Tensor, " check"]

    def __post_init__(self) -> None:
        require_declared(self)

    def _require_values(self) -> None:
        require_finite(self, "predicted", "measured")

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.sweep.source

    @property
    def errors(self) -> Float[Tensor, " check"]:
        """Factors between the curve and the measured KL divergence at the checked ranks, at least 1."""
        pair = (self.predicted.clamp(min=FLOOR), self.measured.clamp(min=FLOOR))
        return torch.exp((pair[0].log() - pair[1].log()).abs())

    def interpolated(self, ranks: Iterable[int]) -> Float[Tensor, " rank"]:
        """The KL divergence at any ranks, in nats per token; logarithms are interpolated."""
        chosen = torch.as_tensor([*ranks], dtype=torch.double)
        return _curve(self.sweep.ranks, self.sweep.measurement.kl_divergence, chosen)

    def to_pandas(self) -> Any:
        """As the sweep's."""
        return self.sweep.to_pandas()

    def __repr__(self) -> str:
        stated = "no rank was left to check"
        if len(self.checked):
            typical, worst = float(self.errors.median()), float(self.errors.max())
            stated = (
                f"between them the curve is off by a factor of {typical:.2g} in the middle and "
                f"{worst:.2g} at most, at {len(self.checked)} random ranks"
            )
        return f"AdaptiveSweep: {self.sweep!r}".replace("\n", f"\n  {stated}\n", 1)


@runs_model(MeasureOptions)
def sweep_adaptively(
    model: Model,
    task: Task,
    svd: Decomposition | Sequence[Decomposition],
    count: int = 33,
    order: Iterable[int] | Int[Tensor, " rank"] | None = None,
    *,
    nats: float = 1.0,
    checks: int = 8,
    seed: int = 0,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> AdaptiveSweep:
    """Sweep few ranks: where the curve of the KL divergence bends, and around its lasting rank.

    It begins with evenly spaced ranks. Each round then halves the intervals that bend most. At the
    end the interval of the lasting rank is halved until it is certain, as far as the ranks tried
    can tell, and random ranks show how far the curve between the others is off.

    Args:
        count: ranks before the lasting rank is sought and the curve is checked.
        nats: of KL divergence, summed over the text: the bar of the lasting rank.
        checks: how many random ranks.
        seed: of these.
        svd, order, baseline, options: see `sweep_rank`.

    Raises:
        ValueError: as `sweep_rank`; fewer than three ranks.

    Example:
        >>> few = ms.sweep_adaptively(model, task, svd, count=9, checks=2)
        >>> len(few.sweep.ranks) < len(sweep.ranks), few.errors.shape
        (True, torch.Size([2]))
    """
    require_kind(task, Task)
    count, checks = require_whole("count", count, 3), require_whole("checks", checks, 0)
    if not is_number(nats, 0):
        raise ValueError(f"`nats` is {nats!r:.40}, but must be finite and at least 0.")
    generator = torch.Generator().manual_seed(require_whole("seed", seed))
    permutation = None if order is None else torch.as_tensor(once(order))
    full = max(one.rank for one in require_decompositions(svd))
    bar = nats / len(task.continuation)

    def measured(ranks: Sequence[int], before: RankSweep | None) -> RankSweep:
        found = sweep_rank(model, task, svd, [*ranks], permutation, baseline=baseline, **options)
        return _sorted(found if before is None else join_sweeps(before, found))

    with open_session(model, (task,), **_without_metric(options)):
        first = torch.linspace(0, full, min(FIRST, count, full + 1)).round().long()
        sweep = measured(first.unique().tolist(), None)
        while len(sweep.ranks) < min(count, full + 1):
            sweep = measured(_bends(sweep, min(count, full + 1) - len(sweep.ranks)), sweep)
        while (middle := _around_lasting(sweep, bar)) is not None:
            sweep = measured([middle], sweep)
        left = [k for k in range(full + 1) if k not in {*sweep.ranks.tolist()}]
        drawn = torch.randperm(len(left), generator=generator)[:checks].sort().values
        checked = torch.tensor([left[i] for i in drawn.tolist()], dtype=torch.long)
        predicted = _curve(sweep.ranks, sweep.measurement.kl_divergence, checked.double())
        if len(checked):
            sweep = measured(checked.tolist(), sweep)
    places = torch.searchsorted(sweep.ranks, checked)
    return AdaptiveSweep(
        sweep, checked, predicted, sweep.measurement.kl_divergence[places].double()
    )


def _without_metric(options: MeasureOptions) -> Any:
    return {k: value for k, value in options.items() if k not in ("metric", "noise_floor")}


def _sorted(sweep: RankSweep) -> RankSweep:
    order = sweep.ranks.argsort()
    return replace(sweep, ranks=sweep.ranks[order], measurement=sweep.measurement[order])


def _bends(sweep: RankSweep, most: int) -> list[int]:
    """The middles of the intervals where the logarithm of the divergence bends most, and wide ones."""
    x = sweep.ranks.double()
    y = sweep.measurement.kl_divergence.double().clamp(min=FLOOR).log()
    width = x.diff()
    slope = y.diff() / width
    change = slope.diff().abs()
    around = torch.zeros_like(width)
    around[:-1] += change
    around[1:] += change
    score = torch.where(width > 1, width * (around + 1e-3 * slope.abs().max() + 1e-12), -1.0)
    best = score.argsort(descending=True)[: max(1, min(most, len(score) // 3))]
    return sorted(int((x[i] + x[i + 1]) // 2) for i in best.tolist() if score[i] > 0)


def _around_lasting(sweep: RankSweep, bar: float) -> int | None:
    """A rank between the last one beyond the bar and the next; None if there is none between."""
    far = (sweep.measurement.kl_divergence > bar).nonzero().flatten()
    if len(far) == 0 or int(far[-1]) + 1 == len(sweep.ranks):
        return None
    low, high = sweep.ranks[int(far[-1])], sweep.ranks[int(far[-1]) + 1]
    return int((low + high) // 2) if high - low > 1 else None


def _curve(
    ranks: Int[Tensor, " edit"], values: Float[Tensor, " edit"], at: Float[Tensor, " rank"]
) -> Float[Tensor, " rank"]:
    import numpy as np

    logs = values.double().clamp(min=FLOOR).log().numpy()
    return torch.from_numpy(np.exp(np.interp(at.numpy(), ranks.numpy(), logs)))
