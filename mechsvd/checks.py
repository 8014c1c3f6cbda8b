"""Checks of what the user passes, and warnings at the user's line."""

import difflib
import functools
import inspect
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from pathlib import Path
from types import FrameType, MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from mechsvd.ambient import plain

_SUBJECT = ContextVar("subject", default="")  # what the current warnings are about
_IS_QUIET = ContextVar("is_quiet", default=False)
Call = TypeVar("Call", bound=Callable[..., Any])
Number = int | float
LARGEST = 2**63 - 1  # whole number of a tensor
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# shape checks whose frames may come between the package and its user
_WRAPPERS = ("jaxtyping", "beartype")


def warn(message: str) -> None:
    """Warn at the line where the user called into the package, at any depth."""
    if _IS_QUIET.get():
        return
    frame: FrameType | None = sys._getframe()
    level = user_level = 1
    while frame:
        library = frame.f_globals.get("__name__", "").split(".")[0]
        if library == "mechsvd" or (library in _WRAPPERS and user_level == level):
            user_level = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{_SUBJECT.get()}{message}", stacklevel=user_level)


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Begin the warnings of a block with a subject, such as the prompt.

    With several prompts, each then gets its own warning.
    """
    token = _SUBJECT.set(f"{subject}: ")
    try:
        yield
    finally:
        _SUBJECT.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Do not warn in this block, where a caller makes on purpose what would be warned of."""
    token = _IS_QUIET.set(True)
    try:
        yield
    finally:
        _IS_QUIET.reset(token)


def single(value: Any) -> Any:
    """The Python number of a NumPy number or of a tensor without axes; anything else as it is."""
    is_number = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    if not is_number or (isinstance(value, Tensor) and (value.is_meta or value.requires_grad)):
        return value
    return value.item()


def is_whole(value: Any, least: Number = -math.inf, most: Number = math.inf) -> bool:
    """Whether a value is a whole number in a range, and of 64 bits; bools are none.

    Those of NumPy and tensors without axes are.
    """
    value = single(value)
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return is_integer and max(least, -(2**63)) <= int(value) <= min(most, LARGEST)


def require_whole(name: str, value: Any, least: int = 0, most: Number = math.inf) -> int:
    """Take an option as a whole number in a range.

    Raises:
        ValueError: anything else.
    """
    if not is_whole(value, least, most):
        is_open = most == math.inf and not (isinstance(value, Integral) and int(value) > LARGEST)
        numbers = f"of at least {least}" if is_open else f"from {least} to {min(most, LARGEST)}"
        raise ValueError(f"`{name}` is {value!r:.60}, but must be a whole number {numbers}.")
    return int(value)


def whole_numbers(name: str, numbers: Any) -> Tensor:
    """Take an option as a list of whole numbers, in a tensor on the CPU.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(numbers, Iterable) or getattr(numbers, "ndim", 1) == 0:
        raise TypeError(
            f"`{name}` must be a list of whole numbers, but is {type(numbers).__name__}."
        )
    listed = numbers if isinstance(numbers, Tensor | str) else [single(n) for n in numbers]
    if isinstance(listed, str) or (
        isinstance(listed, list) and any(isinstance(n, bool | str) for n in listed)
    ):
        raise ValueError(f"`{name}` must be a list of whole numbers, but is {numbers!r:.60}.")
    try:
        tensor = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):  # mixed, or too large
        tensor = torch.empty(0)
    if tensor.ndim != 1 or len(tensor) == 0 or tensor.dtype not in WHOLE:
        raise ValueError(
            f"`{name}` must be a non-empty list of whole numbers, but is {numbers!r:.60}."
        )
    return tensor.cpu().long()


def real_tensor(name: str, value: Any, axes: str) -> Tensor:
    """Take an option as a dense tensor of real numbers; arrays and lists of numbers become one.

    Raises:
        TypeError: anything else, such as complex or sparse values.
    """
    tensor = value
    if isinstance(value, np.ndarray | list | tuple):
        try:
            tensor = torch.tensor(np.array(value) if isinstance(value, np.ndarray) else value)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        what = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(
            f"`{name}` must be a tensor [{axes}], but is {type(value).__name__} {what:.60}."
        )
    if tensor.dtype not in FLOATS | WHOLE | {torch.bool}:
        raise TypeError(
            f"`{name}` must be a tensor [{axes}] of real numbers, but its dtype is {tensor.dtype}; "
            "turn it into float32."
        )
    return tensor


def file_path(name: str, path: Any) -> Path:
    """Take an option as a path, where ~ is the home folder and links are followed.

    What is written there goes into the file that a link names, and the link stays.

    Raises:
        TypeError, ValueError: no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`{name}` must be a path, but is {path!r:.60}.")
    if not (text := os.fsdecode(path)) or "\0" in text:
        raise ValueError(
            f"`{name}` is {text!r:.60}, which can be no path: give the name of a file."
        )
    try:
        found = Path(text).expanduser()
        return found.resolve() if found.is_symlink() else found
    except (OSError, RuntimeError) as error:  # links that go round, or no home
        raise ValueError(f"`{name}` is {text!r:.60}, which leads nowhere: {error}.") from error


def is_number(value: Any, least: Number = -math.inf) -> bool:
    """Whether a value is finite and at least `least`; bools are no numbers.

    Those of NumPy and tensors without axes are.
    """
    value = single(value)
    return (
        not isinstance(value, bool) and isinstance(value, Real) and least <= float(value) < math.inf
    )


def with_options(kind: type) -> Callable[[Call], Call]:
    """Refuse options that a call does not take, and name the closest that it takes.

    Args:
        kind: the TypedDict of the call's `**options`.
    """

    def decorate(call: Call) -> Call:
        parameters = inspect.signature(call).parameters.values()
        own_names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        known = [*own_names, *sorted(kind.__optional_keys__)]  # type: ignore[attr-defined]
        take = with_plain_arguments(call, kind.__annotations__)

        @functools.wraps(call)
        def checked(*args: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                    hint = (
                        f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known)}."
                    )
                    raise TypeError(f"`{call.__name__}` has no option `{name}`: {hint}")
                if name in own_names[: len(args)]:
                    raise TypeError(
                        f"`{name}` is given to `{call.__name__}` twice: by its place and by its "
                        "name; give it once."
                    )
            return take(*args, **options)

        return checked  # type: ignore[return-value]

    return decorate


def with_plain_arguments(call: Call, more: Mapping[str, Any] = MappingProxyType({})) -> Call:
    """Let a call take NumPy's numbers as Python's, and for on and off True and False only.

    Which arguments are numbers, and which on or off, is read from the annotations. The call
    computes the same whatever modes of torch its caller is in; see `plain_torch`.

    Args:
        more: annotations of the call's `**options`.
    """
    parameters = inspect.signature(call).parameters
    hints = {name: _parts(p.annotation) for name, p in parameters.items()}
    hints |= {name: _parts(hint) for name, hint in more.items()}
    numbers = {name: parts for name, parts in hints.items() if any(map(_is_of_numbers, parts))}
    names, call = [*parameters], plain(call)

    @functools.wraps(call)
    def taken(*args: Any, **options: Any) -> Any:
        args = tuple(
            _taken(name, value, numbers[name]) if name in numbers else value
            for name, value in itertools.zip_longest(names[: len(args)], args)
        )
        options = {
            name: _taken(name, value, numbers[name]) if name in numbers else value
            for name, value in options.items()
        }
        return call(*args, **options)

    return taken  # type: ignore[return-value]


def _parts(hint: Any) -> set[Any]:
    """The types that an annotation allows."""
    return {*get_args(hint)} if get_origin(hint) in (Union, UnionType) else {hint}


def _is_of_numbers(hint: Any) -> bool:
    """Whether an annotation is of a number, of on or off, or of several numbers."""
    return hint in (bool, int, float) or get_args(hint) in ((int,), (float,))


def _taken(name: str, value: Any, parts: set[Any]) -> Any:
    value = [single(v) for v in value] if type(value) is list else single(value)
    is_switch = bool in parts and parts <= {bool, NoneType}
    if is_switch and not isinstance(value, bool) and not (value is None and NoneType in parts):
        raise TypeError(f"`{name}` is {value!r:.40}, but must be True or False.")
    return value


def once(values: Any) -> Any:
    """Keep the values of a one-shot iterable, such as a generator, for a second pass.

    So it does where a dict holds some.
    """
    if isinstance(values, dict) and any(isinstance(value, Iterator) for value in values.values()):
        return {name: once(value) for name, value in values.items()}
    return tuple(values) if isinstance(values, Iterator) else values


def require_numbers(what: str, values: Tensor, use: str) -> Tensor:
    """Refuse NaN where numbers are compared, such as effects of edits that make a model overflow.

    Args:
        what: the values in words, each of which has a number of its own.
        use: what they are compared for.

    Raises:
        ValueError: naming the first of them.
    """
    if values.isnan().any():
        wrong = values.isnan().nonzero()[:, -1].unique().tolist()
        raise ValueError(
            f"{what} {wrong[:10]} {'is' if len(wrong) == 1 else 'are'} NaN, since the model "
            f"overflows under the edit, but {use} needs numbers; leave them out, or edit less."
        )
    return values
