"""Corpora: documents read one by one from tasks, texts or a file, and tokenised when they run."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mechsvd.model.padding import warn_pads
from mechsvd.model.sites import Model
from mechsvd.model.sources import TEXT, read_entries
from mechsvd.model.tasks import Task, require_known
from mechsvd.model.texts import prompt_of, text_of
from mechsvd.model.tokenization import prompt_tokens, warn_unusual_start


class Document(NamedTuple):
    """A document of a source.

    Attributes:
        place: for messages, such as "text 3 (line 5 of corpus.txt)".
        raw: what a fingerprint is of.
        read: gives its tokens; none of a document without any text.
    """

    place: str
    raw: bytes
    read: Callable[[], Int[Tensor, " pos"]]


def read_documents(model: Model, source: Any, shard: tuple[int, int]) -> Iterator[Document]:
    """Read the documents of a shard one by one: tasks, texts, or a file of texts.

    Raises:
        ValueError, TypeError: a document that is none of these.
    """
    entries = read_entries([source] if isinstance(source, Task) else source)
    is_first = True
    for place, name, entry in islice(entries, shard[0], None, shard[1]):
        if not isinstance(entry, Task):
            yield _document_of_text(model, place, name, entry)
            continue
        if is_first:  # once, not for each of very many
            warn_unusual_start(model, entry.tokens[:2].tolist(), entry.text()[0])
        is_first = False
        if not entry.pieces:
            warn_pads(model, entry.tokens.tolist())
        yield _document_of_tokens(model, place, entry.tokens.cpu().long())


def tokens_of(document: Document) -> Int[Tensor, " pos"]:
    """The tokens of a document, with its BOS.

    Raises:
        ValueError, TypeError: it cannot be tokenised, or the model lacks a token, with its place.
    """
    try:
        return document.read()
    except (ValueError, TypeError) as error:
        raise type(error)(f"{document.place}: {error}") from error


def to_hash(document: Document) -> bytes:
    """What a fingerprint of several documents takes of each: its length and its bytes."""
    return f"{len(document.raw)}:".encode() + document.raw


def _document_of_tokens(model: Model, place: str, tokens: Int[Tensor, " pos"]) -> Document:
    def read() -> Tensor:
        require_known(model, tokens)
        return tokens

    return Document(place, b"tokens " + tokens.numpy().tobytes(), read)


def _document_of_text(model: Model, place: str, name: str, entry: Any) -> Document:
    if _is_empty(entry):
        return Document(place, b"", lambda: torch.empty(0, dtype=torch.int64))
    text = text_of(place, name, entry)
    if text.tokens:
        warn_pads(model, text.tokens)
        return _document_of_tokens(model, place, torch.tensor(text.tokens))
    whole = prompt_of(model, text) + (text.continuation or "")

    def read() -> Tensor:
        tokens = torch.tensor(prompt_tokens(model, whole))
        require_known(model, tokens)
        return tokens

    return Document(place, b"text " + whole.encode("utf-8", "surrogatepass"), read)


def _is_empty(entry: Any) -> bool:
    """Whether an entry is a text without any characters, of which datasets have many."""
    if not isinstance(entry, dict):
        return entry == "" if isinstance(entry, str) else False
    text = entry[TEXT] if entry.get("prompt") is None and TEXT in entry else entry.get("prompt")
    return text == "" and not entry.get("continuation")
