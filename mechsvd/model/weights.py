"""The weights that write to the residual stream, and the vectors that they write."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsvd.model.sites import find_weights

# a bridge's names, and those of a HookedTransformer
_WRITES = re.compile(r"blocks\.\d+\.(.+\.)?((o|out)\.weight|W_O|W_out)")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def written_vectors(
    model: Any, patterns: str | Sequence[str]
) -> dict[str, Float[Tensor, "column d_model"]]:
    """Find weights that write to the residual stream, with what each of their inputs writes.

    Args:
        patterns: as `find_weights` takes them.

    Returns:
        By the weight's shortest name, in the order of the modules: one vector per neuron or
        dimension of a head, in the dtype of the weight and without a gradient.

    Raises:
        KeyError: a pattern matches nothing.
        ValueError: a weight that does not write to the residual stream, whose output axis is
            unknown or not `d_model`, or that holds anything but finite floats.
    """
    found, modules = find_weights(model, patterns), dict(nn.Module.named_modules(model))
    writers, vectors = _writers(model), {}
    for name, (paths, weight) in found.items():
        subject, (path, _, own) = _described(name, weight), paths[0].rpartition(".")
        if id(weight) not in writers:
            raise ValueError(
                f"{subject} {_purpose(name, weight)}; choose weights that write to the residual "
                f"stream: {_examples([*writers.values()])}."
            )
        vectors[name] = _by_input(subject, modules[path], own, weight.detach())
        _require_written(subject, vectors[name], model.cfg.d_model)
    return vectors


def _writers(model: Any) -> dict[int, str]:
    """By the id of each weight that writes to the residual stream: a name for it."""
    # the shape of a query's weight is often that of an output weight, so only the name can tell
    names: dict[int, str] = {}
    for path, weight in nn.Module.named_parameters(model, remove_duplicate=False):
        name = path.replace("._original_component", "")
        if _WRITES.fullmatch(name):
            names[id(weight)] = min(names.get(id(weight), name), name, key=len)
    return names


def _by_input(subject: str, module: nn.Module, own: str, weight: Tensor) -> Tensor:
    """A weight as [column, output]; the kind of module says which of its axes is the output."""
    if own in ("W_O", "W_out"):  # of HookedTransformer: [head, d_head, d_model], [d_mlp, d_model]
        return weight.flatten(end_dim=-2)
    if isinstance(module, nn.Linear) and weight.ndim == 2:
        return weight.mT
    # Hugging Face's, known by its name, because the import of transformers is slow
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and weight.ndim == 2:
        return weight
    raise ValueError(
        f"{subject} belongs to a {type(module).__name__}, and which of its axes is the output is "
        "known for Linear, Conv1D and HookedTransformer's W_O and W_out only; "
        "turn it yourself and call `mechsvd.decompose` on [site, column, d_model]."
    )


def _require_written(subject: str, vectors: Tensor, d_model: int) -> None:
    """Refuse vectors that are not what the model adds to its residual stream."""
    if vectors.shape[1] != d_model:
        raise ValueError(
            f"{subject} writes vectors of {vectors.shape[1]} dimensions, but the residual stream "
            f"has {d_model}; choose weights whose output is added to it."
        )
    if vectors.dtype not in _FLOATS:
        raise ValueError(
            f"{subject} is {vectors.dtype}, so its numbers are not those that the model "
            "multiplies by; load the model without quantisation."
        )
    if not vectors.isfinite().all():
        raise ValueError(f"{subject} holds NaN or inf, but must be finite.")


def _described(name: str, weight: Tensor) -> str:
    return f"`{name}` of shape {list(weight.shape)}"


def _purpose(name: str, weight: Tensor) -> str:
    if weight.ndim < 2:
        return "is a bias or the gain of a norm, not a matrix with directions"
    if name.startswith("unembed."):
        return "is the unembedding, which reads the residual stream and gives logits"
    if "embed" in name.split(".")[0]:
        return "is an embedding, which starts the residual stream and is no write"
    return "is not what TransformerLens names the output weight of attention or an MLP"


def _examples(names: Sequence[str]) -> str:
    """Patterns of weights that write, such as 'blocks.*.attn.o.weight'."""
    patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    return " or ".join(map(repr, patterns)) or "this model has none of that name"
