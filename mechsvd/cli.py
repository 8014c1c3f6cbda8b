"""The command line: its parser, and how its notes, errors and interruptions read.

What each command does is in `commands/`.
"""

import argparse
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from mechsvd.commands.directions import add_describe, add_fold, add_stream, add_sweep
from mechsvd.commands.doctor import add_doctor
from mechsvd.commands.studies import add_literature, add_reproduce
from mechsvd.commands.wording import in_flags
from mechsvd.consoles import any_console
from mechsvd.engine.checkpoint import Stopped
from mechsvd.version import __version__

ERRORS = (ValueError, KeyError, TypeError, OSError, ImportError, MemoryError, RuntimeError)
COMMANDS = (
    add_reproduce,
    add_sweep,
    add_describe,
    add_fold,
    add_stream,
    add_literature,
    add_doctor,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 after an error, which is printed in one line; 130 after Ctrl-C.
    """
    with any_console():
        return _main(sys.argv[1:] if arguments is None else [*arguments])


def _main(typed: Sequence[str]) -> int:
    options = _parser().parse_args(typed)
    with _notes(options):
        try:
            options.run(options)
        except ERRORS as error:
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            print(f"mechsvd: {in_flags(str(message), options)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            print(_stopped(stop, typed), file=sys.stderr)
            return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mechsvd", description="What a transformer writes to its residual stream."
    )
    parser.add_argument("--version", action="version", version=f"mechsvd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser


_FOR_AUTHORS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def _stopped(stop: KeyboardInterrupt, typed: Sequence[str]) -> str:
    """Two lines: what is kept, and how to go on."""
    start = "\r" if sys.stderr.isatty() else ""  # over the ^C of the terminal
    command = shlex.join(["mechsvd", *typed])
    if isinstance(stop, Stopped) and stop.path.exists():
        size = stop.path.stat().st_size / 2**10
        return (
            f"{start}mechsvd: stopped. What is done is kept in {stop.path} ({size:,.0f} KiB).\n"
            f"Go on with: {command}"
        )
    return f"{start}mechsvd: stopped. Nothing is kept.\nBegin again with: {command}"


@contextmanager
def _notes(options: argparse.Namespace) -> Iterator[None]:
    """Print each warning as one note, in the words of the command line, above a progress bar."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, _FOR_AUTHORS):  # of the libraries below, not for who runs a command
            return
        tqdm.write(f"mechsvd: note: {in_flags(str(message), options)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
