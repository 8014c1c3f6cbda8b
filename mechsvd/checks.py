"""Checks of what the user passes, and warnings at the user's line."""

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

_SUBJECT = ContextVar("subject", default="")  # what the current warnings are about
_IS_QUIET = ContextVar("is_quiet", default=False)
Call = TypeVar("Call", bound=Callable[..., Any])
Number = int | float
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


def is_whole(value: Any, least: Number = -math.inf, most: Number = math.inf) -> bool:
    """Whether a value is a whole number in a range; numpy's integers count, bools do not."""
    return (
        not isinstance(value, bool) and isinstance(value, Integral) and least <= int(value) <= most
    )


def require_whole(name: str, value: Any, least: int = 0, most: Number = math.inf) -> int:
    """Take an option as a whole number in a range.

    Raises:
        ValueError: anything else.
    """
    if not is_whole(value, least, most):
        numbers = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` is {value!r:.60}, but must be a whole number {numbers}.")
    return int(value)


def whole_numbers(name: str, numbers: Any) -> Tensor:
    """Take an option as a list of whole numbers, in a tensor on the CPU.

    Raises:
        TypeError, ValueError: anything else.
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
    """Whether a value is finite and at least `least`; numpy's numbers count, bools do not."""
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
            return call(*args, **options)

        return checked  # type: ignore[return-value]

    return decorate


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
