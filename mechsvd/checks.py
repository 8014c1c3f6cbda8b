"""Checks and warnings at every door."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

_SUBJECT = ContextVar("subject", default="")  # what the warnings of the moment are about
_WRAPPERS = ("jaxtyping", "beartype")  # shape checks that may stand between the package and its user


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


def once(values: Any) -> Any:
    """Keep the values of a generator or another one-shot iterable, so that a second pass finds them too."""
    return tuple(values) if isinstance(values, Iterator) else values
