"""Metrics: one number per edit, from the logits at the scored positions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.checks import is_whole
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.finite import give_probabilities, require_finite_logits
from mechsvd.model.runs import run_model
from mechsvd.model.selfcheck import SelfCheck
from mechsvd.model.sites import Hook, Model
from mechsvd.model.tasks import Task, require_known
from mechsvd.model.tokenization import one_token

Logits = Float[Tensor, "edit scored d_vocab"]
Clean = Float[Tensor, "scored d_vocab"]
Function = Callable[[Logits, Clean, Task], Float[Tensor, " edit"]]
Profile = Callable[[Logits, Clean], Float[Tensor, "edit item"]]
Tokens = str | int | Sequence[str] | Sequence[int]  # one or several, as text or as ids
# columns of the tables that are no metrics
_TAKEN = {
    *("direction", "singular_value", "effect", "is_noise", "rank", "alpha", "gain", "edit"),
    *("effective_directions", "probability", "surprise", "orig_delta", "kept_delta", "task"),
    *("layer", "component", "margin", "reached", "is_tie", "random"),
}


@dataclass(frozen=True)
class Metric:
    """A metric with its name and unit; any function of the same arguments serves as one.

    Attributes:
        name: of the column in tables.
        unit: of the value; empty if it has none.
        function: of the logits at the scored positions under each edit, "edit scored d_vocab", of
            the clean ones, "scored d_vocab", and of the task; one number per edit.
        better: whether more or less of it is better. The effect is damage: clean − edited where
            more is better, and edited − clean where less is, as for a divergence, which is 0 clean.
        column: of a measurement, with the same value at no cost; None if it has none.
        fit: makes the function for a model and task, where it depends on them.
        profile: further numbers of each edit, "edit item", which a measurement keeps as
            `profiles`; of the log-probabilities of all tokens, edited and clean. None for none.

    Example:
        >>> largest = ms.Metric("largest", "logits", lambda logits, clean, task: logits.amax((1, 2)))
        >>> ms.measure(model, task, [ms.keep(mine)], metric=largest).unit
        'logits'
    """

    name: str
    unit: str
    function: Function
    better: Literal["more", "less"] = "more"
    column: str | None = None
    fit: Callable[[Model, Task], Function] | None = None
    profile: Profile | None = None

    def __call__(self, logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
        """The value of each edit; NaN where its logits hold NaN or inf. −inf is a masked token."""
        values = self.function(logits, clean, task)
        is_right = give_probabilities(logits).all(dim=-1)
        if is_right.all() or getattr(values, "shape", None) != is_right.shape:
            return values
        return values.where(is_right, torch.nan)


AnyMetric = Metric | Function


def metric_for(metric: Any, model: Model, task: Task) -> Metric:
    """A metric ready for one task; a function becomes one, under its own name.

    Raises:
        TypeError: it is not a function.
        ValueError: its name is taken, or it does not fit the task.
    """
    metric = as_metric(metric)
    return metric if metric.fit is None else replace(metric, function=metric.fit(model, task))


def as_metric(metric: Any) -> Metric:
    """A metric for any task: by default the log-probability; see `metric_for`."""
    if metric is None:
        return log_prob
    if not callable(metric):
        raise TypeError(
            f"`metric` must be a function of logits, clean logits and task, but is {metric!r:.40}; "
            "see `mechsvd.kl_divergence` and `mechsvd.logit_difference`."
        )
    if metric is logit_difference:
        raise TypeError("`logit_difference` makes a metric; write `metric=logit_difference()`.")
    if not isinstance(metric, Metric):
        name = getattr(metric, "__name__", "metric").replace("<lambda>", "metric")
        if name in _TAKEN | READY.keys():
            raise ValueError(
                f"A metric cannot be named `{name}`, a column that the tables have; rename it."
            )
        metric = Metric(name, "", metric)
    return metric


def evaluate(metric: Metric, logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
    """The metric of each edit, checked; differentiable where the metric is.

    Raises:
        TypeError: it returns no tensor of floats.
        ValueError: it returns another shape, or NaN or inf for logits that give probabilities, or
            changes what it was given in place.
    """
    own, own_clean = protected(metric.function, logits, clean)
    tokens = task.tokens.clone()
    try:
        values = metric(own, own_clean, task)
    finally:
        if is_changed := not torch.equal(tokens, task.tokens):
            task.tokens.copy_(tokens)
    if is_changed or (own is not logits and (own._version or own_clean._version)):
        what = "the task's tokens" if is_changed else "its logits"
        raise ValueError(
            f"The metric `{metric.name}` changed {what} in place; compute with new tensors."
        )
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(
            f"The metric `{metric.name}` returned {kind}, but must return a tensor of floats."
        )
    if values.shape != logits.shape[:1]:
        raise ValueError(
            f"The metric `{metric.name}` returned shape {list(values.shape)} for "
            f"{len(logits)} edits; it must return one number for each, [edit]."
        )
    wrong = ~values.isfinite()
    if wrong.any() and give_probabilities(logits[wrong]).any():
        raise ValueError(
            f"The metric `{metric.name}` returned {values[wrong][0].item()} for logits without NaN; "
            "it must return finite numbers, also where a logit is −inf (a masked token)."
        )
    return values


def protected(function: Callable[..., Any], *values: Tensor) -> tuple[Tensor, ...]:
    """What a function gets for some values that must not change: copies, unless it is ours."""
    function = getattr(function, "func", function)  # of a partial
    own = (_difference, token_drops, *(metric.function for metric in READY.values()))
    is_own = any(function is one for one in own)
    return values if is_own else tuple(value.clone() for value in values)


def predict(
    model: Model,
    tasks: Sequence[Task],
    check: SelfCheck,
    hooks: Sequence[Hook] = (),
    counts: Sequence[int] = (1,),
    beginning: tuple[int, Any] = (0, None),
) -> Logits:
    """Run some tasks of one length once, with hooks that make `counts` rows of each.

    Gradients flow through it where they are enabled; see `evaluation`.

    Args:
        beginning: length, keys and values of what is not run again; see `Beginning.of`.

    Returns:
        The logits of every token at the positions that any of the tasks scores, in float32 or
        wider; the rows of the first task come first. See `own_positions`.
    """
    tokens = torch.stack([task.tokens for task in tasks]).to(next(model.parameters()).device)
    if not check.shares_prefix or len(tasks) > 1:  # only one row is broadcast by what comes later
        tokens = tokens.repeat_interleave(torch.tensor(counts).to(tokens.device), dim=0)
    start, cache = beginning
    scored = scored_by(tasks)
    logits = run_model(
        model,
        tokens[:, start:],
        hooks,
        slice(scored.start - start, scored.stop - start),
        cut_early=check.scores_alone,
        fused=check.runs_fused,
        beginning=cache,
    )
    return logits.to(at_least_single(logits.dtype))


def predict_clean(model: Model, task: Task, check: SelfCheck) -> Clean:
    """Run one task without an edit; see `predict`.

    Raises:
        ValueError: its logits hold NaN or inf; see `require_finite_logits`.
    """
    logits = predict(model, [task], check)
    require_finite_logits(model, task.tokens[None], logits, task.scored)
    return logits[0]


def scored_by(tasks: Sequence[Task]) -> slice:
    """The positions that any of the tasks scores, and those between."""
    starts, stops = zip(*((task.scored.start, task.scored.stop) for task in tasks), strict=True)
    return slice(min(starts), max(stops))


def own_positions(task: Task, first: int) -> slice:
    """The scored positions of a task, among those from `first` on."""
    return slice(task.scored.start - first, task.scored.stop - first)


def score(
    predictions: Logits, task: Task
) -> tuple[Float[Tensor, "edit scored"], Bool[Tensor, "edit scored"]]:
    """The log-probability of each continuation token, and whether it is the most probable one.

    Args:
        predictions: log-probabilities of all tokens.
    """
    target = _target(task, predictions)
    log_probs = predictions.gather(-1, target[..., None])[..., 0]
    return log_probs, (predictions.argmax(dim=-1) == target) & log_probs.isfinite()


def divergences(edited: Logits, clean: Clean) -> Float[Tensor, "edit scored"]:
    """The KL divergence of clean ‖ edited at each scored position, in nats.

    It is 0 where the predictions are the same, and never cancels over tokens. It is NaN where
    either of them is, and infinite where the edit masks a token that the clean run does not.

    Args:
        edited, clean: log-probabilities of all tokens; −inf for a masked one.
    """
    probabilities, change = clean.exp(), clean - edited
    divergence = torch.einsum("sv,esv->es", probabilities, change)  # one pass over the vocabulary
    if not divergence.isfinite().all():  # a masked token has p = 0, and its terms count as 0
        is_masked = (probabilities == 0) & ~edited.isnan()
        divergence = (probabilities * change).masked_fill(is_masked, 0.0).sum(dim=-1)
    return divergence


def token_drops(edited: Logits, clean: Clean) -> Float[Tensor, "edit d_vocab"]:
    """How much of each token's log-probability an edit takes: the mean over the scored positions.

    It is clean − edited in nats, so positive for a token that the edit makes less probable. A token
    that is masked in both runs has 0.

    Args:
        edited, clean: log-probabilities of all tokens.
    """
    drops = clean.mean(dim=0) - edited.mean(dim=1)  # no copy of edit × scored × vocabulary
    is_masked = (clean == -torch.inf).any(dim=0)
    if is_masked.any():
        is_masked = is_masked & give_probabilities(edited).all(dim=-1)[:, None]
    return drops.masked_fill(is_masked & drops.isnan(), 0.0)


def token_log_probs(logits: Logits, task: Task) -> Float[Tensor, "edit scored"]:
    """The log-probability of each continuation token, in nats, from logits."""
    chosen = logits.gather(-1, _target(task, logits)[..., None])[..., 0]
    total = logits.logsumexp(dim=-1)
    return chosen - total.masked_fill(total == torch.inf, torch.nan)  # inf − inf, or finite − inf


def _log_prob(logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
    return token_log_probs(logits, task).sum(dim=-1)


def _kl_divergence(logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
    return divergences(logits.log_softmax(dim=-1), clean.log_softmax(dim=-1)).mean(dim=-1)


def _absolute_change(logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
    change = token_log_probs(logits, task) - token_log_probs(clean[None], task)
    return change.abs().sum(dim=-1)


def _cross_entropy(logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
    return -token_log_probs(logits, task).mean(dim=-1)


def _greedy_share(logits: Logits, clean: Clean, task: Task) -> Float[Tensor, " edit"]:
    return (logits.argmax(dim=-1) == _target(task, logits)).to(logits).mean(dim=-1)


log_prob = Metric("log_prob", "nats", _log_prob, column="log_prob")
"""The natural-log probability of the whole continuation, in nats: the metric by default.

Example:
    >>> measured = ms.measure(model, task, [ms.keep(mine)], metric=ms.log_prob)
    >>> torch.equal(measured.value, measured.log_prob)
    True
"""

kl_divergence = Metric(
    "kl_divergence", "nats per token", _kl_divergence, "less", column="kl_divergence"
)
"""Mean over the scored positions of the KL divergence of clean ‖ edited; tokens do not cancel.

Example:
    >>> measured = ms.measure(model, task, [ms.chain()], metric=ms.kl_divergence)  # no edit
    >>> bool(measured.effect.abs() < 1e-6)
    True
"""

absolute_change = Metric("absolute_change", "nats", _absolute_change, "less", "absolute_change")
"""Sum over tokens of the size of the change of their log-probability; tokens do not cancel.

Example:
    >>> measured = ms.measure(model, task, [ms.keep(mine)], metric=ms.absolute_change)
    >>> bool(measured.value >= (measured.log_prob - measured.clean_run.log_prob).abs())
    True
"""

cross_entropy = Metric("cross_entropy", "nats per token", _cross_entropy, "less", "cross_entropy")
"""Minus the mean log-probability of the continuation's tokens: the loss.

Example:
    >>> measured = ms.measure(model, task, [ms.keep(mine)], metric=ms.cross_entropy)
    >>> torch.allclose(measured.value, -measured.log_prob / len(task.continuation))
    True
"""

greedy_share = Metric("greedy_share", "of the tokens", _greedy_share, column="greedy_share")
"""The share of continuation tokens that are the most probable ones; it has no slope.

Example:
    >>> ms.measure(model, task, [ms.chain()], metric=ms.greedy_share).value.tolist()  # no edit
    [1.0]
"""

READY = {m.name: m for m in (log_prob, kl_divergence, absolute_change, cross_entropy, greedy_share)}


def logit_difference(right: Tokens | None = None, wrong: Tokens | None = None) -> Metric:
    """The metric of a choice: the logit of the right token minus that of the wrong one.

    It is read at the first scored position, where the answer begins, in logits. Of several tokens
    on one side, the mean logit counts.

    Args:
        right, wrong: a text of one token (with its space, " Mary"), a token id, or several. By
            default, those of the task; see `Task.from_choice`.

    Raises:
        ValueError, TypeError: when it meets the model: a text of several tokens, an id that the
            model does not have, or a task without a choice.

    Reference: Wang et al., Interpretability in the wild, 2022, arXiv:2211.00593.

    Example:
        >>> choice = ms.Task.from_choice(model, "The meaning of life is", " to", " a")
        >>> ms.measure(model, choice, [ms.keep(mine)], metric=ms.logit_difference()).unit
        'logits'
    """
    if (right is None) != (wrong is None):
        raise ValueError(
            "`logit_difference` needs both `right` and `wrong`, or neither, for those of the task."
        )
    return Metric(
        "logit_difference",
        "logits",
        partial(_difference, right, wrong),
        fit=partial(_fitted_difference, right, wrong),
    )


def _fitted_difference(right: Any, wrong: Any, model: Model, task: Task) -> Function:
    ids = _ids(model, task, right, "right"), _ids(model, task, wrong, "wrong")
    return partial(_difference, *ids)


def _difference(
    right: Any, wrong: Any, logits: Logits, clean: Clean, task: Task
) -> Float[Tensor, " edit"]:
    first = logits[:, 0]
    means = [
        first[:, _plain_ids(tokens, chosen, name)].mean(dim=-1)
        for tokens, chosen, name in ((right, task.right, "right"), (wrong, task.wrong, "wrong"))
    ]
    return means[0] - means[1]


def _plain_ids(tokens: Any, chosen: tuple[int, ...], name: str) -> list[int]:
    ids = list(chosen) if tokens is None else _several(tokens)
    if not ids or any(isinstance(token, str) for token in ids):
        raise ValueError(
            f"`{name}` must be token ids where there is no model to read texts, but is {tokens!r}; "
            "pass the metric to `measure`."
        )
    return ids


def _ids(model: Model, task: Task, tokens: Any, name: str) -> Int[Tensor, " token"]:
    if tokens is None:
        ids = list(getattr(task, name))
        if not ids:
            raise ValueError(
                "The task has no choice: make it by `Task.from_choice(model, prompt, right, "
                "wrong)`, or pass `logit_difference(right, wrong)`."
            )
    else:
        start = task.tokens[: task.prompt_length].tolist()
        ids = [
            one_token(model, start, token, name) if isinstance(token, str) else token
            for token in _several(tokens)
        ]
    if not ids:
        raise ValueError(f"`{name}` of a logit difference is empty; give at least one token.")
    if wrong := [token for token in ids if not is_whole(token, 0)]:
        raise TypeError(f"`{name}` must be a text or token ids, but holds {wrong[0]!r:.40}.")
    require_known(model, torch.tensor(ids), as_outputs=True)
    return torch.tensor(ids)


def _several(tokens: Any) -> list[Any]:
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    return [*tokens] if isinstance(tokens, Iterable) and not isinstance(tokens, str) else [tokens]


def _target(task: Task, logits: Logits) -> Int[Tensor, "edit scored"]:
    return task.continuation.to(logits.device).expand(len(logits), -1)
