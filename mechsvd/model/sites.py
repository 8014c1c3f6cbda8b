"""The sites where a model writes; the only file that knows TransformerLens's names."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Protocol, TypedDict, runtime_checkable

from mechsvd.checks import is_whole, once, with_plain_arguments
from mechsvd.fields import require_declared
from mechsvd.model.positions import Positions
from mechsvd.results import result

COMPONENTS = ("attn", "mlp")
_SPLICED = ".hook_sae_output"  # SAELens's name for the output of a dictionary
Hook = tuple[str, Callable[..., Tensor | None]]


@runtime_checkable
class Model(Protocol):
    """A TransformerLens model: a `TransformerBridge` or a `HookedTransformer`.

    These are the parts that mechsvd needs.
    """

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> dict[str, Any]: ...

    def run_with_hooks(self, input: Any, fwd_hooks: Any, return_type: str | None) -> Any: ...

    def generate(self, input: Any, **options: Any) -> Any: ...

    def hooks(self, fwd_hooks: Any) -> Any: ...

    def parameters(self) -> Iterator[Tensor]: ...


@result
class Site:
    """A hook point whose value is added to the residual stream: a write.

    With `at` patterns it is any hook point, or one head of it.

    Attributes:
        layer: None outside of the blocks.
        component: "attn" or "mlp"; elsewhere, the hook's name within its block.
        head: None where there are no heads, as for writes.

    Example:
        >>> site = ms.find_sites(model)[1]
        >>> site.hook_name, str(site), site.is_write
        ('blocks.0.hook_mlp_out', '0 mlp', True)
    """

    layer: int | None
    component: str
    hook_name: str
    head: int | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        is_place = bool(self.component) and self.hook_name.endswith(self.component)
        is_known = (self.is_write and self.layer is not None) or is_place
        if not is_known or (self.layer is not None and self.layer < 0):
            raise ValueError(
                f"No site {self}: layers count from 0, and components are {list(COMPONENTS)}."
            )

    @property
    def is_write(self) -> bool:
        """Whether it is a write to the residual stream, and no other hook point."""
        return self.component in COMPONENTS

    @property
    def name(self) -> str:
        """What tells the site from all others: its hook name, and its head if it has one."""
        return self.hook_name if self.head is None else f"{self.hook_name}[{self.head}]"

    @property
    def place(self) -> str:
        """The site in a sentence."""
        if not self.is_write:
            return self.name
        return f"layer {self.layer} {self.component}"

    def __str__(self) -> str:
        head = "" if self.head is None else f" {self.head}"
        return f"{'' if self.layer is None else f'{self.layer} '}{self.component}{head}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def require_model(model: Any) -> None:
    """Refuse anything but a TransformerLens model, such as a model's name.

    Raises:
        TypeError: saying how to get a model.
    """
    if not hasattr(model, "run_with_hooks") or not hasattr(model, "hook_dict"):
        raise TypeError(
            f"`model` must be a TransformerLens model, but is {model!r:.60}; "
            "get one by `mechsvd.load_model(…)`."
        )


@contextmanager
def forgets_conversions(model: Model) -> Iterator[None]:
    """Let go of what TransformerLens notes about each tensor of a hooked run, and never forgets.

    `AttentionAutoConversion` has a dict for each that passed a hook point of attention, by its id.
    """
    points = (getattr(point, "hook_conversion", None) for point in model.hook_dict.values())
    notes = [s for p in points if isinstance(s := getattr(p, "_conversion_state", None), dict)]
    before = [{*state} for state in notes]  # of a run that we are called in
    try:
        yield
    finally:
        for state, own in zip(notes, before, strict=True):
            for key in [*state]:
                if key not in own:
                    del state[key]


@with_plain_arguments
def find_sites(
    model: Model,
    layers: int | Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS,
    missing: Literal["error", "skip"] = "error",
) -> tuple[Site, ...]:
    """List the sites of a model in writing order: attention 0, MLP 0, attention 1, …

    Args:
        layers: one layer or several; all by default.
        components: "attn", "mlp" or both.
        missing: what to do if a layer lacks a hook (hybrid and attention-only models): raise an
            error, or skip the site.

    Raises:
        KeyError: a layer or component is unknown, or a layer lacks a hook.
        ValueError: no sites are left.

    Example:
        >>> [site.name for site in ms.find_sites(model, layers=[0])]
        ['blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out']
    """
    require_model(model)
    if missing not in ("error", "skip"):
        raise ValueError(f"`missing` is {missing!r}, but must be 'error' or 'skip'.")
    chosen_layers, chosen_components = _valid_layers(model, layers), _valid_components(components)
    hook_names, sites = model.hook_dict, []
    # the blocks of an attention-only model still have an MLP hook, which never fires
    attention_only = getattr(model.cfg, "attn_only", False)
    for layer in chosen_layers:
        for component in chosen_components:
            name = passed_on(model, f"blocks.{layer}.hook_{component}_out")
            if name in hook_names and not (attention_only and component == "mlp"):
                sites.append(Site(layer, component, name))
            elif missing == "error":
                raise KeyError(
                    f"No hook point `{name}`: layer {layer} of this model has no {component} write "
                    "that TransformerLens names. Choose other layers or components, "
                    "or pass `missing='skip'`."
                )
    if not sites:
        raise ValueError(
            f"No sites are left for layers {list(chosen_layers)} "
            f"and components {chosen_components}."
        )
    return tuple(sites)


def find_weights(model: Any, patterns: str | Sequence[str]) -> dict[str, tuple[list[str], Tensor]]:
    """Find weights by shell-like patterns of TransformerLens's names.

    A pattern is "blocks.2.mlp.*", say, or "*" for all. In a bridge a weight has several names
    (`blocks.2.mlp.in.weight`, `blocks.2.mlp.up_proj.weight`). Any of them matches, and each weight
    is listed once.

    Returns:
        By the shortest name: the names under which `torch.func.functional_call` replaces the
        weight, one per module that holds it (tied weights have two), and the weight.

    Raises:
        KeyError: a pattern matches nothing; the closest names are given.
    """
    require_model(model)
    pattern_list = [patterns] if isinstance(patterns, str) else list(patterns)
    aliases: dict[int, list[str]] = {}
    # a bridge's own `named_parameters` gives other names
    for name, weight in nn.Module.named_parameters(model, remove_duplicate=False):
        alias = name.replace("._original_component", "")
        alias = alias.replace("._W_", ".W_").replace("._b_", ".b_")  # grouped keys and values
        aliases.setdefault(id(weight), []).append(alias)
    matches: dict[int, tuple[list[str], Tensor]] = {}
    for path, module in nn.Module.named_modules(model):
        for name, weight in module.named_parameters(path, recurse=False):
            if any(
                fnmatchcase(alias, pattern)
                for alias in aliases[id(weight)]
                for pattern in pattern_list
            ):
                matches.setdefault(id(weight), ([], weight))[0].append(name)
    for pattern in pattern_list:
        known = [alias for names in aliases.values() for alias in names]
        if not any(fnmatchcase(alias, pattern) for alias in known):
            close = (
                difflib.get_close_matches(pattern, sorted(set(known)), n=3, cutoff=0.3) or known[:3]
            )
            raise KeyError(
                f"No weight matches {pattern!r}: patterns are shell-like, such as "
                f"'blocks.2.mlp.*'; close matches: {close}."
            )
    return {min(aliases[i], key=len): match for i, match in matches.items()}


def stream_names(model: Model) -> list[tuple[str, str]]:
    """The hook names of the residual stream before and after each block."""
    return [
        (
            passed_on(model, f"blocks.{i}.hook_resid_pre"),
            passed_on(model, f"blocks.{i}.hook_resid_post"),
        )
        for i in range(model.cfg.n_layers)
    ]


def passed_on(model: Model, name: str) -> str:
    """The hook point of a value as it goes on in the model.

    SAELens replaces a hook point by a dictionary, whose own hook points are named after it: what
    goes on is then the dictionary's output.
    """
    return f"{name}{_SPLICED}" if f"{name}{_SPLICED}" in model.hook_dict else name


def dictionaries(model: Model) -> dict[str, Any]:
    """The outputs of the dictionaries that SAELens has spliced in, by name."""
    return {name: p for name, p in model.hook_dict.items() if name.endswith(_SPLICED)}


def end_of_stream(model: Model) -> str:
    """The last hook point of the residual stream: of a bridge, where its final norm begins."""
    return (
        "ln_final.hook_in" if "ln_final.hook_in" in model.hook_dict else stream_names(model)[-1][1]
    )


def before_unembedding(model: Model) -> str:
    """The last hook point before the unembedding.

    A bridge has one at the unembedding, a HookedTransformer only after its last block.
    """
    # not before the last norm: GPT-2 reshapes to the input's shape after it
    return "unembed.hook_in" if "unembed.hook_in" in model.hook_dict else stream_names(model)[-1][1]


def _valid_layers(model: Model, layers: int | Iterable[int] | None) -> Sequence[int]:
    n_layers = model.cfg.n_layers
    if layers is None:
        return range(n_layers)
    several = isinstance(layers, Iterable) and not is_whole(layers)
    numbers: list[Any] = [*layers] if several else [layers]  # type: ignore[misc]
    if wrong := [layer for layer in numbers if not is_whole(layer, 0, n_layers - 1)]:
        raise KeyError(f"No layers {wrong}: the model has layers 0–{n_layers - 1}.")
    return sorted({int(layer) for layer in numbers})


def _valid_components(components: Sequence[str]) -> list[str]:
    names = [components] if isinstance(components, str) else list(components)
    for component in names:
        if component not in COMPONENTS:
            close = difflib.get_close_matches(component, COMPONENTS, n=1, cutoff=0.3)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"No component {component!r}: choose from {list(COMPONENTS)}.{hint}")
    return [component for component in COMPONENTS if component in names]


class SiteOptions(TypedDict, total=False):
    """The options that select writes.

    Attributes:
        layers, components: which sites; all by default.
        at: other hook points instead of writes, by names or patterns ("blocks.*.hook_resid_post").
        heads: of hook points with an axis of heads ("blocks.3.attn.hook_z"); all by default. Each
            head is a site of its own.
        positions: in the text, all by default: a number, a list or range, a slice, "last" (the last
            scored prediction), or a mask "pos" or "text pos". Negative ones count from the end.
        missing: "error" or "skip", for a layer that lacks a hook.

    Example:
        >>> where: ms.SiteOptions = {"layers": [0], "positions": "last"}
        >>> len(ms.collect_writes(model, task, **where))
        2
    """

    layers: int | Iterable[int] | None
    components: Sequence[str]
    at: str | Sequence[str] | None
    heads: int | Sequence[int] | None
    positions: Positions
    missing: Literal["error", "skip"]


@dataclass(frozen=True)
class Where:
    """`SiteOptions` with their defaults."""

    layers: int | Iterable[int] | None = None
    components: Sequence[str] = COMPONENTS
    positions: Any = None  # see `Positions`; the session refuses other forms
    missing: Literal["error", "skip"] = "error"
    at: str | Sequence[str] | None = None
    heads: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "components", "positions", "at", "heads"):
            object.__setattr__(self, name, once(getattr(self, name)))


def where_of(options: SiteOptions) -> Where:
    """The writes that options select, with defaults for those left out."""
    return Where(
        options.get("layers"),
        options.get("components", COMPONENTS),
        options.get("positions"),
        options.get("missing", "error"),
        options.get("at"),
        options.get("heads"),
    )
