"""Overlaps of texts next to anchors: halves of texts, random tokens, redrawn weights, chance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import quiet, require_whole, whole_numbers
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, require_same_positions
from mechsvd.engine.writes import Writes, collect_writes
from mechsvd.experiments.nulls import RUN, random_tokens, reinitialised, require_null
from mechsvd.experiments.statistics import jackknife, spread
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.linalg.decomposition import Decomposition, decompose_groups
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

TEXTS, HALVES, CROSSED = "texts", "halves of a text", "halves of two texts"
HAAR, FORCED = "haar", "forced"


@result
class OverlapAnchors(Result):
    """How much the subspaces of texts overlap, next to what other things share by the same count.

    The overlap of two subspaces of rank k counts shared dimensions, from what is forced to k. The
    chance-corrected overlap is 0 for random subspaces in the mean and 1 for equal ones.

    The interval is over the texts: t of texts − 1 degrees of freedom times a jackknife over whole
    texts. Pairs with a text in common are not independent, so their number is no sample size. The
    one re-initialisation and the one draw of random tokens per text are taken as given. An interval
    is NaN with fewer than three texts.

    Attributes:
        kinds: "texts" and nulls, for pairs of texts; "halves of a text" (every other position,
            from the first and from the second collected) and, with as many positions, "halves of
            two texts"; "haar" (random subspaces, in closed form); "forced" (by d_model).
        ranks: k of both subspaces.
        shared: mean overlap, in dimensions.
        low, high: 95 % interval of the chance-corrected mean.
        pairs: number of pairs per kind; 0 where nothing is measured.
        texts: their number.

    Example:
        >>> anchors.to_pandas().columns.tolist()[:4]
        ['rank', 'kind', 'shared', 'chance_corrected']
    """

    kinds: tuple[str, ...]
    ranks: Int[Tensor, " rank"]
    shared: Float[Tensor, "kind rank"]
    chance_corrected: Float[Tensor, "kind rank"]
    low: Float[Tensor, "kind rank"]
    high: Float[Tensor, "kind rank"]
    pairs: tuple[int, ...]
    texts: int
    d_model: int
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "kinds", len(self.shared), "row of `shared`")
        require_length(self, "pairs", len(self.kinds), "kind")

    def _require_values(self) -> None:
        require_finite(self, "shared", "chance_corrected")
        require_between(self, ["shared", "pairs"], 0)

    def to_pandas(self) -> Any:
        """One row per rank and kind; `low` and `high` belong to `chance_corrected`.

        Columns: rank, kind, shared, chance_corrected, low, high, pairs.
        """
        import pandas as pd

        count = len(self.ranks)
        table: dict[str, Any] = {
            "rank": self.ranks.tolist() * len(self.kinds),
            "kind": [kind for kind in self.kinds for _ in range(count)],
        }
        for name in ("shared", "chance_corrected", "low", "high"):
            table[name] = getattr(self, name).flatten().tolist()
        table["pairs"] = [number for number in self.pairs for _ in range(count)]
        return pd.DataFrame(table).sort_values("rank", kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        values = ", ".join(
            f"{kind} {float(value):.3f}"
            for kind, value in zip(self.kinds, self.chance_corrected[:, -1], strict=True)
        )
        ranks = ", ".join(map(str, self.ranks.tolist()))
        return (
            f"OverlapAnchors of {self.texts} texts at rank {ranks} of {self.d_model} dimensions\n"
            f"  chance-corrected overlap at rank {int(self.ranks[-1])}: {values}\n"
            f"  on {self._origin()} (seed {self.seed})"
        )


@runs_model(RunOptions)
def overlap_anchors(
    model: Model,
    tasks: Task | Sequence[Task],
    ranks: Sequence[int] = (8, 16, 32),
    *,
    seed: int = 0,
    nulls: Sequence[str] = RUN,
    skip_bos: bool = False,
    **options: Unpack[RunOptions],
) -> OverlapAnchors:
    """Measure how much texts share, next to a ceiling and to nulls that are run.

    A text gives the span of its first k singular directions. Two halves of one text show how well
    that many positions repeat themselves; compare them with halves of two texts, which have as
    many. They are no upper bound: on two small models, texts of random tokens shared more than
    real texts, and more than halves. Random tokens and the re-initialised model show what is
    shared without content.

    Args:
        tasks: at least two texts; for an interval, three.
        ranks: k, below `d_model` and at most the rank of half a text.
        seed: of the random tokens and the re-initialised model.
        nulls: which of "random tokens" and "reinitialised" to run.
        skip_bos: leave out the writes at BOS. They are the same in every text, so with them all
            texts share what BOS writes, random tokens too.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Raises:
        KeyError: an unknown null.
        ValueError: fewer than two texts, a rank that is too large, or as `collect_writes`.

    Example:
        >>> anchors = ms.overlap_anchors(model, tasks[:2], ranks=[8, 16], nulls=["random tokens"])
        >>> anchors.kinds
        ('texts', 'halves of a text', 'halves of two texts', 'random tokens', 'haar', 'forced')
    """
    require_same_positions(options)
    chosen, seed = as_tasks(tasks), require_whole("seed", seed)
    for kind in nulls:
        require_null(kind, RUN)
    if len(chosen) < 2:
        raise ValueError("One text given, but it takes two to compare; pass more.")
    ks = [require_whole("ranks", k, 1) for k in whole_numbers("ranks", ranks).tolist()]

    def collected(of: Model, texts: Sequence[Task]) -> list[Writes]:
        return _by_text(collect_writes(of, texts, skip_bos=skip_bos, **options))

    with open_session(model, chosen, **options) as session:
        writes = collected(model, chosen)
        halves = [_decomposed(half) for text in writes for half in _halves(text)]
        svds = {TEXTS: [_decomposed(text) for text in writes]}
        _require_ranks(ks, [*halves, *svds[TEXTS]])
        if RUN[0] in nulls:
            random_texts = [
                random_tokens(model, task, one)
                for task, one in zip(chosen, _seeds(seed, len(chosen)), strict=True)
            ]
            svds[RUN[0]] = [_decomposed(text) for text in collected(model, random_texts)]
        source = replace(session.provenance(session.sites), seed=seed)
    if RUN[1] in nulls:
        with quiet():  # what there is to say of the model was said of the original
            twin_writes = collected(reinitialised(model, seed), chosen)
        svds[RUN[1]] = [_decomposed(text) for text in twin_writes]
    _require_ranks(ks, [svd for group in svds.values() for svd in group])
    return _anchors(svds, halves, ks, seed, source)


def _anchors(
    svds: dict[str, list[Decomposition]],
    halves: list[Decomposition],
    ks: list[int],
    seed: int,
    source: Provenance,
) -> OverlapAnchors:
    first = halves[0]
    count, d_model = len(svds[TEXTS]), first.d_model
    rows: dict[str, list[tuple[float, float]]] = {}
    for kind, group in svds.items():
        rows[kind] = [_over_texts(mean_of_pairs(_shared(group, group, k)), count) for k in ks]
        if kind == TEXTS:
            crossed = [_shared_halves(halves, k) for k in ks]
            rows[HALVES] = [_over_texts(_mean_of(one.diagonal()), count) for one in crossed]
            rows[CROSSED] = [_over_texts(mean_of_pairs(one), count) for one in crossed]
    rows[HAAR] = [(k * k / d_model, 0.0) for k in ks]
    rows[FORCED] = [(max(0.0, 2.0 * k - d_model), 0.0) for k in ks]
    values, errors = torch.tensor([rows[kind] for kind in rows], dtype=torch.float64).unbind(-1)
    ranks = torch.tensor(ks)
    chance = ranks.double().square() / d_model
    corrected = (values - chance) / (ranks - chance)
    half = jackknife_quantile(count) * errors / (ranks - chance) if count > 2 else errors
    unordered = count * (count - 1) // 2
    pairs = dict.fromkeys(svds, unordered) | {HALVES: count, CROSSED: 2 * unordered}
    return OverlapAnchors(
        tuple(rows),
        ranks,
        values,
        corrected,
        corrected - half,
        corrected + half,
        tuple(pairs.get(kind, 0) for kind in rows),
        count,
        d_model,
        seed,
        source,
    )


def _shared(
    rows: Sequence[Decomposition], columns: Sequence[Decomposition], k: int
) -> Float[Tensor, "text text"]:
    """The overlaps of the first k directions, for all pairs at once."""
    first, second = (
        torch.cat([svd.directions[:, :k].cpu().double() for svd in svds], dim=1)
        for svds in (rows, columns)
    )
    return (first.T @ second).square().view(len(rows), k, len(columns), k).sum(dim=(1, 3))


def _shared_halves(halves: Sequence[Decomposition], k: int) -> Float[Tensor, "text text"]:
    """Those of each first half with each second one; on the diagonal, of one text."""
    return _shared(halves[::2], halves[1::2], k)


def mean_of_pairs(
    shared: Float[Tensor, "text text"],
) -> Callable[[Int[Tensor, " kept"]], float]:
    """The mean over all pairs of different texts, of those that are kept."""

    def mean(kept: Int[Tensor, " kept"]) -> float:
        part, count = shared[kept][:, kept], len(kept)
        return float((part.sum() - part.trace()) / (count * (count - 1)))

    return mean


def _mean_of(values: Float[Tensor, " text"]) -> Callable[[Int[Tensor, " kept"]], float]:
    return lambda kept: float(values[kept].mean())


def _over_texts(
    statistic: Callable[[Int[Tensor, " kept"]], float], count: int
) -> tuple[float, float]:
    """A statistic of all texts, and its standard error by a jackknife over whole texts."""
    value = statistic(torch.arange(count))
    return value, spread(jackknife(statistic, count)) if count > 2 else torch.nan


def jackknife_quantile(texts: int) -> float:
    """Standard errors on each side of a 95 % interval by a jackknife over so many texts."""
    from scipy.stats import t

    return float(t.ppf(0.975, texts - 1))


def _by_text(writes: Writes) -> list[Writes]:
    texts = range(int(writes.task_index.max()) + 1)
    return [writes.at(writes.task_index == text) for text in texts]


def _halves(writes: Writes) -> tuple[Writes, Writes]:
    even = torch.arange(len(writes.tokens)) % 2 == 0
    if bool(even.all()):
        raise ValueError("A text of one position has no halves; pass longer texts.")
    return writes.at(even), writes.at(~even)


def _decomposed(writes: Writes) -> Decomposition:
    """The pooled decomposition, without a warning where there are fewer writes than dimensions."""
    return decompose_groups(writes.values[None], source=writes.source)[0]


def _require_ranks(ks: Sequence[int], svds: Sequence[Decomposition]) -> None:
    most = min(svds[0].d_model - 1, *(svd.rank for svd in svds))
    for k in ks:
        if k > most:
            raise ValueError(
                f"`ranks` holds {k}, but must be at most {most}: below `d_model` = "
                f"{svds[0].d_model}, and no more than the directions of half a text or of a null."
            )


def _seeds(seed: int, count: int) -> list[int]:
    """Seeds that do not repeat from one seed to the next, as seed + i would."""
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
