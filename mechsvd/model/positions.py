"""Positions in a text: the forms in which users give them, and the numbers that they mean."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechsvd.checks import is_whole

Positions = (
    int
    | slice
    | Literal["last"]
    | Iterable[int]
    | Int[Tensor, " position"]
    | Bool[Tensor, "*text pos"]
    | None
)
FORMS = (
    "give a whole number, a list or range of them, a slice, 'last', or a mask [pos] or [text, pos]"
)


def is_mask(positions: Any) -> bool:
    """Whether positions are given as a mask, of one text or of several."""
    return isinstance(positions, Tensor) and positions.dtype == torch.bool


def positions_in(
    positions: Any, length: int, last: int, text: int = 0, texts: int = 1
) -> tuple[int, ...] | None:
    """The positions in a text, as sorted whole numbers from 0; None for all.

    Args:
        length: number of tokens; negative positions count from the end.
        last: the position that "last" means: that of the last scored prediction.
        text, texts: number of the text, and of all; a mask may have a row for each.

    Raises:
        TypeError: none of the forms.
        ValueError: positions that do not exist, none, or a mask of another shape.
    """
    if positions is None:
        return None
    if isinstance(positions, str):
        _require_last(positions)
        return (last,)
    if isinstance(positions, Tensor) and is_mask(positions):
        numbers = _of_mask(positions, length, text, texts)
    elif isinstance(positions, slice):
        numbers = [*range(length)[positions]]
    else:
        numbers = _whole(positions)
        if wrong := [p for p in numbers if not -length <= p < length]:
            raise ValueError(f"No positions {wrong[:5]}: the text has 0 to {length - 1}.")
        numbers = [p % length for p in numbers]
    if not numbers:
        raise ValueError("`positions` is empty, so nothing is left; give at least one.")
    return tuple(sorted(set(numbers)))


def absolute_positions(positions: Any) -> tuple[int, ...] | None:
    """Positions in texts of unknown length, as sorted whole numbers from 0; None for all.

    Raises:
        TypeError: none of the forms.
        ValueError: positions that depend on the length of the text, or none.
    """
    if positions is None:
        return None
    if isinstance(positions, slice):
        ends = (positions.start or 0, positions.stop)
        if positions.stop is not None and min(ends) >= 0 and (positions.step or 1) > 0:
            positions = range(ends[0], ends[1], positions.step or 1)
    if isinstance(positions, str):
        _require_last(positions)
    if isinstance(positions, str | slice) or is_mask(positions):
        shown = "a mask" if is_mask(positions) else repr(positions)
        raise ValueError(
            f"`positions` is {shown}, which depends on the length of the text, and that "
            "is not known here: give numbers from 0, or edit whole texts by "
            "`measure(positions=…)`."
        )
    numbers = _whole(positions)
    if not numbers:
        raise ValueError("`positions` is empty, so nothing is left; give at least one.")
    if wrong := [p for p in numbers if p < 0]:
        raise ValueError(
            f"No positions {wrong[:5]}: the length of the text is not known here, so they are "
            "absolute, 0 and more."
        )
    return tuple(sorted(set(numbers)))


def _require_last(positions: str) -> None:
    if positions != "last":
        raise TypeError(f"`positions` is {positions!r:.40}, but the only word is 'last'; {FORMS}.")


def _whole(positions: Any) -> list[int]:
    if is_whole(positions):
        return [int(positions)]
    values = positions.tolist() if isinstance(positions, Tensor) else positions
    if not isinstance(values, Iterable):
        raise TypeError(f"`positions` is {positions!r:.60}; {FORMS}.")
    numbers = [*values]
    if wrong := [p for p in numbers if not is_whole(p)]:
        raise TypeError(
            f"`positions` must be whole numbers, but holds {wrong[0]!r:.40}; a mask must be a "
            "tensor of bools."
        )
    return [int(p) for p in numbers]


def _of_mask(mask: Tensor, length: int, text: int, texts: int) -> list[int]:
    rows = mask if mask.ndim == 2 else mask[None]
    fits = mask.ndim in (1, 2) and (mask.ndim == 1 or len(rows) == texts)
    if not fits or rows.shape[1] < length or (texts == 1 and rows.shape[1] != length):
        raise ValueError(
            f"`positions` is a mask of shape {list(mask.shape)}, but must be [pos], or [text, pos] "
            f"with {texts} texts and at least {length} positions."
        )
    return rows[text if mask.ndim == 2 else 0, :length].nonzero().flatten().tolist()
