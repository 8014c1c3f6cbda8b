"""The report's tables as CSV and results as safetensors, in one folder per prompt."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechsvd.experiments.contrast_results import Contrast
from mechsvd.experiments.direction_cards import DirectionCards
from mechsvd.figures.display import file_name
from mechsvd.report.study import Comparison, Study
from mechsvd.results import write_atomically

TOGETHER = "_all"  # folder for all prompts together; no prompt's folder begins with _
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # spreadsheets compute cells that begin so


def write_tables(
    studies: Sequence[Study],
    comparison: Comparison | None,
    contrast: Contrast | None,
    folder: Path,
) -> None:
    """Write the tables and results of every prompt, and of all together, into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    for study in studies:
        _write(folder / file_name(study.name), _tables(study), _results(study))
    tables: dict[str, Any] = {}
    results: dict[str, Any] = {}
    if comparison:
        tables = _tables_together(comparison)
        results = {"overlap": comparison.overlap, "pool": comparison.pool}
    if contrast:
        tables |= {"contrast": contrast.to_pandas(), "contrast_ratios": contrast.summary()}
        results["contrast"] = contrast
    if tables:
        _write(folder / TOGETHER, tables, results)


def _write(folder: Path, tables: dict[str, Any], results: dict[str, Any]) -> None:
    folder.mkdir()
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", as_csv(table))
    for name, result in results.items():
        result.save(folder / f"{name}.safetensors")


def as_csv(table: Any) -> bytes:
    """A table as CSV; text that a spreadsheet would take for a formula is marked as text."""
    texts = table.select_dtypes(exclude="number")
    guarded = {name: texts[name].map(_as_text) for name in texts.columns}
    quoting = csv.QUOTE_NONNUMERIC  # a bare carriage return would end a row
    return bytes(table.assign(**guarded).to_csv(index=False, quoting=quoting).encode())


def _as_text(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _results(study: Study) -> dict[str, Any]:
    found = {
        "cards": study.cards,
        "task": study.task,
        "decomposition": study.pooled,
        "sweep": study.sweep,
        "sweep_of_site_bases": study.by_site,
        "ranking": study.ranking,
        "critical_rank": study.critical,
        "ridge": study.ridge,
        "attribution": study.attribution,
        "sweep_of_metric": study.metric_sweep,
        "ranking_of_metric": study.metric_ranking,
    }
    return {name: result for name, result in found.items() if result is not None}


def _tables(study: Study) -> dict[str, Any]:
    import pandas as pd

    norms = study.writes.to_pandas()
    return {
        "tokens": study.task.to_pandas(),
        "write_norms": norms,
        "singular_values": study.pooled.to_pandas(),
        "layer_singular_values": pd.concat(
            [svd.to_pandas().assign(layer=svd.layer) for svd in study.layers]
        ),
        "sweep": study.sweep.to_pandas(),
        "sweep_by_site": study.sweep.sites_to_pandas(),
        "writers_of_direction_0": norms.drop(columns="norm").assign(
            share=study.pooled.writer_map(0).flatten().cpu().numpy()
        ),
        "critical_rank": study.critical.to_pandas(),
        **_tables_of_parts(study),
        **_tables_of_cards(study.cards),
    }


def _tables_of_parts(study: Study) -> dict[str, Any]:
    """The tables of parts that can be left out."""
    import pandas as pd

    results = {
        "sweep_of_site_bases": study.by_site,
        "directions": study.ranking,
        "ridge": study.ridge,
        "sweep_of_metric": study.metric_sweep,
        "directions_of_metric": study.metric_ranking,
    }
    tables = {name: result.to_pandas() for name, result in results.items() if result is not None}
    if "orders" in study.choices:
        tables["orders"] = pd.concat(
            [sweep.to_pandas().assign(order=order) for order, sweep in study.sweeps.items()]
        )
    if study.attribution is not None:
        bases = study.attribution.bases.items()
        tables["attributions"] = pd.concat([own.to_pandas().assign(basis=b) for b, own in bases])
    if "texts" in study.choices:
        tables["texts"] = _texts(study)
    return tables


def _tables_of_cards(cards: DirectionCards | None) -> dict[str, Any]:
    if cards is None:
        return {}
    return {
        "cards": cards.to_pandas(),
        "cards_agreement": cards.tokens.agreement_to_pandas(),
        "cards_writers": cards.writers.shares_to_pandas(),
        "cards_parts": cards.writers.parts_to_pandas(),
        "cards_value_vectors": cards.values.to_pandas(),
        "cards_examples": cards.examples_to_pandas(),
        "cards_dose": cards.dose.to_pandas(),
    }


def _texts(study: Study) -> Any:
    import pandas as pd

    rows = [
        {"start": text.start, "rank": rank, "prompt": task.text()[0], "text": task.text()[1]}
        for text in study.texts
        for rank, task in zip(text.ranks, text.tasks, strict=True)
    ]
    return pd.DataFrame(rows).astype({"rank": "Int64"})  # empty for the clean model


def _tables_together(comparison: Comparison) -> dict[str, Any]:
    import pandas as pd

    names = dict(enumerate(comparison.names))
    pairs = comparison.overlap.to_pandas().replace({"first": names, "second": names})
    angles = [
        {"first": first, "second": second, "place": place, "radians": angle}
        for (first, second), radians in comparison.angles.items()
        for place, angle in enumerate(radians.tolist())
    ]
    parts = {
        "held_out_lasting_ranks": comparison.held_out and comparison.held_out.summary(),
        "random_texts": comparison.random_texts and comparison.random_texts.to_pandas(),
        "overlap_anchors": comparison.anchors and comparison.anchors.to_pandas(),
    }
    if comparison.held_out:
        held_out = comparison.held_out.to_pandas()
        parts["held_out"] = held_out.assign(task=held_out["task"].map(names))
    return {name: table for name, table in parts.items() if table is not None} | {
        "overlap": pairs,
        "pool": comparison.pool.to_pandas(),
        "principal_angles": pd.DataFrame(angles),
    }
