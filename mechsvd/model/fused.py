"""Run a bridge's attention, norms and activations on fused kernels, for the time of a pass.

A bridge computes attention by plain kernels, so that hooks can see its scores and patterns, and
every norm twice, so that hooks can see its scale. Nobody looks there while we edit writes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

from mechsvd.model.sites import Model

# classes of transformers that compute the tanh approximation of GELU in several passes
_TANH_GELUS = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "BloomGelu")
# and those that compute x ÷ √(mean x² + ε) · w, as Llama does
_RMS_NORMS = tuple(f"{name}RMSNorm" for name in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3"))
# options of a Hugging Face configuration during a pass: no copies of keys and values, and no
# patterns kept; the bridge's loader asks for those of all layers
_OPTIONS = {"use_cache": False, "_output_attentions": False}
_MISSING = object()
Swap = tuple[dict[str, Any], str, Any]  # attributes of an object, a name, and the value there
Way = tuple[str, Callable[[Any], Callable[..., Any]]]  # a method, and what makes another one


@contextmanager
def fused_kernels(model: Model) -> Iterator[None]:
    """Let a bridge run on fused kernels, and restore it, also after an exception.

    Where the model's library knows fused attention for it, attention makes no tensor of batch ×
    heads × tokens². Hooks inside attention, and at the scale of norms, do not fire; those at writes
    do. Weights are not copied. Whether the values stay the same is for the self-check to measure.

    Raises:
        NotImplementedError: the model is no bridge, so nothing is known to fuse.
    """
    with swapped(_swaps(model)):
        yield


@contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Put attributes in place, and the earlier ones back, also after an exception."""
    saved: list[Swap] = []
    try:
        for attributes, name, value in swaps:
            saved.append((attributes, name, attributes.get(name, _MISSING)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(saved):
            if value is _MISSING:
                attributes.pop(name, None)
            else:
                attributes[name] = value


def _swaps(model: Any) -> list[Swap]:
    """What to put where: methods of bridge components and activations, and options of configs."""
    hf_model = getattr(model, "original_model", None)
    if not isinstance(hf_model, nn.Module):
        raise NotImplementedError("Only a TransformerBridge is known to run on fused kernels.")
    modules = list(nn.Module.modules(hf_model))  # the bridge's components stand in it
    fuses_attention = getattr(hf_model, "_supports_sdpa", False)
    swaps: list[Swap] = []
    for config in {id(c): c for module in modules if (c := _options_of(module))}.values():
        swaps += [(config, name, value) for name, value in _OPTIONS.items() if name in config]
        if fuses_attention and config["_attn_implementation_internal"] == "eager":
            swaps.append((config, "_attn_implementation_internal", "sdpa"))
    for module in modules:
        kind: Any = type(module)
        way = _pointwise(kind) or (_attention(kind) if fuses_attention else None)
        if way is not None and way[0] not in vars(module):  # else it is patched already
            swaps.append((vars(module), way[0], way[1](module)))
    return swaps


def _options_of(module: nn.Module) -> dict[str, Any]:
    """The options in a module's Hugging Face configuration; none for TransformerLens's own."""
    options: dict[str, Any] = getattr(vars(module).get("config"), "__dict__", {})
    return options if "_attn_implementation_internal" in options else {}


@cache
def _pointwise(kind: Any) -> Way | None:
    """How a class computes a norm once, or an activation in one pass."""
    from transformer_lens.model_bridge import generalized_components as bridges

    if kind.forward is bridges.NormalizationBridge.forward:
        return "forward", partial(MethodType, bridges.base.GeneralizedComponent.forward)
    if kind.__name__ in _TANH_GELUS:
        return "forward", lambda module: partial(gelu, approximate="tanh")
    if kind.__name__ in _RMS_NORMS:
        return "forward", lambda norm: partial(_rms_norm, norm)
    return None


@cache
def _attention(kind: Any) -> Way | None:
    """How a class computes attention without its scores: by its wrapped module, or by `_attend`.

    A wrapped module projects by the bridge's own components. One that projects jointly does not:
    the bridge has its own copies of those weights, and they may have been edited.
    """
    from transformer_lens.model_bridge import generalized_components as bridges

    if kind.forward is bridges.PositionEmbeddingsAttentionBridge.forward:
        return "forward", partial(MethodType, bridges.AttentionBridge.forward)
    joint = (bridges.JointQKVAttentionBridge, bridges.JointQKVPositionEmbeddingsAttentionBridge)
    if getattr(kind, "_reconstruct_attention", None) in [b._reconstruct_attention for b in joint]:
        return "_reconstruct_attention", partial(MethodType, _attend)
    return None


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    normed = rms_norm(x.float(), norm.weight.shape, None, norm.variance_epsilon)
    return norm.weight * normed.to(x.dtype)  # rounded where transformers rounds


def _attend(bridge: Any, q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> tuple[Tensor, None]:
    """Attention after the projections, as the bridge's `_reconstruct_attention` computes it."""
    heads = bridge.config.n_heads
    groups = getattr(bridge.config, "n_key_value_heads", None) or heads
    q, k, v, batch, length, width = bridge._reshape_qkv_to_heads(q, k, v, heads, groups)
    angles = inputs.get("position_embeddings")
    if isinstance(angles, tuple) and hasattr(type(bridge), "_apply_rotary_pos_emb"):
        q, k = bridge._apply_rotary_pos_emb(q, k, *angles)
    k, v = bridge._update_kv_cache(k, v, **inputs)
    if groups != heads:
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    mask = inputs.get("attention_mask")
    z = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    z = bridge._reshape_attn_output(z, batch, length, heads, width)
    return bridge._apply_output_projection(z), None
