"""Printed text on consoles whose encoding lacks some of its signs, such as cp1252 on Windows."""

import codecs
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

PLAIN = "mechsvd"  # the name of the handler of what an encoding lacks
SIGNS = str.maketrans(
    {
        "→": "->",
        "←": "<-",
        "–": "-",
        "—": "-",
        "−": "-",
        "‑": "-",
        "…": "...",
        "×": "x",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "·": "*",
        "‖": "||",
        "Δ": "Delta",
        "σ": "sigma",
        "λ": "lambda",
        "Σ": "Sum ",
        "√": "sqrt ",
        "°": " degrees",
        "±": "+-",
        "²": "^2",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "₀": "_0",
        "₁": "_1",
        "ᵀ": "^T",
        "⁻": "^-",
        "á": "a",
        "é": "e",
        "∞": "inf",
        "½": "1/2",
        "α": "alpha",
        "ε": "eps",
        "∈": " in ",
    }
)


def printable(text: str) -> str:
    """A text as the console can print it; what UTF-8 shows stays as it is."""
    encoding = getattr(sys.stdout, "encoding", None)
    if not encoding or text.isascii():
        return text
    with suppress(LookupError):  # an encoding of the user's own
        return text.encode(encoding, PLAIN).decode(encoding)
    return text


def prints(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """Let a printed form be one that the console can print."""

    @functools.wraps(show)
    def shown(self: Any) -> str:
        return printable(show(self))

    return shown


@contextmanager
def any_console() -> Iterator[None]:
    """Let all that is printed in this block replace what the console lacks."""
    streams = [one for one in (sys.stdout, sys.stderr) if hasattr(one, "reconfigure")]
    before = [one.errors for one in streams]
    try:
        for one in streams:
            one.reconfigure(errors=PLAIN)
        yield
    finally:
        for one, errors in zip(streams, before, strict=True):
            with suppress(ValueError):  # closed meanwhile
                one.reconfigure(errors=errors)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Signs by plain ones where there are such, and anything else by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(SIGNS)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(PLAIN, _replaced)
