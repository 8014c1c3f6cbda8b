"""Edits: pure maps on writes; shifts, chains, and lists of any of them. Most edits are gates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.edits.gates import Gate

Edit = Callable[..., Tensor]  # edit(x) and, as a TransformerLens hook, edit(x, hook=hook_point)


@runtime_checkable
class Stack(Protocol):
    """Edits side by side: `stack[rows]` is one edit that treats row i of a batch as edit `rows[i]` does."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Edit: ...


def shift(vector: Float[Tensor, " d_model"]) -> Edit:
    """Add one vector to every write, as activation steering does."""
    if vector.ndim != 1 or not vector.isfinite().all():
        what = "holds NaN or inf" if vector.ndim == 1 else f"has shape {list(vector.shape)}"
        raise ValueError(f"`vector` must be finite and of shape [d_model], but {what}.")

    def shifted(x: Tensor, hook: Any = None) -> Tensor:
        if x.shape[-1] != len(vector):
            raise ValueError(
                f"`vector` has {len(vector)} entries, but the writes have d_model {x.shape[-1]}."
            )
        return x + vector.to(x)

    return shifted


def chain(*edits: Edit) -> Edit:
    """Apply edits one after the other, the first one first; a chain of none changes nothing."""
    return Chain(edits)


@dataclass(frozen=True, eq=False)
class Chain:
    """Edits applied one after the other; build one with `chain`."""

    edits: tuple[Edit, ...]

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """Edit the writes `x` by each in turn."""
        for edit in self.edits:
            x = edit(x, hook=hook)
        return x


@dataclass(frozen=True, eq=False)
class EditList:
    """Edits of any kind side by side: edit i acts on row i, or on its own copy of the only row."""

    edits: tuple[Edit, ...]

    def __getitem__(self, rows: Int[Tensor, " row"]) -> "EditList":
        """Some of the edits, in the order asked for."""
        return EditList(tuple(self.edits[i] for i in rows))

    def __len__(self) -> int:
        """Number of edits."""
        return len(self.edits)

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """Edit each row of the writes `x` by its own.

        Raises:
            EditError: an edit that gives another shape than it got, though others may make up for its rows.
        """
        rows = x.expand(len(self), -1, -1).split(1)
        edited = [(edit, edit(row, hook=hook)) for edit, row in zip(self.edits, rows, strict=True)]
        return torch.cat([require_same_shape(y, x[:1], edit, hook).to(x) for edit, y in edited])


class EditError(ValueError):
    """An edit gave something else than writes of the shape that it got."""


def require_same_shape(
    edited: Any, x: Tensor, edit: Any, hook: Any = None, rows: int | None = None
) -> Tensor:
    """Refuse what an edit returned if it is no tensor of the shape of the writes `x`.

    Args:
        edit, hook: what returned it, and where; None where that is not known.
        rows: how many rows there must be; as many as in `x` by default.

    Raises:
        EditError: with both shapes.
    """
    if not isinstance(edited, Tensor) or edited.shape != (rows or x.shape[0], *x.shape[1:]):
        returned = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        which, where = (
            "" if edit is None else f" This one is {edit!r:.80}.",
            "" if hook is None else f" at {hook}",
        )
        raise EditError(
            f"The edit{where} returned {returned} for writes of shape {list(x.shape)}; an edit must return a new tensor of "
            f"the same shape.{which}"
        )
    return edited


def gates_of(edit: Edit) -> list[Gate]:
    """The gates in an edit, so that their bases can be held against a model."""
    if isinstance(edit, Chain):
        return [gate for part in edit.edits for gate in gates_of(part)]
    return [edit] if isinstance(edit, Gate) else []
