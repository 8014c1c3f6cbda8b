"""Results that know their origin, and save as one safetensors file with a JSON header.

A result is a frozen dataclass of tensors, numbers, text and other results.
`Result` gives it `.save` and `.load`.
"""

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, no_type_check

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from mechsvd.ambient import plain
from mechsvd.checks import file_path
from mechsvd.consoles import prints
from mechsvd.fields import named, require_declared
from mechsvd.packing import pack, unpack
from mechsvd.version import __version__

FORMAT = 1
UNFINISHED = ".mechsvd"  # suffix of the hidden names of unfinished files
T = TypeVar("T")
R = TypeVar("R", bound="Result")
_CLASSES: dict[str, type] = {}


@dataclass_transform(frozen_default=True)
def result(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that `save_result` and `load_result` know by its name.

    Its constructor refuses values that the annotations do not declare. A class with its own
    `__post_init__` must call `require_declared` there. Checks that read whole tensors belong in
    `_require_values`, which `load_result` calls.
    """
    if not hasattr(cls, "__post_init__"):
        cls.__post_init__ = require_declared  # type: ignore[attr-defined]
    for name, value in {**vars(cls)}.items():  # of every method: the same in any mode of torch
        if isinstance(value, FunctionType):
            setattr(cls, name, plain(value))
        elif isinstance(value, property) and value.fget is not None:
            setattr(cls, name, property(plain(value.fget), doc=value.__doc__))
    cls = dataclass(frozen=True, eq=False, repr=cls.__repr__ is object.__repr__)(cls)
    if "__repr__" in cls.__dict__:
        cls.__repr__ = prints(cls.__repr__)  # type: ignore[method-assign]
    if "__str__" in cls.__dict__:
        cls.__str__ = prints(cls.__str__)  # type: ignore[method-assign]
    no_type_check(cls.__init__)  # else the tests' shape checks raise first, with other messages
    _CLASSES[cls.__name__] = cls
    return cls


class Result:
    """Save, load and name the model: what every result can do."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as one safetensors file; see `save_result`."""
        save_result(self, path)

    def to(self: R, device: torch.device | str) -> R:
        """The same result with all of its tensors on a device."""
        return _moved(self, device)

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """Load what `save` wrote; see `load_result`."""
        return load_result(cls, path)

    def _origin(self, unknown: str = "an unnamed model") -> str:
        """The name of the model, for the last line of a printed result."""
        source = getattr(self, "source", None)
        return source.model if source else unknown


class OverTexts(Result):
    """The results of one call on several texts: what all such results can do.

    Attributes:
        parts: one result per text, in the order of the texts.
    """

    parts: tuple[Any, ...]

    def __getitem__(self, text: int) -> Any:
        """The result of one text."""
        return self.parts[text]

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.parts)

    @property
    def source(self) -> "Provenance | None":
        """The model and the first text."""
        return self.parts[0].source if self.parts else None

    def to_pandas(self) -> Any:
        """One table: the first column is `task`, the number of the text, then those of a part."""
        import pandas as pd

        tables = [part.to_pandas() for part in self.parts]
        for number, table in enumerate(tables):
            table.insert(0, "task", number)
        return pd.concat(tables, ignore_index=True)

    def __repr__(self) -> str:
        first, *rest = repr(self.parts[0]).splitlines() if self.parts else ["nothing"]
        return "\n".join([f"{len(self)} texts; the first: {first}", *rest])


@result
class Provenance:
    """Which model, in which state, produced a result.

    Example:
        >>> svd.source.model, svd.source.processing
        ('mechsvd embedded', 'raw')
    """

    model: str
    weights: str  # a fingerprint of the parameters, not of the name
    processing: str  # "raw", or what TransformerLens did to the weights: it changes the SVD
    dtype: str
    transformer_lens: str
    mechsvd: str
    tokens: tuple[tuple[int, ...], ...] = ()
    hooks: tuple[str, ...] = ()
    seed: int | None = None
    notes: tuple[str, ...] = ()  # what was skipped on request, and other hooks on the model

    def differences(self, other: "Provenance") -> list[str]:
        """List how two models differ; if the list is empty, their results can be combined."""
        names = ("weights", "processing", "dtype")
        own_model, other_model = (f"{p.model}" for p in (self, other))
        return [
            f"{name}: {getattr(self, name)} ({own_model}) "
            f"and {getattr(other, name)} ({other_model})"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def require_same_model(first: Provenance | None, second: Provenance | None, what: str) -> None:
    """Refuse to combine results of different models, weights or processing states.

    Args:
        first, second: None, for results made from bare tensors, cannot be checked and passes.
        what: the sentence's subject, such as "the basis and the model".

    Raises:
        ValueError: naming every difference.
    """
    if first is None or second is None:
        return
    if different := first.differences(second):
        raise ValueError(
            f"{what} come from different models or processing states: {'; '.join(different)}. "
            "Directions of one need not mean anything in the other: collect the writes again with "
            "this model. If the two share their directions, as a model and its fine-tune may, "
            "`same_model=False` lets calls that run a model go on, and the result records it."
        )


def require_kind(value: Any, kind: type) -> None:
    """Refuse a result of the wrong kind.

    Raises:
        TypeError: naming the kind that is needed.
    """
    if not isinstance(value, kind):
        needed, shown = named(kind.__name__), " ".join(repr(value).split())
        raise TypeError(
            f"{needed[0].upper()}{needed[1:]} is needed here, "
            f"but this is {type(value).__name__} {shown!r:.50}."
        )


def save_result(self: Any, path: str | os.PathLike[str]) -> None:
    """Save a result as one safetensors file.

    Everything that is not a tensor goes into the header as JSON, with a SHA-256 over both.
    The file is written under a temporary name and then moved: if this fails, an existing file
    stays whole.

    Raises:
        FileNotFoundError, OSError: the folder is missing, read-only or full.
    """
    from safetensors.torch import save

    body, tensors = pack(self)
    metadata = {
        "mechsvd": body,
        "version": __version__,
        "format": str(FORMAT),
        "sha256": _digest(body, tensors),
    }
    write_atomically(path, save(tensors, metadata=metadata))


def load_result(cls: type[T], path: str | os.PathLike[str]) -> T:
    """Load what `.save` wrote, and check its types, shapes and values.

    Raises:
        ValueError: the file is of another kind, truncated or damaged, holds another class or
            impossible values, or has a newer format.
        FileNotFoundError: there is no such file.
    """
    metadata, tensors = _read(file_path("path", path))
    _require_format(path, metadata)
    if _digest(metadata["mechsvd"], tensors) != metadata["sha256"]:
        raise ValueError(
            f"{path} is damaged: its contents do not match the SHA-256 in its header. "
            "Nothing was loaded."
        )
    try:
        value = unpack(metadata["mechsvd"], tensors, _CLASSES)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = _in_words(error).rstrip(".")
        raise ValueError(
            f"{path}, of mechsvd {metadata['version']}, cannot be used: {reason}. "
            "Nothing was loaded."
        ) from error
    if not isinstance(value, cls):
        class_name = type(value).__name__
        raise ValueError(
            f"{path} holds {named(class_name)}, not {named(cls.__name__)}; call {class_name}.load."
        )
    return value


@plain
def load(path: str | os.PathLike[str]) -> Any:
    """Load any result of mechsvd, of the class that the file names.

    Raises:
        ValueError, FileNotFoundError: as the `load` of a result.

    Example:
        >>> svd.save("svd.safetensors")
        >>> ms.load("svd.safetensors").rank
        128
    """
    return load_result(object, path)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, Result):
        moved = {f.name: _moved(getattr(value, f.name), device) for f in fields(value)}  # type: ignore[arg-type]
        return replace(value, **moved)  # type: ignore[type-var]
    return value


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write the whole file or nothing: temporary name, fsync, replace.

    Raises:
        FileNotFoundError, OSError: the folder is missing, read-only or full; the message names it.
    """
    target = file_path("path", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {target}: the folder {target.parent} does not exist; create it first."
        )
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED, delete=False
    ) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            give_usual_rights(Path(file.name))
            os.replace(file.name, target)
        except BaseException as error:
            Path(file.name).unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = str(target)  # so that its message says where
            raise


def with_notes(provenance: Provenance, *notes: str) -> Provenance:
    """Return a copy with more notes on how the result was made."""
    return replace(provenance, notes=(*provenance.notes, *notes))


def give_usual_rights(path: Path) -> None:
    """Let others read a file that was made under a temporary name, as any new file."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    with open(path, "rb") as file:
        head = file.read(9)
    is_foreign = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x93N")
    if is_foreign and head[8:] != b"{":  # a safetensors header of 640 bytes begins like a pickle
        raise ValueError(
            f"{path} looks like a pickle, .pt or .npy file, which mechsvd never opens; "
            "results are safetensors only."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 (not a dict)
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file: {error}. Nothing was loaded."
        ) from error
    if missing := {"mechsvd", "version", "format", "sha256"} - metadata.keys():
        raise ValueError(
            f"{path} is a safetensors file, but not a result of mechsvd: "
            f"its header lacks {sorted(missing)}."
        )
    return metadata, tensors


def _require_format(path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    file_format, version = metadata["format"], metadata["version"]
    if not re.fullmatch("[1-9][0-9]*", file_format):
        raise ValueError(
            f"{path} is damaged: its format is {file_format!r:.20}, but must be a whole number. "
            "Nothing was loaded."
        )
    if file_format not in map(str, range(1, FORMAT + 1)):
        raise ValueError(
            f"{path} was written by mechsvd {version} in format {file_format:.20}, "
            f"but this version reads up to format {FORMAT}; update mechsvd."
        )


def _in_words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its header is nested too deeply"
    return (
        str(error)
        if isinstance(error, TypeError | ValueError)
        else "a number in its header is too large"
    )


def _digest(body: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(body.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
    return sha.hexdigest()
