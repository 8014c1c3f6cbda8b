"""Many texts as tasks: from a file, a list, a table, tokens of a batch, or chat messages."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mechsvd.checks import warn, with_plain_arguments
from mechsvd.model.padding import unpadded
from mechsvd.model.sites import Model, require_model
from mechsvd.model.sources import FIELDS, IDS, KEYS, LABELS, MASK, TEXT, plain, read_entries
from mechsvd.model.tasks import Task, task_of_tokens


@dataclass(frozen=True)
class Text:
    """A text before it is tokenised, and where it was found.

    Attributes:
        continuation: None for what the model continues with greedily.
        wrong: texts of single tokens, for a choice.
        messages: of a chat, instead of a prompt.
        group: its kind, for a contrast of kinds.
        tokens: instead of a prompt, without pads; the last `scored` of them are the continuation,
            or none where it is greedy.
        place: for messages, such as "text 3 (line 5 of prompts.txt)".
    """

    place: str
    name: str = ""
    prompt: str = ""
    continuation: str | None = None
    wrong: str | list[str] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    group: str = ""
    tokens: tuple[int, ...] = ()
    scored: int = 0


@with_plain_arguments
def tasks_from(
    model: Model,
    source: Any,
    *,
    max_new_tokens: int = 40,
    prepend_bos: bool | None = None,
    truncate: Literal["left"] | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> list[Task]:
    """Make a task of each text of a file, a list or a dataset.

    All texts are read and checked before the model runs.

    Args:
        source: a file with one prompt per line, of JSON lines or of one JSON document, or a CSV, TSV
            or Parquet table; a list; a dict of texts by their names; or a table, such as a data
            frame, a dict of columns or a dataset. An entry is a prompt, a pair of prompt and
            continuation, or a row with `prompt` (or `text`) and, as wanted, `continuation`, `wrong`
            (a choice between single tokens; see `Task.from_choice`) and `name`. Instead of
            `prompt` it may have `messages`, a chat that the tokenizer's template turns into text;
            or `input_ids`, as they come from a tokenizer, with `attention_mask` (pads are left
            out) and `labels` (what they label is the continuation).
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


def read_texts(source: Any, bad: list[str] | None = None) -> Iterator[Text]:
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


def text_of(place: str, name: str, entry: Any) -> Text:
    """The text of one entry of a source.

    Raises:
        ValueError, TypeError: it is no text, with its place.
    """
    if isinstance(entry, Exception):  # the source could not read it
        raise type(entry)(f"{place} {entry}") from entry
    entry = plain(entry)
    if isinstance(entry, str):
        entry = {"prompt": entry}
    elif isinstance(entry, list | tuple) and len(entry) == 2:
        entry = dict(zip(("prompt", "continuation"), entry, strict=True))
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{place} must be a prompt, a pair of prompt and continuation, or an object, "
            f"but is {entry!r:.60}."
        )
    row = {k: value for k in FIELDS if k in entry and (value := plain(entry[k])) is not None}
    if row.get("prompt") is None and row.get(TEXT) is not None:
        row["prompt"] = row[TEXT]
    if IDS in row and not (
        {"prompt", "messages"} & {*row} and not isinstance(row.get(LABELS), list)
    ):
        tokens, scored = unpadded(place, row[IDS], row.get(MASK), row.get(LABELS))
        if not scored and (beside := {"continuation", "wrong"} & {*row}):
            raise ValueError(
                f"{place}: `{min(beside)}` beside `{IDS}` says nothing of tokens; give `{LABELS}` "
                "for what is scored, or a `prompt`."
            )
        return Text(
            place, row.get("name", name), group=row.get("group", ""), tokens=tokens, scored=scored
        )
    fields = {key: row[key] for key in KEYS if key in row}
    messages = tuple(fields.pop("messages", ()))
    fields.setdefault("name", name)
    _require_fields(place, fields, bool(messages))
    return Text(place, messages=messages, **fields)


def _require_fields(place: str, fields: Mapping[str, Any], is_chat: bool) -> None:
    if not is_chat and not fields.get("prompt"):
        raise ValueError(f"{place} has no `prompt`: it is empty or missing.")
    for key in ("name", "prompt", "continuation", "group"):
        if key in fields and not isinstance(fields[key], str):
            raise TypeError(f"{place}: `{key}` must be text, but is {fields[key]!r:.40}.")
    if fields.get("continuation") == "":
        raise ValueError(f"{place}: `continuation` is empty; leave it out for greedy text.")
    if "wrong" in fields and "continuation" not in fields:
        raise ValueError(f"{place}: `wrong` needs `continuation`, the right token.")


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
    if text.tokens:
        if prepend_bos is not None:
            raise ValueError("`prepend_bos` is for texts; tokens are taken as they are.")
        return task_of_tokens(model, text.tokens, text.scored, max_new_tokens, truncate)
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
