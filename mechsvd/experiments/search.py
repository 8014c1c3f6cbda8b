"""The critical rank: a search with few probes of a curve that need not be monotone."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import once, with_options
from mechsvd.engine.measurement import Measurement, concatenate
from mechsvd.engine.noise import NOISE_ROWS
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.experiments.criteria import NATS, Criterion, drop_at_most
from mechsvd.experiments.sweeps import RankSweep, sweep_rank
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model, require_model, where_of
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, require_kind, require_same_model, result

PROBES = 8  # ranks per round
SHARE = 10  # a search may cost a tenth of the evaluations of a full sweep,
LEAST = 48  # or this many, if that is more


@result
class CriticalRank(Result):
    """The smallest rank tried whose directions give the text, and all ranks tried.

    Attributes:
        sweep: the ranks that were tried, rising.
        margins: how far each rank is above (≥ 0) or below the threshold, in `unit`.
        noise_floor: margins down to minus this count as reaching the threshold; 0 for a threshold
            that is not in nats.
        evaluations: number of rows run through the model, including the clean ones and those for
            the noise floor.
        criterion: the threshold's name.
        unit: of the margins; nats by default.
    """

    sweep: RankSweep
    margins: Float[Tensor, " edit"]
    noise_floor: float
    evaluations: int
    criterion: str
    unit: str = NATS

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
    def is_certain(self) -> bool:
        """Whether every smaller rank was tried."""
        smaller = torch.arange((len(self.sweep.order) if self.rank is None else self.rank) + 1)
        return torch.equal(self.sweep.ranks[: len(smaller)], smaller)

    @property
    def crossings(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring ranks, smaller one first, of which only one reaches the threshold."""
        changes = (self.reached[1:] != self.reached[:-1]).nonzero().flatten().tolist()
        ranks = self.sweep.ranks.tolist()
        return tuple((ranks[i], ranks[i + 1]) for i in changes)

    def subspace(self, svd: Decomposition) -> Subspace:
        """The span of the directions that the critical rank keeps, in the order of the sweep.

        It has rank 0 if no direction is needed.

        Raises:
            ValueError: no rank tried reaches the threshold, or a decomposition of other
                directions.
        """
        require_decomposition(svd)
        if len(self.sweep.order) != svd.rank:
            raise ValueError(
                f"The search was over {len(self.sweep.order)} directions, "
                f"but the decomposition has {svd.rank}."
            )
        require_same_model(self.sweep.basis_source, svd.source, "The search and the decomposition")
        if self.rank is None:
            advice = "" if self.is_certain else "try every rank by `exhaustive=True`, "
            raise ValueError(
                f"None of the {len(self.sweep.ranks)} ranks tried reaches {self.criterion}, "
                f"so there is no subspace; allow a `tolerance`, {advice}"
                "or keep all directions by `svd.subspace(svd.rank)`."
            )
        return Subspace(svd.directions[:, self.sweep.order[: self.rank]], svd.source)

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.sweep.source

    def to_pandas(self) -> Any:
        """One row per rank tried: rank, log_prob, margin, reached, is_tie (within the noise)."""
        table = self.sweep.to_pandas()[["rank", "log_prob"]]
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
        return (
            f"Critical rank {which} of {len(self.sweep.order)} directions, for {self.criterion}\n"
            f"  {len(self.crossings)} crossing(s) at {self.evaluations} evaluations; {certain}\n"
            f"  on {self._origin()}"
        )


@with_options(RunOptions)
def critical_rank(
    model: Model,
    task: Task,
    svd: Decomposition,
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
    order: Any = None,
    exhaustive: bool = False,
    **options: Unpack[RunOptions],
) -> CriticalRank:
    """Find the fewest directions from which the clipped model still gives the continuation.

    The curve need not be monotone. The search tries a grid, then closes in on the first crossing,
    with several ranks per forward pass. It then tries the neighbours of the crossing, and the
    smaller ranks where the curve comes near the threshold; if one of them reaches it, the search
    repeats from there. It costs at most a tenth of a full sweep, or 48 evaluations if that is
    more. The result is a crossing, and the smallest one seen.

    Args:
        tolerance: how much log-probability the whole continuation may lose, in nats.
        criterion: another threshold, in place of `tolerance`: `drop_at_most`, `same_greedy_text`,
            or any function of a measurement.
        order: in which the directions are kept; see `sweep_rank`.
        exhaustive: try every rank, for a certain answer.
        options: see `RunOptions` (layers, components, positions, batch_size, progress, …).

    Raises:
        TypeError, ValueError: as `sweep_rank`; two thresholds; a threshold that the clean model
            does not reach.
    """
    require_model(model)
    require_decomposition(svd)
    threshold, search = _threshold(tolerance, criterion), None
    order, where = once(order), where_of(options)
    # each round needs them again, so a generator is read here
    options["layers"], options["positions"] = where.layers, where.positions
    ranks = [*range(svd.rank + 1)] if exhaustive else _evenly(0, svd.rank, PROBES + 1)
    with open_session(model, **options):
        while ranks:
            is_first = search is None
            sweep = sweep_rank(model, task, svd, ranks, order, noise_floor=is_first, **options)
            # each round runs the clean model too
            evaluations = len(ranks) + 1 + (search.evaluations if search else NOISE_ROWS)
            sweep = _join(search.sweep, sweep) if search else sweep
            critical = critical_rank_of(sweep, criterion=threshold)
            search = replace(critical, evaluations=evaluations)
            ranks = _next_ranks(search)
    assert search is not None  # the first round is never empty
    return search


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
        noise_floor: how far below a threshold in nats still counts as reaching it; by default
            what the sweep measured, or 0.

    Raises:
        ValueError: two thresholds; a threshold that the clean model itself does not reach.
    """
    require_kind(sweep, RankSweep)
    threshold = _threshold(tolerance, criterion)
    rising = sweep.ranks.argsort(stable=True)
    measurement = sweep.measurement[rising]
    clean = measurement.clean_run
    floor = measurement.noise_floor if noise_floor is None else float(noise_floor)
    floor = floor or 0.0 if threshold.unit == NATS else 0.0
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


def _threshold(tolerance: float, criterion: Callable[[Measurement], Tensor] | None) -> Criterion:
    if criterion is None:
        return drop_at_most(tolerance)
    if tolerance:
        raise ValueError("`tolerance` and `criterion` are two thresholds; give one of them.")
    if not callable(criterion):
        raise TypeError(
            f"`criterion` must be a function of a measurement, but is {criterion!r:.60}; "
            "see `mechsvd.drop_at_most`."
        )
    if isinstance(criterion, Criterion):
        return criterion
    return Criterion(getattr(criterion, "__name__", "a threshold of your own"), "", criterion)


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
    return margins


def _next_ranks(search: CriticalRank) -> list[int]:
    """The ranks to try next: near the first that reaches the threshold, then elsewhere below."""
    ranks, full, candidates = search.sweep.ranks.tolist(), len(search.sweep.order), list[int]()
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
    tried = list(zip(search.sweep.ranks.tolist(), search.margins.tolist(), strict=True))
    gaps = [
        (max(m, n), (a + b) // 2) for (a, m), (b, n) in pairwise(tried) if b - a > 1 and b <= first
    ]
    return [middle for _, middle in sorted(gaps, reverse=True)]


def _evenly(low: int, high: int, count: int) -> list[int]:
    return sorted({round(low + (high - low) * i / max(1, count - 1)) for i in range(count)})


def _join(first: RankSweep, second: RankSweep) -> RankSweep:
    """Join two rounds of a search.

    The clean log-probability may differ between them, by other batch sizes; the noise floor is at
    least this difference.
    """
    joint = concatenate([first.measurement, second.measurement])
    clean, other = first.measurement.clean_run.log_prob, second.measurement.clean_run.log_prob
    floor = max(float((clean - other).abs()), joint.noise_floor or 0.0)
    joint = replace(joint, noise_floor=floor)
    return replace(first, ranks=torch.cat([first.ranks, second.ranks]), measurement=joint)
