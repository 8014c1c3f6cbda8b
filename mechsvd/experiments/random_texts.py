"""Texts against texts of random tokens: what a set of texts shows that random ones do not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_number, quiet, require_numbers, require_whole
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, require_same_positions
from mechsvd.engine.writes import collect_writes
from mechsvd.experiments.heldout import decompose_texts, lasting_rank_within
from mechsvd.experiments.intervals import interval_columns
from mechsvd.experiments.nulls import random_tokens
from mechsvd.experiments.ranking import rank_directions
from mechsvd.experiments.statistics import sign_flip, smallest_p
from mechsvd.experiments.sweeps import sweep_rank
from mechsvd.fields import require_declared, require_finite, require_length
from mechsvd.linalg.decomposition import Decomposition
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

ALPHA = 0.01  # of all questions together
STEPS = 32  # ranks of a sweep, at most, and the full one
SHARED = 16  # directions per text, whose overlap is compared
OWN = "lasting rank, own directions"
BY_SITE = "saved by a basis per site"
TRANSFER = "more with one other text's directions"
OVERLAP = "dimensions shared with another text"
TREND = "rank correlation of KL divergence and singular value"


@result
class RandomTextComparison(Result):
    """What texts give, next to what texts of random tokens of the same lengths give.

    Attributes:
        questions: what is compared, one per column.
        units: of each question.
        values: mean over the texts and over the random texts.
        effects: one per text; their mean is the difference of the two means. If the texts were
            random too, the signs of each row would be random.
        p_value: of the sign-flip test of each question, for itself.
        p_family: corrected for all questions.
        alpha: a difference is told from chance if `p_family` is at most this.
        seed: of the random tokens.

    Example:
        >>> compared.smallest_p, compared.to_pandas().columns.tolist()[:2]
        (0.5, ['question', 'unit'])
    """

    questions: tuple[str, ...]
    units: tuple[str, ...]
    values: Float[Tensor, "question 2"]
    effects: Float[Tensor, "task question"]
    p_value: Float[Tensor, " question"]
    p_family: Float[Tensor, " question"]
    alpha: float
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        for name in ("questions", "units"):
            require_length(self, name, len(self.values), "row of `values`")

    def _require_values(self) -> None:
        require_finite(self, "values", "effects", "p_value", "p_family")

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that this number of texts can show; with few, above `alpha`."""
        return smallest_p(len(self.effects))

    def to_pandas(self) -> Any:
        """One row per question.

        Columns: question, unit, texts and random_texts (means), difference with its 95 % interval
        low, high over n texts, p_value, p_family, and verdict: "more", "less" or "cannot tell".
        """
        import pandas as pd

        columns = interval_columns(self.effects, 0.95)
        difference, n = columns.pop("mean"), columns.pop("n")
        told = self.p_family <= self.alpha
        verdicts = [
            ("more" if mean > 0 else "less") if sure else "cannot tell"
            for mean, sure in zip(difference, told.tolist(), strict=True)
        ]
        return pd.DataFrame(
            {
                "question": self.questions,
                "unit": self.units,
                "texts": self.values[:, 0].numpy(),
                "random_texts": self.values[:, 1].numpy(),
                "difference": difference,
                **columns,
                "n": n,
                "p_value": self.p_value.numpy(),
                "p_family": self.p_family.numpy(),
                "verdict": verdicts,
            }
        )

    def __repr__(self) -> str:
        told = int((self.p_family <= self.alpha).sum())
        least = self.smallest_p
        hint = f"; {len(self.effects)} texts can show p = {least:.2g} at best"
        return (
            f"RandomTextComparison: {len(self.effects)} texts and as many of random tokens\n"
            f"  {told} of {len(self.questions)} differences are told from chance at "
            f"{self.alpha:g}{hint if least > self.alpha else ''}\n"
            f"  on {self._origin()} (seed {self.seed})"
        )


@runs_model(RunOptions)
def compare_with_random_texts(
    model: Model,
    tasks: Sequence[Task],
    *,
    nats: float = 1.0,
    alpha: float = ALPHA,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> RandomTextComparison:
    """Ask of texts what is not true of texts of random tokens.

    Each text gets a twin of random tokens of the same length. Five numbers are measured on both:
    the lasting rank with the text's own directions, what a basis per site saves, how many more
    directions it takes with those of one other text, how much two texts share, and the rank
    correlation of damage and singular value.

    The test flips the signs of whole texts. For a number of two texts, the effect of a text
    includes its pairs with the twins of others, so that flipping a sign is exactly what exchanging
    the text and its twin does. If the texts are themselves random, any of the five differences is
    told from chance with probability `alpha` at most.

    Args:
        nats: of KL divergence, summed over a text, within which its lasting rank must stay. Sweeps
            have up to 33 ranks, so it is known to a 32nd of the directions.
        alpha: of all five together.
        seed: of the random tokens.
        options: see `RunOptions` (layers, components, batch_size, …).

    Raises:
        ValueError: fewer than two texts, or `nats` or `alpha` out of range.

    References: Westfall and Young, Resampling-Based Multiple Testing (1993).

    Example:
        >>> compared = ms.compare_with_random_texts(model, tasks[:2])
        >>> compared.questions[0], compared.effects.shape
        ('lasting rank, own directions', torch.Size([2, 5]))
    """
    require_same_positions(options)
    texts = as_tasks(tasks)
    if len(texts) < 2:
        raise ValueError(
            "One text given, but what a single text shows cannot be told from chance; pass more."
        )
    _require_positive("nats", nats)
    _require_positive("alpha", alpha)
    seeds = torch.Generator().manual_seed(require_whole("seed", seed))
    drawn = torch.randint(2**62, (len(texts),), generator=seeds).tolist()
    twins = [random_tokens(model, task, number) for task, number in zip(texts, drawn, strict=True)]
    with open_session(model, texts, **options) as session, quiet():
        columns = columns_of(numbers_of(model, [*texts, *twins], nats, options))
        source = replace(session.provenance(session.sites), seed=seed)
    effects = torch.stack([column.effects for column in columns], dim=1)
    test = sign_flip(effects)
    return RandomTextComparison(
        tuple(column.question for column in columns),
        tuple(column.unit for column in columns),
        torch.tensor([column.means for column in columns], dtype=torch.float64),
        effects,
        test.p_value,
        test.p_family,
        float(alpha),
        seed,
        source,
    )


@dataclass(frozen=True)
class Numbers:
    """The numbers of texts, and of pairs of texts.

    Attributes:
        own, by_site: lasting ranks with a text's own directions, pooled and per site.
        trend: rank correlation of damage and singular value.
        more: how many more directions a text needs if they are those of another one.
        shared: dimensions that the first `k` directions of two texts share.
    """

    own: Float[Tensor, " text"]
    by_site: Float[Tensor, " text"]
    trend: Float[Tensor, " text"]
    more: Callable[[int, int], float]
    shared: Callable[[int, int], float]
    k: int


def numbers_of(model: Model, texts: Sequence[Task], nats: float, options: RunOptions) -> Numbers:
    """Measure texts; see `compare_with_random_texts`. Pairs are measured when asked for."""
    writes = collect_writes(model, texts, **options)
    places = range(len(texts))
    pooled: list[Decomposition] = [decompose_texts(writes, [i], "pool") for i in places]

    def lasting(i: int, svd: Any) -> float:
        return _lasting(model, texts[i], svd, nats, options)

    own = torch.tensor([lasting(i, pooled[i]) for i in places])
    by_site = torch.tensor([lasting(i, decompose_texts(writes, [i], "site")) for i in places])
    rankings = [rank_directions(model, texts[i], pooled[i], **options) for i in places]
    for ranking in rankings:
        damage = ranking.measurement.kl_divergence
        require_numbers("The KL divergences of removing", damage, "a correlation")
    trend = torch.tensor([ranking.correlation() for ranking in rankings])
    k = min(SHARED, model.cfg.d_model // 2, *(svd.rank for svd in pooled))
    firsts = [svd.directions[:, :k].cpu().double() for svd in pooled]
    return Numbers(
        own.double(),
        by_site.double(),
        trend.double().nan_to_num(0.0),  # of one direction, or of damage that is all the same
        cache(lambda i, j: lasting(i, pooled[j]) - float(own[i])),
        cache(lambda i, j: float((firsts[i].T @ firsts[j]).square().sum())),
        k,
    )


class Column(NamedTuple):
    """The answer to one question: the means over texts and twins, and the effect of each text."""

    question: str
    unit: str
    means: tuple[float, float]
    effects: Float[Tensor, " task"]


def columns_of(numbers: Numbers, places: Sequence[int] | None = None) -> list[Column]:
    """The answers to all questions.

    Args:
        places: of the texts, and then of their twins in the same order; by default all.
    """
    chosen = [*range(len(numbers.own))] if places is None else [*places]
    count = len(chosen) // 2
    ring = [(i, (i + 1) % count) for i in range(count)]
    every = [*combinations(range(count), 2)]

    def of_one(values: Tensor) -> tuple[tuple[float, float], Tensor]:
        texts, twins = values[chosen].chunk(2)
        return (float(texts.mean()), float(twins.mean())), texts - twins

    def of_two(
        number: Callable[[int, int], float], pairs: Sequence[tuple[int, int]]
    ) -> tuple[tuple[float, float], Tensor]:
        return _of_pairs(lambda i, j: number(chosen[i], chosen[j]), pairs, count)

    return [
        Column(OWN, "directions", *of_one(numbers.own)),
        Column(BY_SITE, "directions", *of_one(numbers.own - numbers.by_site)),
        Column(TRANSFER, "directions", *of_two(numbers.more, ring)),
        Column(OVERLAP, f"of {numbers.k} dimensions", *of_two(numbers.shared, every)),
        Column(TREND, "", *of_one(numbers.trend)),
    ]


def _lasting(model: Model, task: Task, svd: Any, nats: float, options: RunOptions) -> float:
    """The lasting rank; all dimensions if there is none, which is too few."""
    d_model = model.cfg.d_model
    most = max(one.rank for one in (svd if isinstance(svd, tuple) else [svd]))
    ranks = {*range(0, most, math.ceil(d_model / STEPS)), most}
    sweep = sweep_rank(model, task, svd, sorted(ranks), noise_floor=False, **options)
    rank = lasting_rank_within(sweep, nats)
    return float(d_model if rank is None else rank)


def _of_pairs(
    number: Callable[[int, int], float], pairs: Sequence[tuple[int, int]], count: int
) -> tuple[tuple[float, float], Float[Tensor, " task"]]:
    """The means of a number of two texts over some pairs, and the effect of each text.

    With signs s (1: a text, −1: its twin takes its place), the difference of a pair is
    (sᵢ + sⱼ)/2 · (own − twins) + (sᵢ − sⱼ)/2 · (mixed), so the mean is linear in the signs.
    """
    effects = torch.zeros(count, dtype=torch.float64)
    means = torch.zeros(2, dtype=torch.float64)
    share = 1 / len(pairs)
    for i, j in pairs:
        both = number(i, j), number(i + count, j + count)
        same, mixed = both[0] - both[1], number(i, j + count) - number(i + count, j)
        means += torch.tensor(both, dtype=torch.float64) * share
        effects[i] += (same + mixed) / 2 * share * count
        effects[j] += (same - mixed) / 2 * share * count
    return (float(means[0]), float(means[1])), effects


def _require_positive(name: str, value: Any) -> None:
    if not is_number(value, 0) or value == 0:
        raise ValueError(f"`{name}` is {value!r:.40}, but must be finite and above 0.")
