"""Calls that go on where they stopped: every finished batch of their loops is kept in a file."""

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from mechsvd.ambient import plain_torch
from mechsvd.checks import once, with_options
from mechsvd.engine.checkpoint import CheckpointFile, describe, open_checkpoint
from mechsvd.engine.memory import memory_in_words
from mechsvd.engine.processes import one_voice, own_file
from mechsvd.model.identity import provenance_of
from mechsvd.packing import pack
from mechsvd.results import Provenance, Result, result

Call = TypeVar("Call", bound=Callable[..., Any])
LARGEST = 2**28  # bytes of all kept batches; beyond it, batches are not kept and run again


@result
class Loop(Result):
    """The finished batches of one loop over rows.

    Attributes:
        rows: which rows it runs over, as a digest.
        size: rows per batch at its start, which depends on free memory.
        counts: rows of each finished batch.
        parts: what each gave.
        device: where tensors lay.
    """

    rows: str
    size: int
    counts: tuple[int, ...]
    parts: tuple[Any, ...]
    device: str = "cpu"
    source: Provenance | None = None

    def to_pandas(self) -> Any:
        """One row per batch: its number of rows."""
        import pandas as pd

        return pd.DataFrame({"rows": list(self.counts)})

    def __repr__(self) -> str:
        return f"Loop: {sum(self.counts)} rows in {len(self.counts)} batches\n  {self.rows}"


@result
class Loops(Result):
    """The loops of a call, in order."""

    loops: tuple[Loop, ...]
    source: Provenance | None = None

    def to_pandas(self) -> Any:
        """One row per loop: rows and batches that are done."""
        import pandas as pd

        done = [(sum(loop.counts), len(loop.counts)) for loop in self.loops]
        return pd.DataFrame(done, columns=["rows", "batches"])

    def __repr__(self) -> str:
        return f"Loops: {len(self.loops)} loops of a call\n  on {self._origin()}"


@dataclass
class Kept:
    """The batches of one loop, as they come."""

    journal: "Journal"
    rows: str
    size: int
    counts: list[int] = field(default_factory=list)
    parts: list[Any] = field(default_factory=list)
    device: str = "cpu"

    def add(self, count: int, part: Any) -> None:
        """Keep one more batch, and save where it is time to."""
        self.counts.append(count)
        self.parts.append(part)
        self.journal.grew(part)

    def as_loop(self) -> Loop:
        """What is saved of it."""
        device = next((str(t.device) for part in self.parts for t in _tensors(part)), "cpu")
        return Loop(self.rows, self.size, tuple(self.counts), tuple(self.parts), device)


class Journal:
    """The kept batches of a call; see `runs_model`."""

    def __init__(self, file: CheckpointFile, saved: Loops | None) -> None:
        self._file, self._saved = file, [*saved.loops] if saved else []
        self._loops: list[Kept] = []
        self._bytes, self._is_new = 0, False

    def loop(self, rows: Tensor, size: int) -> Kept:
        """The next loop of the call, with the batches that an earlier run finished.

        Raises:
            ValueError: the earlier run went over other rows, so it was another call.
        """
        place, digest = len(self._loops), describe_value(rows)
        kept = Kept(self, digest, size)
        if place < len(self._saved):
            saved = self._saved[place]
            if saved.rows != digest:
                raise ValueError(
                    f"The checkpoint's loop {place} ran over {saved.rows}, and this one over "
                    f"{digest}: it is of another call. Give another path."
                )
            parts = [_moved(part, saved.device) for part in saved.parts]
            kept = Kept(self, digest, saved.size, [*saved.counts], parts)
            self._bytes += sum(_size(part) for part in parts)
        self._loops.append(kept)
        return kept

    def grew(self, part: Any) -> None:
        """Note a new batch; save if it is time to."""
        self._bytes, self._is_new = self._bytes + _size(part), True
        if self._file.is_due():
            self.save()

    def save(self) -> None:
        """Write everything that is kept, if anything is new."""
        if not self._is_new or self._bytes > LARGEST:
            return
        loops = [kept.as_loop() for kept in self._loops]
        loops += self._saved[len(loops) :]  # of a run that came further
        self._file.save(Loops(tuple(loops)))
        self._is_new = False


_JOURNAL: ContextVar[Journal | None] = ContextVar("journal", default=None)


def kept_loop(rows: Tensor, size: int) -> Kept | None:
    """The next loop of the call that has a checkpoint; None without one."""
    journal = _JOURNAL.get()
    return None if journal is None else journal.loop(rows, size)


def runs_model(kind: type) -> Callable[[Call], Call]:
    """Make a function a call that runs a model: it knows its options, and may have a checkpoint.

    Arguments that can be read once, such as generators, become tuples.

    With `checkpoint=path`, the outermost call keeps the finished batches of all loops in a file.
    The same call later takes them from there and goes on. Within it, others need no file. Each of
    several processes has its own.

    Args:
        kind: the TypedDict of its options; see `with_options`.
    """

    def decorate(call: Call) -> Call:
        signature = inspect.signature(call)

        @functools.wraps(call)
        def run(*args: Any, **options: Any) -> Any:
            path = options.pop("checkpoint", None)
            args = tuple(map(once, args))
            options = {name: once(value) for name, value in options.items()}
            with plain_torch(), one_voice(), memory_in_words(call.__name__):
                if path is None or _JOURNAL.get() is not None:
                    return call(*args, **options)
                return _run_with(path, call, signature.bind(*args, **options))

        return with_options(kind)(cast(Call, run))

    return decorate


def _run_with(path: Any, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    given = dict(bound.arguments)
    model, options = given.pop("model"), given.pop("options", {})
    given |= {k: v for k, v in options.items() if k != "progress"}
    with keeping(path, call.__name__, given, provenance_of(model)):
        return call(*bound.args, **bound.kwargs)


@contextmanager
def keeping(
    path: Any, call: str, arguments: Mapping[str, Any], source: Provenance
) -> Iterator[None]:
    """Keep the finished batches of all loops of this block, and take those of an earlier run.

    Args:
        path: of the file; of several processes each has its own, see `own_file`.
        call, arguments, source: what the batches depend on.

    Raises:
        ValueError: the file holds the batches of another call.
        OSError, RuntimeError: as `open_checkpoint`.
    """
    described = {name: describe_value(value) for name, value in arguments.items()}
    with open_checkpoint(own_file(path)) as file:
        saved = file.resume(describe(call, described, source))
        journal = Journal(file, cast("Loops | None", saved.state))
        token = _JOURNAL.set(journal)
        try:
            yield
        finally:
            _JOURNAL.reset(token)
            with suppress(OSError):  # the first error counts
                journal.save()


def describe_value(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """An argument as JSON that differs where the argument does: large ones as a digest.

    A function is described by its code and by the values that it holds, but not by globals.

    Args:
        inside: the objects that hold this one, by their id: one that holds itself ends there.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return describe_value(torch.as_tensor(value))
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.tobytes()).hexdigest()[:12]
        return f"a tensor {list(value.shape)} of {value.dtype} ({digest})"
    if id(value) in inside:
        return "itself"
    describe = functools.partial(describe_value, inside=(*inside, id(value)))
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, slice):
        return {"slice": [describe(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, set | frozenset):
        return {"set": sorted(repr(describe(item)) for item in value)}
    if isinstance(value, list | tuple | range):
        described = [describe(item) for item in value]
        is_short = len(repr(described)) < 200
        return described if is_short else f"{len(described)} items ({_digest(described)})"
    if isinstance(value, Result):
        body, tensors = pack(value)
        digests = [body, *(describe(tensor) for tensor in tensors.values())]
        return f"{type(value).__name__} ({_digest(digests)})"
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: describe(vars(value))}
    if (parts := _parts(value)) is not None:
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{name} ({_digest(describe(parts))})"
    # an address differs in each run
    return getattr(value, "__qualname__", None) or re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _parts(value: Any) -> Any:
    """What makes a function or an object what it is; None for a class, or what has no parts."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        function = inspect.unwrap(value)
        held = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        return [function.__code__, held, function.__defaults__, function.__kwdefaults__]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, value.co_consts]
    if isinstance(value, nn.Module):
        return value.state_dict()
    is_object = not isinstance(value, type | ModuleType) and hasattr(value, "__dict__")
    return vars(value) if is_object else None


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a function that is still being defined
        return False


def _digest(described: Any) -> str:
    return hashlib.sha256(repr(described).encode()).hexdigest()[:12]


def _tensors(part: Any) -> list[Tensor]:
    """The tensors of a batch, at the top or in tuples."""
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, list | tuple):
        return [tensor for item in part for tensor in _tensors(item)]
    if is_dataclass(part):
        return [tensor for item in vars(part).values() for tensor in _tensors(item)]
    return []


def _size(part: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(part))


def _moved(part: Any, device: str) -> Any:
    """Tensors at the top or in tuples, on their device again; results stay on the CPU."""
    if isinstance(part, Tensor):
        return part.to(device)
    return tuple(_moved(item, device) for item in part) if isinstance(part, tuple) else part
