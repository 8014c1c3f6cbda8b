"""The shortform's experiment on one prompt, in its order, and the comparison of prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mechsvd.attribution.gradients import collect_gradients, gradient_basis
from mechsvd.attribution.hessian import PAIRS, hessian_attribution
from mechsvd.attribution.scores import Attribution
from mechsvd.checks import warn
from mechsvd.edits.bases import keep
from mechsvd.engine.progress import begin_step
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.engine.writes import Writes, collect_writes
from mechsvd.experiments.adaptive import sweep_adaptively
from mechsvd.experiments.anchors import OverlapAnchors, overlap_anchors
from mechsvd.experiments.contrast_results import Contrast
from mechsvd.experiments.contrasts import contrast
from mechsvd.experiments.direction_cards import DirectionCards
from mechsvd.experiments.directions import describe
from mechsvd.experiments.generation import generate_tasks
from mechsvd.experiments.heldout import OWN, RANDOM, HeldOut, fit_and_measure
from mechsvd.experiments.random_texts import RandomTextComparison, compare_with_random_texts
from mechsvd.experiments.ranking import (
    Ranking,
    order_at_random,
    order_by_compromise,
    order_by_effect,
    order_by_singular_value,
    rank_directions,
)
from mechsvd.experiments.ridge import RidgeSweep, sweep_ridge
from mechsvd.experiments.search import CriticalRank, critical_rank_of
from mechsvd.experiments.sweeps import RankSweep, sweep_rank
from mechsvd.linalg.comparison import Overlap, Pool, overlap, pool, principal_angles
from mechsvd.linalg.decomposition import Decomposition, decompose
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.readout import UnreadableError
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task
from mechsvd.report.choices import Choices

WHOLE = Choices()  # every part, and every rank
# the names of the orders
BY_SIZE, BY_KL = "singular value", "KL divergence"
SIGNED = "the shortform's signed effect"
RANKS = (8, 16, 32)  # of the subspaces whose overlap is compared with nulls
QUICK = 33  # ranks of a quick sweep, before its lasting rank is sought
PRODUCTS = 256  # with the Hessian, about as many as Lanczos takes for the largest pairs
ANCHORED = 12  # texts at most in that comparison
TWINNED, FEWEST = 24, 8  # texts compared with random ones: at most, and enough to tell
SPECIAL = 8  # directions of each group of texts
FOLDS = 5  # of the texts, or one text a fold if there are fewer
DESCRIBED = 4  # directions of each prompt that have a card: half by size, half by effect
FEWER = (0.75, 0.5, 0.25)  # shares of the critical rank that also write texts


@dataclass(frozen=True)
class Text:
    """Texts from one start, by the clean model and from inside several subspaces.

    Attributes:
        start: name of the start, such as the prompt that the text continues.
        ranks: number of kept directions; None for the clean model.
        tasks: one per rank: the start with its text.
    """

    start: str
    ranks: tuple[int | None, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Study:
    """All results for one prompt; those of parts that were left out are None."""

    name: str
    task: Task
    writes: Writes
    pooled: Decomposition
    layers: tuple[Decomposition, ...]
    ranking: Ranking | Any
    sweeps: dict[str, RankSweep]  # by the name of the order
    by_site: RankSweep | Any  # with a basis per site
    ridge: RidgeSweep | Any
    critical: CriticalRank
    texts: tuple[Text, ...]
    attribution: Attribution | Any  # of the probability to the gains
    elsewhere: dict[str, RankSweep] = field(default_factory=dict)  # directions of other texts
    cards: DirectionCards | None = None  # None where the unembedding cannot be read
    errors: tuple[float, ...] = ()  # factors between the curves of few ranks and ranks in between
    choices: Choices = WHOLE
    metric_sweep: RankSweep | None = None  # in the chosen metric
    metric_ranking: Ranking | None = None

    @property
    def sweep(self) -> RankSweep:
        """The sweep by falling singular value."""
        return self.sweeps[BY_SIZE]

    @property
    def fits(self) -> dict[str, RankSweep]:
        """Sweeps with one basis for all sites, by what it is fitted on; see `with_held_out`."""
        return {OWN: self.sweep} | self.elsewhere

    @property
    def subspace(self) -> Subspace:
        """The subspace of the critical rank; all directions if there is none."""
        return self.pooled.subspace(_rank_or_all(self.critical, self.pooled))


@dataclass(frozen=True)
class Comparison:
    """Several prompts: subspaces at the critical ranks, and directions fitted on other prompts.

    Those of parts that were left out are None.
    """

    names: tuple[str, ...]
    overlap: Overlap
    pool: Pool
    angles: dict[tuple[str, str], Tensor]  # principal angles of each pair, in radians
    held_out: HeldOut | Any
    anchors: OverlapAnchors | Any
    random_texts: RandomTextComparison | None


def study_task(
    model: Model,
    name: str,
    task: Task,
    starts: Mapping[str, Tensor],
    choices: Choices = WHOLE,
    *,
    others: Sequence[Task] = (),
) -> Study:
    """Run the whole experiment for one task, or the chosen parts of it.

    Args:
        starts: token ids that generated text continues, by name of the start.
        others: tasks whose gradients are also in the second moment, which gives a basis.
    """
    options = choices.options
    with open_session(model, **options):
        begin_step("writes")
        writes = collect_writes(model, task, **options)
        svd = decompose(writes)
        begin_step("ranking")
        ranking = rank_directions(model, task, svd, **options) if choices.takes_ranking else None
        run = _Sweeps(model, task, choices)
        begin_step("ranks")
        sweeps = {BY_SIZE: run.sweep(svd)}
        floor = None if ranking is None else ranking.noise_floor
        critical = critical_rank_of(sweeps[BY_SIZE], noise_floor=floor)
        begin_step("other orders")
        if ranking is not None and "orders" in choices:
            orders = _orders(svd, ranking, choices.seed)
            sweeps |= {kind: run.sweep(svd, order) for kind, order in orders.items()}
        begin_step("a basis per site")
        by_site = run.sweep(decompose(writes, per="site")) if "clipping" in choices else None
        begin_step("ridge")
        ridge = sweep_ridge(model, task, svd, **options) if "ridge" in choices else None
        begin_step("texts")
        kept, length = _rank_or_all(critical, svd), len(task.continuation)
        texts = _texts(model, svd, kept, starts, length, options) if "texts" in choices else ()
        begin_step("attribution")
        every = [task, *others]
        attribution = _attribution(model, svd, every, choices) if "attribution" in choices else None
        begin_step("cards")
        cards = _cards(model, task, svd, ranking, choices) if "cards" in choices else None
        begin_step("metric")
        metric_sweep, metric_ranking = run.in_metric(svd)
    return Study(
        name,
        task,
        writes,
        svd,
        decompose(writes, per="layer"),
        ranking,
        sweeps,
        by_site,
        ridge,
        critical,
        texts,
        attribution,
        cards=cards,
        errors=tuple(run.errors),
        choices=choices,
        metric_sweep=metric_sweep,
        metric_ranking=metric_ranking,
    )


@dataclass
class _Sweeps:
    """The sweeps of one task, over the chosen ranks.

    Attributes:
        errors: see `Study`.
    """

    model: Model
    task: Task
    choices: Choices
    errors: list[float] = field(default_factory=list)

    def sweep(self, basis: Any, order: Tensor | None = None) -> RankSweep:
        """Sweep the chosen ranks; of a quick study, few that are placed where the curve bends."""
        ranks, options = self._ranks(basis), self.choices.options
        if ranks is not None or not self.choices.quick:
            return sweep_rank(self.model, self.task, basis, ranks, order, **options)
        found = sweep_adaptively(self.model, self.task, basis, QUICK, order, **options)
        self.errors.extend(found.errors.tolist())
        return found.sweep

    def in_metric(self, svd: Decomposition) -> tuple[RankSweep | None, Ranking | None]:
        """The sweep and the ranking in the chosen metric, of a study with the parts that show it."""
        metric, options, sweep, ranking = self.choices.metric, self.choices.options, None, None
        if metric is not None and "clipping" in self.choices:
            ranks = self._ranks(svd)
            if ranks is None and self.choices.quick:
                ranks = [*range(0, svd.rank + 1, math.ceil(svd.rank / QUICK))]
            sweep = sweep_rank(self.model, self.task, svd, ranks, metric=metric, **options)
        if metric is not None and "directions" in self.choices:
            ranking = rank_directions(self.model, self.task, svd, metric=metric, **options)
        return sweep, ranking

    def _ranks(self, basis: Any) -> list[int] | None:
        bases = basis if isinstance(basis, tuple) else (basis,)
        return self.choices.visited(max(one.rank for one in bases))


def compare(
    model: Model,
    studies: Sequence[Study],
    choices: Choices = WHOLE,
    *,
    more: Sequence[Task] = (),
) -> Comparison:
    """Compare at least two prompts: their subspaces, and directions of one on another.

    Args:
        more: eight of these are compared with random ones if the prompts are fewer.
    """
    options, seed = choices.options, choices.seed
    subspaces = [study.subspace for study in studies]
    names = tuple(study.name for study in studies)
    tasks = [study.task for study in studies]
    pairs = combinations(zip(names, subspaces, strict=True), 2)
    angles = {(a, b): principal_angles(first, second) for (a, first), (b, second) in pairs}
    begin_step("held-out texts")
    held_out = anchors = random = None
    if "held-out" in choices:
        folds, ranks = min(FOLDS, len(studies)), _held_out_ranks(studies[0], choices)
        held_out = fit_and_measure(model, tasks, folds, ranks=ranks, seed=seed, **options)
    begin_step("overlaps")
    if "prompts" in choices:
        sizes = _anchor_sizes(studies)
        anchors = overlap_anchors(model, tasks[:ANCHORED], sizes, seed=seed, **options)
    begin_step("texts of random tokens")
    if "told" in choices:
        several, most = (more, FEWEST) if len(tasks) < FEWEST <= len(more) else (tasks, TWINNED)
        chosen = several[:: math.ceil(len(several) / most)]
        random = compare_with_random_texts(model, chosen, seed=seed, **options)
    return Comparison(names, overlap(subspaces), pool(subspaces), angles, held_out, anchors, random)


def _held_out_ranks(study: Study, choices: Choices) -> list[int] | None:
    """The ranks of sweeps with other texts' directions, which end at d_model and hold 0."""
    d_model = study.pooled.d_model
    visited = choices.visited(d_model)
    if visited is not None:
        return sorted({0, *visited})
    return [*range(0, d_model + 1, math.ceil(d_model / QUICK))] if choices.quick else None


def _anchor_sizes(studies: Sequence[Study]) -> list[int]:
    half = min(len(study.writes) for study in studies) // 2  # writes of half a text
    most = min(half // 2, studies[0].pooled.d_model // 2)
    return [rank for rank in RANKS if rank <= most] or [1]


def with_held_out(studies: Sequence[Study], held_out: HeldOut) -> list[Study]:
    """Give each study the sweeps of its text with directions of other texts, and random ones."""
    fits = {
        fit.fitted: fit.sweeps.parts
        for fit in held_out.fits
        if fit.basis == "pooled"
        and fit.fitted != OWN
        and (fit.order == BY_SIZE or fit.fitted == RANDOM)
    }
    return [
        replace(study, elsewhere={name: parts[i] for name, parts in fits.items()})
        for i, study in enumerate(studies)
    ]


def compare_groups(
    model: Model, groups: Mapping[str, Sequence[Task]], choices: Choices = WHOLE
) -> Contrast:
    """Split the dimensions into those special to each group of texts and those shared."""
    k = min(SPECIAL, model.cfg.d_model // 4)
    return contrast(model, groups, k, seed=choices.seed, **choices.options)


def _rank_or_all(critical: CriticalRank, svd: Decomposition) -> int:
    return svd.rank if critical.rank is None else critical.rank


def _orders(svd: Decomposition, ranking: Ranking, seed: int) -> dict[str, Tensor]:
    """All orders but the first one, by singular value."""
    return {
        BY_KL: order_by_effect(ranking, by="kl_divergence"),
        "compromise": order_by_compromise(svd, ranking, by="kl_divergence"),
        SIGNED: order_by_effect(ranking),
        "random": order_at_random(svd, seed),
        "reversed": order_by_singular_value(svd).flip(0),
    }


def _attribution(
    model: Model, svd: Decomposition, tasks: Sequence[Task], choices: Choices
) -> Attribution:
    """Attribute the first task's probability to the gains, in the Hessian basis and three others.

    Each basis has the same number of directions: all, where the whole Hessian takes no more
    products than the largest eigenpairs alone would.
    """
    options = choices.options
    gradients = gradient_basis(collect_gradients(model, tasks, svd, **options)).directions
    few = choices.quick or len(gradients) > PRODUCTS
    pairs = min(PAIRS, len(gradients)) if few else len(gradients)
    bases = {
        "singular directions": torch.eye(len(gradients))[:, :pairs],
        "gradients": gradients[:, :pairs],
    }
    return hessian_attribution(
        model, tasks[0], svd, pairs=pairs, bases=bases, seed=choices.seed, **options
    )


def _cards(
    model: Model, task: Task, svd: Decomposition, ranking: Any, choices: Choices
) -> DirectionCards | None:
    """Cards of the directions with the largest singular values, and of the most needed others."""
    by_size = range(min(DESCRIBED // 2, svd.rank))
    needed = order_by_effect(ranking, by="kl_divergence").tolist()
    others = [j for j in needed if j not in by_size][: DESCRIBED - len(by_size)]
    try:
        chosen = [*by_size, *others]
        return describe(model, svd, chosen, task, seed=choices.seed, **choices.options)
    except UnreadableError as error:
        warn(f"No cards of directions: {error}")
        return None


def _texts(
    model: Model,
    svd: Decomposition,
    critical: int,
    starts: Mapping[str, Tensor],
    length: int,
    options: RunOptions,
) -> tuple[Text, ...]:
    fewer = sorted(
        {max(1, round(share * critical)) for share in FEWER} & {*range(critical)}, reverse=True
    )
    ranks = (None, critical, *fewer)
    edits = [None if rank is None else keep(svd.subspace(rank)) for rank in ranks]
    texts = []
    for start, tokens in starts.items():
        room = min(length, model.cfg.n_ctx - len(tokens))
        tasks = generate_tasks(model, tokens, edits, max_new_tokens=room, **options)
        texts.append(Text(start, ranks, tuple(tasks)))
    return tuple(texts)
