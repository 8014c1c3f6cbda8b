"""The shortform's experiment in one run: results for each prompt, then one page with its figures and tables beside it."""

import html
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mechsvd import figures
from mechsvd.decomposition import Decomposition, decompose
from mechsvd.measurement import estimate_seconds
from mechsvd.results import Provenance, write_atomically
from mechsvd.selfcheck import SelfCheck, self_check
from mechsvd.sites import COMPONENTS, Model
from mechsvd.sweeps import RankSweep, sweep_rank
from mechsvd.tasks import Task
from mechsvd.writes import Writes, collect_writes


@dataclass(frozen=True)
class Study:
    """All that was found for one prompt."""

    name: str
    task: Task
    writes: Writes
    pooled: Decomposition
    layers: tuple[Decomposition, ...]
    sweep: RankSweep


def study(model: Model, name: str, task: Task, components: Sequence[str] = COMPONENTS, progress: bool | None = None) -> Study:
    """Collect the writes of one task, decompose them, and sweep the rank."""
    writes = collect_writes(model, task, components=components)
    pooled = decompose(writes)
    sweep = sweep_rank(model, task, pooled, components=components, progress=progress)
    return Study(name, task, writes, pooled, decompose(writes, per_layer=True), sweep)


def main_numbers(found: Study) -> dict[str, str]:
    """The numbers a reader looks for first, each as text."""
    svd, sweep, writes = found.pooled, found.sweep, found.writes
    clean = sweep.measurement.clean
    assert clean is not None  # `sweep_rank` always runs it
    squares = svd.singular_values.cpu().double().square()
    shares = squares.cumsum(0) / squares.sum()
    first = svd.left[:, writes.positions == 0, :1].square().sum()
    numbers = {
        "tokens": f"{found.task.prompt_length} of the prompt, {len(found.task.continuation)} scored",
        "writes": f"{len(writes)} ({len(writes.sites)} sites × {len(writes.tokens)} positions), {svd.d_model} dimensions",
        "directions (numerical rank)": f"{svd.rank}",
        "largest singular value": f"{float(svd.singular_values[0]):.4g}",
        "directions for 90 % and 99 % of the squared size": " and ".join(f"{int((shares < s).sum()) + 1}" for s in (0.9, 0.99)),
        "share of the first position in direction 1": f"{float(first):.1%}",
        "clean probability": f"{float(clean.log_prob.exp()):.4g} ({float(clean.log_prob):.4f} nats)",
        "clean size of a write (root mean square)": f"{float(clean.orig_delta):.4g}",
    }
    for nats in (1.0, 0.1):
        within = (clean.log_prob - sweep.measurement.log_prob).abs() <= nats
        numbers[f"fewest directions from which all ranks stay within {nats:g} nat of clean"] = _first_lasting(sweep, within)
    return numbers


def all_figures(found: Study) -> dict[str, Any]:
    """Every figure of a study, by the name of its table."""
    svd, sweep = found.pooled, found.sweep
    return {
        "singular_values": figures.singular_values(svd),
        "singular_values_log": figures.singular_values(svd, log=True),
        "cumulative_singular_values": figures.cumulative_singular_values(svd),
        "layer_spectra": figures.layer_spectra(found.layers),
        "probability": figures.probability(sweep),
        "surprise": figures.surprise(sweep),
        "deltas": figures.deltas(sweep),
        "kept_deltas_by_site": figures.delta_map(sweep),
        "orig_deltas_by_site": figures.delta_map(sweep, kept=False),
        "writers_of_direction_1": figures.writer_map(svd, found.writes),
    }


def write_report(studies: Sequence[Study], check: SelfCheck, out: Path, *, cdn: bool = False, seconds: float | None = None) -> Path:
    """Write `report.html`, and beside it in `report-data/` the tables as CSV and the results.

    Args:
        cdn: load plotly from the network instead of carrying it in the page (5 MB).
        seconds: how long the run took, for the page.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be written.
    """
    for found in studies:
        _write_data(found, out / "report-data" / found.name)
    _remove_stale(out / "report-data", {found.name for found in studies})
    path = out / "report.html"
    write_atomically(path, _page(studies, check, cdn, seconds).encode())
    return path


def reproduce(
    model: Model,
    tasks: dict[str, Callable[[], Task]],
    out: Path,
    *,
    components: Sequence[str] = COMPONENTS,
    cdn: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run the whole experiment on several prompts and write the report; each step is announced by `say`.

    Args:
        tasks: how to make each task, by name: a greedy continuation is found only when its turn comes.

    Raises:
        OSError: the folder cannot be written, which is tried before anything is computed.
    """
    started = time.perf_counter()
    require_writable(out)
    studies = []
    for name, make in tasks.items():
        task = make()
        say(f"{name}: {task.prompt_length} tokens of the prompt, {len(task.continuation)} scored; {_cost(model, task)}")
        studies.append(study(model, name, task, components))
    path = write_report(studies, self_check(model), out, cdn=cdn, seconds=time.perf_counter() - started)
    say(f"{path} after {time.perf_counter() - started:.0f} s")
    return path


def require_writable(out: Path) -> None:
    """Make the report's folders, and refuse where that fails.

    Raises:
        OSError: saying which folder.
    """
    try:
        (out / "report-data").mkdir(parents=True, exist_ok=True)
        write_atomically(out / "report-data" / ".writable", b"")
        (out / "report-data" / ".writable").unlink()
    except OSError as error:
        raise OSError(f"The report cannot be written to {out}: {error.strerror or error}; choose another folder.") from error


def _cost(model: Model, task: Task) -> str:
    edits = min(model.cfg.d_model, len(task.tokens) * 2 * model.cfg.n_layers) + 1
    return f"at most {edits} ranks, about {max(1, round(estimate_seconds(model, task, edits)))} s"


def _first_lasting(sweep: RankSweep, good: torch.Tensor) -> str:
    lasting = good.flip(0).long().cumprod(0).flip(0).bool()
    return str(int(sweep.ranks[lasting][0])) if lasting.any() else "none"


def _write_data(found: Study, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    import pandas as pd

    layers = pd.concat([svd.to_pandas().assign(layer=svd.layer) for svd in found.layers])
    tables = {
        "tokens": found.task.to_pandas(),
        "write_norms": found.writes.to_pandas(),
        "singular_values": found.pooled.to_pandas(),
        "layer_singular_values": layers,
        "sweep": found.sweep.to_pandas(),
        "sweep_by_site": found.sweep.sites_to_pandas(),
        "writers_of_direction_1": _writers(found),
    }
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False).encode())
    found.task.save(folder / "task.safetensors")
    found.pooled.save(folder / "decomposition.safetensors")
    found.sweep.save(folder / "sweep.safetensors")


def _writers(found: Study) -> Any:
    norms = found.writes.to_pandas().drop(columns="norm")
    return norms.assign(share=found.pooled.writer_map(0).flatten().cpu().numpy())


def _remove_stale(folder: Path, fresh: set[str]) -> None:
    """Remove what an earlier run left for other prompts: only files that a run writes, only folders that hold nothing else."""
    written = {path.name for name in fresh for path in (folder / name).iterdir()}
    for old in folder.iterdir():
        if old.is_dir() and old.name not in fresh and {path.name for path in old.iterdir()} <= written:
            shutil.rmtree(old)


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:3rem;border-bottom:1px solid #ccc;padding-bottom:.3rem}
.text{white-space:pre-wrap;background:#f6f6f4;border-left:4px solid #1f5fa8;padding:.8rem 1rem;border-radius:3px}
.text b{font-weight:400;background:#dcebfa}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:1rem}
.plot{height:400px;min-width:0;overflow:hidden}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
tr+tr{border-top:1px solid #e5e5e5}td:last-child{font-variant-numeric:tabular-nums}nav a{margin-right:1rem}
footer{margin-top:3rem;color:#666;font-size:.9rem}
"""


def _page(studies: Sequence[Study], check: SelfCheck, cdn: bool, seconds: float | None) -> str:
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    address = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
    plotly = f'<script src="{address}" charset="utf-8"></script>' if cdn else f"<script>{get_plotlyjs()}</script>"
    source = studies[0].sweep.measurement.source
    assert source is not None  # `measure` always says it
    links = "".join(f'<a href="#{_escape(s.name)}">{_escape(s.name)}</a>' for s in studies)
    sections = "\n".join(_section(s) for s in studies)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Writes of {_escape(source.model)}</title>
<style>{_STYLE}</style>{plotly}</head><body>
<h1>What {_escape(source.model)} writes to its residual stream</h1>
<p>Every vector that attention and MLP layers add to the residual stream during a text is collected; their singular value
decomposition gives directions; then every write is clipped to the first <i>k</i> directions while the model runs, for every
<i>k</i>, and the probability of the continuation is measured.</p>
<nav>{links}</nav>
{sections}
<h2>Where this comes from</h2>
{_table(_provenance_rows(source, check, seconds))}
<footer>Tables (CSV) and results (safetensors) are in <code>report-data/</code>. Probabilities are of the whole continuation;
logarithms are natural; sizes are root-mean-square L2 norms over sites and positions.</footer>
</body></html>
"""


def _section(found: Study) -> str:
    prompt, continuation = found.task.text()
    plots = "\n".join(_plot(f"{found.name}-{name}", figure) for name, figure in all_figures(found).items())
    return f"""<section><h2 id="{_escape(found.name)}">{_escape(found.name)}</h2>
<p class="text">{_escape(prompt)}<b>{_escape(continuation)}</b></p>
{_table(main_numbers(found))}
<div class="grid">{plots}</div></section>"""


def _plot(name: str, figure: Any) -> str:
    from plotly.io import to_html

    body = to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config={"displaylogo": False, "responsive": True})
    return f'<div class="plot">{body}</div>'


def _provenance_rows(source: Provenance, check: SelfCheck, seconds: float | None) -> dict[str, str]:
    rows = {key: value for key, value in asdict(source).items() if isinstance(value, str)}
    rows["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    rows["self-check"] = " ".join(repr(check).split())
    rows["notes"] = "; ".join(source.notes) or "none"
    return rows | ({"time": f"{seconds:.1f} s"} if seconds is not None else {})


def _table(rows: dict[str, str]) -> str:
    body = "".join(f"<tr><th>{_escape(key)}</th><td>{_escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{body}</table>"


def _escape(text: str) -> str:
    return html.escape(text)
