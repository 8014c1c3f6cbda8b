"""Files of texts: lines, JSON, and tables, each with the line where it stands."""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

STARTS = {  # of files that hold no text, or not as UTF-8
    b"\x1f\x8b": "compressed (gzip)",
    b"PK\x03\x04": "compressed (zip; an Excel workbook is one, too)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ\x00": "compressed (xz)",
    b"7z\xbc\xaf\x27\x1c": "compressed (7z)",
    b"\x04\x22\x4d\x18": "compressed (lz4)",
    b"PAR1": "a Parquet file, and must end in .parquet",
    b"ARROW1": "an Arrow file; save it as .parquet",
    b"\xff\xfe": "text in UTF-16 or UTF-32",
    b"\xfe\xff": "text in UTF-16",
    b"\x00\x00\xfe\xff": "text in UTF-32",
}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # bytes that are no UTF-8 are read as surrogates


def file_of_texts(path: str | os.PathLike[str]) -> Path:
    """The path of a file of texts.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is compressed, or in another encoding than UTF-8.
    """
    found = Path(path).expanduser()
    try:
        is_file = found.is_file()
    except (OSError, ValueError):  # a text, too long for a name
        is_file = False
    if not is_file:
        shown = str(found).replace("\0", "\\0")
        raise FileNotFoundError(
            f"There is no file of texts {shown:.200}; give a text itself in a list, [text]."
        )
    with open(found, "rb") as file:
        start = file.read(8)
    for bytes_, what in STARTS.items():
        if start.startswith(bytes_) and not (bytes_ == b"PAR1" and found.suffix == ".parquet"):
            raise ValueError(
                f"{found} (line 1) is {what}; give a file of text in UTF-8, or read it yourself and "
                "pass a list of texts."
            )
    return found


def read_lines(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The entries of a file with their lines; one that cannot be read is its error.

    Args:
        needed: the columns of which a table must have one.

    Raises:
        ValueError: a table without any of them.
        ImportError: a Parquet file, but no pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _rows_of_parquet(path, needed)
        return
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=_newline(suffix)) as f:
        if suffix in SEPARATORS:
            yield from _rows_of_table(path, f, needed)
            return
        for number, line in enumerate(f, start=1):
            if line.strip():
                text, where = line.rstrip("\n"), f"line {number}"
                is_json = suffix in (".jsonl", ".ndjson")
                yield where, _problem(text) or (_from_json(text) if is_json else text)


def read_document(path: Path) -> Any:
    """The JSON document of a file.

    Raises:
        ValueError: it is none, with the line.
    """
    content = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(content.split("\n"), start=1):
        if error := _problem(line):
            raise ValueError(f"{path} (line {number}) {error}")
    try:
        document = json.loads(content, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict | list):
        raise ValueError(f"{path} must hold an object or a list of texts.")
    return document


def _newline(suffix: str) -> str | None:
    return "" if suffix in SEPARATORS else None  # cells may hold ends of lines


def _problem(text: str) -> ValueError | None:
    """What keeps a line from being text; None if nothing does."""
    found = NO_TEXT.search(text)
    if found is None:
        return None
    if found[0] == "\0":
        return ValueError("holds NUL bytes, as binary files and UTF-16 do; save it in UTF-8.")
    byte = ord(found[0]) - 0xDC00
    return ValueError(
        f"is not UTF-8: byte {byte:#04x} at character {found.start()}; save it in UTF-8, such as by "
        "`iconv -f latin1 -t utf-8`."
    )


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return ValueError(f"is not JSON: {error}.")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"The file names {sorted(repeated)} more than once; name each text once.")
    return dict(pairs)


def _rows_of_table(
    path: Path, file: IO[str], needed: Sequence[str]
) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
    """The rows of a CSV or TSV file; an empty cell is a missing value, but an empty text."""
    reader = csv.reader(file, delimiter=SEPARATORS[path.suffix.lower()])
    cells = _next_row(reader)
    header = cells if isinstance(cells, list) else []
    _require_header(path, header, needed)
    line = reader.line_num + 1
    while (cells := _next_row(reader)) is not None:
        where, line = f"line {line}", reader.line_num + 1
        if isinstance(cells, ValueError):
            yield where, cells
        elif len(cells) not in (0, len(header)):
            yield (
                where,
                ValueError(
                    f"has {len(cells)} cells, but the header {len(header)}; put a text with "
                    'separators into quotes, "…".'
                ),
            )
        elif cells:
            row = zip(header, cells, strict=True)
            yield where, {name: cell for name, cell in row if cell or name in needed}


def _next_row(reader: Any) -> list[str] | ValueError | None:
    """The next row, its error, or None at the end; a cell may be as long as a document."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        cells = next(reader, None)
    except csv.Error as error:
        return ValueError(f"is no row of a table: {error}.")
    finally:
        csv.field_size_limit(limit)
    return (cells and _problem("".join(cells))) or cells


def _require_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    if not any(name in header for name in needed):
        raise ValueError(
            f"{path} (line 1) has the columns {[*header][:8]}, but none of them is `prompt` or "
            "`text`; name the columns in the first line."
        )
    if len({*header}) < len(header):
        raise ValueError(f"{path} (line 1) names a column twice: {[*header][:8]}.")


def _rows_of_parquet(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        file = ParquetFile(path)
        _require_header(path, file.schema_arrow.names, needed)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}.") from error
