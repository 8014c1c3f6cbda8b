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
from mechsvd.model.sites import COMPONENTS, Model
from mechsvd.model.tasks import Task

# the names of the orders
BY_SIZE, BY_KL = "singular value", "KL divergence"
SIGNED = "the shortform's signed effect"
SWEEPS = 7  # over all directions, per task: six orders, and the ranking
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
    """All results for one prompt."""

    name: str
    task: Task
    writes: Writes
    pooled: Decomposition
    layers: tuple[Decomposition, ...]
    ranking: Ranking
    sweeps: dict[str, RankSweep]  # by the name of the order
    by_site: RankSweep  # with a basis per site
    ridge: RidgeSweep
    critical: CriticalRank
    texts: tuple[Text, ...]
    attribution: Attribution  # of the probability to the gains
    elsewhere: dict[str, RankSweep] = field(default_factory=dict)  # directions of other texts
    cards: DirectionCards | None = None  # None where the unembedding cannot be read
    errors: tuple[float, ...] = ()  # factors between the curves of few ranks and ranks in between

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
    """Several prompts: subspaces at the critical ranks, and directions fitted on other prompts."""

    names: tuple[str, ...]
    overlap: Overlap
    pool: Pool
    angles: dict[tuple[str, str], Tensor]  # principal angles of each pair, in radians
    held_out: HeldOut
    anchors: OverlapAnchors
    random_texts: RandomTextComparison


def study_task(
    model: Model,
    name: str,
    task: Task,
    starts: Mapping[str, Tensor],
    components: Sequence[str] = COMPONENTS,
    progress: bool | None = None,
    *,
    others: Sequence[Task] = (),
    quick: bool = False,
) -> Study:
    """Run the whole experiment for one task.

    Args:
        starts: token ids that generated text continues, by name of the start.
        others: tasks whose gradients are also in the second moment, which gives a basis.
        components: whose writes are collected and clipped, attn or mlp.
        quick: sweep few ranks, placed where the curve bends, and only the largest eigenpairs.
    """
    options: RunOptions = {"components": components, "progress": progress}
    with open_session(model, **options):
        writes = collect_writes(model, task, **options)
        svd = decompose(writes)
        ranking = rank_directions(model, task, svd, **options)
        errors: list[float] = []

        def sweep(basis: Any, order: Tensor | None = None) -> RankSweep:
            if not quick:
                return sweep_rank(model, task, basis, order=order, **options)
            found = sweep_adaptively(model, task, basis, QUICK, order, **options)
            errors.extend(found.errors.tolist())
            return found.sweep

        sweeps = {kind: sweep(svd, order) for kind, order in _orders(svd, ranking).items()}
        critical = critical_rank_of(sweeps[BY_SIZE], noise_floor=ranking.noise_floor)
        layers = decompose(writes, per="layer")
        by_site = sweep(decompose(writes, per="site"))
        ridge = sweep_ridge(model, task, svd, **options)
        texts = _texts(
            model, svd, _rank_or_all(critical, svd), starts, len(task.continuation), options
        )
        attribution = _attribution(model, task, svd, [task, *others], options, quick)
        cards = _cards(model, task, svd, ranking, options)
    return Study(
        name,
        task,
        writes,
        svd,
        layers,
        ranking,
        sweeps,
        by_site,
        ridge,
        critical,
        texts,
        attribution,
        cards=cards,
        errors=tuple(errors),
    )


def compare(
    model: Model,
    studies: Sequence[Study],
    components: Sequence[str] = COMPONENTS,
    *,
    more: Sequence[Task] = (),
    quick: bool = False,
) -> Comparison:
    """Compare at least two prompts: their subspaces, and directions of one on another.

    Args:
        quick: sweep few ranks with the directions of other texts.
        more: eight of these are compared with random ones if the prompts are fewer.
    """
    subspaces = [study.subspace for study in studies]
    names = tuple(study.name for study in studies)
    pairs = combinations(zip(names, subspaces, strict=True), 2)
    angles = {(a, b): principal_angles(first, second) for (a, first), (b, second) in pairs}
    d_model = studies[0].pooled.d_model
    held_out = fit_and_measure(
        model,
        [study.task for study in studies],
        min(FOLDS, len(studies)),
        ranks=range(0, d_model + 1, math.ceil(d_model / QUICK)) if quick else None,
        components=components,
    )
    half = min(len(study.writes) for study in studies) // 2  # writes of half a text
    most = min(half // 2, studies[0].pooled.d_model // 2)
    sizes = [rank for rank in RANKS if rank <= most] or [1]
    tasks = [study.task for study in studies]
    anchors = overlap_anchors(model, tasks[:ANCHORED], sizes, components=components)
    several, most = (more, FEWEST) if len(tasks) < FEWEST <= len(more) else (tasks, TWINNED)
    chosen = several[:: math.ceil(len(several) / most)]
    random = compare_with_random_texts(model, chosen, components=components)
    return Comparison(names, overlap(subspaces), pool(subspaces), angles, held_out, anchors, random)


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
    model: Model, groups: Mapping[str, Sequence[Task]], components: Sequence[str] = COMPONENTS
) -> Contrast:
    """Split the dimensions into those special to each group of texts and those shared."""
    return contrast(model, groups, min(SPECIAL, model.cfg.d_model // 4), components=components)


def _rank_or_all(critical: CriticalRank, svd: Decomposition) -> int:
    return svd.rank if critical.rank is None else critical.rank


def _orders(svd: Decomposition, ranking: Ranking) -> dict[str, Tensor]:
    by_size = order_by_singular_value(svd)
    return {
        BY_SIZE: by_size,
        BY_KL: order_by_effect(ranking, by="kl_divergence"),
        "compromise": order_by_compromise(svd, ranking, by="kl_divergence"),
        SIGNED: order_by_effect(ranking),
        "random": order_at_random(svd),
        "reversed": by_size.flip(0),
    }


def _attribution(
    model: Model,
    task: Task,
    svd: Decomposition,
    tasks: Sequence[Task],
    options: RunOptions,
    quick: bool,
) -> Attribution:
    """Attribute the probability to the gains, in the Hessian basis and three others.

    Each basis has the same number of directions: all, where the whole Hessian takes no more
    products than the largest eigenpairs alone would.
    """
    gradients = gradient_basis(collect_gradients(model, tasks, svd, **options)).directions
    pairs = min(PAIRS, len(gradients)) if quick or len(gradients) > PRODUCTS else len(gradients)
    bases = {
        "singular directions": torch.eye(len(gradients))[:, :pairs],
        "gradients": gradients[:, :pairs],
    }
    return hessian_attribution(model, task, svd, pairs=pairs, bases=bases, **options)


def _cards(
    model: Model, task: Task, svd: Decomposition, ranking: Ranking, options: RunOptions
) -> DirectionCards | None:
    """Cards of the directions with the largest singular values, and of the most needed others."""
    by_size = range(min(DESCRIBED // 2, svd.rank))
    needed = order_by_effect(ranking, by="kl_divergence").tolist()
    others = [j for j in needed if j not in by_size][: DESCRIBED - len(by_size)]
    try:
        return describe(model, svd, [*by_size, *others], task, **options)
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
