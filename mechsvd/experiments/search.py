"""The smallest rank from which a model still gives the text, from few probes of a curve that need not be monotone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_number, once, with_options
from mechsvd.engine.measurement import Measurement, concatenate
from mechsvd.engine.noise import NOISE_ROWS
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.experiments.sweeps import RankSweep, sweep_rank
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model, require_model, where_of
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, require_kind, require_same_model, result

PROBES = 8  # a round
SHARE = 10  # a search may cost one in so many of a full sweep's evaluations,
LEAST = 48  # or so many, where that is more
NATS = "nats"  # the unit that the noise floor is in


@dataclass(frozen=True)
class Criterion:
    """A threshold that an edit reaches or misses.

    Attributes:
        name: what is asked, in words.
        unit: of the margin.
        margin: a function of a measurement that gives how far each edit is above (≥ 0) or below the threshold.
    """

    name: str
    unit: str
    margin: Callable[[Measurement], Float[Tensor, " edit"]]

    def __call__(self, measured: Measurement) -> Any:
        """How far each edit is above (≥ 0) or below the threshold."""
        return self.margin(measured)


@result
class CriticalRank(Result):
    """The smallest rank, of those tried, whose directions give the text, and all that was tried.

    Attributes:
        sweep: the ranks that were tried, rising.
        margins: how far each is above (≥ 0) or below the threshold: in nats, unless the criterion says otherwise.
        noise_floor: margins no further below 0 than this count as reaching the threshold; 0 for a threshold that is not in nats.
        evaluations: how many rows went through the model, the clean ones and those for the noise floor too.
        criterion: the threshold's name.
        unit: of the margins.
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
        """Which margins say nothing, being within the numerical noise."""
        return (self.margins.abs() <= self.noise_floor) & (self.noise_floor > 0)

    @property
    def rank(self) -> int | None:
        """The smallest rank that reaches the threshold; None where none of those tried does."""
        return int(self.sweep.ranks[self.reached][0]) if self.reached.any() else None

    @property
    def is_certain(self) -> bool:
        """Whether every smaller rank was tried."""
        smaller = torch.arange((len(self.sweep.order) if self.rank is None else self.rank) + 1)
        return torch.equal(self.sweep.ranks[: len(smaller)], smaller)

    @property
    def crossings(self) -> tuple[tuple[int, int], ...]:
        """Neighbours among the ranks tried of which one reaches the threshold and the other does not, smaller rank first."""
        changes = (self.reached[1:] != self.reached[:-1]).nonzero().flatten().tolist()
        ranks = self.sweep.ranks.tolist()
        return tuple((ranks[i], ranks[i + 1]) for i in changes)

    def subspace(self, svd: Decomposition) -> Subspace:
        """The span of the directions that the critical rank keeps, in the order of the sweep; of rank 0 where none is needed.

        Raises:
            ValueError: no rank that was tried reaches the threshold, or a decomposition of other directions.
        """
        require_decomposition(svd)
        if len(self.sweep.order) != svd.rank:
            raise ValueError(
                f"The search was over {len(self.sweep.order)} directions, but the decomposition has {svd.rank}."
            )
        require_same_model(self.sweep.basis_source, svd.source, "The search and the decomposition")
        if self.rank is None:
            more = "" if self.is_certain else "try every rank by `exhaustive=True`, "
            raise ValueError(
                f"None of the {len(self.sweep.ranks)} ranks tried reaches {self.criterion}, so there is no subspace; allow a "
                f"`tolerance`, {more}or keep all directions by `svd.subspace(svd.rank)`."
            )
        return Subspace(svd.directions[:, self.sweep.order[: self.rank]], svd.source)

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.sweep.source

    def to_pandas(self) -> Any:
        """One row a rank tried: rank, log_prob, margin, reached, is_tie (within the noise floor)."""
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


def drop_at_most(nats: float = 0.0, *, each_token: bool = False) -> Criterion:
    """The threshold that the continuation loses no more log-probability than this against the clean run.

    Args:
        nats: for the whole continuation, or, with `each_token`, for each of its tokens.

    Raises:
        ValueError: a drop below 0, or not finite.
    """
    if not is_number(nats, 0):
        raise ValueError(
            f"A drop of {nats!r:.40} nats cannot be allowed: `drop_at_most` takes a number, 0 or more."
        )

    def margin(measured: Measurement) -> Float[Tensor, " edit"]:
        if each_token:
            return (measured.log_probs - measured.clean_run.log_probs).amin(dim=-1) + nats
        return measured.log_prob - measured.clean_run.log_prob + nats

    return Criterion(
        f"a drop of at most {nats:g} nats" + (" at each token" if each_token else ""), NATS, margin
    )


def _greedy_margin(measured: Measurement) -> Float[Tensor, " edit"]:
    return -(~measured.is_greedy).sum(dim=-1).to(measured.log_probs)


# The model would say the continuation greedily; the margin is minus the number of tokens that it would not.
same_greedy_text = Criterion("same_greedy_text", "tokens", _greedy_margin)


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
    """Find the smallest number of directions from which the clipped model still gives the continuation.

    The curve need not be monotone. The search tries a grid, closes in on the first crossing with several ranks in each forward
    pass, then looks at its neighbours and where else below it the curve comes near the threshold, and begins again where
    one of them is smaller. It costs at most a tenth of a full sweep, or 48 evaluations where that is more. What it finds is a crossing, and the
    smallest one that it saw.

    Args:
        tolerance: how much log-probability the whole continuation may lose, in nats.
        criterion: another threshold, in place of `tolerance`: `drop_at_most`, `same_greedy_text`, or any function of a measurement.
        order: in which the directions are kept; see `sweep_rank`.
        exhaustive: try every rank, for the certain answer.
        options: see `RunOptions` (layers, components, positions, batch_size, progress, …).

    Raises:
        TypeError, ValueError: as `sweep_rank`; two thresholds; a threshold that the clean model does not reach.
    """
    require_model(model)
    require_decomposition(svd)
    threshold, found = _threshold(tolerance, criterion), None
    order, where = once(order), where_of(options)
    options["layers"], options["positions"] = (
        where.layers,
        where.positions,
    )  # each round needs them, were they generators
    ranks = [*range(svd.rank + 1)] if exhaustive else _evenly(0, svd.rank, PROBES + 1)
    with open_session(model, **options):
        while ranks:
            sweep = sweep_rank(model, task, svd, ranks, order, noise_floor=found is None, **options)
            spent = (
                len(ranks) + 1 + (NOISE_ROWS if found is None else found.evaluations)
            )  # each round runs the clean model too
            found = replace(
                critical_rank_of(
                    _together(found.sweep, sweep) if found else sweep, criterion=threshold
                ),
                evaluations=spent,
            )
            ranks = _next_ranks(found)
    assert found is not None  # the first round is never empty
    return found


def critical_rank_of(
    sweep: RankSweep,
    tolerance: float = 0.0,
    *,
    criterion: Callable[[Measurement], Float[Tensor, " edit"]] | None = None,
    noise_floor: float | None = None,
) -> CriticalRank:
    """Read the critical rank off a sweep that is there already, among the ranks that it has.

    Args:
        tolerance, criterion: as in `critical_rank`.
        noise_floor: how far below a threshold of nats still counts as reaching it; what the sweep measured by default, or 0.

    Raises:
        ValueError: two thresholds; a threshold that the clean model itself does not reach.
    """
    require_kind(sweep, RankSweep)
    threshold = _threshold(tolerance, criterion)
    rising = sweep.ranks.argsort(stable=True)
    measured = sweep.measurement[rising]
    clean, floor = (
        measured.clean_run,
        measured.noise_floor if noise_floor is None else float(noise_floor),
    )
    floor = floor or 0.0 if threshold.unit == NATS else 0.0
    if not (best := float(_margins(threshold, replace(clean, clean=clean))[0])) >= -floor:
        raise ValueError(
            f"The clean model itself misses the threshold, {threshold.name}, by {-best:.4g}, so no rank "
            "can be compared with it; for the same greedy text, make the task without a continuation."
        )
    rising_sweep = replace(sweep, ranks=sweep.ranks[rising], measurement=measured)
    return CriticalRank(
        rising_sweep,
        _margins(threshold, measured),
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
            f"`criterion` must be a function of a measurement, but is {criterion!r:.60}; see `mechsvd.drop_at_most`."
        )
    if isinstance(criterion, Criterion):
        return criterion
    return Criterion(getattr(criterion, "__name__", "a threshold of your own"), "", criterion)


def _margins(threshold: Criterion, measured: Measurement) -> Float[Tensor, " edit"]:
    margins = threshold(measured)
    if (
        not isinstance(margins, Tensor)
        or margins.shape != (len(measured),)
        or not margins.is_floating_point()
    ):
        returned = (
            f"{margins.dtype} {list(margins.shape)}"
            if isinstance(margins, Tensor)
            else type(margins).__name__
        )
        raise ValueError(
            f"`criterion` must return a float for each edit, 0 or more where it is met, but gave {returned} for {len(measured)}."
        )
    return margins


def _next_ranks(found: CriticalRank) -> list[int]:
    """The ranks to try next: around the first that reaches the threshold, then elsewhere below it."""
    ranks, full, wanted = found.sweep.ranks.tolist(), len(found.sweep.order), list[int]()
    first = full if found.rank is None else found.rank
    below = max((rank for rank in ranks if rank < first), default=first)
    if found.rank is not None and first - below > 1:
        wanted = _evenly(below, first, PROBES + 2)
    elif found.rank is not None:
        near = max(PROBES, full // 48)
        wanted = [*range(max(0, first - near), min(full, first + near // 2) + 1)]
    untried = (
        sorted({*wanted} - {*ranks}, key=lambda rank: abs(rank - first))
        or _nearly(found, first)[:PROBES]
    )
    affordable = max(LEAST, (full + 1) // SHARE) - found.evaluations - 1
    return sorted(untried[: max(0, affordable)])


def _nearly(found: CriticalRank, first: int) -> list[int]:
    """The middles of the gaps below the first that reaches the threshold, those first where the curve comes nearest to it."""
    tried = list(zip(found.sweep.ranks.tolist(), found.margins.tolist(), strict=True))
    gaps = [
        (max(m, n), (a + b) // 2) for (a, m), (b, n) in pairwise(tried) if b - a > 1 and b <= first
    ]
    return [middle for _, middle in sorted(gaps, reverse=True)]


def _evenly(low: int, high: int, count: int) -> list[int]:
    return sorted({round(low + (high - low) * i / max(1, count - 1)) for i in range(count)})


def _together(first: RankSweep, second: RankSweep) -> RankSweep:
    """Both rounds; the noise floor is at least how far the clean log-probability moved between them, in other batch sizes."""
    measured = concatenate([first.measurement, second.measurement])
    moved = float(
        (first.measurement.clean_run.log_prob - second.measurement.clean_run.log_prob).abs()
    )
    measured = replace(measured, noise_floor=max(moved, measured.noise_floor or 0.0))
    return replace(first, ranks=torch.cat([first.ranks, second.ranks]), measurement=measured)
