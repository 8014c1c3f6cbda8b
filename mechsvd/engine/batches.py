"""How many edits run in one forward pass: from the memory that is free, halved when it runs out."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mechsvd.checks import warn
from mechsvd.engine.memory import free_bytes, is_out_of_memory
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task

SHARE_OF_MEMORY = 0.4
GPU_TOKENS = 65_536  # a pass; enough to keep the matrix products busy
CPU_TOKENS = 1024  # a pass; enough to read the weights seldom
CPU_ENTRIES = 1_500_000  # of the widest activation a pass, for small models: more leaves the cache and takes fresh pages
PATIENCE = 8  # passes that must go well before more rows are tried again
Part = TypeVar("Part")


def rows_per_pass(model: Model, task: Task) -> int:
    """How many edits of a task fit into one forward pass, from the free memory and the model's size."""
    device, length = next(model.parameters()).device, len(task.tokens)
    fitting = int(SHARE_OF_MEMORY * free_bytes(device) / bytes_per_row(model, task))
    busy = max(CPU_TOKENS, CPU_ENTRIES // _d_mlp(model)) if device.type == "cpu" else GPU_TOKENS
    return max(1, min(fitting, busy // length))


def bytes_per_row(model: Model, task: Task) -> int:
    """What one more edit in a forward pass takes, roughly: activations of a block, attention scores, scored logits."""
    cfg, length = model.cfg, len(task.tokens)
    widths = 16 * cfg.d_model + 4 * _d_mlp(model) + 3 * cfg.n_heads * length
    return 4 * (length * widths + 3 * len(task.continuation) * cfg.d_vocab)


def run_batches(
    forward: Callable[[Int[Tensor, " row"]], Part],
    order: Int[Tensor, " edit"],
    size: int,
    halve: Callable[[int], int],
    progress: bool | None,
    what: str = "edits",
) -> list[Part]:
    """Run all rows, `size` at a time in the order given; fewer when memory runs out, and more again when it has come back.

    Args:
        halve: gives the next smaller size, or raises; see `halving`.
        what: the rows are, for the progress bar.

    Raises:
        MemoryError: one row alone does not fit.
    """
    parts: list[Part] = []
    done, good, patience, now = 0, 0, PATIENCE, size
    with progress_bar(len(order), what, progress) as bar:
        while done < len(order):
            if now < size and good >= patience:  # memory may have run out for a moment only
                now, good = min(size, 2 * now), 0
            rows = order[done : done + now]
            if not _fits(forward, rows, parts):
                now, good, patience = halve(len(rows)), 0, 2 * patience
                continue
            done, good = done + len(rows), good + 1
            bar.update(len(rows))
    return parts


def halving(model: Model, task: Task) -> Callable[[int], int]:
    """Make the function that halves the rows of a pass, and says so.

    It raises a MemoryError with the bytes needed where one row alone does not fit.
    """

    def halve(size: int) -> int:
        if size == 1:
            raise MemoryError(
                "One edit alone does not fit into memory: about "
                f"{bytes_per_row(model, task) / 2**20:,.0f} MiB are needed next to the model. Shorten the task, or load the model in a smaller dtype."
            )
        warn(f"Out of memory with {size} edits a forward pass; going on with {size // 2}.")
        return size // 2

    return halve


def progress_bar(total: int | None, what: str, progress: bool | None) -> Any:
    """A bar with an estimate; by default only where it is seen, in a terminal or a notebook."""
    return tqdm(
        total=total, desc=what, disable=not _is_seen() if progress is None else not progress
    )


def _fits(forward: Callable[[Tensor], Part], rows: Tensor, parts: list[Part]) -> bool:
    """Run some edits and keep what they give, or say that memory ran out."""
    try:
        parts.append(forward(rows))
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the except block: the exception holds the frames, and those the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _d_mlp(model: Model) -> int:
    return getattr(model.cfg, "d_mlp", None) or 4 * model.cfg.d_model


def _is_seen() -> bool:
    in_notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty()
