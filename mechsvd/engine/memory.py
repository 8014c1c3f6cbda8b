"""How much memory is free, and whether it ran out."""

from pathlib import Path

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, as far as the system tells: of a container, within its limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_bytes_in(Path("/proc/meminfo"), "MemAvailable:", 1024), _free_in_cgroup(Path("/"))]
    return min(
        (known for known in free if known is not None), default=4 * 2**30
    )  # neither outside Linux


# limit, usage, and what of the usage is cache that can be given back
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _free_in_cgroup(root: Path) -> int | None:
    """What a container's memory limit leaves, the tightest of its control groups (v1 and v2); None where there is none."""
    try:
        lines = [
            line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()
        ]
    except OSError:
        return None
    free = []
    for _, controllers, path in lines:
        mount = root / "sys/fs/cgroup" / ("memory" if "memory" in controllers.split(",") else "")
        own = mount / path.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                free += [_left_of(folder, *names) for names in _CGROUP_FILES]
    return min((known for known in free if known is not None), default=None)


def _left_of(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _bytes_in(folder / limit), _bytes_in(folder / usage)
    if (
        most is None or used is None or most >= 2**60
    ):  # v1 says no limit by a huge number, v2 by "max"
        return None
    return max(0, most - used + (_bytes_in(folder / "memory.stat", cache) or 0))


def _bytes_in(file: Path, name: str = "", unit: int = 1) -> int | None:
    """The number in a file of the system, behind a name where it has several; None where there is none."""
    try:
        words = next(
            line.split() for line in file.read_text().splitlines() if line.startswith(name)
        )
        return int(words[1 if name else 0]) * unit
    except (OSError, StopIteration, ValueError, IndexError):
        return None
