"""The whole experiment in one run.

It writes one page in the shortform's order, with its tables and results next to it.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mechsvd.checks import about, warn
from mechsvd.engine.passes import estimate_seconds
from mechsvd.engine.session import open_session
from mechsvd.experiments.contrast_results import Contrast
from mechsvd.figures.display import escape, file_name
from mechsvd.model.selfcheck import SelfCheck, self_check
from mechsvd.model.sites import COMPONENTS, Model
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.model.tokenization import prompt_tokens
from mechsvd.report import findings
from mechsvd.report.folders import DATA, replace_run, require_writable
from mechsvd.report.html import page, table, write_plotly
from mechsvd.report.sections import (
    MANY,
    SECTIONS,
    held_out,
    one_prompt,
    prompt_text,
    section,
    several,
    special,
    texts,
    told,
)
from mechsvd.report.study import (
    SWEEPS,
    Comparison,
    Study,
    compare,
    compare_groups,
    study_task,
    with_held_out,
)
from mechsvd.report.tables import write_tables
from mechsvd.results import Provenance

PLOTLY, FIGURES = "plotly.min.js", "figures.html"  # of the pages of many prompts
LEAST = 4  # texts of a kind, for a contrast
OTHERS = 8  # prompts whose gradients join those of each prompt


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


def reproduce(
    model: Model,
    tasks: Mapping[str, Callable[[], Task]],
    out: Path,
    *,
    groups: Mapping[str, Sequence[Task | str]] | None = None,
    components: Sequence[str] = COMPONENTS,
    cdn: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run the whole experiment on several prompts and write the report.

    Args:
        tasks: functions that make the tasks, by name.
        groups: tasks, or names of prompts, by their kind, whose special directions are looked for.
        say: is called with one line per step.

    Raises:
        OSError: the folder cannot be written. This is checked before anything is computed.
    """
    started = time.perf_counter()
    require_writable(out)
    with open_session(model):  # common warnings come once, and the weights are read once
        made = {name: _made(name, make) for name, make in tasks.items()}
        kinds = _kinds(groups or {}, made)  # before anything long runs
        studies = [_study(model, name, made, components, say) for name in made]
        comparison = contrast = None
        if len(studies) > 1:
            with about("several prompts"):
                every = [task for own in kinds.values() for task in own]
                comparison = compare(model, studies, components, more=every)
            studies = with_held_out(studies, comparison.held_out)
        if kinds:
            with about("special directions"):
                contrast = compare_groups(model, kinds, components)
    seconds = time.perf_counter() - started
    path = write_report(
        studies,
        self_check(model),
        out,
        comparison=comparison,
        contrast=contrast,
        cdn=cdn,
        seconds=seconds,
    )
    say(f"{path} after {time.perf_counter() - started:.0f} s")
    return path


def _made(name: str, make: Callable[[], Task]) -> Task:
    with about(name):
        return make()


def _kinds(
    groups: Mapping[str, Sequence[Task | str]], made: Mapping[str, Task]
) -> dict[str, list[Task]]:
    """The different texts of each kind; none if there are too few for a contrast."""
    seen: set[tuple[int, ...]] = set()
    kinds: dict[str, list[Task]] = {}
    for kind, own in groups.items():
        for entry in own:
            task = made[entry] if isinstance(entry, str) else entry
            tokens = tuple(task.tokens.tolist())
            if tokens in seen:
                warn(f"A text of kind {kind!r:.40} is there twice; the second one is left out.")
            else:
                kinds.setdefault(kind, []).append(task)
            seen.add(tokens)
    if kinds and (len(kinds) < 2 or min(map(len, kinds.values())) < LEAST):
        warn(
            f"Directions special to a kind need two kinds of at least {LEAST} texts, but there "
            f"are { ({kind: len(own) for kind, own in kinds.items()}) }; left out."
        )
        return {}
    return kinds


def _study(
    model: Model,
    name: str,
    tasks: Mapping[str, Task],
    components: Sequence[str],
    say: Callable[[str], None],
) -> Study:
    task = tasks[name]
    others = [other for other in tasks.values() if other is not task][:OTHERS]
    with about(name):
        say(
            f"{name}: {task.prompt_length} tokens of the prompt, {len(task.continuation)} scored; "
            f"{_cost(model, task)}"
        )
        return study_task(model, name, task, _starts(model, name, tasks), components, others=others)


def _cost(model: Model, task: Task) -> str:
    edits = SWEEPS * (min(model.cfg.d_model, len(task.tokens) * 2 * model.cfg.n_layers) + 1)
    seconds = max(1, round(estimate_seconds(model, task, edits)))
    return f"at most {edits} edits in {SWEEPS} sweeps, about {seconds} s"


def _starts(model: Model, name: str, tasks: Mapping[str, Task]) -> dict[str, torch.Tensor]:
    """Starts of generated text: the same prompt, the next prompt, and BOS if there is one."""
    names, task = list(tasks), tasks[name]
    own, bos = task.tokens[: task.prompt_length], getattr(model.tokenizer, "bos_token_id", None)
    if len(names) > 1:
        other = names[(names.index(name) + 1) % len(names)]
        ids = tasks[other].tokens[: tasks[other].prompt_length]
    else:
        candidates = [
            (key, torch.tensor(prompt_tokens(model, text)))
            for key, text in list(SHORTFORM_PROMPTS.items())[:2]
        ]
        other, ids = next((key, ids) for key, ids in candidates if not torch.equal(ids, own))
    starts = {"its own prompt": own, f"another prompt ({other})": ids}
    return starts if bos is None else starts | {"no prompt": torch.tensor([bos])}


def _page(
    studies: Sequence[Study],
    comparison: Comparison | None,
    contrast: Contrast | None,
    check: SelfCheck,
    cdn: bool,
    seconds: float | None,
    data: str,
) -> str:
    source = studies[0].sweep.source
    assert source is not None  # `measure` always sets it
    titles = {"told": "What can be told"} | {s.name: s.title for s in SECTIONS}
    titles["texts"] = "Text from inside"
    if comparison:
        titles |= {"held-out": "Held-out texts", "prompts": "Several prompts"}
    if contrast:
        titles["special"] = "Special directions"
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in titles.items())
    body = "\n".join(
        [
            *(section(part, studies) for part in SECTIONS),
            texts(studies),
            held_out(comparison) + several(comparison) if comparison else "",
            special(contrast) if contrast else "",
        ]
    )
    content = f"""<h1>What <bdi>{escape(source.model)}</bdi> writes to its residual stream</h1>
<p>The shortform's experiments on Llama-3-8B, repeated on this model. Each section says what the
shortform saw. The text in bold says what was measured here.</p>
<nav>{links}</nav>
{told(comparison)}
{_prompts(studies, data)}
{body}
<h2>Provenance</h2>
{table({key: [value] for key, value in _provenance_rows(source, check, seconds).items()})}
<footer>The tables (CSV) and results (safetensors) of this run are in
<a href="{data}"><code>{data}</code></a>. Probabilities are of the whole continuation. Logarithms
are natural. Sizes are root-mean-square L2 norms over sites and positions.</footer>"""
    return page(f"Writes of {source.model}", content, cdn=cdn)


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
    if len(studies) <= MANY:
        columns = table({"": [s.name for s in studies]} | _columns(numbers))
        return "".join(prompt_text(s) for s in studies) + columns
    links = "".join(
        f'<a href="{data}{file_name(s.name)}/{FIGURES}">{escape(s.name)}</a> ' for s in studies
    )
    rows = {"": list(numbers[0])} | {
        s.name: list(own.values()) for s, own in zip(studies, numbers, strict=True)
    }
    return (
        f"<details open><summary>One prompt at a time</summary><nav>{links}</nav></details>"
        f"<details><summary>All numbers of {len(studies)} prompts</summary>{table(rows)}</details>"
    )


def _provenance_rows(source: Provenance, check: SelfCheck, seconds: float | None) -> dict[str, str]:
    rows = {key: value for key, value in asdict(source).items() if isinstance(value, str)}
    rows["torch"] = (
        f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}"
    )
    rows["self-check"] = " ".join(repr(check).split())
    rows["notes"] = "; ".join(source.notes) or "none"
    return rows | ({"time": f"{seconds:.1f} s"} if seconds is not None else {})


def _columns(numbers: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    return {key: [column[key] for column in numbers] for key in numbers[0]}
