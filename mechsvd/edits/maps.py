"""Edits: pure maps on writes. Shifts, chains, and lists of any edits; most edits are gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.checks import real_tensor
from mechsvd.edits.gates import Gate, takes_tuples
from mechsvd.edits.stacks import SiteGates, SiteRemovals
from mechsvd.model.sites import Site
from mechsvd.model.tasks import Task

Edit = Callable[..., Tensor]  # edit(x) and, as a TransformerLens hook, edit(x, hook=hook_point)


@runtime_checkable
class Stack(Protocol):
    """Edits side by side: in `stack[rows]`, row i of a batch gets edit `rows[i]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Edit: ...


def shift(vector: Any) -> Edit:
    """Add one vector to every write, as activation steering does.

    Every chosen site adds it at every position, so its effect grows with their number; `layers` and
    `components` choose fewer. `writes.values.norm(dim=-1).mean()` is a scale for its length.

    Raises:
        TypeError: not a tensor, such as a subspace; its directions are columns of `subspace.basis`.
        ValueError: NaN or inf, or not one axis.

    Example:
        >>> ms.shift(torch.tensor([1.0, -1.0]))(torch.tensor([[4.0, 4.0]]))
        tensor([[5., 3.]])
    """
    if not isinstance(vector, Tensor | np.ndarray | list | tuple):
        raise TypeError(
            f"`vector` must be a tensor [d_model], but is {type(vector).__name__}; a direction is a "
            "column of `svd.directions` or `subspace.basis`."
        )
    vector = real_tensor("vector", vector, "d_model")
    if vector.ndim != 1 or not vector.isfinite().all():
        what = "holds NaN or inf" if vector.ndim == 1 else f"has shape {list(vector.shape)}"
        raise ValueError(f"`vector` must be finite and of shape [d_model], but {what}.")
    vector = vector if vector.is_floating_point() else vector.float()
    return Shift(vector if vector.requires_grad else vector.clone())  # which may change later


@dataclass(frozen=True, eq=False)
class Shift:
    """A vector added to every write; build one with `shift`."""

    vector: Float[Tensor, " d_model"]

    @takes_tuples
    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The writes `x` with the vector added."""
        if x.shape[-1] != len(self.vector):
            raise ValueError(
                f"`vector` has {len(self.vector)} entries, but the writes have d_model "
                f"{x.shape[-1]}."
            )
        return x + self.vector.to(x)


def chain(*edits: Edit) -> Edit:
    """Apply edits one after the other, in the order given; an empty chain changes nothing.

    Raises:
        TypeError: an edit is not a function, such as a list of edits.

    Example:
        >>> ms.chain(ms.keep(torch.eye(2), 1), ms.shift(torch.ones(2)))(torch.tensor([[4.0, 5.0]]))
        tensor([[5., 1.]])
    """
    for edit in edits:
        if not callable(edit):
            raise TypeError(
                f"`chain` takes edits, `chain(first, second)`, but one is {type(edit).__name__}."
            )
    return Chain(edits)


@dataclass(frozen=True, eq=False)
class Chain:
    """Edits applied one after the other; build one with `chain`."""

    edits: tuple[Edit, ...]

    @takes_tuples
    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """Apply each edit in turn to the writes `x`."""
        for edit in self.edits:
            x = apply_edit(edit, x, hook)
        return x


@dataclass(frozen=True, eq=False)
class EditList:
    """Edits of any kind side by side: edit i acts on row i, or on its own copy of the only row."""

    edits: tuple[Edit, ...]

    def __getitem__(self, rows: Int[Tensor, " row"]) -> "EditList":
        """Some of the edits, in the order of `rows`."""
        return EditList(tuple(self.edits[i] for i in rows))

    def __len__(self) -> int:
        """Number of edits."""
        return len(self.edits)

    @takes_tuples
    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """Edit each row of the writes `x` by its own edit.

        Raises:
            EditError: an edit returns another shape, even if the total number of rows is right.
        """
        rows = x.expand(len(self), -1, -1).split(1)
        edited = [(e, apply_edit(e, row, hook)) for e, row in zip(self.edits, rows, strict=True)]
        return torch.cat([require_same_shape(y, x[:1], edit, hook).to(x) for edit, y in edited])


class EditError(ValueError):
    """An edit returned something other than writes of the shape that it got, or changed those."""


def apply_edit(edit: Edit, x: Tensor, hook: Any = None) -> Any:
    """Call an edit on writes that stay as they are.

    A function of the user's gets a copy, since torch notices few ways to write to a tensor.

    Raises:
        EditError: torch noticed one.
    """
    if type(edit).__module__.startswith("mechsvd."):
        return edit(x, hook=hook)
    given = x.clone()
    edited = edit(given, hook=hook)
    if not given.is_inference() and given._version:
        where = "" if hook is None else f" at {hook}"
        raise EditError(
            f"The edit{where} changed its input in place; return a new tensor, `x = x.clone()` "
            "first."
        )
    return edited


def require_same_shape(
    edited: Any, x: Tensor, edit: Any, hook: Any = None, rows: int | None = None
) -> Tensor:
    """Refuse what an edit returned unless it is a tensor of the shape of `x`.

    Args:
        edit, hook: what returned it, and where; None where unknown.
        rows: the required number of rows; by default as many as in `x`.

    Raises:
        EditError: another shape or type; the message gives both shapes.
    """
    if not isinstance(edited, Tensor) or edited.shape != (rows or x.shape[0], *x.shape[1:]):
        returned = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        which = "" if edit is None else f" This one is {edit!r:.80}."
        where = "" if hook is None else f" at {hook}"
        raise EditError(
            f"The edit{where} returned {returned} for writes of shape {list(x.shape)}; "
            f"an edit must return a new tensor of the same shape.{which}"
        )
    return edited


def gates_of(edit: Any) -> list[Gate]:
    """The gates in an edit or a stack, so that their bases can be compared with a model."""
    if isinstance(edit, Chain | EditList):
        return [gate for part in edit.edits for gate in gates_of(part)]
    if isinstance(edit, SiteGates | SiteRemovals):
        return list(edit.gates)
    return [edit] if isinstance(edit, Gate) else []


def for_task(edit: Any, task: Task) -> Any:
    """An edit or a stack with the baselines of one text.

    Raises:
        ValueError: a baseline has no points for it.
    """
    if isinstance(edit, Gate):
        if edit.baseline is None:
            return edit
        return replace(edit, baseline=edit.baseline.for_task(task))
    if isinstance(edit, SiteGates):
        return replace(edit, gates=tuple(for_task(gate, task) for gate in edit.gates))
    if isinstance(edit, Chain | EditList | SiteRemovals):
        parts = edit.edits
        fitted: Any = (
            for_task(parts, task)
            if isinstance(parts, SiteGates)
            else tuple(for_task(part, task) for part in parts)
        )
        return type(edit)(fitted)
    return edit


def require_sites(edit: Any, sites: Sequence[Site]) -> None:
    """Refuse an edit whose bases or baselines lack a site.

    Raises:
        KeyError: naming the site.
    """
    if isinstance(edit, Chain | EditList):
        for part in edit.edits:
            require_sites(part, sites)
    index = getattr(getattr(edit, "edits", edit), "index", None)
    if isinstance(index, dict) and (lacking := [site for site in sites if site.name not in index]):
        raise KeyError(
            f"No basis is of {lacking[0].place} ({lacking[0].name}), one of {len(lacking)} sites "
            "without one; decompose the writes of all sites that you edit, or choose `layers` and "
            "`components`."
        )
    for gate in gates_of(edit):
        if gate.baseline is not None:
            gate.baseline.require_sites(sites)
