"""Several processes: each runs a share of the work, and all of them get the whole result.

The process group is the user's own, made by `torch.distributed.init_process_group`. Without one
there is one process. With one, all its processes make the same calls in the same order.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, distributed

from mechsvd.checks import quiet, warn

Part = TypeVar("Part")


def this_process() -> tuple[int, int]:
    """The number of this process, and how many there are; (0, 1) without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def warn_lonely() -> None:
    """Warn of a job of several processes that have no group, so that each would run everything."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1 and this_process()[1] == 1:
        warn(
            f"This is one of {count} processes, but they have no process group, so each runs "
            "everything; call `torch.distributed.init_process_group` first."
        )


def own_share(rows: Int[Tensor, " row"]) -> Int[Tensor, " own"]:
    """The rows that this process runs: neighbours, and as many as the others run, or one more."""
    number, count = this_process()
    return rows.tensor_split(count)[number]


def own_file(path: Any) -> Any:
    """This process's own file for a path that all processes are given."""
    number, count = this_process()
    if count == 1 or not isinstance(path, str | os.PathLike):
        return path
    return f"{os.fspath(path)}.{number}-of-{count}"


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only the first process warn in this block, since the others would say the same."""
    if this_process()[0] == 0:
        yield
        return
    with quiet():
        yield


def gather(call: Callable[[], Any], work: Callable[[], Part]) -> list[Part]:
    """Do this process's part of some work, and get the parts of all processes in their order.

    An exception in one of them is raised in all, so that nobody waits for a part that never comes.

    Args:
        call: describes what must be the same in all processes, such as the texts.

    Raises:
        RuntimeError: the work failed in another process, or the processes made different calls.
    """
    number, count = this_process()
    if count == 1:
        return [work()]
    part, error = None, None
    try:
        part = work()
    except Exception as failure:  # the others are waiting, so they are told before it is raised
        error = failure
    told = None if error is None else f"{type(error).__name__}: {error}"
    replies: list[Any] = [None] * count
    distributed.all_gather_object(replies, (call(), told, part))
    if error is not None:
        raise error
    for other, (_, failed, _) in enumerate(replies):
        if failed is not None:
            raise RuntimeError(f"Process {other} of {count} failed, so all stop. {failed}")
    _require_same([described for described, _, _ in replies], number)
    return [own for _, _, own in replies]


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, with the same bits in each."""
    if this_process()[1] == 1:
        return values
    place = {"gloo": torch.device("cpu"), "nccl": torch.device("cuda")}
    summed = values.to(place.get(distributed.get_backend(), values.device), copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def _require_same(described: list[Any], number: int) -> None:
    """Refuse results that were made by different calls, which would be mixed."""
    for other, call in enumerate(described):
        for mine, its in zip(described[number], call, strict=False):
            if mine != its:
                raise RuntimeError(
                    f"Processes {number} and {other} made different calls: {mine!r:.200} and "
                    f"{its!r:.200}. With a process group, all its processes make the same calls, "
                    "with the same texts, edits and options, in the same order."
                )
