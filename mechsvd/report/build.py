"""The whole experiment in one run, which goes on where an earlier one was stopped."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mechsvd.checks import about, warn
from mechsvd.engine.resuming import describe_value, keeping
from mechsvd.engine.session import open_session
from mechsvd.experiments.contrast_results import Contrast
from mechsvd.model.identity import provenance_of
from mechsvd.model.selfcheck import SelfCheck, self_check
from mechsvd.model.sites import COMPONENTS, Model
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.model.tokenization import prompt_tokens
from mechsvd.report.folders import require_writable
from mechsvd.report.pages import end_growing, write_growing, write_report
from mechsvd.report.plan import plan_report
from mechsvd.report.study import (
    Comparison,
    Study,
    compare,
    compare_groups,
    study_task,
    with_held_out,
)
from mechsvd.version import __version__

LEAST = 4  # texts of a kind, for a contrast
OTHERS = 8  # prompts whose gradients join those of each prompt
PATIENCE = 10  # times as long as writing the growing page takes, until it is written again


def reproduce(
    model: Model,
    tasks: Mapping[str, Callable[[], Task]],
    out: Path,
    *,
    groups: Mapping[str, Sequence[Task | str]] | None = None,
    components: Sequence[str] = COMPONENTS,
    quick: bool = False,
    cdn: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run the whole experiment on several prompts and write the report.

    Args:
        tasks: functions that make the tasks, by name.
        groups: tasks, or names of prompts, by their kind, whose special directions are looked for.
        quick: answer the same questions from few ranks, and state the error.
        say: is called with one line per step.

    Raises:
        OSError: the folder cannot be written. This is checked before anything is computed.
    """
    started = time.perf_counter()
    require_writable(out)
    with open_session(model):  # common warnings come once, and the weights are read once
        made = {name: _made(name, make) for name, make in tasks.items()}
        kinds = _kinds(groups or {}, made)  # before anything long runs
        kept = _unfinished(model, made, kinds, [*components, f"quick {quick}"], out)
        if kept.exists():
            say(f"Going on from {kept}, which a run that was stopped left.")
        say(str(plan_report(model, made, kinds, quick)))
        arguments = {"tasks": made, "groups": kinds, "components": [*components], "quick": quick}
        with keeping(kept, "reproduce", arguments, provenance_of(model)):
            check = self_check(model)
            studies = _studies(model, made, components, quick, say, check, out, cdn)
            comparison, contrast = _together(model, studies, kinds, components, quick, say)
        if comparison:
            studies = with_held_out(studies, comparison.held_out)
        seconds = time.perf_counter() - started
        path = write_report(
            studies,
            check,
            out,
            comparison=comparison,
            contrast=contrast,
            cdn=cdn,
            seconds=seconds,
        )
    end_growing(out)
    kept.unlink(missing_ok=True)
    say(f"{path} after {time.perf_counter() - started:.0f} s")
    return path


def _unfinished(
    model: Model,
    made: Mapping[str, Task],
    kinds: Mapping[str, Sequence[Task]],
    components: Sequence[str],
    out: Path,
) -> Path:
    """The file that keeps what is done until the report is complete; one per command."""
    asked = describe_value([made, kinds, [*components], provenance_of(model), __version__])
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    return out / f"report-{digest}.unfinished"


def _studies(
    model: Model,
    made: Mapping[str, Task],
    components: Sequence[str],
    quick: bool,
    say: Callable[[str], None],
    check: SelfCheck,
    out: Path,
    cdn: bool,
) -> list[Study]:
    """The study of each prompt; the page of those that are done grows meanwhile."""
    studies: list[Study] = []
    due = 0.0
    for name in made:
        studies.append(_study(model, name, made, components, quick, say))
        if len(made) > len(studies) and time.perf_counter() >= due:
            started = time.perf_counter()
            path = write_growing(studies, check, out, of=len(made), cdn=cdn)
            if not due:
                say(f"{path} shows the prompts that are done.")
            ended = time.perf_counter()
            due = ended + PATIENCE * (ended - started)
    return studies


def _together(
    model: Model,
    studies: Sequence[Study],
    kinds: Mapping[str, Sequence[Task]],
    components: Sequence[str],
    quick: bool,
    say: Callable[[str], None],
) -> tuple[Comparison | None, Contrast | None]:
    comparison = contrast = None
    if len(studies) > 1:
        say("several prompts: held-out directions, overlaps, and texts of random tokens")
        with about("several prompts"):
            every = [task for own in kinds.values() for task in own]
            comparison = compare(model, studies, components, more=every, quick=quick)
    if kinds:
        say("special directions of kinds of text")
        with about("special directions"):
            contrast = compare_groups(model, kinds, components)
    return comparison, contrast


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
    quick: bool,
    say: Callable[[str], None],
) -> Study:
    task = tasks[name]
    others = [other for other in tasks.values() if other is not task][:OTHERS]
    with about(name):
        say(
            f"{name}, prompt {[*tasks].index(name) + 1} of {len(tasks)}: {task.prompt_length} "
            f"tokens of the prompt, {len(task.continuation)} scored"
        )
        return study_task(
            model, name, task, _starts(model, name, tasks), components, others=others, quick=quick
        )


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
