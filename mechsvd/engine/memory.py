"""How much memory is free, and whether it ran out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )


@contextmanager
def memory_in_words(call: str) -> Iterator[None]:
    """Say what to do where memory runs out in a call, outside of what runs in smaller batches.

    Raises:
        MemoryError: in place of torch's own error, whose sentence it repeats.
    """
    try:
        yield
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"Memory ran out in `{call}`, in a part that cannot run in fewer rows: {error}. Give "
            "fewer or shorter texts, or load the model in a smaller dtype."
        ) from error


def free_bytes(device: torch.device) -> int:
    """Free memory on a device, as far as the system reports it; within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_bytes_in(Path("/proc/meminfo"), "MemAvailable:", 1024), _free_in_cgroup(Path("/"))]
    # neither is known outside Linux
    return min((size for size in free if size is not None), default=4 * 2**30)


def total_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    return _bytes_in(Path("/proc/meminfo"), "MemTotal:", 1024)


def container_limit(root: Path = Path("/")) -> int | None:
    """The memory that a container allows this process; None if there is no limit."""
    limits = [_limit_of(folder, names[0]) for folder in _cgroups(root) for names in _CGROUP_FILES]
    return min((size for size in limits if size is not None), default=None)


# limit, usage, and the part of the usage that is cache and can be given back
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _free_in_cgroup(root: Path) -> int | None:
    """What a container's memory limit leaves free; None if there is no limit.

    It is the smallest over the control groups (v1 and v2) that the process is in.
    """
    free = [_left_of(folder, *names) for folder in _cgroups(root) for names in _CGROUP_FILES]
    return min((size for size in free if size is not None), default=None)


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of the control groups that the process is in, and of those around them."""
    try:
        lines = [
            line.split(":", 2)
            for line in (root / "proc/self/cgroup")
            .read_text(encoding="utf-8", errors="replace")
            .splitlines()
        ]
    except OSError:
        return
    for _, controllers, path in lines:
        mount = root / "sys/fs/cgroup" / ("memory" if "memory" in controllers.split(",") else "")
        own = mount / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


def _left_of(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    most = _limit_of(folder, limit)
    if most is None:
        return None
    used = _bytes_in(folder / usage)
    if used is None:
        return None
    return max(0, most - used + (_bytes_in(folder / "memory.stat", cache) or 0))


def _limit_of(folder: Path, limit: str) -> int | None:
    most = _bytes_in(folder / limit)
    # no limit is a huge number in v1, and "max" in v2
    return None if most is None or most >= 2**60 else most


def _bytes_in(file: Path, name: str = "", unit: int = 1) -> int | None:
    """The number in a system file, after `name` if it has several; None if there is none."""
    try:
        words = next(
            line.split()
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith(name)
        )
        return int(words[1 if name else 0]) * unit
    except (OSError, StopIteration, ValueError, IndexError):
        return None
