"""Edits bound to sites: `(name, function)` pairs for `run_with_hooks(fwd_hooks=…)`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.checks import once, with_options
from mechsvd.edits.maps import (
    Edit,
    EditError,
    EditList,
    apply_edit,
    gates_of,
    require_same_shape,
    require_sites,
)
from mechsvd.edits.stacks import GateStack
from mechsvd.model.cache import warn_dropped
from mechsvd.model.identity import provenance_of
from mechsvd.model.places import sites_of, warn_norm_inputs, width_of
from mechsvd.model.positions import absolute_positions
from mechsvd.model.reading import Reading
from mechsvd.model.sites import (
    Hook,
    Model,
    Site,
    SiteOptions,
    where_of,
)
from mechsvd.results import Provenance, require_same_model

Observer = Callable[[Site, Tensor, Tensor], None]  # site, attempted write, kept write


@with_options(SiteOptions)
@plain
def fwd_hooks(
    model: Model,
    edit: Edit,
    *,
    check: bool = True,
    same_model: bool = True,
    **options: Unpack[SiteOptions],
) -> list[Hook]:
    """Bind an edit to the sites of a model, as hooks for `run_with_hooks`, `hooks` or `generate`.

    At one hook point, hooks act in the order of the list, after those of an enclosing
    `model.hooks`. So TransformerLens's cache holds the kept writes, and a patch after the edit
    brings in a write that is not clipped.

    Args:
        edit: a gate, a chain, or any function `edit(x, hook)` of the writes "batch pos d_model".
            It must return a new tensor of the same shape. A stack of gates edits each row of the
            batch by its own gate, `model.run_with_hooks(ids.expand(len(stack), -1), …)`.
        check, same_model: refuse a basis that comes from another model or processing state, unless
            one of them is False. For a fine-tune, say `same_model=False`.
        options: see `SiteOptions` (layers, components, at, heads, …). With a KV cache, the
            start of a run is read from the cache, so a text may be read in chunks. In a batch with
            left padding, positions count columns, padding included; pass the attention mask on.

    Returns:
        One `(hook name, function)` per site, in the order of writing. With `positions`, one more
        comes first, which reads how much of the text is cached.

    Raises:
        KeyError: an unknown layer or component, or one that a basis or baseline lacks.
        TypeError: an edit that cannot be called, or positions that are not whole numbers.
        ValueError: an edit over another `d_model` or of another model, or a position below 0; when
            it runs, a stack with another number of edits than the batch has rows.

    Example:
        >>> hooks = ms.fwd_hooks(model, ms.keep(mine), layers=[0])
        >>> [name for name, hook in hooks]
        ['blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out']
        >>> model.run_with_hooks(task.tokens[None], fwd_hooks=hooks).shape
        torch.Size([1, 21, 1024])
    """
    where = where_of(options)
    sites = sites_of(model, where)
    warn_norm_inputs(model, sites)
    positions = absolute_positions(where.positions)
    source = provenance_of(model) if check and same_model and gates_of(edit) else None
    require_fitting_edit(model, edit, source, sites)
    require_sites(edit, sites)
    warn_dropped(model)
    return hooks_at(model, edit, sites, positions)


def hooks_at(
    model: Model,
    edit: Edit,
    sites: Sequence[Site],
    positions: Sequence[int] | None,
) -> list[Hook]:
    """Bind an edit to sites for runs that may start anywhere in a text, as with a KV cache.

    Raises:
        ValueError: positions, but the first layer has no attention.
    """
    by_position = any(g.baseline is not None and g.baseline.by_position for g in gates_of(edit))
    if positions is None and not by_position:
        return [(site.hook_name, bind(edit, site)) for site in sites]
    reading = Reading(model, (sites[0].layer if sites[0].is_write else 0) or 0)
    hooks = [(site.hook_name, bind(edit, site, positions, reading=reading)) for site in sites]
    return [reading.hook, *hooks]


def _advice(source: Provenance | None) -> str:
    """What to do about a basis of another size."""
    if source is not None and source.hooks:
        return f"Its directions are of {source.hooks[0]}; pass the same `at` and `heads`."
    return "Vectors that are rows make a subspace by `span(vectors, rows=True)`."


def require_fitting_edit(
    model: Model, edit: Any, source: Provenance | None, sites: Sequence[Site] = ()
) -> None:
    """Refuse an edit that cannot be called, or whose basis does not fit the model.

    Args:
        source: the model that the basis must come from; None where that is not checked.
        sites: where it acts; the vectors of other hook points may have another length.

    Raises:
        TypeError: not a function.
        ValueError: a basis of another `d_model` or of another model.
    """
    if not callable(edit) and not isinstance(edit, GateStack):
        raise TypeError(
            f"An edit must be a function of the writes, but this is {type(edit).__name__}; "
            "make one by `mechsvd.keep`, or by `mechsvd.shift` of a vector."
        )
    width, is_write = width_of(model, sites), not sites or sites[0].is_write
    for gate in gates_of(edit):
        if gate.d_model != width:
            actual = f"the model's is {width}" if is_write else f"{sites[0].place} holds {width}"
            raise ValueError(
                f"The edit's basis has d_model {gate.d_model}, but {actual}. {_advice(gate.source)}"
            )
        require_same_model(gate.source, source, "The basis and the model")
        if gate.baseline is not None:
            require_same_model(gate.baseline.source, source, "The baseline and the model")


def as_stack(
    model: Model,
    edits: Any,
    source: Provenance | None,
    sites: Sequence[Site] = (),
) -> GateStack | EditList:
    """Turn a gate, a stack or a list of edits into a stack that fits the model, on its device.

    Args:
        source: as in `require_fitting_edit`.
        sites: where the edits act.

    Raises:
        TypeError, KeyError, ValueError: as `require_fitting_edit` and `require_sites`; no edits; a
            stack in a list.
    """
    stack = _stacked(model, edits, source, sites)
    require_sites(stack, sites)
    return stack


def _stacked(
    model: Model, edits: Any, source: Provenance | None, sites: Sequence[Site]
) -> GateStack | EditList:
    if isinstance(edits, GateStack):
        require_fitting_edit(model, edits, source, sites)
        device = next(model.parameters()).device
        stack: GateStack = edits if edits.is_stack else edits[None]  # type: ignore[index]
        return stack.to(device)
    edits = [edits] if callable(edits) else once(edits)
    if not isinstance(edits, Sequence) or not edits:
        what = "is empty" if isinstance(edits, Sequence) else f"is {type(edits).__name__}"
        raise TypeError(
            f"`edits` must be an edit, a stack of gates or a list of edits, at least one, but {what}."
        )
    for edit in edits:
        require_fitting_edit(model, edit, source, sites)
        if isinstance(edit, GateStack) and edit.is_stack:
            raise ValueError(
                "A stack of gates cannot be one of a list of edits: pass the stack alone, "
                "or its members `stack[i]`."
            )
    return EditList(tuple(edits))


def bind(
    edit: Edit,
    site: Site,
    positions: Sequence[int] | None = None,
    observe: Observer | None = None,
    rows: int | None = None,
    reading: Reading | None = None,
    start: int = 0,
) -> Callable[..., Tensor]:
    """Make the hook function of one site.

    It edits, checks the shape, restores dtype and device, and leaves other positions unchanged.

    Args:
        observe: called with the attempted and the kept write, at the edited positions.
        rows: number of rows that the edit returns; by default as many as it gets.
        reading: gives the place in the text where a run starts.
        start: that place, if it is known.
    """

    return _Bound(edit, site, positions, observe, rows, reading, start)


class _Bound:
    """The hook function that `bind` makes; a class, since many are made and run only once."""

    def __init__(
        self,
        edit: Edit,
        site: Site,
        positions: Sequence[int] | None,
        observe: Observer | None,
        rows: int | None,
        reading: Reading | None,
        start: int,
    ):
        self.edit, self.site, self.positions = edit, site, positions
        self.observe, self.rows, self.reading, self.start = observe, rows, reading, start
        self._mask: tuple[Any, Tensor] | None = None

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        site, reading = self.site, self.reading
        if site.head is not None and x.ndim == 4:
            h, own = site.head, self(x[:, :, site.head], hook)
            return torch.cat([x[:, :, :h], own[:, :, None], x[:, :, h + 1 :]], dim=2)
        if x.ndim == 2:  # OPT's MLP sees [batch·pos, d_model]
            shape = (reading.rows, reading.length, x.shape[-1]) if reading else (1, *x.shape)
            return self(x.reshape(shape), hook).flatten(0, 1)
        start = reading.start(site) if reading else self.start
        point = SitePoint(site, hook, start)
        if self.rows is None:
            _require_rows(self.edit, x, point)
        edited = _run(self.edit, x, point, self.rows)
        if self.positions is None:
            if self.observe:
                self.observe(site, x, edited)
            return edited
        mask = self._mask_of(start, x.shape[1], x.device)
        if self.observe:
            self.observe(site, x[:, mask], edited[:, mask])
        return torch.where(mask[:, None], edited, x)

    def _mask_of(self, start: int, length: int, device: torch.device) -> Tensor:
        """Which of the positions from `start` on are edited; the last answer is kept."""
        asked = (start, length, device)
        if self._mask is None or self._mask[0] != asked:
            own = torch.tensor(sorted(self.positions or ()))
            mask = torch.isin(torch.arange(start, start + length), own)
            self._mask = (asked, mask.to(device))
        return self._mask[1]


class SitePoint:
    """TransformerLens's hook point under the name that `find_sites` gives it.

    The name differs between versions; everything else is passed on from the point.

    Attributes:
        start: the position in the text where the run begins.
    """

    def __init__(self, site: Site, point: Any, start: int = 0):
        self.name, self.start = site.name, start
        self._site, self._point = site, point

    def layer(self) -> int | None:
        """The layer of the site."""
        return self._site.layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._point, name)

    def __str__(self) -> str:
        return self._site.place


def _require_rows(edit: Edit, x: Tensor, point: SitePoint) -> None:
    if isinstance(edit, GateStack) and edit.is_stack and len(edit) != len(x):
        raise ValueError(
            f"A stack of {len(edit)} edits meets a batch of {len(x)} rows at {point}: repeat the "
            "text, `ids.expand(len(stack), -1)`, bind one edit, `stack[i]`, or measure all by "
            "`measure`."
        )


def _run(edit: Edit, x: Tensor, point: SitePoint, rows: int | None) -> Tensor:
    try:
        edited = apply_edit(edit, x, point)
    except (torch.OutOfMemoryError, MemoryError, EditError):
        raise
    except Exception as error:  # a user's exception keeps its type and gains the site
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"The edit failed at {point}: {error.args[0]}",)
        elif hasattr(error, "add_note"):
            error.add_note(f"The edit failed at {point}.")
        raise
    return require_same_shape(edited, x, None, point, rows).to(x)
