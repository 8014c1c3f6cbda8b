"""What a source of texts holds: the entries of a file, a list, a table, or texts by their names."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mechsvd.model.text_files import file_of_texts, read_document, read_lines

TEXT = "text"  # another name of `prompt`, as in many datasets
IDS, MASK, LABELS = "input_ids", "attention_mask", "labels"  # tokens, as a tokenizer gives them
KEYS = ("name", "prompt", "continuation", "wrong", "messages", "group")
NEEDED = ("prompt", TEXT, "messages", IDS)  # a row has one of them
FIELDS = {*KEYS, TEXT, IDS, MASK, LABELS}
SPLIT = {"columns", "index", "data"}  # of a table in JSON, as pandas writes with orient="split"


def read_entries(source: Any) -> Iterator[tuple[str, str, Any]]:
    """Each entry with its place and, in a JSON object, its name; those of a file one by one.

    An entry that cannot be read is its error, which `text_of` raises.

    Raises:
        FileNotFoundError, TypeError, ValueError: nothing here can be read.
    """
    if isinstance(source, str | os.PathLike):
        path = file_of_texts(source)
        if path.suffix.lower() == ".json":
            yield from read_entries(read_document(path))
            return
        for number, (where, entry) in enumerate(read_lines(path, NEEDED)):
            yield f"text {number} ({where} of {path.name})", "", entry
    elif isinstance(source, Mapping) and not _is_table(source):
        _require_named_texts(source)
        for number, (name, entry) in enumerate(source.items()):
            yield f"text {number} ({name})", str(name), entry
    elif (isinstance(source, Iterable) and getattr(source, "ndim", 1) != 0) or _is_table(source):
        entries = _rows(source) if _is_table(source) else source
        rows = (row for entry in entries for row in _rows(entry))
        for number, entry in enumerate(rows):
            yield f"text {number}", "", entry
    else:
        raise TypeError(
            f"`source` must be a file or a list of texts, but is {type(source).__name__}."
        )


def plain(value: Any) -> Any:
    """A value of a table as Python has it: arrays and tensors as lists, what is missing as None."""
    for method in ("to_pylist", "tolist", "as_py"):
        if hasattr(value, method):
            value = getattr(value, method)()
    return None if isinstance(value, float) and value != value else value


def _is_table(source: Any) -> bool:
    """Whether a source is one table, or one row of one, and not a list of texts.

    Raises:
        ValueError: a dict that may be a row, or texts by their names.
    """
    if not isinstance(source, Mapping):
        return _is_frame(source) or hasattr(source, "to_pylist") or _as_row(source) is not source
    if {*source} == SPLIT or _is_columns(source):
        return True
    needed = [source[name] for name in NEEDED if name in source]
    if not needed or isinstance(needed[0], Mapping):  # an entry by its name
        return False
    if more := [k for k, v in source.items() if k not in FIELDS and isinstance(v, str)]:
        raise ValueError(
            f"`source` may be one row of a table or texts by their names: it has {more[:3]} beside "
            f"{[name for name in NEEDED if name in source]}. Give a row as [row], and named texts "
            'as a list of {"name": …, "prompt": …}.'
        )
    return True


def _rows(entry: Any) -> list[Any]:
    """The rows of a table; anything else is a row."""
    if _is_frame(entry):
        _require_columns(entry, [*entry.columns])
        if hasattr(entry, "to_dicts"):  # of Polars
            return entry.to_dicts()
        return entry.astype(object).where(entry.notna(), None).to_dict("records")
    if hasattr(entry, "to_pylist"):  # of Arrow
        _require_columns(entry, getattr(entry, "column_names", NEEDED))
        return entry.to_pylist()
    if isinstance(entry, Mapping) and {*entry} == SPLIT:
        return [dict(zip(entry["columns"], row, strict=True)) for row in entry["data"]]
    return _rows_of_columns(entry) if _is_columns(entry) else [_as_row(entry)]


def _as_row(entry: Any) -> Any:
    """A row of a data frame or an array, or a named tuple, as a dict; anything else as it is."""
    names = getattr(entry, "_fields", ()) or (getattr(entry, "index", ()) if _is_row(entry) else ())
    if isinstance(entry, np.void) and entry.dtype.names:  # of a structured array
        names, entry = entry.dtype.names, dict(zip(entry.dtype.names, entry.tolist(), strict=True))
    if isinstance(entry, dict) or not any(name in names for name in NEEDED):
        return entry
    return entry._asdict() if hasattr(entry, "_asdict") else entry.to_dict()


def _is_frame(source: Any) -> bool:
    """Whether it is a data frame of pandas or Polars; neither need be imported for that."""
    is_frame = hasattr(source, "iterrows") or hasattr(source, "to_dicts")
    return is_frame and hasattr(source, "columns")


def _is_row(entry: Any) -> bool:
    return hasattr(entry, "to_dict") and hasattr(entry, "iat")


def _is_columns(entry: Any) -> bool:
    """Whether it is a dict of columns, as `dataset[:2]` and a tokenizer's batch are."""
    if not isinstance(entry, Mapping):
        return False
    for name in NEEDED:
        if name in entry:
            value = entry[name]
            if isinstance(value, Mapping):  # by the number of the row, as pandas writes JSON
                return not any(key in FIELDS for key in value)
            return _depth(value) > (name in ("messages", IDS))
    return bool(entry) and all(k in FIELDS and _depth(v) > 0 for k, v in entry.items())


def _depth(value: Any) -> int:
    """How many axes a nested list or an array has."""
    is_single = isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__")
    if is_single or getattr(value, "ndim", 1) == 0:
        return 0
    return 1 + _depth(next(iter(value), None))


def _rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    _require_columns(columns, [*columns])
    kept = {name: values for name, values in columns.items() if name in FIELDS}
    first = next(name for name in NEEDED if name in kept)
    for name, values in kept.items():
        fits = _depth(values) > 0 or isinstance(values, Mapping)
        if not fits or len(values) != len(kept[first]):
            count = f"{len(values)} values" if fits else f"{values!r:.40}"
            raise ValueError(
                f"The columns differ in length: `{name}` has {count}, but `{first}` "
                f"{len(kept[first])}; give one value per row."
            )
    if isinstance(kept[first], Mapping):
        numbers = [*kept[first]]
        lists = [[values[number] for number in numbers] for values in kept.values()]
    else:
        lists = [list(plain(values)) for values in kept.values()]
    return [dict(zip(kept, row, strict=True)) for row in zip(*lists, strict=True)]


def _require_columns(table: Any, names: Iterable[Any]) -> None:
    """Refuse a table without texts, or with a column twice."""
    listed = [*names]
    if not any(name in listed for name in NEEDED):
        raise ValueError(
            f"The {type(table).__name__} has the columns {listed[:8]}, but none of them is "
            "`prompt` or `text`; rename one."
        )
    if twice := sorted({str(n) for n in listed if n in FIELDS and listed.count(n) > 1}):
        raise ValueError(f"The {type(table).__name__} has the columns {twice} twice; drop one.")


def _require_named_texts(source: Mapping[Any, Any]) -> None:
    """Refuse a dict of tables, such as all splits of a dataset."""
    tables = [n for n, v in source.items() if hasattr(v, "column_names") or _is_frame(v)]
    if tables:
        raise TypeError(
            f"`source` is a {type(source).__name__} of several tables, {tables[:5]}; give one of "
            f"them, source[{tables[0]!r}]."
        )
