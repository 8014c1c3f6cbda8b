"""The texts that a command runs on."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from mechsvd.checks import about
from mechsvd.model.loading import EMBEDDED
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.model.texts import Text, read_texts, task_of
from mechsvd.model.tokenization import prompt_tokens

KIND_TEXTS, KIND_TOKENS = 8, 28  # of each kind of the embedded model's language


def texts_of(options: argparse.Namespace) -> dict[str, Text]:
    """The texts that were asked for, by their names; those of the shortform by default.

    Raises:
        ValueError: options that exclude each other, or an empty text.
    """
    if options.prompts:
        if options.prompt or options.continuation:
            raise ValueError(
                "`--prompts` stands alone: put the prompts and continuations of --prompt "
                "into the file."
            )
        return _named(options.prompts)
    if not options.prompt:
        if options.continuation:
            raise ValueError("`--continuation` needs a `--prompt` that it continues.")
        return {name: Text(name, name, prompt) for name, prompt in SHORTFORM_PROMPTS.items()}
    if not all([*options.prompt, *(options.continuation or [])]):
        raise ValueError("A --prompt or --continuation is empty; give some text.")
    continuations = options.continuation or [None] * len(options.prompt)
    if len(continuations) != len(options.prompt):
        raise ValueError(
            f"{len(options.prompt)} --prompt but {len(continuations)} --continuation; "
            "give one for each, or none."
        )
    return {
        f"prompt-{i}": Text(f"prompt-{i}", "", prompt, continuation)
        for i, (prompt, continuation) in enumerate(
            zip(options.prompt, continuations, strict=True), start=1
        )
    }


def task(model: Any, text: Text, options: argparse.Namespace) -> Task:
    """The task of a text, as the options say."""
    return task_of(model, text, options.max_new_tokens, truncate=options.truncate)


def tasks_of(model: Any, options: argparse.Namespace) -> list[Task]:
    """The tasks of all texts; notes about one begin with its name."""
    tasks = []
    for name, text in texts_of(options).items():
        with about(name):
            tasks.append(task(model, text, options))
    return tasks


def has_own_texts(options: argparse.Namespace) -> bool:
    """Whether a command asks for the embedded model and for no prompts, so for its own language."""
    return options.model == EMBEDDED and not (options.prompt or options.prompts)


def kinds_of(texts: dict[str, Text]) -> dict[str, list[str]]:
    """The names of the texts of each group, if the file gives groups."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        if text.group:
            groups.setdefault(text.group, []).append(name)
    return groups


def embedded_kinds(model: Any) -> dict[str, list[Task]]:
    """Texts of the four shapes of the embedded model's language, cut to one length."""
    from mechsvd.demo.language import kinds

    found: dict[str, list[Task]] = {}
    for shape, texts in kinds(KIND_TEXTS).items():
        ids = [torch.tensor(prompt_tokens(model, text)) for text in texts]
        cut = {tuple(one[:KIND_TOKENS].tolist()) for one in ids if len(one) >= KIND_TOKENS}
        found[shape] = [Task(torch.tensor(one), KIND_TOKENS // 3) for one in sorted(cut)]
    return found


def _named(path: Path) -> dict[str, Text]:
    """The texts of a file by their names, each of which makes a folder."""
    texts: dict[str, Text] = {}
    for i, text in enumerate(read_texts(path), start=1):
        name = text.name or f"prompt-{i}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise ValueError(
                f"{text.place}: the name {name!r} must be letters, digits, - and _, "
                "beginning with a letter or digit, because it makes a folder."
            )
        if name in texts:
            raise ValueError(f"{text.place} is named {name!r}, as {texts[name].place} is.")
        texts[name] = text
    if not texts:
        raise ValueError(
            f'{path} holds no prompts: give one per line, or in JSON {{"name": "prompt", …}}.'
        )
    return texts
