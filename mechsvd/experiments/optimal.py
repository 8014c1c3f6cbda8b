"""Optimal ablation: the constants that cost least; and rankings under several baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import require_numbers
from mechsvd.edits.baselines import Baseline, Shifted
from mechsvd.edits.gates import Gate
from mechsvd.engine.ablations import mean_baseline, resample_baseline
from mechsvd.engine.metrics import AnyMetric, kl_divergence
from mechsvd.engine.passes import measure
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.engine.writes import collect_writes
from mechsvd.experiments.ranking import rank_directions
from mechsvd.fields import require_declared, require_finite, require_length
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

SHARE = 0.2  # of a ranking, for the fine line search on a sample
FINE = 8  # points of the line search per direction
STEP = 0.1  # of the standard deviation
FARTHEST = 3.0  # steps from the mean that a parabola may be trusted


@result
class OptimalBaseline(Baseline):
    """The mean of each site, shifted along each direction by the constant that costs least.

    Attributes:
        steps: size of the shifts that were tried at each site along each direction: −1, 0 and 1 of
            them.
        shifts: the chosen shift along each direction, in steps.
        costs: effect of removing each direction at each shift that was tried, in the mean over the
            texts.
        sample: directions with a fine line search.
        excess: what the chosen shift costs more than the best point of the search, at each.
        unit: of the costs.

    Example:
        >>> optimal.kind
        'optimal constant of each direction'
    """

    steps: Float[Tensor, "site rank"] = torch.zeros(0, 0)
    shifts: Float[Tensor, " rank"] = torch.zeros(0)
    costs: Float[Tensor, "shift rank"] = torch.zeros(3, 0)
    sample: Int[Tensor, " sample"] = torch.zeros(0, dtype=torch.long)
    excess: Float[Tensor, " sample"] = torch.zeros(0)
    unit: str = ""

    def _require_values(self) -> None:
        require_finite(self, "values", "steps", "shifts", "costs", "excess")

    def __repr__(self) -> str:
        farthest = float(self.excess.max()) if len(self.excess) else 0.0
        return (
            f"{super().__repr__()}\n"
            f"  {int((self.shifts != 0).sum())} of {len(self.shifts)} directions shifted from the "
            f"mean; on {len(self.sample)} sampled ones a fine search is better by up to "
            f"{farthest:.2g} {self.unit}"
        )


@runs_model(RunOptions)
def optimal_baseline(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition,
    *,
    metric: AnyMetric = kl_divergence,
    **options: Unpack[RunOptions],
) -> OptimalBaseline:
    """Find, for each direction, the constant that costs least when it replaces the direction.

    Each direction is removed with its mean shifted by −1, 0 and 1 steps, all in the batch. The
    minimum of the parabola through the three costs gives the constant. A step is a tenth of the
    standard deviation of the site's writes along the direction, so all sites shift together, each
    in its own measure. On a sample of directions a fine line search says how far the parabola was
    from the best.

    Args:
        tasks: the texts whose mean cost counts; the constants know them.
        metric: of the cost; the KL divergence by default.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Raises:
        TypeError, ValueError: as `rank_directions`.

    Reference: Li and Janson, Optimal ablation for interpretability, 2024, arXiv:2409.09951. They
        train the constants.

    Example:
        >>> optimal = ms.optimal_baseline(model, task, svd, layers=[0])
        >>> optimal.shifts.shape
        torch.Size([128])
    """
    require_decomposition(svd)
    chosen = as_tasks(tasks)
    with open_session(model, chosen, **options):
        writes = collect_writes(model, chosen, **options)
        mean = mean_baseline(writes)
        centred = (writes.values - mean.values[0]).double() @ svd.directions.double()
        steps = STEP * centred.square().mean(dim=1).sqrt()

        def cost(directions: Tensor, shifts: Tensor) -> Tensor:
            stack = _shifted_removals(svd, mean, directions, shifts * steps[:, directions])
            effects = [
                measure(model, task, stack, metric=metric, **options).effect for task in chosen
            ]
            return torch.stack(effects).mean(dim=0)

        every = torch.arange(svd.rank)
        tried = torch.tensor([-1.0, 0.0, 1.0]).double().repeat_interleave(svd.rank)
        costs = cost(every.repeat(3), tried).view(3, svd.rank)
        require_numbers("The costs of replacing directions", costs, "a minimum")
        shifts = _minimum(costs)
        sample = torch.linspace(0, svd.rank - 1, max(1, int(SHARE * svd.rank / (FINE + 1)))).long()
        fine = torch.linspace(-FARTHEST, FARTHEST, FINE).double().repeat(len(sample), 1)
        points = torch.cat([fine, shifts[sample][:, None]], dim=1)
        searched = cost(sample.repeat_interleave(FINE + 1), points.flatten()).view(len(sample), -1)
        unit = measure(model, chosen[0], _nothing(svd), metric=metric, **options).unit
    constants = (shifts * steps) @ svd.directions.double().T
    return OptimalBaseline(
        (mean.values.double() + constants[None, :, None]).to(mean.values),
        mean.sites,
        "optimal constant of each direction",
        source=mean.source,
        steps=steps,
        shifts=shifts,
        costs=costs,
        sample=sample,
        excess=searched[:, -1] - searched.amin(dim=1),
        unit=unit,
    )


@result
class BaselineComparison(Result):
    """Rankings of directions under several baselines.

    Attributes:
        names: of the baselines.
        effects: of removing each direction, in the mean over the texts, in `unit`.
        texts: number of texts.

    Example:
        >>> baselines.to_pandas().columns.tolist()
        ['baseline', 'mean_effect', 'largest_effect', 'correlation with zero', 'correlation with mean']
    """

    names: tuple[str, ...]
    effects: Float[Tensor, "baseline rank"]
    texts: int
    metric: str
    unit: str
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "names", len(self.effects), "row of `effects`")

    def _require_values(self) -> None:
        require_finite(self, "effects")

    @property
    def correlation(self) -> Float[Tensor, "baseline baseline"]:
        """Spearman's correlation between the rankings."""
        places = self.effects.argsort(dim=1).argsort(dim=1).double()
        return torch.corrcoef(places) if len(places) > 1 else torch.ones(1, 1).double()

    def to_pandas(self) -> Any:
        """One row per baseline: its mean effect over the directions, and the correlations."""
        import pandas as pd

        table = pd.DataFrame(
            {
                "baseline": self.names,
                "mean_effect": self.effects.mean(dim=1).numpy(),
                "largest_effect": self.effects.amax(dim=1).numpy(),
            }
        )
        for name, column in zip(self.names, self.correlation.T, strict=True):
            table[f"correlation with {name}"] = column.numpy()
        return table

    def __repr__(self) -> str:
        means = ", ".join(
            f"{name} {float(mean):.3g}"
            for name, mean in zip(self.names, self.effects.mean(dim=1), strict=True)
        )
        return (
            f"BaselineComparison of {len(self.names)} baselines over {self.effects.shape[1]} "
            f"directions and {self.texts} text(s)\n"
            f"  mean effect on `{self.metric}` in {self.unit}: {means}\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def compare_baselines(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition,
    baselines: Mapping[str, Baseline | None] | None = None,
    *,
    metric: AnyMetric = kl_divergence,
    **options: Unpack[RunOptions],
) -> BaselineComparison:
    """Rank the directions under several baselines, and correlate the rankings.

    Args:
        baselines: by name; None is zero ablation. By default zero, the mean of each site, the
            optimal constants, and, if every text has another of its length, resampling.
        metric: of the effect; the KL divergence by default.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Raises:
        TypeError, ValueError: as `rank_directions`.

    Example:
        >>> baselines = ms.compare_baselines(model, task, svd, {"zero": None, "mean": baseline})
        >>> baselines.correlation.shape
        torch.Size([2, 2])
    """
    require_decomposition(svd)
    chosen = as_tasks(tasks)
    with open_session(model, chosen, **options) as session:
        if baselines is None:
            baselines = _usual(model, chosen, svd, metric, options)
        if not isinstance(baselines, Mapping) or not baselines:
            raise TypeError(
                "`baselines` must be baselines by name, such as {'zero': None}, but is "
                f"{baselines!r:.40}."
            )
        effects, rankings = [], []
        for baseline in baselines.values():
            rankings = [
                rank_directions(model, task, svd, metric=metric, baseline=baseline, **options)
                for task in chosen
            ]
            effects.append(torch.stack([ranking.effect for ranking in rankings]).mean(dim=0))
        source = session.provenance(session.sites)
    first = rankings[0].measurement
    return BaselineComparison(
        tuple(baselines), torch.stack(effects), len(chosen), first.metric, first.unit, source
    )


def _usual(
    model: Model,
    tasks: tuple[Task, ...],
    svd: Decomposition,
    metric: AnyMetric,
    options: RunOptions,
) -> dict[str, Baseline | None]:
    everywhere: RunOptions = {**options, "positions": None}
    writes = collect_writes(model, tasks, **everywhere)
    usual: dict[str, Baseline | None] = {"zero": None, "mean": mean_baseline(writes)}
    lengths = [len(task.tokens) for task in tasks]
    distinct = {tuple(task.tokens.tolist()) for task in tasks}
    if len(distinct) == len(tasks) and all(lengths.count(n) > 1 for n in lengths):
        usual["resample"] = resample_baseline(writes)
    return usual | {"optimal": optimal_baseline(model, tasks, svd, metric=metric, **options)}


def _shifted_removals(
    svd: Decomposition,
    mean: Baseline,
    directions: Int[Tensor, " edit"],
    shifts: Float[Tensor, "site edit"],
) -> Gate:
    """A stack where each edit removes one direction, about the mean shifted along it."""
    gains = svd.directions.new_ones(len(directions), svd.rank)
    gains[torch.arange(len(directions)), directions] = 0
    shifted = Shifted(mean, svd.directions.T[directions], shifts.T.to(svd.directions))
    return Gate(svd.directions, gains, 1.0, svd.source, shifted)


def _nothing(svd: Decomposition) -> Gate:
    return Gate(svd.directions, svd.directions.new_ones(svd.rank), 1.0, svd.source)


def _minimum(costs: Float[Tensor, "shift rank"]) -> Float[Tensor, " rank"]:
    """Where the parabola through the costs at −1, 0 and 1 is least; the best of these if none is."""
    low, middle, high = costs
    bend, slope = (low + high) / 2 - middle, (high - low) / 2
    vertex = (-slope / (2 * torch.where(bend > 0, bend, 1.0))).clamp(-FARTHEST, FARTHEST)
    best = costs.argmin(dim=0).to(costs) - 1
    return torch.where(bend > 0, vertex, best)
