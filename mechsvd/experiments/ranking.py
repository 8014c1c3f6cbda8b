"""Rank directions: what the text loses without each one, and orders that follow from it."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.checks import require_numbers, whole_numbers
from mechsvd.edits.baselines import Baseline, require_baseline
from mechsvd.edits.bases import Bases, is_several, names_of, names_of_directions, removals
from mechsvd.engine.measurement import Measurement
from mechsvd.engine.metrics import AnyMetric
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import rows_called
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, warn_other_sites
from mechsvd.experiments.intervals import interval_columns
from mechsvd.experiments.statistics import (
    RankAgreement,
    power,
    rank_agreement_of_halves,
    sign_flip,
)
from mechsvd.fields import (
    require_between,
    require_declared,
    require_falling,
    require_finite,
    require_length,
)
from mechsvd.linalg.decomposition import (
    Decomposition,
    require_decompositions,
    require_directions,
)
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import (
    OverTexts,
    Provenance,
    Result,
    require_kind,
    require_same_model,
    result,
)


@result
class Ranking(Result):
    """What each direction is worth to a task: its effect when removed, and its singular value.

    Attributes:
        singular_values: in the units of the residual stream; NaN for a basis without any.
        measurement: row j has direction j removed from every write.
        bases: with one basis per site or layer, the name of each; a direction is then removed at
            the sites of its basis only. Empty for a single basis.
        sizes: number of directions of each of these bases.

    Example:
        >>> ranking.effect.shape, ranking.noise_floor < 1e-3
        (torch.Size([128]), True)
    """

    singular_values: Float[Tensor, " rank"]
    measurement: Measurement
    bases: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "measurement", len(self.singular_values), "direction")
        require_length(self, "sizes", len(self.bases), "basis")
        if self.sizes and sum(self.sizes) != len(self.singular_values):
            raise ValueError(
                f"`sizes` must sum to the {len(self.singular_values)} directions, "
                f"but sum to {sum(self.sizes)}."
            )

    def _require_values(self) -> None:
        if self.singular_values.isnan().all():
            return
        require_finite(self, "singular_values")
        require_between(self, ["singular_values"], 0)
        if not self.bases:
            require_falling(self, "singular_values")

    @property
    def effect(self) -> Float[Tensor, " rank"]:
        """What each removal costs in the metric, in its unit; damage is positive.

        By default, clean minus edited log-probability in nats: signed, and summed over tokens,
        which may cancel.
        """
        return self.measurement.effect

    @property
    def noise_floor(self) -> float:
        """How much batch size and rounding change the clean metric, in its unit."""
        return self.measurement.noise_floor or 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each direction: its number, after that of its basis if there are several."""
        return names_of_directions(self.bases, self.sizes, len(self.singular_values))

    @property
    def is_noise(self) -> Bool[Tensor, " rank"]:
        """Which effects are within the noise floor: rounding alone can give them.

        An effect above it is reproducible, not for that significant.
        """
        return self.effect.abs() <= self.noise_floor

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of the signed effect and singular value; see `correlation`."""
        return self.correlation("effect")

    def correlation(self, by: str = "kl_divergence") -> float:
        """Spearman's correlation of the damage and the singular value.

        It is NaN below two directions, and for a basis without singular values.

        Args:
            by: as in `order_by_effect`, or "size" for the size of the signed effect.
        """
        from scipy.stats import spearmanr

        damage = self.effect.abs() if by == "size" else damage_by(self, by)
        return float(spearmanr(self.singular_values.numpy(), damage.numpy()).statistic)

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.measurement.source

    def to_pandas(self) -> Any:
        """One row per direction: direction, singular_value, log_prob, effect, is_noise, …

        The last columns are `kl_divergence` (nats per token), `absolute_change` (nats), and the
        metric under its own name if it is another one. With several bases, the first column is
        `basis`, and directions count within it.
        """
        import pandas as pd

        sizes = self.sizes or (len(self.singular_values),)
        columns: dict[str, Any] = {
            "direction": [j for size in sizes for j in range(size)],
            "singular_value": self.singular_values.numpy(),
            "log_prob": self.measurement.log_prob.numpy(),
            "effect": self.effect.numpy(),
            "is_noise": self.is_noise.numpy(),
            "kl_divergence": self.measurement.kl_divergence.numpy(),
            "absolute_change": self.measurement.absolute_change.numpy(),
            self.measurement.metric: self.measurement.value.numpy(),
        }
        table = pd.DataFrame(columns)
        if self.bases:
            names = [n for n, size in zip(self.bases, sizes, strict=True) for _ in range(size)]
            table.insert(0, "basis", names)
        return table

    def tokens_to_pandas(self) -> Any:
        """One row per direction and scored token: direction, position, token, log_prob, …

        With several bases, a direction has the name that `names` gives.
        """
        table = self.measurement.tokens_to_pandas()
        edit = table.pop("edit").to_numpy()
        names = range(len(self.names)) if not self.bases else self.names
        table.insert(0, "direction", [names[j] for j in edit])
        return table

    def __repr__(self) -> str:
        known, broken = self.effect.nan_to_num(nan=-torch.inf), int(self.effect.isnan().sum())
        worst, noise_count = int(known.argmax()), int(self.is_noise.sum())
        largest, unit = int(self.effect.abs().nan_to_num(nan=0.0).argmax()), self.measurement.unit
        lost = f"; {broken} effects are NaN" * (broken > 0)
        unit = unit and f" {unit}"
        size = float(self.effect[largest])
        gain = f"; the largest change is a gain, {size:.4g}, of {self.names[largest]}" * (size < 0)
        return (
            f"Ranking of {len(self.singular_values)} directions, each removed alone: "
            f"direction {self.names[worst]} does most damage\n"
            f"  {float(self.effect[worst]):.4g}{unit}{gain}; {noise_count} effects within the noise "
            f"floor of {self.noise_floor:.1e}{unit}{lost}\n"
            f"  on {self._origin()}"
        )


@result
class Rankings(OverTexts):
    """The rankings of several texts, of the same directions.

    Example:
        >>> rankings = ms.rank_directions(model, tasks[:2], svd)
        >>> rankings.effect.shape, rankings.summary().columns.tolist()[2:5]
        (torch.Size([2, 128]), ['mean', 'low', 'high'])
    """

    parts: tuple[Ranking, ...]

    @property
    def effect(self) -> Float[Tensor, "task rank"]:
        """What each removal costs each text in the metric, in its unit."""
        return torch.stack([part.effect for part in self.parts])

    def mean(self, by: str = "effect") -> Float[Tensor, " rank"]:
        """The mean damage over the texts; `by` as in `order_by_effect`."""
        return torch.stack([damage_by(part, by) for part in self.parts]).double().mean(dim=0)

    def summary(self, by: str = "effect", confidence: float = 0.95, seed: int = 0) -> Any:
        """One row per direction, with its mean damage over the texts and whether it is chance.

        Columns: direction, singular_value, mean, low, high, n, and for the signed effect p_value
        (two-sided sign-flip permutation over texts), p_family (largest |mean| over all directions)
        and q_value (Benjamini–Hochberg). A divergence is never negative, so its sign tests
        nothing. Flips of signs test that effects are symmetric about 0, not only their mean. The
        last column, detectable, is the mean effect that so many texts would probably have shown.

        Args:
            by: as in `order_by_effect`.

        Raises:
            ValueError: there is one text only.
        """
        first = self.parts[0].to_pandas()
        keys = [name for name in ("basis", "direction", "singular_value") if name in first]
        values = torch.stack([damage_by(part, by) for part in self.parts]).double()
        table = first[keys].assign(**interval_columns(values, confidence))
        if by != "effect" or self.parts[0].measurement.metric in (
            "kl_divergence",
            "absolute_change",
        ):
            return table
        flips = sign_flip(values, seed=seed, studentise=False)  # few texts are skewed
        return table.assign(
            p_value=flips.p_value.numpy(),
            p_family=flips.p_family.numpy(),
            q_value=flips.q_value.numpy(),
            detectable=power(values).numpy(),
        )

    def agreement_of_halves(self, by: str = "kl_divergence", seed: int = 0) -> RankAgreement:
        """Spearman's correlation between the mean damage over random halves of the texts.

        Raises:
            ValueError: too few texts for halves.
        """
        values = torch.stack([damage_by(part, by) for part in self.parts]).double()
        return rank_agreement_of_halves(values, seed=seed)


@overload
def rank_directions(
    model: Model,
    task: Task,
    svd: Bases,
    *,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    after: Iterable[int] | None = None,
    **options: Unpack[RunOptions],
) -> Ranking: ...
@overload
def rank_directions(
    model: Model,
    task: Sequence[Task],
    svd: Bases,
    *,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    after: Iterable[int] | None = None,
    **options: Unpack[RunOptions],
) -> Rankings: ...
@runs_model(RunOptions)
def rank_directions(
    model: Model,
    task: Task | Sequence[Task],
    svd: Bases,
    *,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    after: Iterable[int] | None = None,
    **options: Unpack[RunOptions],
) -> Ranking | Rankings:
    """Remove each direction alone from every write, and measure what the continuation loses.

    The effect is exact, for all directions. Many directions share a forward pass as rows of its
    batch, each at the cost of one dot product per write.

    Args:
        task: one text, or a list of texts.
        svd: the directions, of a decomposition, a subspace or a tensor "d_model rank"; or one basis
            per layer or site, where each direction is removed at the sites of its own only.
        metric: what the effect is measured in; the log-probability by default. See `Metric`.
        baseline: what a removed part is replaced by, 0 by default (zero ablation); see `gate`.
        after: directions of a single basis that are removed as well in every row; effects are
            still from the clean run.
        options: see `RunOptions` (layers, components, positions, batch_size, progress, …).

    Returns:
        One row per direction, in the order of the decomposition, or of the bases one after the
        other. Of a list of texts, `Rankings`.

    Raises:
        TypeError, KeyError, ValueError: as `measure`; or a decomposition without directions.

    Example:
        >>> ms.rank_directions(model, task, svd).to_pandas().columns.tolist()[:4]
        ['direction', 'singular_value', 'log_prob', 'effect']
    """
    bases = require_directions(svd)
    require_baseline(baseline, bases[0].d_model, bases[0].source)
    several = is_several(svd)
    removed = _removed(bases, several, after)
    own = bases if several else bases[0]
    stack = removals(own, baseline, removed.tolist())
    with rows_called("directions"):
        measured = measure(model, as_tasks(task), stack, metric=metric, noise_floor=True, **options)
    warn_other_sites(bases, measured[0].sites)
    values = torch.cat([one.singular_values for one in bases]).cpu()
    rankings = tuple(Ranking(values, part, *names_of(own)) for part in measured.parts)
    return rankings[0] if isinstance(task, Task) else Rankings(rankings)


def _removed(
    bases: Sequence[Decomposition], several: bool, after: Iterable[int] | None
) -> Int[Tensor, " removed"]:
    if after is None:
        return torch.zeros(0, dtype=torch.long)
    chosen = whole_numbers("after", after)
    if several or chosen.min() < 0 or chosen.max() >= bases[0].rank:
        raise ValueError(
            f"`after` is {chosen.tolist()!s:.60}, but must be directions of a single basis, 0 to "
            f"{bases[0].rank - 1}."
        )
    return chosen


@plain
def order_by_singular_value(
    svd: Decomposition | Sequence[Decomposition],
) -> Int[Tensor, " rank"]:
    """Order directions by falling singular value, as in the decomposition.

    The directions of several bases are numbered one after the other.

    Example:
        >>> ms.order_by_singular_value(svd)[:3]
        tensor([0, 1, 2])
    """
    values = torch.cat([one.singular_values for one in require_decompositions(svd)]).cpu()
    return values.argsort(descending=True, stable=True)


By = Literal["effect", "kl_divergence", "absolute_change"]


@plain
def order_by_effect(ranking: Ranking | Rankings, by: By = "effect") -> Int[Tensor, " rank"]:
    """Order directions by falling damage; ties stay in the order of their singular values.

    The effect is signed and summed over tokens, so a direction that helps one token and harms
    another comes late. The other two do not cancel.

    Args:
        ranking: of one text; or of several, whose mean damage counts.
        by: the effect in the ranking's metric, by default on the text's log-probability, as in the
            shortform; the KL divergence of clean ‖ edited predictions; or the summed size of the
            change of each token's log-probability.

    Raises:
        ValueError: another name, a ranking of an older version that lacks the divergence, or damage
            that is NaN.

    Example:
        >>> order = ms.order_by_effect(ranking, by="kl_divergence")
        >>> bool(order[0] == ranking.measurement.kl_divergence.argmax())
        True
    """
    if not isinstance(ranking, Rankings):
        require_kind(ranking, Ranking)
    damage = ranking.mean(by) if isinstance(ranking, Rankings) else damage_by(ranking, by)
    require_numbers("The effects of removing", damage, "an order")
    return damage.argsort(descending=True, stable=True)


def damage_by(ranking: Ranking, by: str) -> Float[Tensor, " rank"]:
    """The damage of each direction, by one of the names that `order_by_effect` takes."""
    if by not in ("effect", "kl_divergence", "absolute_change"):
        raise ValueError(
            f"`by` is {by!r:.60}, but must be 'effect', 'kl_divergence' or 'absolute_change'."
        )
    damage: Tensor = ranking.effect if by == "effect" else getattr(ranking.measurement, by)
    if by == "kl_divergence" and ranking.measurement.kl_divergences is None:
        raise ValueError(
            "The ranking is of an older version, without the KL divergence; "
            "rank the directions again, or choose `by='absolute_change'`."
        )
    return damage


@plain
def order_by_compromise(
    svd: Decomposition | Sequence[Decomposition],
    ranking: Ranking,
    weight: float = 0.5,
    by: By = "effect",
) -> Int[Tensor, " rank"]:
    """Order directions by the weighted mean of their places in the two orders.

    Args:
        weight: of the place by effect, 0 to 1; the place by singular value gets the rest. Ties go
            to the larger singular value.
        by: the effect; see `order_by_effect`.

    Raises:
        ValueError: a weight outside 0 to 1, or a ranking of other directions.

    Example:
        >>> ms.order_by_compromise(svd, ranking, weight=0.5).shape
        torch.Size([128])
    """
    require_kind(ranking, Ranking)
    if not 0 <= weight <= 1:
        raise ValueError(
            f"`weight` is {weight}, but must be from 0 (singular value alone) to 1 (effect alone)."
        )
    bases = require_decompositions(svd)
    values = torch.cat([one.singular_values for one in bases]).cpu()
    if len(ranking.singular_values) != len(values):
        raise ValueError(
            f"The ranking is of {len(ranking.singular_values)} directions, "
            f"but the decomposition has {len(values)}."
        )
    require_same_model(bases[0].source, ranking.source, "The decomposition and the ranking")
    if not torch.allclose(values, ranking.singular_values):
        raise ValueError(
            "The ranking is of other directions, with other singular values; "
            "rank those of this decomposition."
        )
    by_effect = order_by_effect(ranking, by).argsort().double()
    by_singular_value = order_by_singular_value(svd).argsort().double()
    return (weight * by_effect + (1 - weight) * by_singular_value).argsort(stable=True)


@plain
def order_at_random(
    svd: Decomposition | Sequence[Decomposition], seed: int = 0
) -> Int[Tensor, " rank"]:
    """A seeded random order, as a baseline for the others.

    Example:
        >>> sorted(ms.order_at_random(svd, seed=1).tolist()) == list(range(128))
        True
    """
    count = sum(one.rank for one in require_decompositions(svd))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
