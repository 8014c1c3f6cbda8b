"""The plain Hugging Face model that a bridge wraps: the same weights, and none of its code.

A bridge replaces attention, norms and blocks by its own, which may leave something out: a softcap,
a scale, a factor of the rotary angles. It may also replace functions of transformers' modules for
the whole process (TransformerLens#1795), so the model's class comes from a second copy of its
module.
"""

import copy
import importlib.util
import inspect
import sys
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechsvd.model.cache import wrapped
from mechsvd.model.evaluation import torch_hooks
from mechsvd.model.sites import Model


class NoReferenceError(ValueError):
    """There is no plain model to compare with, and why."""


def plain_logits(
    model: Model, tokens: Int[Tensor, "batch pos"], count: int
) -> Float[Tensor, "batch scored d_vocab"]:
    """The logits of the plain model at the last positions, by its own eager attention.

    Raises:
        NoReferenceError: the model is no bridge, or more than a bridge was put on it.
    """
    reference = plain_model(model)
    takes = inspect.signature(reference.forward).parameters
    fewer = {"logits_to_keep": count} if "logits_to_keep" in takes else {}
    with torch.no_grad():
        return reference(input_ids=tokens, use_cache=False, **fewer).logits[:, -count:]


def plain_model(model: Model) -> nn.Module:
    """The plain model, which shares the bridge's weights.

    Raises:
        NoReferenceError: as `plain_logits`.
    """
    from accelerate import init_empty_weights

    hf_model = _comparable(model)
    kind, config = _own_class(type(hf_model)), copy.deepcopy(hf_model.config)
    with init_empty_weights(include_buffers=False):
        plain = kind(config)
    stored = {
        name.replace("._original_component", ""): value
        for name, value in nn.Module.state_dict(hf_model).items()
    }
    own, modules = plain.state_dict(), dict(plain.named_modules())
    for name in stored.keys() - own:  # a bridge adds zeros, and modules for parts of joint weights
        if name.rpartition(".")[0] in modules and stored[name].any():
            raise NoReferenceError(f"its weight {name} is not one of transformers'")
    plain.load_state_dict({n: stored[n] for n in own if n in stored}, strict=False, assign=True)
    plain.tie_weights()
    if lacking := [name for name, weight in plain.named_parameters() if weight.is_meta]:
        raise NoReferenceError(f"its weight {lacking[0]} has another name in the bridge")
    device = next(model.parameters()).device
    for module in plain.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return plain.eval()


def _comparable(model: Model) -> Any:
    """The wrapped model, if nothing but a bridge was put on it.

    Raises:
        NoReferenceError: saying what was.
    """
    hf_model = wrapped(model)
    if hf_model is None:
        raise NoReferenceError("a HookedTransformer wraps no model")
    if getattr(model, "compatibility_mode", False):
        raise NoReferenceError("its weights were processed")
    if changed := torch_hooks(model):
        raise NoReferenceError(f"{changed[0]} is part of it")
    if getattr(hf_model.config, "quantization_config", None) is not None:
        raise NoReferenceError("its weights are quantised")
    _require_joint_weights(hf_model)
    return hf_model


def _require_joint_weights(hf_model: nn.Module) -> None:
    """Refuse a bridge whose copies of queries, keys and values were changed.

    Where transformers projects them jointly, the bridge runs on copies of its own.
    """
    attentions: list[Any] = [
        m for m in nn.Module.modules(hf_model) if hasattr(m, "split_qkv_matrix")
    ]
    for attention in attentions:
        with torch.device("meta"):  # where the new layers' first values are not drawn
            parts = attention.split_qkv_matrix(attention.original_component)
        for name, part in zip("qkv", parts, strict=True):
            if not torch.equal(part.weight, getattr(attention, name).weight):
                raise NoReferenceError(
                    f"its weight {attention.name}.{name} was changed in the bridge"
                )


def _own_class(kind: type) -> Any:
    """The class from a copy of its module that nothing has changed."""
    name = f"{kind.__module__}__plain"
    if not kind.__module__.startswith("transformers."):
        raise NoReferenceError("its class is not one of transformers")
    if name not in sys.modules:
        origin: Any = importlib.util.find_spec(kind.__module__)
        spec: Any = importlib.util.spec_from_file_location(name, origin.origin)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return getattr(sys.modules[name], kind.__name__)
