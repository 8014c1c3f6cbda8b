"""The worst gains of the directions that a subspace leaves out, found by gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.attribution.objective import objective_over
from mechsvd.checks import require_whole
from mechsvd.engine.batches import independent, run_batches
from mechsvd.engine.metrics import AnyMetric, metric_for
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.fields import require_between, require_declared, require_finite
from mechsvd.linalg.decomposition import (
    Decomposition,
    kept_directions,
    require_decomposition,
)
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

STARTS = 4  # points from which gradients are followed


@result
class WorstGains(Result):
    """Gains from 0 to 1 of some directions that cost much, while the kept ones stay at 1.

    Attributes:
        kept: numbers of the kept directions.
        gains: of all directions; the worst that was met per text.
        effects: what they cost each text in the metric, in `unit`; damage is positive.
        path: the worst effect up to each step.
        metric, unit: of the effects.
        source: the model and the texts.

    Example:
        >>> worst.to_pandas().columns.tolist()
        ['task', 'effect', 'dropped']
    """

    kept: Int[Tensor, " direction"]
    gains: Float[Tensor, "task rank"]
    effects: Float[Tensor, " task"]
    path: Float[Tensor, "task step"]
    metric: str
    unit: str
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)

    def _require_values(self) -> None:
        require_finite(self, "gains", "effects", "path")
        require_between(self, ["gains"], 0, 1)

    def to_pandas(self) -> Any:
        """One row per text: task, effect, and how many gains are below one half."""
        import pandas as pd

        columns = {"effect": self.effects, "dropped": (self.gains < 0.5).sum(dim=1)}
        table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        table.insert(0, "task", range(len(table)))
        return table

    def __repr__(self) -> str:
        return (
            f"WorstGains of the directions besides {len(self.kept)} kept ones, "
            f"on {len(self.effects)} text(s)\n"
            f"  {self.metric} worse by {float(self.effects.mean()):.4g} {self.unit} in the mean, "
            f"{float(self.effects.max()):.4g} at most\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def worst_gains(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition,
    kept: Any,
    *,
    metric: AnyMetric | None = None,
    steps: int = 12,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> WorstGains:
    """Look for gains of the directions outside a subspace that cost each text most.

    If the kept directions are all that matters, no gains of the others do harm. Random gains are a
    weak test of this; see `measure_faithfulness`. Here Frank–Wolfe steps follow the gradient of the
    cost from removing everything, from halving it, and from random points. What is found is a lower
    bound of the worst. The part that the decomposition did not see stays as it is.

    Args:
        kept: numbers of the directions whose gain stays 1, or how many of the first.
        metric: what costs; see `Metric`. One without a slope, such as `greedy_share`, gives the
            worst of the starts.
        steps: gradients per start.
        seed: of the random starts.
        options: see `RunOptions` (layers, components, positions, …).

    Raises:
        ValueError: directions out of range or repeated, or none or all of them.

    Reference: Jaggi, Revisiting Frank–Wolfe, ICML 2013.

    Example:
        >>> worst = ms.worst_gains(model, task, svd, range(64))
        >>> worst.gains.shape
        torch.Size([1, 128])
    """
    require_decomposition(svd)
    chosen, steps = kept_directions(svd, kept), require_whole("steps", steps, 1)
    generator = torch.Generator().manual_seed(require_whole("seed", seed))
    random = torch.rand(STARTS - 2, svd.rank, generator=generator)
    starts = torch.cat([torch.zeros(1, svd.rank), torch.full((1, svd.rank), 0.5), random])
    starts[:, chosen] = 1.0
    free = torch.ones(svd.rank, dtype=torch.bool)
    free[chosen] = False
    texts = as_tasks(tasks)
    fitted = metric_for(metric, model, texts[0])
    with open_session(model, texts, gradients=True, **options) as session:
        found = [_ascend(session, task, svd, metric, starts, free, steps) for task in texts]
        source = session.provenance(session.sites)
    gains, paths = (torch.stack(parts) for parts in zip(*found, strict=True))
    return WorstGains(chosen, gains, paths[:, -1], paths, fitted.name, fitted.unit, source)


def _ascend(
    session: Session,
    task: Task,
    svd: Decomposition,
    metric: Any,
    starts: Float[Tensor, "start rank"],
    free: Tensor,
    steps: int,
) -> tuple[Float[Tensor, " rank"], Float[Tensor, " step"]]:
    """Frank–Wolfe steps from all starts; the worst gains that were met, and the effect so far."""
    f = objective_over(session, task, svd)
    fitted = metric_for(metric, session.model, task)
    cost, sign = f.metric(fitted), -1.0 if fitted.better == "more" else 1.0
    with torch.no_grad():
        clean = cost(f.point[None])[0]
    size = max(1, session.rows_per_pass(task) // 4)  # a backward pass takes several times as much
    points = f.point.repeat(len(starts), 1)
    points[:, : svd.rank] = starts.to(points)
    moves = free.to(points.device)
    best, worst, path = points[0].clone(), -torch.inf, []
    for step in range(steps + 1):
        effects, slopes = _slopes(lambda rows: sign * (cost(rows) - clean), points, size, session)
        if worst == worst and not float(effects.max()) <= worst:  # NaN is worse than any number
            worst, best = float(effects.max()), points[int(effects.argmax())].clone()
        path.append(worst)
        target = torch.where(slopes[:, : svd.rank] > 0, 1.0, 0.0).to(points)
        stride = 2 / (step + 2) if step else 0.5  # the first step alone would forget the starts
        inside = points[:, : svd.rank]
        inside[:, moves] += stride * (target - inside)[:, moves]
    return best[: svd.rank].cpu().float(), torch.tensor(path, dtype=torch.float64)


def _slopes(
    effect: Callable[[Tensor], Tensor],
    points: Float[Tensor, "row entry"],
    size: int,
    session: Session,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row entry"]]:
    """The effect of each row, and its gradient; zero where it has none."""

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = points[rows].requires_grad_()
        with torch.enable_grad():
            values = effect(chosen)
        if not values.requires_grad:
            return values, torch.zeros_like(chosen)
        (slopes,) = torch.autograd.grad(values.sum(), chosen, materialize_grads=True)
        return values.detach(), slopes

    parts = run_batches(
        run,
        torch.arange(len(points)),
        size,
        session.halve(session.tasks[0]),
        False,
        restored=independent,
    )
    values, slopes = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(slopes)
