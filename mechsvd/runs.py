"""Running a model: once, or on and on, with hooks of which each must fire; and leaving the model as it was found."""

import difflib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mechsvd.sites import Hook, Model, before_unembedding


def run_model(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    hooks: Sequence[Hook] = (),
    scored: slice | None = None,
    cut_early: bool = True,
) -> Float[Tensor, "edit scored d_vocab"]:
    """Run the model once with hooks, each of which must fire exactly once.

    A hook may return more rows than it got ("1 pos d_model" to "edit pos d_model"): what comes before it is then computed once.

    Args:
        scored: positions whose logits are wanted.
        cut_early: drop the other positions before the unembedding, where most of the memory is, unless a user's hook may see it.

    Returns:
        Logits at the scored positions (all by default).

    Raises:
        KeyError: a hook name that the model does not have.
        RuntimeError: a hook fired another number of times than once.
    """
    _require_points(model, hooks)
    ours, fired = _counted(hooks, (-1, tokens.shape[1]))
    cut_early = cut_early and scored is not None and not users_hooks(model)
    if cut_early:
        ours.append((before_unembedding(model), lambda x, hook=None: x[:, scored]))
    logits = model.run_with_hooks(tokens, fwd_hooks=ours, return_type="logits")
    for (name, _), times in zip(hooks, fired, strict=True):
        if times != 1:
            raise RuntimeError(f"The hook at `{name}` fired {times} of 1 times: this model does not pass there once a run.")
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
    """Let the model go on from tokens by its own `generate`, with hooks that act at every step.

    Args:
        temperature: 0 takes the most probable token; above, tokens are drawn with `seed`, and the global generators stay as
            they were.

    Returns:
        Each row's tokens, the given ones too, up to and with its first end-of-text token.

    Raises:
        KeyError: a hook name that the model does not have.
        RuntimeError: a hook never fired.
    """
    _require_points(model, hooks)
    ours, fired = _counted(hooks, (len(tokens), -1))
    device = next(model.parameters()).device
    options = {
        "do_sample": temperature > 0,
        "temperature": temperature,
        "use_past_kv_cache": use_kv_cache,
        "stop_at_eos": bool(end_tokens(model)),
    }
    with _seeded(seed, device) if temperature > 0 else nullcontext(), model.hooks(fwd_hooks=ours):
        longer = model.generate(
            tokens.to(device), max_new_tokens=max_new_tokens, return_type="tokens", verbose=False, **options
        ).cpu()
    if silent := [name for (name, _), times in zip(hooks, fired, strict=True) if times == 0]:
        raise RuntimeError(f"The hook at `{silent[0]}` never fired: this model does not pass there when it generates.")
    return [_until_its_end(model, row, tokens.shape[1]) for row in longer]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that `torch.manual_seed` reaches, and put them back afterwards."""
    other = {"device_type": device.type} if device.type not in ("cpu", "cuda") else {}
    devices = [device] if other else [*range(torch.cuda.device_count())]
    with torch.random.fork_rng(devices, **other):
        torch.manual_seed(seed)
        yield


def end_tokens(model: Model) -> list[int]:
    """The tokens that end a text; none where the tokenizer names none."""
    end = getattr(model.tokenizer, "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)


@contextmanager
def evaluation(model: Model, *, gradients: bool = False) -> Iterator[tuple[str, ...]]:
    """Evaluate without dropout, and leave the model as it was, also after an exception.

    Args:
        gradients: allow them, to the second order: the parameters themselves are frozen meanwhile, and attention runs on
            torch's plain kernels, for the fused ones have no second derivative. By default there are none.

    Yields:
        Notes for the provenance: whose hooks took part.
    """
    notes: tuple[str, ...] = ()
    if names := users_hooks(model):
        notes = (f"hooks of the user at {', '.join(names)}",)
        warnings.warn(f"The model already has hooks at {', '.join(names)}; they are kept, and results include them.", stacklevel=4)
    training = [module for module in _modules(model) if module.training]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad] if gradients else []
    if training:
        warnings.warn("The model is in train mode: it is evaluated in eval mode here and put back afterwards.", stacklevel=4)
    try:
        for module in training:
            module.training = False
        for parameter in wanting:
            parameter.requires_grad = False
        with _differentiable() if gradients else torch.no_grad():
            yield notes
    finally:
        for parameter in wanting:
            parameter.requires_grad = True
        for module in training:
            module.training = True


@contextmanager
def without_users_hooks(model: Model) -> Iterator[None]:
    """Set the user's hooks aside for a while; they come back as they were, in their order."""
    points = {id(point): point for point in model.hook_dict.values() if point.fwd_hooks}
    theirs = [(point, point.fwd_hooks, point._forward_hooks) for point in points.values()]
    try:
        for point in points.values():
            point.fwd_hooks, point._forward_hooks = [], OrderedDict()
        yield
    finally:
        for point, handles, functions in theirs:
            point.fwd_hooks, point._forward_hooks = handles, functions


def users_hooks(model: Model) -> list[str]:
    """Names of the hook points that carry somebody's forward hooks."""
    points = {id(point): point for point in model.hook_dict.values()}
    return [str(point.name) for point in points.values() if point.fwd_hooks]


@contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _require_points(model: Model, hooks: Sequence[Hook]) -> None:
    points = model.hook_dict
    for name, _ in hooks:
        if name not in points:
            close = difflib.get_close_matches(name, points, n=3)
            raise KeyError(f"No hook point `{name}`: the model has layers 0–{model.cfg.n_layers - 1}; close matches: {close}.")


def _counted(hooks: Sequence[Hook], shape: tuple[int, int]) -> tuple[list[Hook], list[int]]:
    """The hooks, each told how often it fired, and given both axes of `shape` where the model has made one of them."""
    fired = [0] * len(hooks)

    def counted(index: int, hook_function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def run(x: Tensor, hook: Any = None) -> Tensor | None:
            fired[index] += 1
            if x.ndim == 3:
                return hook_function(x, hook=hook)
            rows = hook_function(x.reshape(*shape, x.shape[-1]), hook=hook)  # OPT's MLP sees [batch·pos, d_model]
            return None if rows is None else rows.flatten(0, 1)

        return run

    return [(name, counted(i, f)) for i, (name, f) in enumerate(hooks)], fired


def _until_its_end(model: Model, row: Tensor, start: int) -> Tensor:
    ends = torch.isin(row[start:], torch.tensor(end_tokens(model), dtype=row.dtype)).nonzero()
    return row[: start + int(ends[0]) + 1] if len(ends) else row


def _modules(model: Any) -> list[Any]:
    """All modules, those of the wrapped Hugging Face model too, whose mode can be set apart from the bridge's."""
    roots = [model, getattr(model, "original_model", None)]
    return list({id(module): module for root in roots if root is not None for module in root.modules()}.values())
