"""What others found, asked of a model and texts at hand: theirs, ours, an interval, a null."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import quiet, require_whole
from mechsvd.edits.bases import ablate, gate
from mechsvd.edits.maps import chain
from mechsvd.engine.ablations import donor_baseline
from mechsvd.engine.metrics import logit_difference
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import Step, begin_step, steps
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, require_same_positions
from mechsvd.engine.writes import collect_writes
from mechsvd.experiments.anchors import jackknife_quantile, mean_of_pairs
from mechsvd.experiments.heldout import decompose_texts, random_directions
from mechsvd.experiments.nulls import random_tokens
from mechsvd.experiments.search import critical_rank
from mechsvd.experiments.statistics import interval, jackknife, spread
from mechsvd.experiments.sweeps import sweep_rank
from mechsvd.fields import require_declared, require_finite, require_length
from mechsvd.linalg.comparison import random_subspace
from mechsvd.linalg.decomposition import Decomposition, decompose_groups
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

SHARE = 8  # d_model ÷ this is "few" directions
VARIANCE = 0.99
SET, SETS = 16, 16  # directions that are removed together, and such sets per text
STEPS = 32  # ranks of a sweep
FOLDS = 4
Numbers = tuple[float, float, float]  # a mean, and its 95 % interval
Rows = tuple[Numbers, Numbers, Numbers]  # ours, of the null, and of the difference
Found = dict[str, tuple[Rows, int]]  # for each claim, and the number of texts or pairs
Statistic = Callable[[Int[Tensor, " kept"]], float]


class Claim(NamedTuple):
    """A claim of the literature.

    Attributes:
        what: the number that is measured here, with its unit.
        source: who found it.
        theirs: what they found.
        against: what the number is for the null.
    """

    what: str
    source: str
    theirs: str
    against: str


CLAIMS = {
    "overlap": Claim(
        "dimensions shared by two texts' subspaces, of their critical ranks ÷ by random ones",
        "tailcalled, LessWrong 2024-05-22",
        "1, to about 1 %",
        "texts of random tokens",
    ),
    "overlap-of-few": Claim(
        "the same for subspaces of d_model ÷ 8 directions, which need not meet",
        "tailcalled, LessWrong 2024-05-22",
        "1 would follow",
        "texts of random tokens",
    ),
    "attention": Claim(
        "share of directions that holds 99 % of the variance of an attention layer's output",
        "arXiv:2508.16929",
        "about 0.6",
        "as many Gaussian vectors",
    ),
    "restored": Claim(
        "share of the gap of two texts that patching d_model ÷ 8 directions restores",
        "arXiv:2605.18830",
        "most",
        "random directions",
    ),
    "complement": Claim(
        "share of the gap of two texts that patching all other directions restores",
        "arXiv:2605.18830",
        "none",
        "the complement of random directions",
    ),
    "together": Claim(
        "KL divergence of removing 16 directions ÷ the sum over removing each",
        "arXiv:2602.01442",
        "14",
        "1, the sum itself, which is no null",
    ),
    "below": Claim(
        "loss at the best rank below the full one − clean loss, nats per token of other texts",
        "LASER, arXiv:2312.13558",
        "can be below 0",
        "random directions",
    ),
}


@result
class Literature(Result):
    """Claims of the literature, as they turn out on a model and its texts.

    Attributes:
        names: of the claims; see `CLAIMS`.
        ours: mean over the texts, with its 95 % interval low, high.
        null: the same for the null.
        difference: ours − null, text by text, with its 95 % interval: what the claim rests on.
        texts: how many independent texts, pairs or folds each interval is over.
        seed: of everything random.

    Example:
        >>> published.names, published.ours.shape
        (('together',), torch.Size([1, 3]))
    """

    names: tuple[str, ...]
    ours: Float[Tensor, "claim 3"]
    null: Float[Tensor, "claim 3"]
    difference: Float[Tensor, "claim 3"]
    texts: tuple[int, ...]
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        for name in ("names", "null", "difference", "texts"):
            require_length(self, name, len(self.ours), "row of `ours`")
        if wrong := [name for name in self.names if name not in CLAIMS]:
            raise ValueError(f"`names` of Literature holds {wrong[0]!r:.40}; known: {[*CLAIMS]}.")

    def _require_values(self) -> None:
        require_finite(self, "ours", "null", "difference")

    def to_pandas(self) -> Any:
        """One row per claim: name, what, source, theirs, ours, low, high, n, and the null.

        The last columns are null, null_low, null_high, difference, difference_low, difference_high,
        and against, which says what the null is.
        """
        import pandas as pd

        claims = [CLAIMS[name] for name in self.names]

        def columns(name: str, first: str = "") -> dict[str, list[float]]:
            names = (name, f"{first}low", f"{first}high")
            return dict(zip(names, getattr(self, name).T.tolist(), strict=True))

        return pd.DataFrame(
            {
                "name": self.names,
                "what": [claim.what for claim in claims],
                "source": [claim.source for claim in claims],
                "theirs": [claim.theirs for claim in claims],
                **columns("ours"),
                "n": self.texts,
                **columns("null", "null_"),
                **columns("difference", "difference_"),
                "against": [claim.against for claim in claims],
            }
        )

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name} {mean:.3g} ({low:.3g}–{high:.3g})"
            for name, (mean, low, high) in zip(self.names, self.ours.tolist(), strict=True)
        )
        return (
            f"Literature: {len(self.names)} claims on {max(self.texts)} texts\n"
            f"  {shown}\n"
            f"  on {self._origin()} (seed {self.seed})"
        )


@runs_model(RunOptions)
def compare_with_literature(
    model: Model,
    tasks: Sequence[Task],
    only: str | Iterable[str] | None = None,
    *,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Literature:
    """Measure what others found on this model and these texts, next to a null.

    - "overlap": of each two texts, of as many first singular directions as their critical ranks.
      The next one takes d_model ÷ 8; large subspaces must meet, so their ratio is near 1.
    - "attention": per layer, of the centred outputs at all positions of all texts; needs many more
      positions than dimensions, and says nothing of variance below the null.
    - "restored", "complement": texts are cut to one length in pairs, and the second of a pair runs
      with the first one's writes along some directions, at every site. The metric is the logit
      difference of their next tokens. The directions are those of the differences of all
      other pairs.
    - "together": random sets of 16 of a text's own singular directions.
    - "below": directions, and the best rank, come from the other folds of texts.

    Args:
        tasks: at least six texts. They should go on differently, as greedy texts do.
        only: some of the claims; by default all.
        seed: of folds, sets, random tokens and directions.
        options: see `RunOptions` (layers, components, batch_size, …).

    Raises:
        KeyError: an unknown claim.
        ValueError: fewer than six texts, or no two that can be a pair.

    Example:
        >>> published = ms.compare_with_literature(model, tasks, "together")
        >>> published.to_pandas().columns.tolist()[:4]
        ['name', 'what', 'source', 'theirs']
    """
    require_same_positions(options)
    texts, seed = as_tasks(tasks), require_whole("seed", seed)
    names = [*CLAIMS] if only is None else [only] if isinstance(only, str) else [*only]
    if wrong := [name for name in names if name not in CLAIMS]:
        raise KeyError(f"No claim {wrong[0]!r:.40}: there are {[*CLAIMS]}.")
    if len(texts) < 6:
        raise ValueError(f"{len(texts)} texts given, but claims of texts need at least 6.")
    found: Found = {}
    costs, progress = dict.fromkeys(names, Step(1.0, 0)), options.get("progress")
    with (
        open_session(model, texts, **options) as session,
        quiet(),
        steps("literature", costs, progress),
    ):
        for name in names:
            begin_step(name)
            if name not in found:
                found |= _WAYS[name](model, texts, seed, options)
        source = replace(session.provenance(session.sites), seed=seed)
    table = torch.tensor([found[name][0] for name in names], dtype=torch.float64)
    ours, null, difference = table.unbind(dim=1)
    counts = tuple(found[name][1] for name in names)
    return Literature(tuple(names), ours, null, difference, counts, seed, source)


def _overlap(model: Model, texts: Sequence[Task], seed: int, options: RunOptions) -> Found:
    twins = [random_tokens(model, task, seed + i) for i, task in enumerate(texts)]
    groups = []
    for own in (texts, twins):
        writes = collect_writes(model, own, **options)
        groups.append([decompose_texts(writes, [i], "pool") for i in range(len(own))])
    critical = [
        critical_rank(model, task, svd, **options).rank or svd.rank
        for task, svd in zip(texts, groups[0], strict=True)
    ]
    few = [max(1, model.cfg.d_model // SHARE)] * len(texts)
    found: Found = {}
    for name, ranks in (("overlap", critical), ("overlap-of-few", few)):
        ours, null = (_ratios(svds, ranks) for svds in groups)
        found[name] = _jackknifed(mean_of_pairs(ours), mean_of_pairs(null), len(texts))
    return found


def _ratios(svds: Sequence[Decomposition], ranks: Sequence[int]) -> Float[Tensor, "text text"]:
    """Dimensions shared by each two subspaces ÷ those of random ones of the same ranks."""
    bases = [svd.directions[:, :k].cpu().double() for svd, k in zip(svds, ranks, strict=True)]
    shared = torch.tensor([[float((a.T @ b).square().sum()) for b in bases] for a in bases])
    sizes = torch.tensor([basis.shape[1] for basis in bases], dtype=torch.float64)
    return shared.double() / (sizes[:, None] * sizes / svds[0].d_model)


def _attention(model: Model, texts: Sequence[Task], seed: int, options: RunOptions) -> Found:
    chosen: Any = {**options, "components": ("attn",)}
    writes = collect_writes(model, texts, **chosen)
    values, text_of = writes.values.double().cpu(), writes.task_index.cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)

    def of(vectors: Tensor) -> Statistic:
        return lambda kept: _share_of_variance(vectors[:, torch.isin(text_of, kept)])

    return {"attention": _jackknifed(of(values), of(noise), len(texts))}


def _share_of_variance(values: Float[Tensor, "site pos d_model"]) -> float:
    """Directions that hold 99 % of the variance, ÷ d_model, in the mean over sites."""
    centred = values - values.mean(dim=1, keepdim=True)
    energy = torch.linalg.svdvals(centred).square()
    held = energy.cumsum(dim=1) / energy.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return float((1 + (held < VARIANCE).sum(dim=1)).double().mean()) / values.shape[2]


def _restored(model: Model, texts: Sequence[Task], seed: int, options: RunOptions) -> Found:
    pairs = _pairs(texts)
    k = max(1, model.cfg.d_model // SHARE)
    firsts, seconds = (
        [collect_writes(model, pair[side], **options) for pair in pairs] for side in (0, 1)
    )
    gaps = [one.values - other.values for one, other in zip(firsts, seconds, strict=True)]
    values = []
    for i, (clean, corrupt) in enumerate(pairs):
        others = torch.cat([gap for j, gap in enumerate(gaps) if j != i], dim=1)
        svd = decompose_groups(others[None], source=firsts[i].source)[0]
        random = random_subspace(svd.d_model, k, seed + i)
        values.append(_patched(model, clean, corrupt, [_first(svd, k), random], options))
    table = torch.tensor(values, dtype=torch.float64)
    ours, own_rest, null, null_rest = table.T
    return {"restored": _over_texts(ours, null), "complement": _over_texts(own_rest, null_rest)}


def _pairs(texts: Sequence[Task]) -> list[tuple[Task, Task]]:
    """Texts two by two, cut to one length, after which they go on with different tokens."""
    pairs = []
    for one, other in zip(texts[::2], texts[1::2], strict=False):
        both = [task.tokens[: min(len(one.tokens), len(other.tokens))] for task in (one, other)]
        differ = (both[0] != both[1]).nonzero().flatten().tolist()
        if len(differ) > 1:  # an earlier difference, and the tokens that are predicted
            end = differ[-1] + 1
            pairs.append((Task(both[0][:end], end - 1), Task(both[1][:end], end - 1)))
    if len(pairs) < 3:
        raise ValueError(
            f"{len(pairs)} pairs of texts differ before their last tokens, but it takes 3; "
            "pass more texts."
        )
    return pairs


def _patched(
    model: Model, clean: Task, corrupt: Task, bases: Sequence[Subspace], options: RunOptions
) -> list[float]:
    """The share of the gap that is restored along each basis, and along all but it."""
    metric = logit_difference(int(clean.tokens[-1]), int(corrupt.tokens[-1]))
    donor = donor_baseline(model, clean, **options)
    edits = [
        edit
        for basis in bases
        for edit in (
            ablate(basis, baseline=donor),
            gate(basis, torch.ones(basis.rank), rest=0.0, baseline=donor),
        )
    ]
    found = measure(model, corrupt, edits, metric=metric, **options)
    start = found.value + found.effect  # the effect is clean − edited
    goal = measure(model, clean, [chain()], metric=metric, **options).value
    return ((found.value - start) / (goal - start)).tolist()


def _first(svd: Decomposition, k: int) -> Subspace:
    return svd.subspace(min(k, svd.rank))


def _together(model: Model, texts: Sequence[Task], seed: int, options: RunOptions) -> Found:
    writes = collect_writes(model, texts, **options)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for i, task in enumerate(texts):
        svd = decompose_texts(writes, [i], "pool")
        size = min(SET, svd.rank)
        sets = torch.stack([torch.randperm(svd.rank, generator=generator) for _ in range(SETS)])
        sets = sets[:, :size]
        alone = torch.zeros(svd.rank, dtype=torch.bool).index_fill(0, sets.unique(), True)
        gains = torch.ones(SETS, svd.rank).scatter(1, sets, 0.0)
        single = torch.eye(svd.rank)[alone]
        stack = gate(svd, torch.cat([gains, 1 - single]), rest=1.0)
        divergence = measure(model, task, stack, **options).kl_divergence.double()
        each = torch.zeros(svd.rank, dtype=torch.float64)
        each[alone] = divergence[SETS:]
        ratios.append(float(divergence[:SETS].sum() / each[sets].sum()))
    return {"together": _over_texts(torch.tensor(ratios), torch.ones(len(ratios)))}


def _below(model: Model, texts: Sequence[Task], seed: int, options: RunOptions) -> Found:
    writes = collect_writes(model, texts, **options)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([len(task.continuation) for task in texts])
    change, null = (torch.zeros(len(texts), dtype=torch.float64) for _ in range(2))
    for fold in order.chunk(min(FOLDS, len(texts))):
        others = [i for i in range(len(texts)) if i not in fold.tolist()]
        svd = decompose_texts(writes, others, "pool")
        for basis, into in ((svd, change), (random_directions(writes, seed), null)):
            step = math.ceil(basis.rank / STEPS)
            ranks = [*range(0, basis.rank, step)]
            sweeps = sweep_rank(model, texts, basis, ranks, **options)
            effects = torch.stack([sweep.measurement.effect.double() for sweep in sweeps.parts])
            losses = effects / lengths[:, None]  # clean − edited log-probability
            best = losses[others].mean(dim=0).argmin()
            into[fold] = losses[fold, best]
    return {"below": _over_texts(change, null)}


def _jackknifed(ours: Statistic, null: Statistic, count: int) -> tuple[Rows, int]:
    """Two statistics of all texts and their difference, with intervals by a jackknife over texts."""
    quantile = jackknife_quantile(count)

    def over_texts(statistic: Statistic) -> Numbers:
        value, half = statistic(torch.arange(count)), quantile * spread(jackknife(statistic, count))
        return value, value - half, value + half

    return (
        over_texts(ours),
        over_texts(null),
        over_texts(lambda kept: ours(kept) - null(kept)),
    ), count


def _over_texts(ours: Tensor, null: Tensor) -> tuple[Rows, int]:
    """Means over texts and of their differences, with bootstrap intervals."""

    def mean(values: Tensor) -> Numbers:
        low, high = interval(values.double()[:, None])
        return float(values.double().mean()), float(low), float(high)

    return (mean(ours), mean(null), mean(ours - null)), len(ours)


_WAYS: dict[str, Callable[[Model, Sequence[Task], int, RunOptions], Found]] = {
    "overlap": _overlap,
    "overlap-of-few": _overlap,
    "attention": _attention,
    "restored": _restored,
    "complement": _restored,
    "together": _together,
    "below": _below,
}
