"""Run a model once, or let it generate, with hooks that must all fire."""

import difflib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.model.evaluation import has_other_hooks
from mechsvd.model.fused import fused_kernels
from mechsvd.model.sites import Hook, Model, before_unembedding

_SEEDING = threading.RLock()  # the generators are those of all threads, whatever model they run


def run_model(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    hooks: Sequence[Hook] = (),
    scored: slice | None = None,
    cut_early: bool = True,
    fused: bool = False,
    beginning: Any = None,
) -> Float[Tensor, "edit scored d_vocab"]:
    """Run the model once with hooks; each hook must fire exactly once.

    A hook may return more rows than it receives ("1 pos d_model" to "edit pos d_model"). What comes
    before it is then computed once.

    Args:
        scored: positions whose logits are returned.
        cut_early: drop the other positions before the unembedding, which takes most of the memory,
            unless a user's hook may see it.
        fused: run on fused kernels, with hooks at writes only; see `fused_kernels`.
        beginning: keys and values of what comes before `tokens`; see `Beginning.of`.

    Returns:
        Logits at the scored positions (all by default).

    Raises:
        KeyError: the model has no hook point of a given name.
        RuntimeError: a hook did not fire exactly once.
    """
    _require_points(model, hooks)
    counted = _counted(hooks, (-1, tokens.shape[1]))
    all_hooks: list[Hook] = [*counted]
    cut_early = cut_early and scored is not None and not has_other_hooks(model)
    if cut_early:
        all_hooks.append((before_unembedding(model), lambda x, hook=None: x[:, scored]))
    cached = {} if beginning is None else {"past_key_values": beginning}
    with fused_kernels(model) if fused else nullcontext():
        logits = model.run_with_hooks(tokens, fwd_hooks=all_hooks, return_type="logits", **cached)
    for name, hook in counted:
        if hook.times != 1:
            raise RuntimeError(
                f"The hook at `{name}` fired {hook.times} of 1 times: "
                "this model does not pass there once per run."
            )
    return logits if cut_early or scored is None else logits[:, scored]


def continue_tokens(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    hooks: Sequence[Hook] = (),
    *,
    temperature: float = 0.0,
    seed: int = 0,
    use_kv_cache: bool = True,
) -> list[Int[Tensor, " longer"]]:
    """Continue tokens by the model's own `generate`, with hooks at every step.

    Args:
        temperature: 0 takes the most probable token. Above 0, tokens are drawn with `seed`; the
            global generators do not change.

    Returns:
        The tokens of each row, the given ones included, up to and with its first end-of-text token.

    Raises:
        KeyError: the model has no hook point of a given name.
        RuntimeError: a hook never fired.
    """
    _require_points(model, hooks)
    counted = _counted(hooks, (len(tokens), -1))
    device = next(model.parameters()).device
    options = {
        "do_sample": temperature > 0,
        "temperature": temperature,
        "use_past_kv_cache": use_kv_cache,
        "stop_at_eos": bool(end_tokens(model)),
    }
    with (
        _seeded(seed, device) if temperature > 0 else nullcontext(),
        model.hooks(fwd_hooks=counted),
    ):
        longer = model.generate(
            tokens.to(device),
            max_new_tokens=max_new_tokens,
            return_type="tokens",
            verbose=False,
            **options,
        ).cpu()
    if silent := [name for name, hook in counted if hook.times == 0]:
        raise RuntimeError(
            f"The hook at `{silent[0]}` never fired: "
            "this model does not pass there when it generates."
        )
    return [_until_its_end(model, row, tokens.shape[1]) for row in longer]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that `torch.manual_seed` reaches, and restore them at the end."""
    other = {"device_type": device.type} if device.type not in ("cpu", "cuda") else {}
    devices = [device] if other else [*range(torch.cuda.device_count())]
    with _SEEDING, torch.random.fork_rng(devices, **other):
        torch.manual_seed(seed)
        yield


def end_tokens(model: Model) -> list[int]:
    """The tokens that end a text; none if the tokenizer names none."""
    end = getattr(model.tokenizer, "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _require_points(model: Model, hooks: Sequence[Hook]) -> None:
    points = model.hook_dict
    for name, _ in hooks:
        if name not in points:
            close = difflib.get_close_matches(name, points, n=3)
            raise KeyError(
                f"No hook point `{name}`: the model has layers 0–{model.cfg.n_layers - 1}; "
                f"close matches: {close}."
            )


class _Counted:
    """A hook that counts how often it fires.

    It gets both axes of `shape`, even if the model has merged them into one.
    """

    def __init__(self, function: Callable[..., Tensor | None], shape: tuple[int, int]):
        self.times, self._function, self._shape = 0, function, shape

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor | None:
        self.times += 1
        if x.ndim != 2:
            return self._function(x, hook=hook)
        # OPT's MLP sees [batch·pos, d_model]
        rows = self._function(x.reshape(*self._shape, x.shape[-1]), hook=hook)
        return None if rows is None else rows.flatten(0, 1)


def _counted(hooks: Sequence[Hook], shape: tuple[int, int]) -> list[tuple[str, _Counted]]:
    return [(name, _Counted(function, shape)) for name, function in hooks]


def _until_its_end(model: Model, row: Tensor, start: int) -> Tensor:
    ends = torch.isin(row[start:], torch.tensor(end_tokens(model), dtype=row.dtype)).nonzero()
    return row[: start + int(ends[0]) + 1] if len(ends) else row
