"""Places: any hook points of a model, by patterns of their names, and the shapes found there."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from mechsvd.checks import is_whole, warn
from mechsvd.model.evaluation import evaluation, without_hook_points
from mechsvd.model.sites import COMPONENTS, Model, Site, Where, find_sites

# what a short run saw at hook points: the point and [batch, pos, …], in the order of firing
_SEEN: "WeakKeyDictionary[Any, dict[str, tuple[Any, tuple[int, ...]]]]" = WeakKeyDictionary()


def sites_of(model: Model, where: Where) -> tuple[Site, ...]:
    """The sites that options choose: writes, or with `at` any hook points.

    Raises:
        KeyError: no such layer, component, hook point or head.
        ValueError: nothing is left; points without a vector per position, or of several shapes;
            options that exclude each other.
    """
    if where.at is None:
        if where.heads is not None:
            raise ValueError("`heads` needs `at`, such as at='blocks.*.attn.hook_z'.")
        return find_sites(model, where.layers, where.components, where.missing)
    if tuple(where.components) != COMPONENTS:
        raise ValueError("`components` chooses writes and `at` other hook points; give one.")
    names = _matching(model, where.at, where.layers)
    shapes = _shapes(model, names)
    names = [name for name in shapes if name in names]  # in the order of the run
    widths = {shapes[name][2:] for name in names}
    if len(widths) > 1:
        examples = {shapes[name][2:]: name for name in names}
        raise ValueError(
            "The hook points have several shapes after [batch, pos]: "
            f"{', '.join(f'{list(shape)} ({name})' for shape, name in examples.items())}; "
            "choose those of one shape."
        )
    (shape,) = widths
    heads = _heads(where.heads, shape, names[0])
    return tuple(
        Site(_layer(name), _component(name), name, head) for name in names for head in heads
    )


def width_of(model: Model, sites: Sequence[Site]) -> int:
    """The length of the vectors at some sites: `d_model` for writes."""
    seen = _seen(model) if sites and not sites[0].is_write else {}
    shape = seen.get(sites[0].hook_name) if seen else None
    return shape[-1] if shape else int(model.cfg.d_model)


def warn_norm_inputs(model: Model, sites: Sequence[Site]) -> None:
    """Warn of residual streams that a bridge reads where only a norm does.

    An edit there reaches the norm and what follows it, but not the stream that passes by.
    """
    points = model.hook_dict
    inputs = {id(point) for name, point in points.items() if re.search(r"\.ln\w*\.hook_in$", name)}
    names = [site.hook_name for site in sites if not site.is_write and "resid" in site.hook_name]
    if wrong := [name for name in names if id(points[name]) in inputs]:
        warn(
            f"In this model `{wrong[0]}` is the input of a norm: an edit there does not change "
            "the residual stream that passes by; edit `hook_resid_pre` or `hook_resid_post`."
        )


def _matching(model: Model, at: str | Sequence[str], layers: Any) -> list[str]:
    """The names that match, once for each hook point: of its aliases, the first that matches."""
    points = model.hook_dict
    patterns = [at] if isinstance(at, str) else list(at)
    chosen_layers = None if layers is None else {site.layer for site in find_sites(model, layers)}
    names: dict[int, str] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`at` must be names or patterns of hook points, but has {pattern!r}.")
        matching = [name for name in points if fnmatchcase(name, pattern)]
        if not matching:
            close = difflib.get_close_matches(pattern, points, n=3, cutoff=0.4)
            raise KeyError(
                f"No hook point matches {pattern!r}: patterns are shell-like, such as "
                f"'blocks.*.hook_resid_post'; close matches: {close}."
            )
        for name in matching:
            if chosen_layers is None or _layer(name) in chosen_layers:
                names.setdefault(id(points[name]), name)
    if not names:
        raise ValueError(f"No hook point is left of {patterns} in layers {layers}.")
    return list(names.values())


def _seen(model: Model) -> dict[str, tuple[int, ...]]:
    """The known shapes at hook points that the model still has: SAELens replaces some."""
    points = model.hook_dict
    return {
        name: shape
        for name, (point, shape) in _SEEN.get(model, {}).items()
        if name in points and points[name] is point()
    }


def _shapes(model: Model, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes at hook points, from a short run; a point's first axes are batch and position."""
    seen = _seen(model)
    if not set(names) <= seen.keys():
        found: dict[str, list[tuple[int, ...]]] = {}
        counts = {getattr(model.cfg, name, None) for name in ("n_heads", "n_key_value_heads")}
        length = next(n for n in (5, 6, 7) if n not in counts)

        def record(name: str) -> Any:
            def note(x: Any, hook: Any = None) -> None:
                shape = tuple(x.shape) if isinstance(x, Tensor) else ()
                # OPT's MLP sees [batch·pos, width]
                shape = (1, *shape) if len(shape) == 2 and shape[0] == length else shape
                found.setdefault(name, []).append(shape)

            return name, note

        tokens = torch.arange(1, length + 1, device=next(model.parameters()).device)[None]
        hooks = [record(name) for name in {*names, *seen}]
        with without_hook_points(model), evaluation(model, quiet=True):
            model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        for name in names:
            _require_vectors(name, found.get(name, []), length)
        seen = {name: shapes[0] for name, shapes in found.items()}
        points = model.hook_dict
        _SEEN[model] = {name: (ref(points[name]), shape) for name, shape in seen.items()}
    return seen


def _require_vectors(name: str, shapes: list[tuple[int, ...]], length: int) -> None:
    if len(shapes) != 1:
        raise ValueError(
            f"The hook at `{name}` fires {len(shapes)} times in a run of this model, so nothing "
            "can be collected or edited there; it must fire once."
        )
    shape = shapes[0]
    if len(shape) not in (3, 4) or shape[:2] != (1, length):
        raise ValueError(
            f"`{name}` holds {list(shape)} for one text of {length} tokens, which is no vector per "
            "position; choose points of shape [batch, pos, width] or [batch, pos, head, width]."
        )


def _listed(heads: Any) -> list[Any]:
    return [*heads] if isinstance(heads, Iterable) and not is_whole(heads) else [heads]


def _heads(heads: Any, shape: tuple[int, ...], name: str) -> list[int | None]:
    if len(shape) == 1:
        if heads is not None:
            raise ValueError(f"`{name}` has no axis of heads, so `heads` has no meaning there.")
        return [None]
    chosen = range(shape[0]) if heads is None else _listed(heads)
    wrong = [head for head in chosen if not is_whole(head, 0, shape[0] - 1)]
    if wrong or not chosen:
        raise KeyError(f"No heads {wrong}: `{name}` has heads 0–{shape[0] - 1}.")
    return [int(head) for head in chosen]


def _layer(name: str) -> int | None:
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) if block else None


def _component(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)
