"""How many edits run in one forward pass: as free memory allows, halved when it runs out."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechsvd.checks import warn
from mechsvd.engine.memory import free_bytes, is_out_of_memory
from mechsvd.engine.progress import progress_bar
from mechsvd.engine.resuming import kept_loop
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task

SHARE_OF_MEMORY = 0.4
GPU_TOKENS = 65_536  # per pass; enough to keep the matrix products busy
CPU_TOKENS = 1024  # per pass; enough to read the weights rarely
# of the widest activation per pass, for small models: more leaves the cache and needs new pages
CPU_ENTRIES = 1_500_000
WORTH_TELLING = 10.0  # seconds of a loop, from which a line tells its cost
PATIENCE = 8  # successful passes before more rows are tried again
Part = TypeVar("Part")


def rows_per_pass(model: Model, task: Task, start: int = 0) -> int:
    """How many edits of a task fit into one forward pass, from free memory and model size.

    Args:
        start: the position where the rows begin, if they share what is before it.
    """
    device, length = next(model.parameters()).device, len(task.tokens) - start
    fitting = int(SHARE_OF_MEMORY * free_bytes(device) / bytes_per_row(model, task, start))
    busy = max(CPU_TOKENS, CPU_ENTRIES // _d_mlp(model)) if device.type == "cpu" else GPU_TOKENS
    return max(1, min(fitting, busy // length))


def bytes_per_row(model: Model, task: Task, start: int = 0) -> int:
    """Approximate bytes for one more edit in a forward pass.

    It counts the activations of a block, the attention scores, the scored logits, and a copy of the
    keys and values before `start`.
    """
    cfg, length = model.cfg, len(task.tokens)
    widths = 16 * cfg.d_model + 4 * _d_mlp(model) + 3 * cfg.n_heads * length
    entries = (length - start) * widths + 2 * start * cfg.d_model
    return 4 * (entries + 5 * len(task.continuation) * cfg.d_vocab)


def run_batches(
    forward: Callable[[Int[Tensor, " row"]], Part],
    order: Int[Tensor, " edit"],
    size: int,
    halve: Callable[[int], int],
    progress: bool | None,
    what: str = "rows",
    *,
    restored: Callable[[Sequence[Int[Tensor, " _"]]], None] | None = None,
    row_bytes: int = 0,
) -> list[Part]:
    """Run all rows in the order given, `size` at a time.

    Fewer rows share a pass when memory runs out, and more again when it has come back.

    Args:
        halve: returns the next smaller size, or raises; see `halving`.
        what: name of the rows in the progress bar.
        restored: where the batches may be kept for a later run. It is called with the rows of those
            that an earlier run finished, which do not run again.
        row_bytes: memory of one row, for the line that tells the cost of a long loop.

    Raises:
        MemoryError: one row alone does not fit.
    """
    parts: list[Part] = []
    kept = None if restored is None else kept_loop(order, size)
    if kept is not None and restored is not None:
        size, parts = kept.size, [*kept.parts]
        restored(order[: sum(kept.counts)].split(kept.counts) if kept.counts else [])
    done, passes, patience, current = sum(kept.counts) if kept else 0, 0, PATIENCE, size
    with progress_bar(len(order), what, progress) as bar:
        bar.update(done)
        started, first, is_told = time.perf_counter(), done, bar.disable
        while done < len(order):
            if current < size and passes >= patience:  # memory may have been short only briefly
                current, passes = min(size, 2 * current), 0
            rows = order[done : done + current]
            if not _fits(forward, rows, parts):
                current, passes, patience = halve(len(rows)), 0, 2 * patience
                continue
            if kept is not None:
                kept.add(len(rows), parts[-1])
            done, passes = done + len(rows), passes + 1
            bar.update(len(rows))
            if not is_told:
                _tell_cost(bar, what, len(order) - first, len(rows), started, row_bytes)
                is_told = True
    return parts


def _tell_cost(bar: Any, what: str, left: int, size: int, started: float, row_bytes: int) -> None:
    """After the first batch of a long loop, say what the whole of it will cost."""
    passes = -(-left // size)
    seconds = (time.perf_counter() - started) * left / size
    if seconds >= WORTH_TELLING:
        memory = f", {row_bytes * size / 2**20:,.0f} MiB each" if row_bytes else ""
        bar.write(
            f"{what}: {left} rows in {passes} forward passes{memory}, about {seconds:.0f} s",
            file=sys.stderr,
        )


def independent(chunks: Sequence[Int[Tensor, " _"]]) -> None:
    """For `restored` of `run_batches`: later batches need nothing of earlier ones."""


def halving(model: Model, task: Task, start: int = 0) -> Callable[[int], int]:
    """Make the function that halves the rows of a pass, with a warning.

    It raises a MemoryError with the bytes needed if a single row does not fit.
    """
    return partial(_halve, bytes_per_row(model, task, start))


def _halve(row_bytes: int, size: int) -> int:
    if size == 1:
        raise MemoryError(
            "One edit alone does not fit into memory: about "
            f"{row_bytes / 2**20:,.0f} MiB are needed next to the model. "
            "Shorten the task, or load the model in a smaller dtype."
        )
    warn(f"Out of memory with {size} edits per forward pass; going on with {size // 2}.")
    return size // 2


def _fits(forward: Callable[[Tensor], Part], rows: Tensor, parts: list[Part]) -> bool:
    """Run some edits and keep their results; False if memory ran out."""
    try:
        parts.append(forward(rows))
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the except block: the exception holds the frames, and they hold the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _d_mlp(model: Model) -> int:
    return getattr(model.cfg, "d_mlp", None) or 4 * model.cfg.d_model
