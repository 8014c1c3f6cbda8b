"""Criteria: the thresholds that a rank must reach."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechsvd.checks import is_number
from mechsvd.engine.measurement import Measurement

NATS = "nats"  # the unit of the noise floor


@dataclass(frozen=True)
class Criterion:
    """A threshold that an edit reaches or misses.

    Attributes:
        name: the threshold in words.
        unit: of the margin.
        margin: a function of a measurement that returns how far each edit is above (≥ 0) or below
            the threshold.
    """

    name: str
    unit: str
    margin: Callable[[Measurement], Float[Tensor, " edit"]]

    def __call__(self, measured: Measurement) -> Any:
        """How far each edit is above (≥ 0) or below the threshold."""
        return self.margin(measured)


def drop_at_most(nats: float = 0.0, *, each_token: bool = False) -> Criterion:
    """The threshold that the continuation loses at most `nats` of log-probability.

    The drop is measured from the clean run.

    Args:
        nats: for the whole continuation; with `each_token`, for each of its tokens.

    Raises:
        ValueError: a drop below 0, or not finite.
    """
    if not is_number(nats, 0):
        raise ValueError(
            f"A drop of {nats!r:.40} nats cannot be allowed: "
            "`drop_at_most` takes a number, 0 or more."
        )

    def margin(measurement: Measurement) -> Float[Tensor, " edit"]:
        if each_token:
            return (measurement.log_probs - measurement.clean_run.log_probs).amin(dim=-1) + nats
        return measurement.log_prob - measurement.clean_run.log_prob + nats

    return Criterion(
        f"a drop of at most {nats:g} nats" + (" at each token" if each_token else ""), NATS, margin
    )


def _greedy_margin(measurement: Measurement) -> Float[Tensor, " edit"]:
    return -(~measurement.is_greedy).sum(dim=-1).to(measurement.log_probs)


# The margin is minus the number of continuation tokens that the model would not write greedily.
same_greedy_text = Criterion("same_greedy_text", "tokens", _greedy_margin)
