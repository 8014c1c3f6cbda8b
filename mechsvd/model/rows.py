"""Rows: documents cut into rows of tokens, and the place in a corpus where a run stands."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechsvd.checks import is_whole, require_whole, with_plain_arguments
from mechsvd.fields import require_between, require_declared
from mechsvd.model.corpus import Document, to_hash, tokens_of
from mechsvd.model.positions import Positions, absolute_positions
from mechsvd.model.sites import Model
from mechsvd.results import Result, result


@result
class Layout(Result):
    """How documents become rows of tokens, and which positions count.

    Attributes:
        context: the longest row.
        packing: whether documents share rows.
        skip_bos: whether BOS does not count.
        positions: that count, in each row that has them; None for all.
        bos: the model's BOS token, if it has one.
    """

    context: int
    packing: bool
    skip_bos: bool
    positions: tuple[int, ...] | None
    bos: int | None

    def _require_values(self) -> None:
        require_between(self, ["context"], 1)
        require_between(self, ["positions", "bos"], 0)

    def kept(self, rows: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Which positions of some rows count."""
        kept = torch.ones(rows.shape, dtype=torch.bool)
        if self.positions is not None:
            kept[:] = False
            kept[:, [p for p in self.positions if p < rows.shape[1]]] = True
        if self.skip_bos and self.bos is not None:
            starts = slice(None) if self.packing else slice(1)  # elsewhere it is text
            kept[:, starts] &= rows[:, starts] != self.bos
        return kept


@result
class Place(Result):
    """How far the documents of a source have been read and run, to go on from there.

    Attributes:
        shard: (i, n) for documents i, i + n, i + 2n, … of the source.
        documents, tokens: read and run so far; a BOS that begins a later row counts as a token.
        empty, split: documents without any text; and those longer than a row, unless packed.
        rest: tokens that have been read, but not run.
        fingerprint: SHA-256 of the documents read.
    """

    shard: tuple[int, int]
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    split: int = 0
    rest: Int[Tensor, " pos"] = torch.empty(0, dtype=torch.int64)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        require_declared(self)
        require_between(self, ["documents", "tokens", "empty", "split"], 0)

    def _require_values(self) -> None:
        require_between(self, ["rest", "shard"], 0)
        first_place(self.shard)
        if self.empty + self.split > self.documents or (self.documents and not self.fingerprint):
            raise ValueError(
                f"A Place has {self.empty} empty and {self.split} split of {self.documents} documents"
                ", and a fingerprint of them; this one cannot be."
            )


class Row(NamedTuple):
    """Tokens that run together, and the place of the last document that was read for them."""

    tokens: Int[Tensor, " pos"]
    document: str


class Window(NamedTuple):
    """Rows, and the place after them."""

    rows: list[Row]
    place: Place


@with_plain_arguments
def layout_of(
    model: Model, context: Any, packing: bool, skip_bos: bool, positions: Positions
) -> Layout:
    """Describe how documents become rows, by default of up to the model's whole context.

    Raises:
        TypeError, ValueError: an option that cannot be.
    """
    n_ctx = int(model.cfg.n_ctx)
    return Layout(
        n_ctx if context is None else require_whole("context", context, 2, n_ctx),
        packing,
        skip_bos,
        absolute_positions(positions),
        getattr(model.tokenizer, "bos_token_id", None),
    )


def first_place(shard: Any) -> Place:
    """The place before the first document of a shard; of all documents for None.

    Raises:
        ValueError: not (i, n) with i < n.
    """
    pair = (0, 1) if shard is None else tuple(shard) if isinstance(shard, tuple | list) else ()
    if len(pair) != 2 or not is_whole(pair[1], 1) or not is_whole(pair[0], 0, int(pair[1]) - 1):
        raise ValueError(
            f"`shard` is {shard!r:.40}, but must be (i, n): documents i, i + n, i + 2n, … of the "
            "source, with i from 0 to n - 1."
        )
    return Place((int(pair[0]), int(pair[1])))


def windows(
    documents: Iterator[Document], start: Place, layout: Layout, size: int
) -> Iterator[Window]:
    """Cut documents into rows, and rows into windows of about `size` tokens, from a place on.

    The cuts depend on the documents alone, not on where a run begins.

    Raises:
        ValueError: the documents before the place are not those that were read for it.
    """
    digest = _skip(documents, start)
    place, rest, lead = start, start.rest, start.rest[:0]
    rows: list[Row] = []
    tokens, name, more = 0, "the text that the checkpoint is in", True
    while more or len(rest):
        if more and len(lead) + len(rest) < (layout.context if layout.packing else 1):
            if more := (document := next(documents, None)) is not None:
                new, name = tokens_of(document), document.place
                digest.update(to_hash(document))
                place = _counted(place, len(new), layout)
                rest, lead = torch.cat([lead, rest, new]), lead[:0]
            continue
        room = layout.context - len(lead)
        row, rest = torch.cat([lead, rest[:room]]), rest[room:]
        lead = _lead(row, rest, layout)
        rows.append(Row(row, name))
        tokens += len(row)
        if tokens >= size:
            place = _at(place, tokens, torch.cat([lead, rest]), digest)
            yield Window(rows, place)
            rows, tokens = [], 0
    yield Window(rows, _at(place, tokens, rest, digest))


def require_end(documents: Iterator[Document], place: Place) -> None:
    """Refuse a source that goes on after a finished place, or begins with other documents.

    Raises:
        ValueError: saying so.
    """
    _skip(documents, place)
    if next(documents, None) is not None:
        raise ValueError(
            f"The checkpoint is finished after {place.documents} documents, but the source has "
            "more; give the same source, or another path."
        )


def _lead(row: Tensor, rest: Tensor, layout: Layout) -> Tensor:
    """The BOS that begins the next row, where the text goes on in it and had one."""
    had_bos = layout.bos is not None and int(row[0]) == layout.bos
    return row[:1] if had_bos and len(rest) and int(rest[0]) != layout.bos else row[:0]


def _at(place: Place, tokens: int, rest: Tensor, digest: Any) -> Place:
    return replace(
        place, tokens=place.tokens + tokens, rest=rest.clone(), fingerprint=digest.hexdigest()
    )


def _counted(place: Place, length: int, layout: Layout) -> Place:
    return replace(
        place,
        documents=place.documents + 1,
        empty=place.empty + (length == 0),
        split=place.split + (length > layout.context and not layout.packing),
    )


def _skip(documents: Iterator[Document], place: Place) -> Any:
    """Read the documents before a place again, untokenised, and check that they are those."""
    digest = hashlib.sha256()
    for number in range(place.documents):
        document = next(documents, None)
        if document is None:
            raise ValueError(
                f"The source has {number} documents, but {place.documents} had been read for the "
                "checkpoint; give the same source, or another path."
            )
        digest.update(to_hash(document))
    if place.documents and digest.hexdigest() != place.fingerprint:
        raise ValueError(
            f"The first {place.documents} documents are not those that were read for the "
            f"checkpoint (SHA-256 {digest.hexdigest()[:12]}… and {place.fingerprint[:12]}…); "
            "give the same source, or another path."
        )
    return digest
