"""The page of a study, with its tables and results next to it."""

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mechsvd.experiments.contrast_results import Contrast
from mechsvd.figures.display import escape, file_name
from mechsvd.model.selfcheck import SelfCheck
from mechsvd.report import findings
from mechsvd.report.choices import Choices
from mechsvd.report.folders import DATA, replace_run
from mechsvd.report.html import chooser, page, table, write_plotly
from mechsvd.report.sections import (
    MANY,
    SECTIONS,
    described,
    held_out,
    one_prompt,
    prompt_text,
    section,
    several,
    special,
    texts,
    told,
)
from mechsvd.report.study import Comparison, Study
from mechsvd.report.tables import write_tables
from mechsvd.results import Provenance, write_atomically

PLOTLY, FIGURES = "plotly.min.js", "figures.html"  # of the pages of many prompts
GROWING = "report-growing.html"  # the page of a run that has not ended


def write_report(
    studies: Sequence[Study],
    check: SelfCheck,
    out: Path,
    *,
    comparison: Comparison | None = None,
    contrast: Contrast | None = None,
    cdn: bool = False,
    seconds: float | None = None,
) -> Path:
    """Write `report.html`, and its tables (CSV) and results into a folder of `report-data/`.

    The page links the folder. Both replace an earlier run in one step. So a run that is killed
    leaves either the earlier run or itself complete.

    Args:
        comparison: of the prompts, if there are several.
        contrast: of groups of texts, if there are some.
        cdn: load plotly from the network instead of including it in the page (5 MB).
        seconds: how long the run took; the page shows it.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be written.
    """

    def write(folder: Path, name: str) -> str:
        write_tables(studies, comparison, contrast, folder)
        if len(studies) > MANY:
            _write_pages(studies, folder, cdn)
        return _page(studies, comparison, contrast, check, cdn, seconds, f"{DATA}/{name}/")

    return replace_run(out, write)


def write_growing(
    studies: Sequence[Study], check: SelfCheck, out: Path, *, of: int, cdn: bool = False
) -> Path:
    """Write the page of the prompts that are done, next to the report of an earlier run.

    It has no tables, and `end_growing` removes it.

    Args:
        of: how many prompts there are.
    """
    path = out / GROWING
    content = _page(studies, None, None, check, cdn, None, "", of=of)
    write_atomically(path, content.encode())
    return path


def end_growing(out: Path) -> None:
    """Remove the page of a run that has ended."""
    (out / GROWING).unlink(missing_ok=True)


def _page(
    studies: Sequence[Study],
    comparison: Comparison | None,
    contrast: Contrast | None,
    check: SelfCheck,
    cdn: bool,
    seconds: float | None,
    data: str,
    of: int | None = None,
) -> str:
    source = studies[0].sweep.source
    assert source is not None  # `measure` always sets it
    choices = studies[0].choices
    parts = [part for part in SECTIONS if part.name in choices]
    titles = _titles(studies, comparison, contrast)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in titles.items())
    body = "\n".join(
        [
            *(section(part, studies) for part in parts),
            described(studies),
            texts(studies) if "texts" in choices else "",
            held_out(comparison) if comparison and "held-out" in choices else "",
            several(comparison) if comparison and "prompts" in choices else "",
            special(contrast) if contrast else "",
        ]
    )
    growing = "" if of is None else f"<p><b>{len(studies)} of {of} prompts so far.</b></p>"
    footer = f"""<footer>The tables (CSV) and results (safetensors) of this run are in
<a href="{data}"><code>{data}</code></a>. Probabilities are of the whole continuation. Logarithms
are natural. Sizes are root-mean-square L2 norms over sites and positions.</footer>"""
    content = f"""<h1>What <bdi>{escape(source.model)}</bdi> writes to its residual stream</h1>
<p>The experiments of tailcalled's <a href="https://www.lesswrong.com/users/tailcalled">shortform</a>
on LessWrong (May 2024), which ran on Llama-3-8B, repeated on this model. Each section says what the
shortform saw. The text in bold says what was measured here.{_about(source.model)}</p>{growing}{_chosen(choices)}
<nav>{links}</nav>
{told(studies, comparison, contrast) if "told" in choices else ""}
{_prompts(studies, data)}
{chooser([s.name for s in studies]) if len(studies) <= MANY else ""}
{body}
<h2>Provenance</h2>
{table({key: [value] for key, value in _provenance_rows(source, check, seconds).items()})}
{footer if data else ""}"""
    return page(f"Writes of {source.model}", content, cdn=cdn)


def _titles(
    studies: Sequence[Study], comparison: Comparison | None, contrast: Contrast | None
) -> dict[str, str]:
    """The parts that the page has, with their names in the line of links."""
    titles = {"told": "What was found"} | {s.name: s.title for s in SECTIONS}
    if any(study.cards for study in studies):
        titles["cards"] = "Single directions"
    titles["texts"] = "Text from inside"
    if comparison:
        titles |= {"held-out": "Held-out texts", "prompts": "Several prompts"}
    if contrast:
        titles["special"] = "Special directions"
    return {name: title for name, title in titles.items() if name in studies[0].choices}


def _chosen(choices: Choices) -> str:
    """What this page leaves out or does otherwise than a whole report."""
    return f'<p class="chosen"><b>{escape(str(choices))}</b></p>' if str(choices) else ""


def _write_pages(studies: Sequence[Study], folder: Path, cdn: bool) -> None:
    """Write a page for each of many prompts into its folder."""
    if not cdn:
        write_plotly(folder / PLOTLY)
    for study in studies:
        content = f"<h1>{escape(study.name)}</h1>\n{one_prompt(study)}"
        text = page(study.name, content, cdn=cdn, plotly_file=f"../{PLOTLY}")
        (folder / file_name(study.name) / FIGURES).write_text(text, encoding="utf-8")


def _prompts(studies: Sequence[Study], data: str) -> str:
    """The texts and main numbers of the prompts; of many, as a table with links to their pages."""
    numbers = [findings.main_numbers(s) for s in studies]
    names = [s.name for s in studies]
    if len(studies) <= MANY:
        rows = {key: [own[key] for own in numbers] for key in numbers[0]}
        return "".join(prompt_text(s) for s in studies) + table(rows, ["", *names])
    by_text = {name: list(own.values()) for name, own in zip(names, numbers, strict=True)}
    whole = table(by_text, ["", *numbers[0]])
    links = "".join(
        f'<a href="{data}{file_name(s.name)}/{FIGURES}">{escape(s.name)}</a> '
        for s in studies
        if data
    )
    return (
        f"<details open><summary>One prompt at a time</summary><nav>{links}</nav></details>"
        f"<details><summary>All numbers of {len(studies)} prompts</summary>{whole}</details>"
    )


def _provenance_rows(source: Provenance, check: SelfCheck, seconds: float | None) -> dict[str, str]:
    rows = {key: value for key, value in asdict(source).items() if isinstance(value, str)}
    rows["torch"] = (
        f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}"
    )
    device = "CUDA: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows["device"] = f"{device} ({platform.processor() or platform.machine()})"
    rows["date"] = time.strftime("%Y-%m-%d %H:%M %Z")
    rows["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    rows["self-check"] = " ".join(repr(check).split())
    rows["notes"] = "; ".join(source.notes) or "none"
    return rows | ({"time": f"{seconds:.1f} s"} if seconds is not None else {})


def _about(model: str) -> str:
    """What the embedded model is, on a page of it."""
    return (
        " The embedded model is a Llama of six layers and 128 dimensions that comes with mechsvd; it "
        "was trained on texts of a small grammar."
        if model == "mechsvd embedded"
        else ""
    )
