"""Criteria: the thresholds that a rank must reach."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechsvd.checks import is_number, with_plain_arguments
from mechsvd.engine.measurement import Measurement
from mechsvd.engine.metrics import absolute_change, kl_divergence, log_prob


@dataclass(frozen=True)
class Criterion:
    """A threshold that an edit reaches or misses.

    Attributes:
        name: the threshold in words.
        unit: of the margin.
        metric: the metric that it is about; None if it is about none. The noise floor of a
            measurement is that of its metric.
        margin: a function of a measurement that returns how far each edit is above (≥ 0) or below
            the threshold.
    """

    name: str
    unit: str
    margin: Callable[[Measurement], Float[Tensor, " edit"]]
    metric: str | None = None

    def __call__(self, measured: Measurement) -> Any:
        """How far each edit is above (≥ 0) or below the threshold."""
        if not isinstance(measured, Measurement):
            raise TypeError(
                f"The criterion {self.name!r} needs a Measurement; give it to `critical_rank` as it is."
            )
        return self.margin(measured)


@with_plain_arguments
def drop_at_most(nats: float = 0.0, *, each_token: bool = False) -> Criterion:
    """The threshold that the continuation loses at most `nats` of log-probability.

    The drop is measured from the clean run.

    Args:
        nats: for the whole continuation; with `each_token`, for each of its tokens.

    Raises:
        ValueError: a drop below 0, or not finite.

    Example:
        >>> ms.drop_at_most(0.1, each_token=True).name
        'a drop of at most 0.1 nats at each token'
        >>> ms.critical_rank_of(sweep, criterion=ms.drop_at_most(1.0)).rank
        48
    """
    _require_amount("A drop of {} nats", nats, "drop_at_most")
    name = f"a drop of at most {nats:g} nats" + (" at each token" if each_token else "")
    margin = _above_worst if each_token else _above
    return Criterion(name, "nats", partial(margin, nats), log_prob.name)


def _above(nats: float, measured: Measurement) -> Float[Tensor, " edit"]:
    return measured.log_prob - measured.clean_run.log_prob + nats


def _above_worst(nats: float, measured: Measurement) -> Float[Tensor, " edit"]:
    return (measured.log_probs - measured.clean_run.log_probs).amin(dim=-1) + nats


def _below(name: str, amount: float, measured: Measurement) -> Float[Tensor, " edit"]:
    """How far a column of a measurement is below an amount."""
    below: Float[Tensor, " edit"] = amount - getattr(measured, name)
    return below


def kl_at_most(nats: float) -> Criterion:
    """The threshold that the KL divergence of clean ‖ edited is at most `nats` per token.

    Unlike a drop of the log-probability, it does not cancel between tokens.

    Raises:
        ValueError: a divergence below 0, or not finite.

    Example:
        >>> ms.kl_at_most(0.05)(sweep.measurement).shape  # one margin per rank
        torch.Size([129])
    """
    _require_amount("A divergence of {} nats", nats, "kl_at_most")
    name = f"a KL divergence of at most {nats:g} nats per token"
    return Criterion(
        name, kl_divergence.unit, partial(_below, "kl_divergence", nats), kl_divergence.name
    )


def change_at_most(nats: float) -> Criterion:
    """The threshold that the tokens' log-probabilities change by at most `nats` in total.

    The sizes of the changes are summed, so they do not cancel.

    Raises:
        ValueError: a change below 0, or not finite.

    Example:
        >>> ms.critical_rank_of(sweep, criterion=ms.change_at_most(1.0)).rank
        48
    """
    _require_amount("A change of {} nats", nats, "change_at_most")
    name = f"an absolute change of at most {nats:g} nats"
    return Criterion(name, "nats", partial(_below, "absolute_change", nats), absolute_change.name)


def effect_at_most(amount: float, metric: str, unit: str) -> Criterion:
    """The threshold that an edit costs at most `amount` in the metric that was measured.

    Args:
        metric, unit: the metric's name and unit.

    Raises:
        ValueError: an amount below 0, or not finite.
    """
    _require_amount("An effect of {}", amount, "effect_at_most")
    name = f"an effect on {metric} of at most {amount:g} {unit}".rstrip()
    return Criterion(name, unit, partial(_below, "effect", amount), metric)


def _require_amount(what: str, amount: object, call: str) -> None:
    if not is_number(amount, 0):
        given = type(amount).__name__ if isinstance(amount, Measurement) else repr(amount)[:40]
        raise ValueError(
            f"{what.format(given)} cannot be allowed: `{call}` takes a number, 0 or more"
            f"{f'; write `{call}(0.1)`' if isinstance(amount, Measurement) else ''}."
        )


def _greedy_margin(measurement: Measurement) -> Float[Tensor, " edit"]:
    return -(~measurement.is_greedy).sum(dim=-1).to(measurement.log_probs)


same_greedy_text = Criterion("same_greedy_text", "tokens", _greedy_margin)
"""The threshold that the model would write the same text, greedily.

The margin is minus the number of continuation tokens that it would not write.

Example:
    >>> bool(ms.same_greedy_text(sweep.measurement)[-1] == 0)  # all directions: the same text
    True
"""
