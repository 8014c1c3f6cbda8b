"""A run's files on disk.

A run's folder is complete before the page that names it is in place. So a run may be killed at any
time: a page is there with every file of its folder.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from mechsvd.results import UNFINISHED, write_atomically

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

PAGE, DATA, LISTING = "report.html", "report-data", ".written.json"
STOPPED = ".unfinished"  # ending of the file that a stopped run leaves
NAME = r"\d{4}-\d\d-\d\d-\d{6}(-\d+)?"  # a run is named by its time


def require_writable(out: Path) -> None:
    """Make the report's folders, and refuse if they cannot be written.

    Raises:
        OSError: the message names the folder.
    """
    try:
        (out / DATA).mkdir(parents=True, exist_ok=True)
        for folder in (out, out / DATA):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"The report cannot be written to {out}: {reason}; choose another folder."
        ) from error


def require_free(out: Path, kept: Path | None = None) -> None:
    """Refuse a folder with the page of an earlier run, unless a stopped run is to go on there.

    Args:
        kept: what the stopped run kept; any such file by default, as long as it is not known.

    Raises:
        FileExistsError: says what to do.
    """
    page = out / PAGE
    goes_on = kept.exists() if kept else any(out.glob(f"report-*{STOPPED}"))
    if page.exists() and not goes_on:
        raise FileExistsError(
            f"{page} is the page of an earlier run; give another folder by --out, or --replace "
            "to put the new one in its place."
        )


def page_stamp(out: Path) -> int | None:
    """Which page a folder has: the time of its last change; None for no page."""
    try:
        return (out / PAGE).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def appeared(out: Path, kept: Path) -> str:
    """The message of a run that ends where another one has put its page meanwhile."""
    return (
        f"Another run has written {out / PAGE} meanwhile. What was computed is kept in {kept}; "
        "the same command with --replace puts its page there."
    )


def replace_run(out: Path, write: Callable[[Path, str], str]) -> Path:
    """Write a run next to the earlier one, put its page in place, then remove the earlier one.

    A second run that writes here waits for the first, and then replaces it.

    Args:
        write: takes a folder and its final name, writes the files and returns the page.

    Returns:
        The path of the page.
    """
    data = out / DATA
    data.mkdir(parents=True, exist_ok=True)
    with _alone(data) as is_alone:
        if is_alone:  # so everything unfinished belongs to a killed run
            _clear_unfinished(out)
        earlier = list(data.iterdir())
        final = next(path for path in _names(data) if not path.exists())
        unfinished = data / f".{final.name}{UNFINISHED}"
        unfinished.mkdir()
        try:
            page = write(unfinished, final.name)
            _write_listing(unfinished, final.name)
            unfinished.rename(final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        write_atomically(out / PAGE, page.encode())
        for folder in earlier:
            _remove(folder, _written(folder))
        _remove_first_layout(out)
    return out / PAGE


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other run writes here; False if the system has no locks.

    A lock ends with its run.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _is_locked(handle)
    finally:
        os.close(handle)


def _is_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # some network folders have no locks
        return False
    return True


def _names(data: Path) -> Iterator[Path]:
    now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    yield data / now
    yield from (data / f"{now}-{number}" for number in count(2))


def _clear_unfinished(out: Path) -> None:
    """Remove what killed runs left: hidden files and folders, and empty folders."""
    for file in out.glob(f".{PAGE}.*{UNFINISHED}"):
        file.unlink()
    for folder in (out / DATA).iterdir():
        if re.fullmatch(rf"\.{NAME}{re.escape(UNFINISHED)}", folder.name):
            shutil.rmtree(folder)
        elif re.fullmatch(NAME, folder.name):
            _remove_empty(folder)


def _write_listing(folder: Path, name: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    content = {"run": name, "sha256": digests}
    write_atomically(folder / LISTING, json.dumps(content, indent=1).encode())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _written(folder: Path) -> list[str]:
    """The files that a run wrote into this folder; none if it is not a run's, but a copy."""
    listing = _read(folder)
    digests = listing.get("sha256")
    is_run = re.fullmatch(NAME, folder.name) and listing.get("run") == folder.name
    return [*digests] if is_run and isinstance(digests, dict) else []


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(folder: Path, files: Iterable[str]) -> None:
    """Remove these files, then empty folders and the listing.

    Files outside the folder stay.
    """
    paths = [folder / file for file in files]
    paths = [path for path in paths if path.parent.resolve().is_relative_to(folder.resolve())]
    for path in paths:
        if path.is_file() or path.is_symlink():
            path.unlink()
    for parent in sorted({path.parent for path in paths} - {folder}, reverse=True):
        _remove_empty(parent)
    if paths:
        (folder / LISTING).unlink(missing_ok=True)
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_first_layout(out: Path) -> None:
    """Remove files from before runs had folders.

    Then each prompt had a folder, and one listing named all files.
    """
    data = out / DATA
    listing = {n: f for n, f in _read(data).items() if isinstance(f, list) and Path(n).name == n}
    if not listing:
        return
    written = [f"{name}/{file}" for name, files in listing.items() for file in files]
    unfinished = [
        f"{name}/{path.name}"
        for name, files in listing.items()
        for path in (data / name).glob(".*.????????")  # a dot, the file's name, a dot, 8 letters
        if path.name[1:-9] in files
    ]
    _remove(data, [*written, *unfinished])
    places = [(data, ".writable"), (data, "..writable.????????"), (data, f".{LISTING}.????????")]
    places.append((out, f".{PAGE}.????????"))
    for file in [file for folder, pattern in places for file in folder.glob(pattern)]:
        file.unlink()
