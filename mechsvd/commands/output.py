"""What a command writes, in the form that the name of the file asks for."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechsvd.results import write_atomically

ENDINGS = (".csv", ".html", ".safetensors")


def require_free(
    options: argparse.Namespace, name: str = "", endings: Sequence[str] = ENDINGS
) -> None:
    """Refuse a place for --out that cannot be written, is taken, or is what the command reads.

    It is called before anything long runs.

    Args:
        name: of the files in a folder; "" where there is no folder.
        endings: that --out may have.

    Raises:
        ValueError, OSError: says what to do.
    """
    out: Path | None = options.out
    if out is None:
        return
    if out.suffix not in (*endings, *([""] if name else [])):
        or_folder = ", or be a folder for all three" if name else ""
        raise ValueError(f"--out is {out}, but must end in {', '.join(endings)}{or_folder}.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {out.parent} for --out; create it first.")
    if out.exists() and out.is_dir() != (not out.suffix):
        kinds = ("folder", "file") if out.suffix else ("file", "folder")
        raise FileExistsError(
            f"--out is {out}, a {kinds[0]}, but must be a {kinds[1]}; give another --out."
        )
    if out.exists() and not options.replace:
        raise FileExistsError(f"{out} is there already; give another --out, or --replace.")
    if not os.access(out if out.is_dir() else out.absolute().parent, os.W_OK):
        raise PermissionError(f"--out is {out}, where nothing may be written; give another --out.")
    _require_no_input(options, _files(out, name))


def _require_no_input(options: argparse.Namespace, written: Sequence[Path]) -> None:
    """Refuse to write over a file that the command reads, under whatever name."""
    for option in ("texts", "prompts", "svd", "model"):
        read = getattr(options, option, None)
        if read is None or not os.path.exists(read):
            continue
        for path in written:
            if path.exists() and os.path.samefile(path, read):
                raise FileExistsError(
                    f"{path} is what the command reads ({read}), and --out would write over it; "
                    "give another --out."
                )


def _files(out: Path, name: str) -> list[Path]:
    return [out] if out.suffix else [out / f"{name}{ending}" for ending in ENDINGS]


def write(out: Path | None, name: str, result: Any, draw: Callable[[], str]) -> None:
    """Write a result as a table, a page, a file to load again, or all three into a folder.

    Args:
        name: of the files in a folder.
        draw: makes the page.
    """
    from mechsvd.report.tables import as_csv  # brings plotly along

    if out is None:
        return
    if not out.suffix:
        out.mkdir(exist_ok=True)
    for path in _files(out, name):
        if path.suffix == ".safetensors":
            result.save(path)
        else:
            content = as_csv(result.to_pandas()) if path.suffix == ".csv" else draw().encode()
            write_atomically(path, content)
        print(path)


@contextmanager
def kept_beside(out: Path | None, goes_on: bool = False) -> Iterator[Path | None]:
    """The file that keeps what is done until a command ends; None if it writes nothing.

    Where the arguments are wrong, the corrected command is another one, so nothing new is kept.

    Args:
        goes_on: it may take what is kept all the same, as with a corpus mended further on.
    """
    if out is None:
        yield None
        return
    kept = out.with_name(f"{out.name}.unfinished")
    if is_old := kept.exists():
        print(f"Going on from {kept}, which a run that was stopped left.", flush=True)
    try:
        yield kept
    except (ValueError, TypeError, KeyError):
        if not is_old and not goes_on:
            kept.unlink(missing_ok=True)
        raise
    kept.unlink(missing_ok=True)
