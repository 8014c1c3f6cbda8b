"""What is attributed: the probability of a task, or a metric, as a function of w."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from mechsvd.attribution.curvature import Function
from mechsvd.attribution.objective import Objective, Over, batched, objective_over
from mechsvd.checks import require_whole
from mechsvd.engine.metrics import AnyMetric, Metric, log_prob, metric_for, score
from mechsvd.engine.session import Session
from mechsvd.model.tasks import Task

Kind = Literal["probability", "log_prob"]


@dataclass(frozen=True)
class TaskFunction:
    """The function of w that belongs to a task.

    Attributes:
        function: f, in units of `unit`.
        name: what f is.
        unit: multiplies everything that is measured in f; the clean probability if f is relative
            to it, and 1 otherwise.
        metric: what the noise floor is measured of.
        objective: the logits as a function of w, and what w is.
    """

    function: Function
    name: str
    unit: float
    metric: Metric
    objective: Objective


def task_function(
    session: Session, task: Task, over: Over, objective: Kind | None, metric: AnyMetric | None
) -> TaskFunction:
    """Make the function f of w that belongs to a task; a probability is relative to the clean one.

    Raises:
        TypeError, KeyError, ValueError: as `hessian_attribution`.
    """
    f = objective_over(session, task, over)
    if metric is None and objective != "log_prob":
        predictions = f.clean_logits()[None].log_softmax(dim=-1)
        clean = float(score(predictions, task)[0].double().sum())
        chosen, name, unit = log_prob, "probability", _probability(clean)
        values: Callable[[Tensor], Tensor] = f.log_prob
        relative_to: float | None = clean
    else:
        chosen = metric_for(log_prob if metric is None else metric, session.model, task)
        name, unit, relative_to = chosen.name, 1.0, None
        values = f.log_prob if chosen is log_prob else f.metric(chosen)
    size, halve = session.rows_per_pass(task), session.halve(task)
    function = Function(values, f.point, size, halve, session.progress, relative_to)
    return TaskFunction(function, name, unit, chosen, f)


def function_of(
    function: Callable[[Float[Tensor, " entry"]], Float[Tensor, ""]],
    w: Float[Tensor, " entry"],
    batch_size: int,
) -> Function:
    """Check your own function of one vector, and make one of rows.

    Raises:
        TypeError, ValueError: as `hessian_attribution_of`.
    """
    if not callable(function):
        raise TypeError(
            f"`function` must be a function of one vector, but is {type(function).__name__}."
        )
    if not isinstance(w, Tensor) or w.ndim != 1 or not w.is_floating_point() or len(w) == 0:
        what = (
            f"{w.dtype} of shape {list(w.shape)}"
            if isinstance(w, Tensor)
            else f"{type(w).__name__}"
        )
        raise ValueError(f"`w` must be a float tensor with one axis, but is {what}.")
    value = function(w.clone())  # a function of the user's may write to what it is given
    if not isinstance(value, Tensor) or value.ndim != 0:
        what = (
            f"a tensor of shape {list(value.shape)}"
            if isinstance(value, Tensor)
            else f"{type(value).__name__} {value!r:.20}"
        )
        raise ValueError(f"`function` must give a scalar tensor (no `.item()`), but gives {what}.")
    size = require_whole("batch_size", batch_size, 1)
    return Function(batched(lambda v: function(v.clone())), w.clone(), size, _halve)


def require_one_function(objective: Any, metric: Any) -> None:
    """Refuse an unknown objective, or two functions to attribute.

    Raises:
        ValueError: naming both.
    """
    if objective not in (None, "probability", "log_prob"):
        raise ValueError(f"`objective` is {objective!r}, but must be 'probability' or 'log_prob'.")
    if objective and metric is not None:
        raise ValueError("`objective` and `metric` are two functions; give one of them.")


def _probability(log_prob: float) -> float:
    if log_prob < math.log(sys.float_info.min):
        raise ValueError(
            f"The log-probability of the continuation is {log_prob:.0f} nats, so its probability "
            "is too small for a number (it underflows); shorten the continuation, or attribute the "
            'logarithm by `objective="log_prob"`.'
        )
    return math.exp(log_prob)


def _halve(size: int) -> int:
    if size == 1:
        raise MemoryError("A single evaluation of the function does not fit into memory.")
    return size // 2
