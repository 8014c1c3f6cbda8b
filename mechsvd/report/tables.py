"""The report's numbers as files: tables as CSV, results as safetensors, a folder for each prompt."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechsvd.figures.display import file_name
from mechsvd.report.study import Comparison, Study
from mechsvd.results import write_atomically

TOGETHER = "_all"  # the folder of what concerns all prompts; no prompt's begins so
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how cells begin that spreadsheets compute


def write_tables(studies: Sequence[Study], comparison: Comparison | None, folder: Path) -> None:
    """Write the tables and results of every prompt, and of all of them together, into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    for found in studies:
        _write(folder / file_name(found.name), _tables(found), _results(found))
    if comparison:
        results = {"overlap": comparison.overlap, "pool": comparison.pool}
        _write(folder / TOGETHER, _tables_together(comparison), results)


def _write(folder: Path, tables: dict[str, Any], results: dict[str, Any]) -> None:
    folder.mkdir()
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", _csv(table))
    for name, result in results.items():
        result.save(folder / f"{name}.safetensors")


def _csv(table: Any) -> bytes:
    """A table as CSV in which text stays text where a spreadsheet would take it for a formula."""
    texts = table.select_dtypes(exclude="number")
    guarded = {name: texts[name].map(_as_text) for name in texts.columns}
    quoting = csv.QUOTE_NONNUMERIC  # a bare carriage return would end a row
    return bytes(table.assign(**guarded).to_csv(index=False, quoting=quoting).encode())


def _as_text(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _results(found: Study) -> dict[str, Any]:
    return {
        "task": found.task,
        "decomposition": found.pooled,
        "sweep": found.sweep,
        "ranking": found.ranking,
        "critical_rank": found.critical,
        "ridge": found.ridge,
        "attribution": found.attribution,
    }


def _tables(found: Study) -> dict[str, Any]:
    import pandas as pd

    norms = found.writes.to_pandas()
    return {
        "tokens": found.task.to_pandas(),
        "write_norms": norms,
        "singular_values": found.pooled.to_pandas(),
        "layer_singular_values": pd.concat(
            [svd.to_pandas().assign(layer=svd.layer) for svd in found.layers]
        ),
        "sweep": found.sweep.to_pandas(),
        "sweep_by_site": found.sweep.sites_to_pandas(),
        "writers_of_direction_0": norms.drop(columns="norm").assign(
            share=found.pooled.writer_map(0).flatten().cpu().numpy()
        ),
        "directions": found.ranking.to_pandas(),
        "orders": pd.concat(
            [sweep.to_pandas().assign(order=order) for order, sweep in found.sweeps.items()]
        ),
        "critical_rank": found.critical.to_pandas(),
        "ridge": found.ridge.to_pandas(),
        "attributions": pd.concat(
            [
                each.to_pandas().assign(basis=basis)
                for basis, each in found.attribution.bases.items()
            ]
        ),
        "texts": _texts(found),
    }


def _texts(found: Study) -> Any:
    import pandas as pd

    rows = [
        {"start": text.start, "rank": rank, "prompt": task.text()[0], "text": task.text()[1]}
        for text in found.texts
        for rank, task in zip(text.ranks, text.tasks, strict=True)
    ]
    return pd.DataFrame(rows).astype({"rank": "Int64"})  # empty for the clean model


def _tables_together(comparison: Comparison) -> dict[str, Any]:
    import pandas as pd

    names = dict(enumerate(comparison.names))
    pairs = comparison.overlap.to_pandas().replace({"first": names, "second": names})
    angles = [
        {"first": first, "second": second, "place": place, "radians": angle}
        for (first, second), found in comparison.angles.items()
        for place, angle in enumerate(found.tolist())
    ]
    return {
        "overlap": pairs,
        "pool": comparison.pool.to_pandas(),
        "principal_angles": pd.DataFrame(angles),
    }
