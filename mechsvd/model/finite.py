"""Runs that are not finite: where NaN or inf begin, and what to do about it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechsvd.model.evaluation import other_hooks
from mechsvd.model.sites import COMPONENTS, Hook, Model, Site, end_of_stream, passed_on

ROOMIER = {torch.float16: "torch.float32 or torch.bfloat16", torch.bfloat16: "torch.float32"}


def require_finite_logits(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    logits: Float[Tensor, "batch scored d_vocab"],
    scored: slice | None = None,
    hooks: Sequence[Hook] = (),
    prompt: int | None = None,
) -> None:
    """Refuse logits from which no text and no probability follows.

    A logit of −inf is a masked token, with probability 0, as of a padded vocabulary: it is let
    through where another token is left. NaN and inf are not. Only where they are, the model runs
    once more, to find where they begin.

    Args:
        tokens: the whole texts, from their first token on.
        scored: the positions of the logits; all by default.
        hooks: of the edits that were on, which are then named as the likely cause.
        prompt: the number of the text, of one; of several rows, by default that of the row.

    Raises:
        ValueError: saying where NaN or inf begin, in which dtype, and what to do.
    """
    wrong = ~give_probabilities(logits)
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        start = 0 if scored is None else scored.indices(tokens.shape[1])[0]
        what = f"the logits at position {start + place}"
        raise ValueError(not_finite(model, tokens, what, hooks, row, prompt))


def give_probabilities(logits: Float[Tensor, "*rows d_vocab"]) -> Bool[Tensor, "*rows"]:
    """Where no logit is NaN or inf and one is more than −inf, by one reduction without a copy."""
    return logits.detach().amax(dim=-1).isfinite()


def not_finite(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    what: str,
    hooks: Sequence[Hook] = (),
    row: int = 0,
    prompt: int | None = None,
) -> str:
    """Say where NaN or inf begin in a run, by one more pass, and what to do.

    Args:
        what: is known not to be finite, for a run in which nothing before the logits is.
        row: the text that is meant, of several.
    """
    tokens = tokens.to(next(model.parameters()).device)
    if hooks and _beginning(model, tokens, (), row):  # without the edit, too
        hooks = ()
    run = "run under the edit" if hooks else "clean run"
    begin = _beginning(model, tokens, hooks, row)
    of = "" if prompt is None else f" of prompt {prompt}"
    if prompt is None and len(tokens) > 1:  # the rows of one prompt are edits
        of = f" of {'edit' if hooks else 'prompt'} {row}"
    where = f"first at {begin}{of}, so {what} are not finite" if begin else f"in {what}{of}"
    return f"The {run} holds NaN or inf, {where}; {_remedy(model, hooks)}"


def overflow_advice(dtype: torch.dtype) -> str:
    """Which dtype holds larger numbers, as a sentence; empty for float32 and wider."""
    if dtype not in ROOMIER:
        return ""
    return f" {str(dtype).removeprefix('torch.')} overflows: load the model with dtype={ROOMIER[dtype]}."


def _remedy(model: Any, hooks: Sequence[Hook]) -> str:
    dtype = next(model.parameters()).dtype
    if hooks:
        return f"the edit makes the model overflow ({dtype}): make it smaller, or leave it out."
    weights = nn.Module.named_parameters(model)
    if broken := [name for name, weight in weights if not weight.isfinite().all()]:
        name = broken[0].replace("._original_component", "")
        others = f", and {len(broken) - 1} more weights" * (len(broken) > 1)
        return f"the weight {name} holds them{others}: load the model again."
    advice = overflow_advice(dtype)
    if on_it := other_hooks(model):
        return f"what is on the model at {', '.join(on_it)} may make them: take it off.{advice}"
    return advice.strip() or f"the model computes them in {dtype}: its weights are too large."


def _beginning(
    model: Model, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook], row: int
) -> str | None:
    """The first hook point of the stream and position where a row is not finite, in words."""
    found: list[str] = []

    def look(name: str) -> Hook:
        def watch(x: Tensor, hook: Any = None) -> None:
            own = x.reshape(-1, tokens.shape[1], x.shape[-1])[row]
            wrong = (~own.isfinite().all(dim=-1)).nonzero()
            if len(wrong) and not found:
                found.append(f"{_place(name)}, position {int(wrong[0])}")

        return name, watch

    points = [look(name) for name in _points(model) if name in model.hook_dict]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *points], return_type="logits")
    return found[0] if found else None


def _points(model: Model) -> list[str]:
    """The hook points of the stream and its writes; after them the logits come."""
    names = [
        passed_on(model, f"blocks.{layer}.hook_{kind}")
        for layer in range(model.cfg.n_layers)
        for kind in ("resid_pre", *(f"{c}_out" for c in COMPONENTS), "resid_post")
    ]
    return [*names, end_of_stream(model)] if end_of_stream(model) not in names else names


def _place(name: str) -> str:
    """A write by its layer and component, and any other hook point by its name."""
    layer, last = name.split(".")[1], name.split(".")[-1]
    component = last.removeprefix("hook_").removesuffix("_out")
    return Site(int(layer), component, name).place if component in COMPONENTS else name
