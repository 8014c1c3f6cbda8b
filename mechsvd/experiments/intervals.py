"""Tables of means over texts, with their intervals."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.experiments.statistics import interval


def interval_columns(values: Float[Tensor, "task item"], confidence: float) -> dict[str, Any]:
    """The columns mean, low, high and n: the mean of each item over the texts, and its interval.

    An item with a value that is NaN or inf has no interval: its ends are NaN.
    """
    is_finite = values.isfinite().all(dim=0)
    is_finite |= ~is_finite.any()  # of no item at all, it is refused
    low, high = (torch.full(values.shape[1:], torch.nan, dtype=torch.float64) for _ in range(2))
    low[is_finite], high[is_finite] = interval(values[:, is_finite], confidence)
    return {
        "mean": values.mean(dim=0).numpy(),
        "low": low.numpy(),
        "high": high.numpy(),
        "n": len(values),
    }


def summary(table: Any, keys: list[str], column: str, confidence: float) -> Any:
    """One row per item that all texts have: what names it, and the mean of a column over the texts.

    Args:
        table: of all texts, with a column `task`.
        keys: columns that name the items.
        column: its values are averaged.

    Raises:
        ValueError: the table has no such column, or one text only.
    """
    if column not in table.columns:
        raise ValueError(
            f"`column` is {column!r:.40}, but must be one of {list(table.columns[1:])}."
        )
    by_text = table.pivot(index=keys, columns="task", values=column)
    is_there = table.assign(is_there=1).pivot(index=keys, columns="task", values="is_there")
    by_text = by_text[is_there.notna().all(axis=1)]  # a value may be NaN
    values = torch.tensor(by_text.to_numpy(dtype="float64")).T
    return by_text.index.to_frame(index=False).assign(**interval_columns(values, confidence))
