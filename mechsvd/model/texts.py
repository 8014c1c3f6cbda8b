"""Many texts as tasks: from a file, a list, rows of a dataset, or chat messages."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mechsvd.ambient import plain
from mechsvd.checks import warn
from mechsvd.model.sites import Model, require_model
from mechsvd.model.tasks import Task

KEYS = ("name", "prompt", "continuation", "wrong", "messages", "group")
TEXT = "text"  # another name of `prompt`, as in many datasets


@dataclass(frozen=True)
class Text:
    """A text before it is tokenised, and where it was found.

    Attributes:
        continuation: None for what the model continues with greedily.
        wrong: texts of single tokens, for a choice.
        messages: of a chat, instead of a prompt.
        group: its kind, for a contrast of kinds.
        place: for messages, such as "text 3 (line 5 of prompts.txt)".
    """

    place: str
    name: str = ""
    prompt: str = ""
    continuation: str | None = None
    wrong: str | list[str] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    group: str = ""


@plain
def tasks_from(
    model: Model,
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    max_new_tokens: int = 40,
    prepend_bos: bool | None = None,
    truncate: Literal["left"] | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> list[Task]:
    """Make a task of each text of a file, a list or a dataset.

    All texts are read and checked before the model runs.

    Args:
        source: a file with one prompt per line, of JSON lines or of one JSON document; or a list.
            An entry is a prompt, a pair of prompt and continuation, or an object (a row of a
            dataset) with `prompt` (or `text`) and, as wanted, `continuation`, `wrong` (a choice between single
            tokens; see `Task.from_choice`) and `name`. Instead of `prompt` it may have `messages`,
            a chat that the tokenizer's template turns into text.
        max_new_tokens, prepend_bos, truncate: as in `Task.from_text`.
        on_bad: "skip" leaves out bad texts, with a warning that names them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: a bad text, named by its number and line; or no texts.

    Example:
        >>> [len(one.tokens) for one in ms.tasks_from(model, ["I believe", "We"], max_new_tokens=3)]
        [6, 6]
    """
    require_model(model)
    if on_bad not in ("error", "skip"):
        raise ValueError(f"`on_bad` is {on_bad!r:.40}, but must be 'error' or 'skip'.")
    tasks: list[Task] = []
    bad: list[str] = []
    made: list[tuple[Text, Task]] = []
    for text in read_texts(source, bad if on_bad == "skip" else None):
        try:
            made.append((text, task_of(model, text, max_new_tokens, prepend_bos, truncate)))
        except (ValueError, TypeError) as error:
            problem = f"{text.place}: {error}"
            if on_bad == "error":
                raise type(error)(problem) from error
            bad.append(problem)
    tasks = [replace(task, name=text.name) for text, task in made]
    if bad:
        warn(f"{len(bad)} texts are left out: {'; '.join(bad[:5])}")
    if not tasks:
        raise ValueError("There are no texts: the source is empty, or none of them is good.")
    seen: dict[tuple[int, ...], str] = {}
    for text, task in made:
        first = seen.setdefault(tuple(task.tokens.tolist()), text.place)
        if first != text.place:
            warn(f"{text.place} has the same tokens as {first}; an interval counts both.")
    return tasks


def read_texts(
    source: str | os.PathLike[str] | Iterable[Any], bad: list[str] | None = None
) -> Iterator[Text]:
    """Read the texts of a source; see `tasks_from`.

    Args:
        bad: collects what is wrong with bad texts; None to raise it.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `tasks_from`.
    """
    for place, name, entry in read_entries(source):
        try:
            yield text_of(place, name, entry)
        except (ValueError, TypeError) as error:
            if bad is None:
                raise
            bad.append(str(error))


def read_entries(source: Any) -> Iterator[tuple[str, str, Any]]:
    """Each entry with its place and, in a JSON object, its name; those of a file one by one."""
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, Mapping):
            for number, (name, entry) in enumerate(source.items()):
                yield f"text {number} ({name})", str(name), entry
        elif isinstance(source, Iterable):
            for number, entry in enumerate(source):
                yield f"text {number}", "", entry
        else:
            raise TypeError(
                f"`source` must be a file or a list of texts, but is {type(source).__name__}."
            )
        return
    path = file_of_texts(source)
    if path.suffix == ".json":
        yield from _entries_of_json(path, path.read_text(encoding="utf-8-sig"))
        return
    with open(path, encoding="utf-8-sig") as file:
        lines = ((i, line.rstrip("\n")) for i, line in enumerate(file, start=1) if line.strip())
        for number, (line_number, line) in enumerate(lines):
            place = f"text {number} (line {line_number} of {path.name})"
            yield place, "", _entry_of_line(place, line) if path.suffix == ".jsonl" else line


def file_of_texts(path: str | os.PathLike[str]) -> Path:
    """The path of a file of texts.

    Raises:
        FileNotFoundError: there is none.
    """
    found = Path(path).expanduser()
    try:
        is_file = found.is_file()
    except (OSError, ValueError):  # a text, too long for a name
        is_file = False
    if not is_file:
        raise FileNotFoundError(
            f"There is no file of texts {found!s:.200}; give a text itself in a list, [text]."
        )
    return found


def _entry_of_line(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}.") from error


def _entries_of_json(path: Path, content: str) -> Iterator[tuple[str, str, Any]]:
    try:
        document = json.loads(content, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict | list):
        raise ValueError(f"{path} must hold an object or a list of texts.")
    yield from read_entries(document)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"The file names {sorted(repeated)} more than once; name each text once.")
    return dict(pairs)


def text_of(place: str, name: str, entry: Any) -> Text:
    """The text of one entry of a source.

    Raises:
        ValueError, TypeError: it is no text, with its place.
    """
    if isinstance(entry, str):
        entry = {"prompt": entry}
    elif isinstance(entry, list | tuple) and len(entry) == 2:
        entry = dict(zip(("prompt", "continuation"), entry, strict=True))
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{place} must be a prompt, a pair of prompt and continuation, or an object, "
            f"but is {entry!r:.60}."
        )
    if entry.get("prompt") is None and entry.get(TEXT) is not None:
        entry = {**entry, "prompt": entry[TEXT]}
    fields = {key: entry[key] for key in KEYS if entry.get(key) is not None}
    messages = tuple(fields.pop("messages", ()))
    fields.setdefault("name", name)
    if not messages and not fields.get("prompt"):
        raise ValueError(f"{place} has no `prompt`: it is empty or missing.")
    for key in ("name", "prompt", "continuation", "group"):
        if key in fields and not isinstance(fields[key], str):
            raise TypeError(f"{place}: `{key}` must be text, but is {fields[key]!r:.40}.")
    if fields.get("continuation") == "":
        raise ValueError(f"{place}: `continuation` is empty; leave it out for greedy text.")
    if "wrong" in fields and "continuation" not in fields:
        raise ValueError(f"{place}: `wrong` needs `continuation`, the right token.")
    return Text(place, messages=messages, **fields)


def prompt_of(model: Model, text: Text) -> str:
    """The prompt of a text; of chat messages, what the tokenizer's template makes of them.

    Raises:
        ValueError: messages, but no template.
    """
    if not text.messages:
        return text.prompt
    if not getattr(model.tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template; give a `prompt`")
    prompt = model.tokenizer.apply_chat_template(
        list(text.messages), tokenize=False, add_generation_prompt=True
    )
    bos = getattr(model.tokenizer, "bos_token", None)
    # the task puts it there
    return prompt[len(bos) :] if bos and prompt.startswith(bos) else prompt


def task_of(
    model: Model,
    text: Text,
    max_new_tokens: int,
    prepend_bos: bool | None = None,
    truncate: Literal["left"] | None = None,
) -> Task:
    """Make the task of one text; see `tasks_from`.

    Raises:
        ValueError, TypeError: it does not fit the model.
    """
    prompt = prompt_of(model, text)
    if text.wrong is not None and text.continuation is not None:
        return Task.from_choice(
            model,
            prompt,
            text.continuation,
            text.wrong,
            prepend_bos=prepend_bos,
            truncate=truncate,
        )
    return Task.from_text(
        model,
        prompt,
        text.continuation,
        max_new_tokens=max_new_tokens,
        prepend_bos=prepend_bos,
        truncate=truncate,
    )
