"""Edits bound to sites: the `(name, function)` pairs that `run_with_hooks(fwd_hooks=…)` takes, next to anyone else's."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechsvd.edits import Each, Edit, Gate, gates_of
from mechsvd.models import provenance_of
from mechsvd.results import Provenance, require_same_model
from mechsvd.sites import COMPONENTS, Hook, Model, Site, find_sites
from mechsvd.tasks import Positions, valid_positions

Observer = Callable[[Site, Tensor, Tensor], None]  # site, attempted write, kept write


def fwd_hooks(
    model: Model,
    edit: Edit,
    *,
    layers: int | Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS,
    positions: Positions = None,
    missing: Literal["error", "skip"] = "error",
    check: bool = True,
) -> list[Hook]:
    """Bind an edit to the sites of a model, as hooks for `run_with_hooks`, `hooks` or `generate`.

    Args:
        edit: a gate, a chain, or any function `edit(x, hook)` of the writes "batch pos d_model" that returns a new tensor of
            that shape.
        layers, components: which sites; all by default.
        positions: absolute positions to edit, all by default. While decoding with a KV cache the hooks count the one-token
            steps, so bind fresh hooks for each new text.
        missing: whether a layer without the hook is refused or left out.
        check: refuse a basis that comes from another model or processing state.

    Returns:
        One `(hook name, function)` a site, in the order of writing.

    Raises:
        KeyError: an unknown layer or component.
        TypeError: an edit that cannot be called, or positions that are not whole numbers.
        ValueError: an edit over another `d_model` or of another model, a stack of edits, or a position below 0.
    """
    sites, chosen = find_sites(model, layers, components, missing), valid_positions(positions)
    if isinstance(edit, Gate) and edit.is_stack:
        raise ValueError(f"This is a stack of {len(edit)} edits: bind one of them, `stack[i]`, or measure all by `measure`.")
    require_fitting_edit(model, edit, provenance_of(model) if check and gates_of(edit) else None)
    return [(site.hook_name, bind(edit, site, chosen)) for site in sites]


def require_fitting_edit(model: Model, edit: Edit, source: Provenance | None) -> None:
    """Refuse an edit that cannot be called, or whose basis is of another size or, where `source` is known, another model.

    Raises:
        TypeError, ValueError: saying which.
    """
    if not callable(edit):
        raise TypeError(f"An edit must be a function of the writes, but this is {type(edit).__name__}; make one by `mechsvd.keep`.")
    for gate in gates_of(edit):
        if gate.d_model != model.cfg.d_model:
            raise ValueError(f"The edit's basis has d_model {gate.d_model}, but the model's is {model.cfg.d_model}.")
        require_same_model(gate.source, source, "The basis and the model")


def as_stack(model: Model, edits: Any, source: Provenance | None) -> Gate | Each:
    """Take one gate, a stack of gates or a list of edits as a stack that fits the model and lies on its device.

    Raises:
        TypeError, ValueError: as `require_fitting_edit`; no edits; a stack in a list.
    """
    if isinstance(edits, Gate):
        require_fitting_edit(model, edits, source)
        device = next(model.parameters()).device
        stacked = edits.gains if edits.is_stack else edits.gains[None]
        return Gate(edits.basis.to(device), stacked.to(device), edits.rest, edits.source)
    if not isinstance(edits, Sequence) or not edits:
        what = "is empty" if isinstance(edits, Sequence) else f"is {type(edits).__name__}"
        raise TypeError(f"`edits` must be a stack of gates or a list of edits, at least one, but {what}.")
    for edit in edits:
        require_fitting_edit(model, edit, source)
        if isinstance(edit, Gate) and edit.is_stack:
            raise ValueError("A stack of gates cannot be one of a list of edits: pass the stack alone, or its members `stack[i]`.")
    return Each(tuple(edits))


def bind(
    edit: Edit,
    site: Site,
    positions: Sequence[int] | None = None,
    observe: Observer | None = None,
    rows: int | None = None,
) -> Callable[..., Tensor]:
    """Make the hook function of one site: edit, check the shape, restore dtype and device, spare the other positions.

    Args:
        observe: is shown the attempted and the kept write, at the edited positions.
        rows: how many rows the edit returns; as many as it gets by default.
    """
    seen = 0

    def hook_function(x: Tensor, hook: Any = None) -> Tensor:
        nonlocal seen
        if x.ndim == 2 and positions is None:  # OPT's MLP sees [batch·pos, d_model]; positions cannot be told apart there
            return _checked(_run(edit, x[None], hook, site), x[None], rows, site)[0]
        start = seen if x.shape[1] == 1 else 0  # a one-token step continues the text before it
        seen = start + x.shape[1]
        edited = _checked(_run(edit, x, hook, site), x, rows, site)
        if positions is None:
            if observe:
                observe(site, x, edited)
            return edited
        mask = _mask(positions, start, x)
        if observe:
            observe(site, x[:, mask], edited[:, mask])
        return torch.where(mask[:, None], edited, x)

    return hook_function


def _run(edit: Edit, x: Tensor, hook: Any, site: Site) -> Any:
    before = None if x.is_inference() else x._version
    try:
        edited = edit(x, hook=hook)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"The edit failed at layer {site.layer} {site.component}: {error}") from error
    if before is not None and x._version != before:
        raise ValueError(
            f"The edit at layer {site.layer} {site.component} changed its input in place, which would change the clean run and "
            "other edits too; return a new tensor, `x = x.clone()` first."
        )
    return edited


def _checked(edited: Any, x: Tensor, rows: int | None, site: Site) -> Tensor:
    if not isinstance(edited, Tensor) or edited.shape != (rows or x.shape[0], *x.shape[1:]):
        returned = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ValueError(
            f"The edit at layer {site.layer} {site.component} returned {returned} for writes of shape {list(x.shape)}; an edit "
            "must return a new tensor of the same shape."
        )
    return edited.to(x)


def _mask(positions: Sequence[int], start: int, x: Tensor) -> Bool[Tensor, " pos"]:
    return torch.tensor([start + i in positions for i in range(x.shape[1])], device=x.device)
