"""Checkpoints: what a long run has done so far, in a file from which the same call goes on."""

import glob
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from mechsvd.checks import file_path, warn
from mechsvd.results import UNFINISHED, Provenance, Result, load_result, result

try:
    import fcntl
except ImportError:  # Windows: two processes are not told apart there
    fcntl = None  # type: ignore[assignment]

SHARE_OF_TIME = 0.1  # that saving may take


@result
class Checkpoint(Result):
    """How far a call has come.

    Attributes:
        call: the function's name.
        arguments: what the state depends on, by name, as JSON.
        source: the model and the sites.
        state: what the call needs to go on; None before the first one.
        is_finished: whether the state is the whole result.

    Example:
        >>> ranking = ms.rank_directions(model, task, svd, checkpoint="ranking.run")
        >>> ms.load("ranking.run").call
        'rank_directions'
    """

    call: str
    arguments: tuple[tuple[str, str], ...]
    source: Provenance
    state: Result | None = None
    is_finished: bool = False

    def to_pandas(self) -> Any:
        """One row per argument."""
        import pandas as pd

        return pd.DataFrame(self.arguments, columns=["argument", "value"])

    def differences(self, other: "Checkpoint") -> list[str]:
        """List how the calls of two checkpoints differ; if empty, one can go on from the other."""
        own, others = dict(self.arguments), dict(other.arguments)
        names = [*own, *(name for name in others if name not in own)]
        changes = [
            f"`{name}` is {own.get(name, 'not given')}, but was {others.get(name, 'not given')}"
            for name in names
            if own.get(name) != others.get(name)
        ]
        if self.call != other.call:
            changes.insert(0, f"the call is `{self.call}`, but was `{other.call}`")
        for what, mine, theirs in (
            ("sites", self.source.hooks, other.source.hooks),
            ("notes", self.source.notes, other.source.notes),
        ):
            if mine != theirs:
                changes.append(f"{_listed(mine, what)}, but there were {_listed(theirs, what)}")
        return [*changes, *self.source.differences(other.source)]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments)
        begun = "not begun" if self.state is None else "not finished"
        how_far = "finished" if self.is_finished else begun
        return f"Checkpoint of `{self.call}`, {how_far}\n  {arguments}\n  on {self._origin()}"


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a call with a checkpoint, and where it keeps what is done.

    Attributes:
        path: of the file; there is none if nothing was done yet.
    """

    def __init__(self, path: Path) -> None:
        kept = f"what is done is kept in {path}" if path.exists() else "nothing was done yet"
        super().__init__(f"stopped; {kept}")
        self.path = path


class CheckpointFile:
    """The file of a checkpoint, held by this process alone; see `open_checkpoint`."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._next = path, 0.0
        self._call: Checkpoint | None = None

    def resume(self, call: Checkpoint) -> Checkpoint:
        """What the file holds of this call; the call itself, without a state, if there is no file.

        Raises:
            ValueError: the file holds another call, naming each difference, or is no checkpoint.
        """
        if self._path is None or not self._path.exists():
            self._call = call
            return call
        try:
            saved = load_result(Checkpoint, self._path)
        except ValueError as error:
            raise ValueError(f"{error} Delete the file, or give another path.") from error
        if changes := call.differences(saved):
            raise ValueError(
                f"{self._path} is the checkpoint of another call: {'; '.join(changes)}. "
                "Give the same arguments and model, or another path, or delete the file."
            )
        self._call = call
        return saved

    def is_due(self) -> bool:
        """Whether to save now: saving takes at most a tenth of the time."""
        return self._path is not None and time.monotonic() >= self._next

    def save(self, state: Result, is_finished: bool = False) -> None:
        """Put a state of the resumed call into the file, whole or not at all."""
        if self._path is None or self._call is None:
            return
        started = time.monotonic()
        replace(self._call, state=state, is_finished=is_finished).save(self._path)
        ended = time.monotonic()
        self._next = ended + (ended - started) * (1 / SHARE_OF_TIME - 1)


def describe(call: str, arguments: Mapping[str, Any], source: Provenance) -> Checkpoint:
    """Describe a call by what its state depends on: values that JSON can hold."""
    packed = tuple((name, json.dumps(value)) for name, value in arguments.items())
    return Checkpoint(call, packed, source)


@contextmanager
def open_checkpoint(path: str | os.PathLike[str] | None) -> Iterator[CheckpointFile]:
    """Open the file of a checkpoint, before anything runs, and lock it until the block ends.

    The lock is on a hidden file beside it; of a link, beside the file that it names. The system
    frees it when the process ends in any way.

    Args:
        path: None for no checkpoint.

    Raises:
        TypeError: not a path.
        FileNotFoundError, OSError: the folder is missing or read-only.
        RuntimeError: another process holds it.
        Stopped: Ctrl-C in the block.
    """
    if path is None:
        yield CheckpointFile(None)
        return
    target = file_path("checkpoint", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot keep the checkpoint {target}: the folder {target.parent} does not exist; "
            "create it first."
        )
    if target.is_dir():
        raise IsADirectoryError(f"`checkpoint` must be a file, but {target} is a folder.")
    with locked(target):
        for rest in target.parent.glob(f".{glob.escape(target.name)}.*{UNFINISHED}"):
            rest.unlink(missing_ok=True)  # of a process that was killed while it wrote
        try:
            yield CheckpointFile(target)
        except KeyboardInterrupt:
            raise Stopped(target) from None  # without the traceback of all that was running


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a checkpoint against other processes, by a hidden file beside it.

    Raises:
        RuntimeError: another process holds it.
        OSError: its folder is read-only.
    """
    side = target.absolute().with_name(f".{target.name}.lock")
    file = _lock(side, target)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps open files
            side.unlink()  # before it is freed, so that nobody else holds it
        file.close()


def _lock(side: Path, target: Path) -> IO[str]:
    while True:
        try:
            file = open(side, "a+", encoding="utf-8")  # noqa: SIM115 (the lock lasts as long as the file is open)
        except OSError as error:
            raise type(error)(f"Cannot keep the checkpoint {target}: {error}.") from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise RuntimeError(
                f"The checkpoint {target} is in use by another run (process {owner or 'unknown'}); "
                "wait for it, or give another path."
            ) from error
        except OSError as error:
            warn(f"{side.parent} cannot lock files ({error}): no other run may use {target.name}.")
        if _is_at(file, side):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()  # its owner removed it in between: once more


def _is_at(file: IO[str], side: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(side))
    except FileNotFoundError:
        return False


def _listed(names: tuple[str, ...], what: str) -> str:
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what} ({few})" if names else f"no {what}"
