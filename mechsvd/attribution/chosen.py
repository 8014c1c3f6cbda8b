"""Directions chosen for a further measurement: rows of an attribution, or of bases by name."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.attribution.directions import RANDOM, given_directions, require_size
from mechsvd.attribution.functions import Kind
from mechsvd.attribution.gradients import GradientBasis
from mechsvd.attribution.scores import Attribution, Order
from mechsvd.checks import is_whole, whole_numbers
from mechsvd.edits.gates import Basis
from mechsvd.engine.metrics import AnyMetric
from mechsvd.results import Provenance, require_same_model

Directions = Attribution | Mapping[str, Basis | GradientBasis]


class Chosen(NamedTuple):
    """Some directions of a basis: their numbers in it, and themselves as columns."""

    numbers: list[int]
    vectors: Float[Tensor, "entry chosen"]


def choose(
    directions: Directions,
    rows: int | Sequence[int] | None,
    order: Order,
    point: Float[Tensor, " entry"],
    over: str,
    source: Provenance | None,
) -> dict[str, Chosen]:
    """Choose directions of each basis, in the dtype of w.

    Args:
        rows: how many, the first in the order; or their numbers; or None for all.
        order: of an attribution's directions; bases by name keep theirs.
        over: what w is.
        source: the model that an attribution must come from; None where that is not checked.

    Raises:
        TypeError: `directions` are neither.
        ValueError: they are of another w or model, or `rows` are out of range.
    """
    if not isinstance(directions, Attribution):
        bases = given_directions(directions, point, over)
        return {
            name: _chosen(name, basis, torch.arange(basis.shape[1]), rows)
            for name, basis in bases.items()
        }
    require_same_model(directions.source, source, "The attribution and the model")
    require_size("The attribution", directions.vectors, point, over)
    if directions.over != over:
        raise ValueError(
            f"The attribution is over {directions.over[:60]}, but w is {over[:60]}; "
            "pass the same `over`."
        )
    return {
        name: _chosen(name, part.vectors.to(point), part.order(order), rows)
        for name, part in directions.bases.items()
        if name != RANDOM
    }


def kind_of(
    directions: Directions, objective: Kind | None, metric: AnyMetric | None
) -> Kind | None:
    """The objective to measure: what the user gave, or that of the attribution.

    Raises:
        ValueError: the attribution is of a metric, which must be given again.
    """
    if objective or metric is not None or not isinstance(directions, Attribution):
        return objective
    if directions.objective == "probability":
        return "probability"
    if directions.objective == "log_prob":
        return "log_prob"
    raise ValueError(
        f"The attribution is of {directions.objective[:60]!r}; pass the same function as `metric`."
    )


def _chosen(name: str, basis: Tensor, order: Tensor, rows: Any) -> Chosen:
    if rows is None or is_whole(rows, 1):
        numbers = order[: None if rows is None else int(rows)]
    else:
        numbers = whole_numbers("rows", rows)
        outside = (numbers < 0) | (numbers >= basis.shape[1])
        if outside.any() or len(numbers.unique()) < len(numbers):
            raise ValueError(
                f"`rows` are {numbers.tolist()[:8]}, but must be different numbers from 0 to "
                f"{basis.shape[1] - 1}, those of the basis {name!r:.40}."
            )
    return Chosen(numbers.tolist(), basis[:, numbers.to(basis.device)])
