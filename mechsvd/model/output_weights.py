"""Writers: the one linear map of the Hugging Face model whose output is a site's write."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsvd.model.evaluation import evaluation, without_hook_points
from mechsvd.model.identity import processing_state
from mechsvd.model.probing import probe_tokens
from mechsvd.model.runs import run_model
from mechsvd.model.sites import Model, Site

_WRAPPED = "_original_component"


@dataclass(frozen=True)
class Writer:
    """A linear map whose output is a site's write.

    Attributes:
        module: a `Linear`, or GPT-2's `Conv1D`, whose weight is turned.
        names: of its weight, and of its bias if it has one, in the Hugging Face checkpoint.
    """

    site: Site
    module: nn.Module
    names: tuple[str, ...]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight, and the bias if there is one."""
        return tuple(p for p in (self.module.weight, self.module.bias) if p is not None)  # type: ignore[misc]

    @property
    def columns(self) -> Float[Tensor, "column d_model"]:
        """What each input writes, without a gradient."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[union-attr,operator]
        return self._turned(weight)

    @property
    def bias(self) -> Float[Tensor, " d_model"] | None:
        """What is written whatever the input, without a gradient."""
        return None if len(self.parameters) == 1 else self.parameters[1].detach()

    def weights_from(
        self, columns: Float[Tensor, "column d_model"], bias: Float[Tensor, " d_model"] | None
    ) -> tuple[Tensor, ...]:
        """New values for `parameters`, in the layout of the module."""
        weight = self._turned(columns).contiguous()
        return (weight,) if bias is None else (weight, bias)

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.mT if isinstance(self.module, nn.Linear) else matrix


def find_writers(model: Model, sites: Sequence[Site]) -> tuple[Writer, ...]:
    """Find the linear map that makes each write: all of the sites, or an error.

    A map counts by what it gives, not by its name: in a run on a few tokens, its output must be the
    value at the site's hook. So a write that a norm, a scale or several experts make has none.

    Raises:
        ValueError: not a bridge with the weights as they were loaded; a site without such a map, or
            a map that shares its weights with another module or runs more than once.
    """
    state = processing_state(model)
    if not hasattr(model, "original_model") or state != "raw":
        kind = "a HookedTransformer" if state == "raw" else f"processed ({state})"
        raise ValueError(
            f"This model is {kind}, so the weights of its Hugging Face checkpoint are not there; "
            "load it by `mechsvd.load_model` and collect the directions with that model."
        )
    given = _outputs_that_are_writes(model, sites)
    if lacking := [site for site in sites if len(given[site.name]) != 1]:
        first = lacking[0]
        count = len(given[first.name]) or "no"
        raise ValueError(
            f"Nothing is folded: {len(lacking)} of {len(sites)} sites have no one linear map whose "
            f"output is the write, such as {first.place} ({first.hook_name}), where {count} maps "
            "give it. A norm or a scale after the map (post-norm models), experts, or a fused or "
            "quantised module make the write; run this edit by its hooks."
        )
    names = _checkpoint_names(model)
    return tuple(_writer(site, given[site.name][0], names) for site in sites)


def hugging_face_weights(model: Model) -> dict[str, nn.Parameter]:
    """The parameters of the wrapped Hugging Face model, by their names in its checkpoint."""
    found: dict[str, nn.Parameter] = {}
    root: Any = getattr(model, "original_model")  # noqa: B009 (not in the protocol)
    for name, parameter in nn.Module.named_parameters(root, remove_duplicate=False):
        path = ".".join(part for part in name.split(".") if part != _WRAPPED)
        found.setdefault(path, parameter)
    return found


def _outputs_that_are_writes(model: Any, sites: Sequence[Site]) -> dict[str, list[nn.Module]]:
    """By the name of each site: the maps that gave exactly its write, in a run on a few tokens."""
    maps = [m for m in nn.Module.modules(model.original_model) if is_linear_map(m)]
    outputs: list[tuple[nn.Module, Tensor]] = []
    writes: dict[str, Tensor] = {}
    note = lambda module, _, output: outputs.append((module, output.detach().clone()))  # noqa: E731
    handles = [module.register_forward_hook(note) for module in maps]
    store = lambda site: lambda x, hook=None: writes.__setitem__(site.name, x.detach())  # noqa: E731
    try:
        with without_hook_points(model), evaluation(model, quiet=True):
            run_model(model, probe_tokens(model), [(site.hook_name, store(site)) for site in sites])
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(id(module) for module, _ in outputs)
    once = [(module, output) for module, output in outputs if times[id(module)] == 1]
    return {
        site.name: [module for module, output in once if _same(output, writes[site.name])]
        for site in sites
    }


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is exactly a `Linear` or a `Conv1D` with plain weights of floats."""
    # Hugging Face's Conv1D by its name, because the import of transformers is slow
    kind = type(module)
    is_known = kind is nn.Linear or (
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    )
    weight = module._parameters.get("weight")
    return is_known and weight is not None and weight.is_floating_point()


def _same(output: Tensor, write: Tensor) -> bool:
    if output.numel() != write.numel() or output.shape[-1] != write.shape[-1]:
        return False
    error = (output.reshape(write.shape) - write).abs().max()
    return bool(error <= 4 * torch.finfo(write.dtype).eps * write.abs().max())


def _checkpoint_names(model: Any) -> dict[int, tuple[list[str], int]]:
    """By the id of a parameter: its names in the checkpoint, and how many modules hold it."""
    needed = {name for name, _ in empty_model(model).named_parameters(remove_duplicate=False)}
    names: dict[int, list[str]] = {}
    for name, parameter in hugging_face_weights(model).items():
        if name in needed:
            names.setdefault(id(parameter), []).append(name)
    owners = Counter(
        id(parameter)
        for module in nn.Module.modules(model.original_model)
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {i: (found, owners[i]) for i, found in names.items()}


def _writer(site: Site, module: Any, names: dict[int, tuple[list[str], int]]) -> Writer:
    own = [names.get(id(p), ([], 0)) for p in (module.weight, module.bias) if p is not None]
    if any(len(found) != 1 or owners != 1 for found, owners in own):
        raise ValueError(
            f"The weights of the map that writes at {site.place} are in the checkpoint under "
            f"{[found for found, _ in own]}, and shared with other modules; an edit of one of them "
            "would change the others. Run this edit by its hooks."
        )
    return Writer(site, module, tuple(found[0] for found, _ in own))


def empty_model(model: Any) -> Any:
    """A Hugging Face model of the same configuration, without any numbers.

    Raises:
        ValueError: the architecture is code of the checkpoint's own.
    """
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    config = deepcopy(model.original_model.config)
    config.output_attentions = False  # TransformerLens sets it, to see the patterns
    if getattr(config, "auto_map", None):
        raise ValueError(
            "The architecture is code of the checkpoint's own, so a copy would not load without it."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
