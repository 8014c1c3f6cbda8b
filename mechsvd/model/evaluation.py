"""Evaluate a model without dropout, with all its hooks, and restore its state."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from mechsvd.ambient import plain_torch, twice_differentiable
from mechsvd.checks import warn
from mechsvd.model.sites import Model

# their hooks belong to the model: they build it, split it over devices, or parametrise it
_LIBRARIES = (
    "transformer_lens.model_bridge.",
    "transformer_lens.hook_points",
    "transformers.",
    "sae_lens.",
    "accelerate.",
    "torch.",
)
# models in evaluation, and the places of the other hooks on them
_OPEN: "WeakKeyDictionary[Any, tuple[str, ...]]" = WeakKeyDictionary()
# who runs a model; by the Hugging Face model where there is one, which several bridges may wrap
_LOCKS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_TORN: "WeakSet[Any]" = WeakSet()  # models that another thread ran when this process was forked


@dataclass(frozen=True)
class OtherHooks:
    """The forward hooks and patched forwards on a model that are not mechsvd's.

    Attributes:
        places: their places, by the names that users know.
        batched: whether they act on every row of a batch, as the user says.
    """

    places: tuple[str, ...]
    batched: bool = False

    @property
    def one_row(self) -> bool:
        """Whether each edit must run as a batch of one row, since a hook may act on one only."""
        return bool(self.places) and not self.batched

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes for the provenance."""
        rows = "one row per pass" if self.one_row else "many rows per pass"
        return (f"hooks of the user at {', '.join(self.places)}, {rows}",) if self.places else ()


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Let other threads wait until this block is done with the model; blocks may be nested.

    Hooks and modes are on the model itself, so those of two threads would mix.

    Raises:
        RuntimeError: inside a transform of `torch.func`, whose tensors stand for others; or another
            thread was running the model when this process was forked.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "mechsvd cannot run a model inside a transform of `torch.func` (vmap, grad, …): call "
            "it outside, or run the model by `run_with_hooks` with `mechsvd.fwd_hooks`."
        )
    key = getattr(model, "original_model", model)
    if key in _TORN:
        raise RuntimeError(
            "mechsvd cannot run this model: another thread was running it when this process was "
            "forked, so that run's hooks may be on it; load it here, or start the process earlier."
        )
    with _LOCKS.setdefault(key, threading.RLock()):
        yield


def _forget_threads() -> None:
    """In a forked process there are no other threads: none will release its lock."""
    for key, lock in [*_LOCKS.items()]:
        if lock.acquire(blocking=False):
            lock.release()
        else:
            _TORN.add(key)
            del _LOCKS[key]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_threads)


@contextmanager
def evaluation(
    model: Model, *, gradients: bool = False, batched_hooks: bool = False, quiet: bool = False
) -> Iterator[OtherHooks]:
    """Evaluate without dropout, and restore the model, also after an exception.

    An evaluation inside another one of the same model does not repeat its warnings. Other threads
    wait meanwhile, and the modes of torch that the caller is in are put aside; see `plain_torch`.

    Args:
        gradients: allow first and second derivatives; off by default. Meanwhile the parameters are
            frozen, and attention runs on torch's plain kernels, since the fused ones have no second
            derivative.
        batched_hooks: whether the user's hooks act on every row of a batch.
        quiet: do not warn.

    Yields:
        The hooks on the model that are not mechsvd's; they stay active.
    """
    with (
        alone(model),
        plain_torch(),
        _evaluation(model, gradients, batched_hooks, quiet) as others,
    ):
        yield others


@contextmanager
def _evaluation(
    model: Model, gradients: bool, batched_hooks: bool, quiet: bool
) -> Iterator[OtherHooks]:
    modules = _named_modules(model)
    places = (*_places_of_points(model), *_places_of_modules(modules))
    others = OtherHooks(places, batched_hooks)
    enclosing = _OPEN.get(model)
    if others.places and others.places != enclosing and not quiet:
        _warn_hooks(others)
    # the bridge and its wrapped Hugging Face model may be in different modes
    training = [module for _, module in modules if module.training]
    trainable = (
        [parameter for parameter in model.parameters() if parameter.requires_grad]
        if gradients
        else []
    )
    if any(_is_random(module) for module in training) and not quiet:
        warn("The model is in train mode: it is evaluated in eval mode and then put back.")
    try:
        _OPEN[model] = others.places
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad = False
        with _differentiable() if gradients else torch.no_grad():
            yield others
    finally:
        _OPEN.pop(model)
        if enclosing is not None:
            _OPEN[model] = enclosing
        for parameter in trainable:
            parameter.requires_grad = True
        for module in training:
            module.training = True


def has_other_hooks(model: Model) -> bool:
    """Whether a model carries hooks that are not mechsvd's.

    Within an evaluation, the answer is that of its beginning.
    """
    return bool(_OPEN[model] if model in _OPEN else other_hooks(model))


def other_hooks(model: Model) -> list[str]:
    """List the places of forward hooks and patched forwards that are the user's.

    Those of mechsvd and of the model's own libraries do not count.

    Returns:
        Names of TransformerLens's hook points, and paths of modules with torch hooks or patches.
    """
    return [*_places_of_points(model), *torch_hooks(model)]


def torch_hooks(model: Model) -> list[str]:
    """List the places of torch hooks and patched forwards that are the user's."""
    return _places_of_modules(_named_modules(model))


@contextmanager
def without_hook_points(model: Model) -> Iterator[None]:
    """Take the user's hooks off the hook points, then restore them in their order."""
    with alone(model):
        points = [point for _, point in _points_of_user(model)]
        saved_hooks = [(point, point.fwd_hooks, point._forward_hooks) for point in points]
        try:
            for point in points:
                point.fwd_hooks, point._forward_hooks = [], OrderedDict()
            yield
        finally:
            for point, handles, functions in saved_hooks:
                point.fwd_hooks, point._forward_hooks = handles, functions


def _warn_hooks(others: OtherHooks) -> None:
    advice = (
        " Each edit runs alone, in a forward pass of its own, since such a hook may act on one row "
        "only; `batched_hooks=True` says that yours act on every row."
    )
    warn(
        f"The model already has hooks at {', '.join(others.places)}; they are kept, "
        "and results include them."
        f"{advice if others.one_row else ''}"
    )


def _is_foreign(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return not str(getattr(function, "__module__", "")).startswith(_LIBRARIES)


def _places_of_points(model: Model) -> list[str]:
    return [name for name, _ in _points_of_user(model)]


def _places_of_modules(modules: Sequence[tuple[str, nn.Module]]) -> list[str]:
    places = []
    for path, module in modules:
        functions = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(map(_is_foreign, functions)):
            places.append(f"{path} (a torch hook)")
        if "forward" in vars(module) and _is_foreign(vars(module)["forward"]):
            places.append(f"{path} (a patched forward)")
    global_hooks = [
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
    ]
    if any(map(_is_foreign, global_hooks)):
        places.append("every module (a global torch hook)")
    return places


def _points_of_user(model: Model) -> list[tuple[str, Any]]:
    """The hook points that carry hooks of the user, by the names that users know."""
    # of several names for a point, the last one is the one that users know
    hooked = {id(p): (name, p) for name, p in model.hook_dict.items() if p.fwd_hooks}
    return [pair for pair in hooked.values() if any(map(_is_foreign, _functions(pair[1])))]


def _functions(point: Any) -> list[Any]:
    """The functions at a hook point; before version 4.3 TransformerLens keeps handles only."""
    return [getattr(handle, "user_hook", None) or _unknown for handle in point.fwd_hooks]


def _unknown() -> None:
    """Stands for a hook function that TransformerLens does not expose."""


def _is_random(module: nn.Module) -> bool:
    """Whether a module drops or jitters values in train mode."""
    rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    rates += [
        value for name, value in vars(module).items() if ("dropout" in name or "jitter" in name)
    ]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextmanager
def _differentiable() -> Iterator[None]:
    with torch.enable_grad(), twice_differentiable():
        yield


def _named_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """All modules with their path, once each, also those of the wrapped Hugging Face model."""
    modules: dict[int, tuple[str, nn.Module]] = {}
    for root in (model, getattr(model, "original_model", None)):
        for path, module in nn.Module.named_modules(root) if root is not None else ():
            modules.setdefault(
                id(module), (path.replace("._original_component", "") or "the model", module)
            )
    return list(modules.values())
