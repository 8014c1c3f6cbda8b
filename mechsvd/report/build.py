"""The whole experiment in one run, which goes on where an earlier one was stopped."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mechsvd.checks import about, warn
from mechsvd.engine.progress import steps
from mechsvd.engine.resuming import describe_value, keeping
from mechsvd.engine.session import open_session
from mechsvd.experiments.contrast_results import Contrast
from mechsvd.experiments.random_texts import ALPHA
from mechsvd.experiments.statistics import smallest_p
from mechsvd.model.identity import provenance_of
from mechsvd.model.selfcheck import SelfCheck, self_check
from mechsvd.model.sites import Model
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.model.tokenization import prompt_tokens
from mechsvd.report.choices import Choices
from mechsvd.report.folders import appeared, page_stamp, require_free, require_writable
from mechsvd.report.pages import end_growing, write_growing, write_report
from mechsvd.report.plan import plan_report, study_steps, together_steps
from mechsvd.report.study import (
    WHOLE,
    Comparison,
    Study,
    compare,
    compare_groups,
    study_task,
    with_held_out,
)
from mechsvd.version import __version__

TOGETHER = ("told", "held-out", "prompts")  # parts that compare several prompts
LEAST = 4  # texts of a kind, for a contrast
OTHERS = 8  # prompts whose gradients join those of each prompt
PATIENCE = 10  # times as long as writing the growing page takes, until it is written again


def reproduce(
    model: Model,
    tasks: Mapping[str, Callable[[], Task]],
    out: Path,
    *,
    groups: Mapping[str, Sequence[Task | str]] | None = None,
    choices: Choices = WHOLE,
    cdn: bool = False,
    replace: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run the whole experiment on several prompts, or chosen parts, and write the report.

    Args:
        tasks: functions that make the tasks, by name.
        groups: tasks, or names of prompts, by their kind, whose special directions are looked for.
        replace: put the page in the place of an earlier run's.
        say: is called with one line per step.

    Raises:
        FileExistsError: the folder has a page of an earlier run, and `replace` is not set.
        OSError: the folder cannot be written. Both are checked before anything is computed.
    """
    started = time.perf_counter()
    require_writable(out)
    if not replace:
        require_free(out)
    with open_session(
        model, **choices.options
    ):  # common warnings come once, and the weights are read once
        made = {name: _made(name, make) for name, make in tasks.items()}
        kinds = _kinds(groups or {}, made) if "special" in choices else {}  # before anything long
        kept = _unfinished(model, made, kinds, choices, out)
        if not replace:
            require_free(out, kept)
        if kept.exists():
            say(f"Going on from {kept}, which a run that was stopped left.")
        say(str(plan_report(model, made, kinds, choices)))
        if untold := _too_few(len(made), "told" in choices and not kinds):
            say(untold)
        earlier = page_stamp(out)
        with keeping(kept, "reproduce", _arguments(made, kinds, choices), provenance_of(model)):
            check = self_check(model)
            studies = _studies(model, made, choices, say, check, out, cdn)
            comparison, contrast = _together(model, studies, kinds, choices, say)
        if comparison and comparison.held_out:
            studies = with_held_out(studies, comparison.held_out)
        if not replace and page_stamp(out) != earlier:
            raise FileExistsError(appeared(out, kept))
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


def _arguments(
    made: Mapping[str, Task], kinds: Mapping[str, Sequence[Task]], choices: Choices
) -> dict[str, Any]:
    """What the results depend on."""
    options = {k: v for k, v in choices.options.items() if k != "progress"}
    return {"tasks": made, "groups": kinds} | vars(choices) | {"options": options}


def _too_few(prompts: int, is_asked: bool) -> str:
    """What so few prompts cannot tell, whatever they show; empty if they are enough."""
    if not is_asked or prompts < 2 or smallest_p(prompts) <= ALPHA:
        return ""
    enough = next(n for n in count(2) if smallest_p(n) <= ALPHA)
    return (
        f"{prompts} prompts cannot tell anything of other texts from chance (p ≤ {ALPHA:g}); "
        f"{enough} can."
    )


def _unfinished(
    model: Model,
    made: Mapping[str, Task],
    kinds: Mapping[str, Sequence[Task]],
    choices: Choices,
    out: Path,
) -> Path:
    """The file that keeps what is done until the report is complete; one per command."""
    asked = [_arguments(made, kinds, choices), provenance_of(model), __version__]
    digest = hashlib.sha256(json.dumps(describe_value(asked)).encode()).hexdigest()[:8]
    return out / f"report-{digest}.unfinished"


def _studies(
    model: Model,
    made: Mapping[str, Task],
    choices: Choices,
    say: Callable[[str], None],
    check: SelfCheck,
    out: Path,
    cdn: bool,
) -> list[Study]:
    """The study of each prompt; the page of those that are done grows meanwhile."""
    studies: list[Study] = []
    due = 0.0
    for name in made:
        studies.append(_study(model, name, made, choices, say))
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
    choices: Choices,
    say: Callable[[str], None],
) -> tuple[Comparison | None, Contrast | None]:
    comparison = contrast = None
    if len(studies) > 1 and any(part in choices for part in TOGETHER):
        name, tasks = f"{len(studies)} prompts together", [study.task for study in studies]
        costs, progress = (
            together_steps(model, tasks, kinds, choices),
            choices.options.get("progress"),
        )
        say(f"{name}: {', '.join([*costs, 'overlaps'])}")
        with about("several prompts"), steps(name, costs, progress):
            every = [task for own in kinds.values() for task in own]
            comparison = compare(model, studies, choices, more=every)
    if kinds:
        say("special directions of kinds of text")
        with about("special directions"):
            contrast = compare_groups(model, kinds, choices)
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
    choices: Choices,
    say: Callable[[str], None],
) -> Study:
    task, place = tasks[name], f"prompt {[*tasks].index(name) + 1} of {len(tasks)}"
    others = [other for other in tasks.values() if other is not task][:OTHERS]
    say(
        f"{name}, {place}: {task.prompt_length} tokens of the prompt, "
        f"{len(task.continuation)} scored"
    )
    costs, progress = study_steps(model, task, choices), choices.options.get("progress")
    with about(name), steps(f"{name}, {place}", costs, progress):
        starts = _starts(model, name, tasks)
        return study_task(model, name, task, starts, choices, others=others)


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
