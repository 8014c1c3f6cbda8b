"""Evaluating a model: without dropout, with everybody's hooks, and leaving it as it was found."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module

from mechsvd.checks import warn
from mechsvd.model.sites import Model

# whose hooks are part of the model: how it is built, split over devices, or parametrised
_LIBRARIES = (
    "transformer_lens.model_bridge.",
    "transformer_lens.hook_points",
    "transformers.",
    "accelerate.",
    "torch.",
)
_OPEN: "WeakKeyDictionary[Any, tuple[str, ...]]" = (
    WeakKeyDictionary()
)  # models in evaluation, and whose hooks were named


@dataclass(frozen=True)
class OtherHooks:
    """The forward hooks and patched forwards on a model that are not mechsvd's.

    Attributes:
        places: where they are, by the names that users know.
        batched: the user says that they act on every row of a batch.
    """

    places: tuple[str, ...]
    batched: bool = False

    @property
    def one_row(self) -> bool:
        """Whether each edit must run as a batch of one row, since a hook may act on a single row only."""
        return bool(self.places) and not self.batched

    @property
    def notes(self) -> tuple[str, ...]:
        """What belongs in the provenance."""
        rows = "one row per pass" if self.one_row else "many rows per pass"
        return (f"hooks of the user at {', '.join(self.places)}, {rows}",) if self.places else ()


@contextmanager
def evaluation(
    model: Model, *, gradients: bool = False, batched_hooks: bool = False, quiet: bool = False
) -> Iterator[OtherHooks]:
    """Evaluate without dropout, and leave the model as it was, also after an exception.

    An evaluation inside another one of the same model does not repeat its warnings.

    Args:
        gradients: allow them, to the second order: the parameters themselves are frozen meanwhile, and attention runs on
            torch's plain kernels, for the fused ones have no second derivative. By default there are none.
        batched_hooks: the user's hooks act on every row of a batch.
        quiet: do not warn.

    Yields:
        The hooks that are not mechsvd's, which take part.
    """
    others = OtherHooks(tuple(other_hooks(model)), batched_hooks)
    enclosing = _OPEN.get(model)
    if others.places and others.places != enclosing and not quiet:
        _warn_hooks(others)
    training = [module for module in _modules(model) if module.training]
    wanting = (
        [parameter for parameter in model.parameters() if parameter.requires_grad]
        if gradients
        else []
    )
    if any(_is_random(module) for module in training) and not quiet:
        warn(
            "The model is in train mode: it is evaluated in eval mode here and put back afterwards."
        )
    try:
        _OPEN[model] = others.places
        for module in training:
            module.training = False
        for parameter in wanting:
            parameter.requires_grad = False
        with _differentiable() if gradients else torch.no_grad():
            yield others
    finally:
        _OPEN.pop(model)
        if enclosing is not None:
            _OPEN[model] = enclosing
        for parameter in wanting:
            parameter.requires_grad = True
        for module in training:
            module.training = True


def has_other_hooks(model: Model) -> bool:
    """Whether anybody else's hooks are on a model; within an evaluation, what was found at its beginning."""
    return bool(_OPEN[model] if model in _OPEN else other_hooks(model))


def other_hooks(model: Model) -> list[str]:
    """Where forward hooks or patched forwards are that neither mechsvd nor the model's own libraries put there.

    Returns:
        Names of TransformerLens's hook points, and paths of the modules that carry torch's own hooks.
    """
    names = {
        id(point): name for name, point in model.hook_dict.items()
    }  # the last name is the one that users know
    found = [
        names[id(point)] for point in _points(model) if any(map(_is_foreign, _functions(point)))
    ]
    for path, module in _named_modules(model):
        plain = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_is_foreign(function) for function in plain):
            found.append(f"{path} (a torch hook)")
        if _is_foreign(vars(module).get("forward")):
            found.append(f"{path} (a patched forward)")
    everywhere = [
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
    ]
    return [
        *found,
        *(["every module (a global torch hook)"] if any(map(_is_foreign, everywhere)) else []),
    ]


@contextmanager
def without_hook_points(model: Model) -> Iterator[None]:
    """Set the user's hooks at hook points aside for a while; they come back as they were, in their order."""
    points = [point for point in _points(model) if any(map(_is_foreign, _functions(point)))]
    theirs = [(point, point.fwd_hooks, point._forward_hooks) for point in points]
    try:
        for point in points:
            point.fwd_hooks, point._forward_hooks = [], OrderedDict()
        yield
    finally:
        for point, handles, functions in theirs:
            point.fwd_hooks, point._forward_hooks = handles, functions


def _warn_hooks(others: OtherHooks) -> None:
    way = (
        " Each edit runs alone, in a forward pass of its own, since such a hook may act on one row only; `batched_hooks=True` says "
        "that yours act on every row."
    )
    warn(
        f"The model already has hooks at {', '.join(others.places)}; they are kept, and results include them."
        f"{way if others.one_row else ''}"
    )


def _is_foreign(function: Callable[..., Any] | None) -> bool:
    while isinstance(function, partial):
        function = function.func
    return function is not None and not str(getattr(function, "__module__", "")).startswith(
        _LIBRARIES
    )


def _points(model: Model) -> list[Any]:
    return list({id(point): point for point in model.hook_dict.values()}.values())


def _functions(point: Any) -> list[Any]:
    """The functions that TransformerLens calls at a hook point; before 4.3 it keeps its handles only."""
    return [getattr(handle, "user_hook", None) or _unknown for handle in point.fwd_hooks]


def _unknown() -> None:
    """Stands for a hook function that TransformerLens does not tell."""


def _is_random(module: nn.Module) -> bool:
    """Whether a module drops or jitters anything in train mode."""
    rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    rates += [
        value for name, value in vars(module).items() if ("dropout" in name or "jitter" in name)
    ]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _named_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """All modules by their path, those of the wrapped Hugging Face model too, each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for root in (model, getattr(model, "original_model", None)):
        for path, module in nn.Module.named_modules(root) if root is not None else ():
            found.setdefault(
                id(module), (path.replace("._original_component", "") or "the model", module)
            )
    return list(found.values())


def _modules(model: Any) -> list[Any]:
    """All modules: the mode of the wrapped Hugging Face model can be set apart from the bridge's."""
    return [module for _, module in _named_modules(model)]
