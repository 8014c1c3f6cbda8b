"""Rank directions: what the text loses without each one, and orders that follow from it."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import with_options
from mechsvd.edits.gates import Gate
from mechsvd.engine.measurement import Measurement, measure
from mechsvd.engine.session import RunOptions, warn_other_sites
from mechsvd.fields import (
    require_between,
    require_declared,
    require_falling,
    require_finite,
    require_length,
)
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, require_kind, require_same_model, result


@result
class Ranking(Result):
    """What each direction is worth to a task: its effect when removed, and its singular value.

    Attributes:
        singular_values: in the units of the residual stream.
        measurement: row j has direction j removed from every write.
    """

    singular_values: Float[Tensor, " rank"]
    measurement: Measurement

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "measurement", len(self.singular_values), "direction")

    def _require_values(self) -> None:
        require_finite(self, "singular_values")
        require_between(self, ["singular_values"], 0)
        require_falling(self, "singular_values")

    @property
    def effect(self) -> Float[Tensor, " rank"]:
        """Clean minus edited log-probability in nats; damage is positive."""
        return self.measurement.clean_run.log_prob - self.measurement.log_prob

    @property
    def noise_floor(self) -> float:
        """How much batch size and rounding change the clean log-probability, in nats."""
        return self.measurement.noise_floor or 0.0

    @property
    def is_noise(self) -> Bool[Tensor, " rank"]:
        """Which effects are within the noise floor."""
        return self.effect.abs() <= self.noise_floor

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of effect and singular value; NaN below two directions."""
        from scipy.stats import spearmanr

        return float(spearmanr(self.singular_values.numpy(), self.effect.numpy()).statistic)

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.measurement.source

    def to_pandas(self) -> Any:
        """One row per direction: direction, singular_value, log_prob, effect, is_noise, …

        The last columns are `kl_divergence` (nats per token) and `absolute_change` (nats).
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "direction": range(len(self.singular_values)),
                "singular_value": self.singular_values.numpy(),
                "log_prob": self.measurement.log_prob.numpy(),
                "effect": self.effect.numpy(),
                "is_noise": self.is_noise.numpy(),
                "kl_divergence": self.measurement.kl_divergence.numpy(),
                "absolute_change": self.measurement.absolute_change.numpy(),
            }
        )

    def __repr__(self) -> str:
        worst, noise_count = int(self.effect.argmax()), int(self.is_noise.sum())
        return (
            f"Ranking of {len(self.singular_values)} directions, each removed alone: "
            f"direction {worst} does most damage\n"
            f"  {float(self.effect[worst]):.4g} nats; {noise_count} effects within the noise floor "
            f"of {self.noise_floor:.1e} nats\n"
            f"  on {self._origin()}"
        )


@with_options(RunOptions)
def rank_directions(
    model: Model, task: Task, svd: Decomposition, **options: Unpack[RunOptions]
) -> Ranking:
    """Remove each direction alone from every write, and measure what the continuation loses.

    The effect is exact, for all directions. Many directions share a forward pass as rows of its
    batch, each at the cost of one dot product per write.

    Args:
        options: see `RunOptions` (layers, components, positions, batch_size, progress, …).

    Returns:
        One row per direction, in the order of the decomposition.

    Raises:
        TypeError, ValueError: as `measure`; or a decomposition without directions.
    """
    require_decomposition(svd)
    gains = 1 - torch.eye(svd.rank, dtype=svd.directions.dtype, device=svd.directions.device)
    measurement = measure(
        model, task, Gate(svd.directions, gains, 1.0, svd.source), noise_floor=True, **options
    )
    warn_other_sites(svd, measurement.sites)
    return Ranking(svd.singular_values.cpu(), measurement)


def order_by_singular_value(svd: Decomposition) -> Int[Tensor, " rank"]:
    """Order directions by falling singular value, as in the decomposition."""
    require_decomposition(svd)
    return torch.arange(svd.rank)


def order_by_effect(
    ranking: Ranking, by: Literal["effect", "kl_divergence", "absolute_change"] = "effect"
) -> Int[Tensor, " rank"]:
    """Order directions by falling damage; ties stay in the order of their singular values.

    The effect is signed and summed over tokens, so a direction that helps one token and harms
    another comes late. The other two do not cancel.

    Args:
        by: the effect on the text's log-probability, as in the shortform; the KL divergence of
            clean ‖ edited predictions; or the summed size of the change of each token's
            log-probability.

    Raises:
        ValueError: another name, or a ranking of an older version that lacks the divergence.
    """
    require_kind(ranking, Ranking)
    if by not in ("effect", "kl_divergence", "absolute_change"):
        raise ValueError(
            f"`by` is {by!r:.60}, but must be 'effect', 'kl_divergence' or 'absolute_change'."
        )
    damage = ranking.effect if by == "effect" else getattr(ranking.measurement, by)
    if damage.isnan().all():
        raise ValueError(
            "The ranking is of an older version, without the KL divergence; "
            "rank the directions again, or choose `by='absolute_change'`."
        )
    return damage.argsort(descending=True, stable=True)


def order_by_compromise(
    svd: Decomposition, ranking: Ranking, weight: float = 0.5
) -> Int[Tensor, " rank"]:
    """Order directions by the weighted mean of their places in the two orders.

    Args:
        weight: of the place by effect, 0 to 1; the place by singular value gets the rest. Ties go
            to the larger singular value.

    Raises:
        ValueError: a weight outside 0 to 1, or a ranking of other directions.
    """
    require_kind(ranking, Ranking)
    if not 0 <= weight <= 1:
        raise ValueError(
            f"`weight` is {weight}, but must be from 0 (singular value alone) to 1 (effect alone)."
        )
    if len(ranking.singular_values) != svd.rank:
        raise ValueError(
            f"The ranking is of {len(ranking.singular_values)} directions, "
            f"but the decomposition has {svd.rank}."
        )
    require_same_model(svd.source, ranking.source, "The decomposition and the ranking")
    if not torch.allclose(svd.singular_values.cpu(), ranking.singular_values):
        raise ValueError(
            "The ranking is of other directions, with other singular values; "
            "rank those of this decomposition."
        )
    by_effect = order_by_effect(ranking).argsort().double()
    by_singular_value = torch.arange(svd.rank).double()
    return (weight * by_effect + (1 - weight) * by_singular_value).argsort(stable=True)


def order_at_random(svd: Decomposition, seed: int = 0) -> Int[Tensor, " rank"]:
    """A seeded random order, as a baseline for the others."""
    require_decomposition(svd)
    return torch.randperm(svd.rank, generator=torch.Generator().manual_seed(seed))
