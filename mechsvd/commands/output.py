"""What a command writes, in the form that the name of the file asks for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechsvd.results import write_atomically

ENDINGS = (".csv", ".html", ".safetensors")


def require_free(out: Path | None, replace: bool) -> None:
    """Refuse an ending that says nothing, a missing folder, and a place that is taken.

    It is called before anything long runs.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: says what to do.
    """
    if out is None:
        return
    if out.suffix not in ("", *ENDINGS):
        raise ValueError(
            f"--out is {out}, but must end in {', '.join(ENDINGS)}, or be a folder for all three."
        )
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {out.parent} for --out; create it first.")
    if out.exists() and not replace:
        raise FileExistsError(f"{out} is there already; give another --out, or --replace.")


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
    for path in [out] if out.suffix else [out / f"{name}{ending}" for ending in ENDINGS]:
        if path.suffix == ".safetensors":
            result.save(path)
        else:
            content = as_csv(result.to_pandas()) if path.suffix == ".csv" else draw().encode()
            write_atomically(path, content)
        print(path)


@contextmanager
def kept_beside(out: Path | None) -> Iterator[Path | None]:
    """The file that keeps what is done until a command ends; None if it writes nothing."""
    if out is None:
        yield None
        return
    kept = out.with_name(f"{out.name}.unfinished")
    if kept.exists():
        print(f"Going on from {kept}, which a run that was stopped left.", flush=True)
    yield kept
    kept.unlink(missing_ok=True)
