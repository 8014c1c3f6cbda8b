"""The critical rank: a search with few probes of a curve that need not be monotone."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.checks import once
from mechsvd.edits.baselines import Baseline
from mechsvd.engine.measurement import Measurement
from mechsvd.engine.metrics import READY, AnyMetric, Metric, log_prob, metric_for
from mechsvd.engine.noise import NOISE_ROWS
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.experiments.criteria import Criterion, drop_at_most, effect_at_most
from mechsvd.experiments.intervals import interval_columns
from mechsvd.experiments.sweeps import RankSweep, join_sweeps, sweep_rank
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.decomposition import Decomposition, require_decompositions
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model, require_model, where_of
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import (
    OverTexts,
    Provenance,
    Result,
    require_kind,
    require_same_model,
    result,
)

PROBES = 8  # ranks per round
SHARE = 10  # a search may cost a tenth of the evaluations of a full sweep,
LEAST = 48  # or this many, if that is more


@result
class CriticalRank(Result):
    """The smallest rank tried whose directions give the text, and all ranks tried.

    The smallest rank may be a lucky crossing, where tokens cancel; `lasting_rank` is none.

    Attributes:
        sweep: the ranks that were tried, rising.
        margins: how far each rank is above (≥ 0) or below the threshold, in `unit`.
        noise_floor: margins down to minus this count as reaching the threshold; 0 for a threshold
            on another quantity than the metric that was measured.
        evaluations: number of rows run through the model, including the clean ones and those for
            the noise floor.
        criterion: the threshold's name.
        unit: of the margins; nats by default.

    Example:
        >>> found.rank, found.lasting_rank, found.is_certain
        (48, 48, False)
    """

    sweep: RankSweep
    margins: Float[Tensor, " edit"]
    noise_floor: float
    evaluations: int
    criterion: str
    unit: str = "nats"

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "margins", len(self.sweep.ranks), "rank")

    def _require_values(self) -> None:
        require_between(self, ["noise_floor", "evaluations"], 0)
        if (self.sweep.ranks.diff() < 0).any():
            raise ValueError(
                f"`sweep` must have rising ranks, but has {self.sweep.ranks.tolist()!s:.60}."
            )

    @property
    def reached(self) -> Bool[Tensor, " edit"]:
        """Which of the ranks that were tried reach the threshold."""
        return self.margins >= -self.noise_floor

    @property
    def is_tie(self) -> Bool[Tensor, " edit"]:
        """Which margins are within the noise floor, so that they decide nothing."""
        return (self.margins.abs() <= self.noise_floor) & (self.noise_floor > 0)

    @property
    def rank(self) -> int | None:
        """The smallest rank that reaches the threshold; None if no rank tried does."""
        return int(self.sweep.ranks[self.reached][0]) if self.reached.any() else None

    @property
    def lasting_rank(self) -> int | None:
        """The smallest rank tried from which it and all larger ones tried reach the threshold.

        None if the largest rank tried does not.
        """
        lasting = self.reached.flip(0).long().cumprod(0).flip(0).bool()
        return int(self.sweep.ranks[lasting][0]) if lasting.any() else None

    @property
    def is_certain(self) -> bool:
        """Whether every smaller rank was tried."""
        smaller = torch.arange((self.sweep.full_rank if self.rank is None else self.rank) + 1)
        return torch.equal(self.sweep.ranks[: len(smaller)], smaller)

    @property
    def crossings(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring ranks, smaller one first, of which only one reaches the threshold."""
        changes = (self.reached[1:] != self.reached[:-1]).nonzero().flatten().tolist()
        ranks = self.sweep.ranks.tolist()
        return tuple((ranks[i], ranks[i + 1]) for i in changes)

    def subspace(self, svd: Decomposition | Sequence[Decomposition]) -> Any:
        """The span of the directions that the critical rank keeps, in the order of the sweep.

        It has rank 0 if no direction is needed.

        Returns:
            A `Subspace`; of several bases, a tuple of them, which `keep` takes.

        Raises:
            ValueError: no rank tried reaches the threshold, or a decomposition of other
                directions.
        """
        bases = require_decompositions(svd)
        sizes = tuple(one.rank for one in bases)
        if sizes != (self.sweep.sizes or (len(self.sweep.order),)):
            raise ValueError(
                f"The search was over {len(self.sweep.order)} directions, "
                f"but the decomposition has {sum(sizes)}."
            )
        require_same_model(
            self.sweep.basis_source, bases[0].source, "The search and the decomposition"
        )
        if self.rank is None:
            advice = "" if self.is_certain else "try every rank by `exhaustive=True`, "
            raise ValueError(
                f"None of the {len(self.sweep.ranks)} ranks tried reaches {self.criterion}, "
                f"so there is no subspace; allow a `tolerance`, {advice}"
                "or keep all directions by `svd.subspace(svd.rank)`."
            )
        subspaces = []
        for one, own in zip(bases, self.sweep.order.argsort().split(list(sizes)), strict=True):
            kept = own.argsort()[: self.rank].to(one.directions.device)
            subspaces.append(Subspace(one.directions[:, kept], one.source))
        return tuple(subspaces) if isinstance(svd, list | tuple) else subspaces[0]

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.sweep.source

    def to_pandas(self) -> Any:
        """One row per rank tried: rank, log_prob, margin, reached, is_tie (within the noise)."""
        columns = dict.fromkeys(["rank", "log_prob", self.sweep.measurement.metric])
        table = self.sweep.to_pandas()[[*columns]]
        return table.assign(
            margin=self.margins.numpy(), reached=self.reached.numpy(), is_tie=self.is_tie.numpy()
        )

    def __repr__(self) -> str:
        which = "not reached" if self.rank is None else self.rank
        certain = (
            "every smaller rank was tried"
            if self.is_certain
            else "`exhaustive=True` tries every rank"
        )
        lasting = (
            "no tried rank lasts"
            if self.lasting_rank is None
            else f"lasting rank {self.lasting_rank}"
        )
        return (
            f"Critical rank {which} of {self.sweep.full_rank} directions, for {self.criterion}\n"
            f"  {lasting}; {len(self.crossings)} crossing(s) at {self.evaluations} evaluations; {certain}\n"
            f"  on {self._origin()}"
        )


@result
class CriticalRanks(OverTexts):
    """The critical ranks of several texts.

    Example:
        >>> ms.critical_rank(model, tasks[:2], svd).summary()["which"].tolist()
        ['critical', 'lasting']
    """

    parts: tuple[CriticalRank, ...]

    def summary(self, confidence: float = 0.95) -> Any:
        """Two rows, for the critical and the lasting rank: mean, low, high, n over the texts.

        A text where no rank reaches the threshold counts as all directions.

        Raises:
            ValueError: there is one text only.
        """
        ranks = torch.tensor(
            [
                [part.sweep.full_rank if r is None else r for r in (part.rank, part.lasting_rank)]
                for part in self.parts
            ]
        )
        import pandas as pd

        columns = interval_columns(ranks.double(), confidence)
        return pd.DataFrame({"which": ["critical", "lasting"], **columns})


@overload
def critical_rank(
    model: Model,
    task: Task,
    svd: Decomposition | Sequence[Decomposition],
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
    order: Any = None,
    exhaustive: bool = False,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    **options: Unpack[RunOptions],
) -> CriticalRank: ...
@overload
def critical_rank(
    model: Model,
    task: Sequence[Task],
    svd: Decomposition | Sequence[Decomposition],
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
    order: Any = None,
    exhaustive: bool = False,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    **options: Unpack[RunOptions],
) -> CriticalRanks: ...
@runs_model(RunOptions)
def critical_rank(
    model: Model,
    task: Task | Sequence[Task],
    svd: Decomposition | Sequence[Decomposition],
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
    order: Any = None,
    exhaustive: bool = False,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    **options: Unpack[RunOptions],
) -> CriticalRank | CriticalRanks:
    """Find the fewest directions from which the clipped model still gives the continuation.

    The curve need not be monotone. The search tries a grid, then closes in on the first crossing,
    with several ranks per forward pass. It then tries the neighbours of the crossing, and the
    smaller ranks where the curve comes near the threshold; if one of them reaches it, the search
    repeats from there. It costs at most a tenth of a full sweep, or 48 evaluations if that is
    more. The result is a crossing, and the smallest one seen.

    Args:
        svd: as in `sweep_rank`.
        tolerance: how much an edit may cost in the metric, in its unit; by default, how much
            log-probability the whole continuation may lose, in nats.
        criterion: another threshold, in place of `tolerance`: `drop_at_most`, `kl_at_most`,
            `change_at_most`, `same_greedy_text`, or any function of a measurement.
        order: in which the directions are kept; see `sweep_rank`.
        exhaustive: try every rank, for a certain answer, also for the lasting rank.
        metric: see `Metric`; by default that of the criterion.
        baseline: what the rest of a write is replaced by; see `gate`.
        options: see `RunOptions` (layers, components, positions, batch_size, progress, …).

    Raises:
        TypeError, ValueError: as `sweep_rank`; two thresholds; a threshold that the clean model
            does not reach.

    Example:
        >>> found = ms.critical_rank(model, task, svd, criterion=ms.kl_at_most(0.05))
        >>> found.rank, found.subspace(svd).rank
        (48, 48)
    """
    require_model(model)
    bases = require_decompositions(svd)
    full = max(one.rank for one in bases)
    if metric is None:
        metric = READY.get(getattr(criterion, "metric", None) or "")
    order, where = once(order), where_of(options)
    # each round needs them again, so a generator is read here
    options["layers"], options["positions"] = where.layers, where.positions
    ranks = [*range(full + 1)] if exhaustive else _evenly(0, full, PROBES + 1)

    def search_for(task: Task) -> CriticalRank:
        threshold = _threshold(tolerance, criterion, metric_for(metric, model, task))

        def sweep(ranks: list[int], is_first: bool) -> RankSweep:
            return sweep_rank(
                model,
                task,
                svd,
                ranks,
                order,
                baseline=baseline,
                metric=metric,
                noise_floor=is_first,
                **options,
            )

        return _search(sweep, threshold, ranks)

    with open_session(model, **options):
        if isinstance(task, Task):
            return search_for(task)
        return CriticalRanks(tuple(search_for(one) for one in as_tasks(task)))


def _search(
    sweep: Callable[[list[int], bool], RankSweep], threshold: Criterion, ranks: list[int]
) -> CriticalRank:
    """Sweep some ranks, then those that the outcome asks for, until none is left to try."""
    search = None
    while ranks:
        found = sweep(ranks, search is None)
        # each round runs the clean model too
        evaluations = len(ranks) + 1 + (search.evaluations if search else NOISE_ROWS)
        joint = join_sweeps(search.sweep, found) if search else found
        search = replace(critical_rank_of(joint, criterion=threshold), evaluations=evaluations)
        ranks = _next_ranks(search)
    assert search is not None  # the first round is never empty
    return search


@plain
def critical_rank_of(
    sweep: RankSweep,
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
    noise_floor: float | None = None,
) -> CriticalRank:
    """Read the critical rank off a finished sweep, among the ranks that it has.

    Args:
        tolerance, criterion: as in `critical_rank`.
        noise_floor: how far below the threshold still counts as reaching it; by default what the
            sweep measured for the threshold's metric, or 0.

    Raises:
        ValueError: two thresholds; a threshold that the clean model itself does not reach.

    Example:
        >>> ms.critical_rank_of(sweep, criterion=ms.kl_at_most(0.05)).rank
        48
    """
    require_kind(sweep, RankSweep)
    measured = sweep.measurement
    threshold = _threshold(tolerance, criterion, measured)
    rising = sweep.ranks.argsort(stable=True)
    measurement = sweep.measurement[rising]
    clean = measurement.clean_run
    floor = measurement.noise_floor if noise_floor is None else float(noise_floor)
    floor = floor or 0.0 if threshold.metric == _name(measurement) else 0.0
    clean_margin = float(_margins(threshold, replace(clean, clean=clean))[0])
    if not clean_margin >= -floor:  # NaN fails too
        raise ValueError(
            f"The clean model itself misses the threshold, {threshold.name}, by "
            f"{-clean_margin:.4g}, so no rank can be compared with it; for the same greedy text, "
            "make the task without a continuation."
        )
    rising_sweep = replace(sweep, ranks=sweep.ranks[rising], measurement=measurement)
    return CriticalRank(
        rising_sweep,
        _margins(threshold, measurement),
        floor,
        len(rising) + 1,
        threshold.name,
        threshold.unit,
    )


@plain
def ranks_without_each_token(
    sweep: RankSweep,
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
) -> Any:
    """The critical and the lasting rank of a sweep when each token in turn is not scored.

    It says how much a rank rests on single tokens. A rank that moves far decides little. Only the
    metrics that are sums or means over tokens are known without a token.

    Args:
        tolerance, criterion: as in `critical_rank_of`.

    Returns:
        A table with one row per scored token: token (its place), critical, lasting; empty cells
        where no rank reaches the threshold.

    Raises:
        ValueError: a single scored token, or another metric than those that a measurement carries.

    Example:
        >>> ms.ranks_without_each_token(sweep).columns.tolist()
        ['token', 'critical', 'lasting']
    """
    import pandas as pd

    require_kind(sweep, RankSweep)
    count = sweep.measurement.log_probs.shape[1]
    if count < 2 or sweep.measurement.scores is not None:
        raise ValueError(
            f"The sweep has {count} scored token(s) and the metric {sweep.measurement.metric!r}; "
            "leaving tokens out needs at least two, and a metric that sums over tokens."
        )
    rows = []
    for token in range(count):
        kept = torch.arange(count) != token
        measured = _of_tokens(sweep.measurement, kept)
        found = critical_rank_of(
            replace(sweep, measurement=measured), tolerance, criterion=criterion
        )
        rows.append({"token": token, "critical": found.rank, "lasting": found.lasting_rank})
    return pd.DataFrame(rows).astype({"critical": "Int64", "lasting": "Int64"})


def _of_tokens(measured: Measurement, kept: Bool[Tensor, " scored"]) -> Measurement:
    """A measurement of some of the scored tokens."""
    names = ("log_probs", "is_greedy", "kl_divergences")
    columns = {
        name: getattr(measured, name)[:, kept]
        for name in names
        if getattr(measured, name) is not None
    }
    clean = measured.clean and _of_tokens(measured.clean, kept)
    # both at once, since a clean run must have the tokens of the others
    return replace(measured, clean=clean, **columns)


def _name(measured: Metric | Measurement) -> str:
    return measured.metric if isinstance(measured, Measurement) else measured.name


def _threshold(
    tolerance: float,
    criterion: Callable[[Measurement], Tensor] | None,
    measured: Metric | Measurement,
) -> Criterion:
    if criterion is None:
        name = _name(measured)
        if name == log_prob.name:
            return drop_at_most(tolerance)
        return effect_at_most(tolerance, name, measured.unit)
    if tolerance:
        raise ValueError("`tolerance` and `criterion` are two thresholds; give one of them.")
    if not callable(criterion):
        raise TypeError(
            f"`criterion` must be a function of a measurement, but is {criterion!r:.60}; "
            "see `mechsvd.drop_at_most`."
        )
    if isinstance(criterion, Criterion):
        return criterion
    name = getattr(criterion, "__name__", "a threshold of your own")
    # a copy, since what it is given is part of the result
    return Criterion(name, "", lambda measurement: criterion(deepcopy(measurement)))


def _margins(threshold: Criterion, measurement: Measurement) -> Float[Tensor, " edit"]:
    margins = threshold(measurement)
    if (
        not isinstance(margins, Tensor)
        or margins.shape != (len(measurement),)
        or not margins.is_floating_point()
    ):
        returned = (
            f"{margins.dtype} {list(margins.shape)}"
            if isinstance(margins, Tensor)
            else type(margins).__name__
        )
        raise ValueError(
            "`criterion` must return a float for each edit, 0 or more where it is met, "
            f"but gave {returned} for {len(measurement)}."
        )
    # what is not a number reaches nothing, whatever a criterion makes of it
    return margins.masked_fill(measurement.log_probs.isnan().any(dim=-1), torch.nan)


def _next_ranks(search: CriticalRank) -> list[int]:
    """The ranks to try next: near the first that reaches the threshold, then elsewhere below."""
    ranks, full, candidates = search.sweep.ranks.tolist(), search.sweep.full_rank, list[int]()
    first = full if search.rank is None else search.rank
    below = max((rank for rank in ranks if rank < first), default=first)
    if search.rank is not None and first - below > 1:
        candidates = _evenly(below, first, PROBES + 2)
    elif search.rank is not None:
        near = max(PROBES, full // 48)
        candidates = [*range(max(0, first - near), min(full, first + near // 2) + 1)]
    untried = (
        sorted({*candidates} - {*ranks}, key=lambda rank: abs(rank - first))
        or _middles(search, first)[:PROBES]
    )
    affordable = max(LEAST, (full + 1) // SHARE) - search.evaluations - 1
    return sorted(untried[: max(0, affordable)])


def _middles(search: CriticalRank, first: int) -> list[int]:
    """The middles of the gaps below `first`, those nearest to the threshold first."""
    margins = search.margins.nan_to_num(nan=-torch.inf)
    tried = list(zip(search.sweep.ranks.tolist(), margins.tolist(), strict=True))
    gaps = [
        (max(m, n), (a + b) // 2) for (a, m), (b, n) in pairwise(tried) if b - a > 1 and b <= first
    ]
    return [middle for _, middle in sorted(gaps, reverse=True)]


def _evenly(low: int, high: int, count: int) -> list[int]:
    return sorted({round(low + (high - low) * i / max(1, count - 1)) for i in range(count)})
