"""Checks and warnings at every door."""

import difflib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

_SUBJECT = ContextVar("subject", default="")  # what the warnings of the moment are about
Call = TypeVar("Call", bound=Callable[..., Any])
Number = int | float
_WRAPPERS = (
    "jaxtyping",
    "beartype",
)  # shape checks that may stand between the package and its user


def warn(message: str) -> None:
    """Warn at the user's line: the one that called into the package, however deep this is."""
    frame: FrameType | None = sys._getframe()
    level = users = 1
    while frame:
        library = frame.f_globals.get("__name__", "").split(".")[0]
        if library == "mechsvd" or (library in _WRAPPERS and users == level):
            users = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{_SUBJECT.get()}{message}", stacklevel=users)


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Begin the warnings of a block with their subject, such as one of several prompts, so that each has its own."""
    token = _SUBJECT.set(f"{subject}: ")
    try:
        yield
    finally:
        _SUBJECT.reset(token)


def is_whole(value: Any, least: Number = -math.inf, most: Number = math.inf) -> bool:
    """Whether a value is a whole number in a range; numpy's count, and bools do not."""
    return (
        not isinstance(value, bool) and isinstance(value, Integral) and least <= int(value) <= most
    )


def require_whole(name: str, value: Any, least: int = 0, most: Number = math.inf) -> int:
    """Take an option as a whole number in a range.

    Raises:
        ValueError: something else.
    """
    if not is_whole(value, least, most):
        numbers = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` is {value!r:.60}, but must be a whole number {numbers}.")
    return int(value)


def whole_numbers(name: str, numbers: Any) -> Tensor:
    """Take an option as a list of whole numbers, in a tensor on the CPU.

    Raises:
        TypeError, ValueError: something else.
    """
    if not isinstance(numbers, Iterable):
        raise TypeError(
            f"`{name}` must be a list of whole numbers, but is {type(numbers).__name__}."
        )
    listed = numbers if isinstance(numbers, Tensor | str) else [*numbers]
    if isinstance(listed, str) or (
        isinstance(listed, list) and any(isinstance(n, bool | str) for n in listed)
    ):
        raise ValueError(f"`{name}` must be a list of whole numbers, but is {numbers!r:.60}.")
    tensor = torch.as_tensor(listed)
    if (
        tensor.ndim != 1
        or len(tensor) == 0
        or tensor.is_floating_point()
        or tensor.dtype == torch.bool
    ):
        raise ValueError(
            f"`{name}` must be a non-empty list of whole numbers, but is {numbers!r:.60}."
        )
    return tensor.cpu().long()


def is_number(value: Any, least: Number = -math.inf) -> bool:
    """Whether a value is a finite number of at least `least`; numpy's count, and bools do not."""
    return (
        not isinstance(value, bool) and isinstance(value, Real) and least <= float(value) < math.inf
    )


def with_options(kind: type) -> Callable[[Call], Call]:
    """Refuse options that a call does not take, in the name of the call, with the closest that it takes.

    Args:
        kind: the TypedDict of the call's `**options`.
    """

    def decorate(call: Call) -> Call:
        parameters = inspect.signature(call).parameters.values()
        own = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        known = [*own, *sorted(kind.__optional_keys__)]  # type: ignore[attr-defined]

        @functools.wraps(call)
        def checked(*args: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                    hint = (
                        f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known)}."
                    )
                    raise TypeError(f"`{call.__name__}` has no option `{name}`: {hint}")
                if name in own[: len(args)]:
                    raise TypeError(
                        f"`{name}` is given to `{call.__name__}` twice: by its place and by its name; give it once."
                    )
            return call(*args, **options)

        return checked  # type: ignore[return-value]

    return decorate


def once(values: Any) -> Any:
    """Keep the values of a generator or another one-shot iterable, so that a second pass finds them too."""
    return tuple(values) if isinstance(values, Iterator) else values
