"""Where a model writes: its sites, one way to run it with hooks on them, and nothing else that knows TransformerLens's names."""

import difflib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.results import result

COMPONENTS = ("attn", "mlp")
Hook = tuple[str, Callable[..., Tensor | None]]


@runtime_checkable
class Model(Protocol):
    """What mechsvd needs of a TransformerLens model: a `TransformerBridge` or a `HookedTransformer`."""

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> dict[str, Any]: ...

    def run_with_hooks(self, input: Any, fwd_hooks: Any, return_type: str | None) -> Any: ...

    def generate(self, input: Any, **options: Any) -> Any: ...

    def parameters(self) -> Iterator[Tensor]: ...


@result
class Site:
    """One hook point whose value is added to the residual stream."""

    layer: int
    component: str
    hook_name: str

    def __str__(self) -> str:
        return f"{self.layer} {self.component}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.hook_name == other.hook_name

    def __hash__(self) -> int:
        return hash(self.hook_name)


def require_model(model: Any) -> None:
    """Refuse what is no TransformerLens model, such as the name of one.

    Raises:
        TypeError: saying how to get a model.
    """
    if not hasattr(model, "run_with_hooks") or not hasattr(model, "hook_dict"):
        raise TypeError(f"`model` must be a TransformerLens model, but is {model!r:.60}; get one by `mechsvd.load_model(…)`.")


def find_sites(
    model: Model,
    layers: int | Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS,
    missing: Literal["error", "skip"] = "error",
) -> tuple[Site, ...]:
    """List the sites of a model in the order of writing: attention 0, MLP 0, attention 1, …

    Args:
        layers: some layers only; all by default.
        components: "attn", "mlp" or both.
        missing: what to do with a layer that lacks a hook (hybrid and attention-only models): refuse, or leave it out.

    Raises:
        KeyError: an unknown layer or component, or a hook that a layer lacks.
        ValueError: nothing left.
    """
    require_model(model)
    if missing not in ("error", "skip"):
        raise ValueError(f"`missing` is {missing!r}, but must be 'error' or 'skip'.")
    wanted_layers, wanted = _valid_layers(model, layers), _valid_components(components)
    hook_names, found = model.hook_dict, []
    attention_only = getattr(model.cfg, "attn_only", False)  # its blocks still have an MLP hook, which never fires
    for layer in wanted_layers:
        for component in wanted:
            name = f"blocks.{layer}.hook_{component}_out"
            if name in hook_names and not (attention_only and component == "mlp"):
                found.append(Site(layer, component, name))
            elif missing == "error":
                raise KeyError(
                    f"No hook point `{name}`: layer {layer} of this model has no {component} write that TransformerLens names. "
                    "Choose other layers or components, or pass `missing='skip'`."
                )
    if not found:
        raise ValueError(f"No sites are left for layers {list(wanted_layers)} and components {list(wanted)}.")
    return tuple(found)


def stream_names(model: Model) -> list[tuple[str, str]]:
    """Names of the residual stream before and after each block."""
    return [(f"blocks.{i}.hook_resid_pre", f"blocks.{i}.hook_resid_post") for i in range(model.cfg.n_layers)]


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
    points = model.hook_dict
    for name, _ in hooks:
        if name not in points:
            close = difflib.get_close_matches(name, points, n=3)
            raise KeyError(f"No hook point `{name}`: the model has layers 0–{model.cfg.n_layers - 1}; close matches: {close}.")
    fired = [0] * len(hooks)

    def counted(index: int, hook_function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def run(x: Tensor, hook: Any = None) -> Tensor | None:
            fired[index] += 1
            if x.ndim == 3:
                return hook_function(x, hook=hook)
            rows = hook_function(x.reshape(-1, tokens.shape[1], x.shape[-1]), hook=hook)  # OPT's MLP sees [batch·pos, d_model]
            return None if rows is None else rows.flatten(0, 1)

        return run

    ours = [(name, counted(i, f)) for i, (name, f) in enumerate(hooks)]
    cut_early = cut_early and scored is not None and not users_hooks(model)
    if cut_early:
        # GPT-2 reshapes to the input's shape behind the last norm; a HookedTransformer has no hook before its unembedding
        last = "unembed.hook_in" if "unembed.hook_in" in points else stream_names(model)[-1][1]
        ours.append((last, lambda x, hook=None: x[:, scored]))
    logits = model.run_with_hooks(tokens, fwd_hooks=ours, return_type="logits")
    for (name, _), times in zip(hooks, fired, strict=True):
        if times != 1:
            raise RuntimeError(f"The hook at `{name}` fired {times} of 1 times: this model does not pass there once a run.")
    return logits if cut_early or scored is None else logits[:, scored]


@contextmanager
def evaluation(model: Model) -> Iterator[tuple[str, ...]]:
    """Evaluate without gradients and dropout, and leave the model as it was, also after an exception.

    Yields:
        Notes for the provenance: whose hooks took part.
    """
    notes: tuple[str, ...] = ()
    if names := users_hooks(model):
        notes = (f"hooks of the user at {', '.join(names)}",)
        warnings.warn(f"The model already has hooks at {', '.join(names)}; they are kept, and results include them.", stacklevel=4)
    training = [module for module in _modules(model) if module.training]
    if training:
        warnings.warn("The model is in train mode: it is evaluated in eval mode here and put back afterwards.", stacklevel=4)
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield notes
    finally:
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


def _modules(model: Any) -> list[Any]:
    """All modules, those of the wrapped Hugging Face model too, whose mode can be set apart from the bridge's."""
    roots = [model, getattr(model, "original_model", None)]
    return list({id(module): module for root in roots if root is not None for module in root.modules()}.values())


def _valid_layers(model: Model, layers: int | Iterable[int] | None) -> Sequence[int]:
    n_layers = model.cfg.n_layers
    if layers is None:
        return range(n_layers)
    chosen = sorted({layers} if isinstance(layers, int) else set(layers))
    if wrong := [layer for layer in chosen if isinstance(layer, bool) or layer not in range(n_layers)]:
        raise KeyError(f"No layers {wrong}: the model has layers 0–{n_layers - 1}.")
    return [int(layer) for layer in chosen]


def _valid_components(components: Sequence[str]) -> list[str]:
    chosen = [components] if isinstance(components, str) else list(components)
    for component in chosen:
        if component not in COMPONENTS:
            close = difflib.get_close_matches(component, COMPONENTS, n=1, cutoff=0.3)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"No component {component!r}: choose from {list(COMPONENTS)}.{hint}")
    return [component for component in COMPONENTS if component in chosen]
