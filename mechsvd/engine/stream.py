"""Streaming: the moments of the writes over a corpus of any length, in memory that does not grow."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.checks import with_options
from mechsvd.engine.checkpoint import CheckpointFile, describe, open_checkpoint
from mechsvd.engine.memory import memory_in_words
from mechsvd.engine.processes import gather, one_voice, own_file, this_process, total
from mechsvd.engine.progress import progress_bar
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.engine.stream_results import WriteStream
from mechsvd.engine.writes import run_by_length
from mechsvd.linalg.moments import Accumulator, merge_moments, no_moments
from mechsvd.model.corpus import Document, read_documents
from mechsvd.model.finite import overflow_advice
from mechsvd.model.places import width_of
from mechsvd.model.rows import (
    Layout,
    Place,
    Row,
    first_place,
    layout_of,
    require_end,
    windows,
)
from mechsvd.model.sites import Model, Site, require_model
from mechsvd.model.tasks import Task
from mechsvd.model.text_files import file_of_texts

# tokens between two states: enough that rows of one length fill the passes, and little to run
# again after an interruption
WINDOW = 2**16


@with_options(RunOptions)
@plain
def stream_writes(
    model: Model,
    texts: Any,
    *,
    context: int | None = None,
    packing: bool = False,
    skip_bos: bool = False,
    shard: tuple[int, int] | None = None,
    **options: Unpack[RunOptions],
) -> WriteStream:
    """Collect the moments of the writes over a corpus, in memory that does not grow with it.

    Nothing is kept of single writes, so the result can be decomposed, merged and saved, but not
    shown by position. Documents are read once, as they are needed. Rows of one length run together,
    without padding. A document longer than `context` goes on in further rows, each of which begins
    with BOS if the document does: there it lacks what came before. Several processes each run a
    shard, and all of them get the stream of all documents.

    Args:
        texts: a file with one document per line, of JSON lines or a table (CSV, TSV, Parquet) with
            `prompt` or `text`; or an iterable of texts, tasks, or objects such as rows of a
            dataset; or a table, as in `tasks_from`. Empty texts are counted.
        context: longest row; by default what the model's context holds.
        packing: join the documents and cut rows of `context` tokens from them. It wastes nothing,
            but writes then depend on the documents before in the row, and so does the spectrum.
        skip_bos: leave out the BOS token; when packed, all of them.
        shard: (i, n) takes documents i, i + n, i + 2n, … of the source; see `merge`.
        options: see `RunOptions` (layers, components, at, positions, batch_size, …). Positions
            count within a row, and rows without them are left out.

            With `checkpoint`, the same call goes on where it stopped: on a CPU, with as many
            threads and if memory never ran out, to the same bits. What was read is read again, but
            not tokenised, and must be the same. A finished one gives its result at once.

    Raises:
        ValueError: no writes, a bad document, a model that fails the self-check, NaN or inf in the
            writes, or a checkpoint of another call, model or source, naming the differences.
        FileNotFoundError: no such file, or no folder for the checkpoint.
        RuntimeError: another run uses the checkpoint.
        KeyError: an unknown layer or component.

    Example:
        >>> stream = ms.stream_writes(model, ["I believe it.", "We think so."], layers=[0])
        >>> stream.documents, stream.decompose().d_model
        (2, 128)
    """
    require_model(model)
    start = _own_place(first_place(shard))
    is_file = isinstance(texts, str | os.PathLike)
    if is_file:  # a missing one is refused before all else
        file_of_texts(texts)
    path = own_file(options.pop("checkpoint", None))
    with (
        one_voice(),
        memory_in_words("stream_writes"),
        open_checkpoint(path) as file,
        open_session(model, **options) as session,
    ):
        layout = layout_of(model, context, packing, skip_bos, session.where.positions)
        arguments = {"shard": start.shard, "window": WINDOW}
        source = session.provenance(session.sites)
        saved = file.resume(describe("stream_writes", _described(layout) | arguments, source))
        state = saved.state
        stream = state if isinstance(state, WriteStream) else _begin(session, layout, start)
        documents = read_documents(model, texts, start.shard)
        is_list = isinstance(texts, Sized) and not (is_file or isinstance(texts, Mapping))
        length = len(texts) // start.shard[1] if is_list else None

        def run() -> WriteStream:
            if saved.is_finished:
                require_end(documents, stream.places[0])
                return stream
            with progress_bar(length, "documents", session.progress) as bar:
                return _run(session, stream, documents, file, bar)

        own, whole = _together(session, _described(layout) | {"shard": shard}, run)
        _require_writes(whole)
        if not saved.is_finished:
            file.save(own, is_finished=True)
        return whole


def _own_place(start: Place) -> Place:
    """The place before the first document of this process, which has a shard of the shard."""
    (i, n), (number, count) = start.shard, this_process()
    return replace(start, shard=(i + n * number, n * count))


def _described(layout: Layout) -> dict[str, Any]:
    return {field.name: getattr(layout, field.name) for field in fields(Layout)}  # type: ignore[arg-type]


def _together(
    session: Session, arguments: Mapping[str, Any], run: Callable[[], WriteStream]
) -> tuple[WriteStream, WriteStream]:
    """Run this process's shard; returns its stream, and that of all processes."""
    streams: list[WriteStream] = []

    def run_own() -> tuple[tuple[Place, ...], int]:  # the moments are summed, not sent
        streams.append(run())
        return streams[0].places, streams[0].tokens_per_pass

    sites = tuple(site.name for site in session.sites)
    parts = gather(lambda: ("stream_writes", *arguments.items(), sites), run_own)
    (own,) = streams
    if len(parts) == 1:
        return own, own
    places = tuple(place for part, _ in parts for place in part)
    moments = merge_moments([own.moments], total)
    return own, replace(own, moments=moments, places=places, tokens_per_pass=parts[0][1])


def _begin(session: Session, layout: Layout, start: Place) -> WriteStream:
    dtype = next(session.model.parameters()).dtype
    width = width_of(session.model, session.sites)
    return WriteStream(
        no_moments(len(session.sites), width, dtype),
        session.sites,
        layout,
        (start,),
        session.rows_per_pass(_longest(layout)) * layout.context,
        session.provenance(session.sites),
    )


def _longest(layout: Layout) -> Task:
    return Task(torch.zeros(layout.context, dtype=torch.int64), layout.context - 1)


def _run(
    session: Session,
    stream: WriteStream,
    documents: Iterator[Document],
    file: CheckpointFile,
    bar: Any,
) -> WriteStream:
    """Go on from where a stream stands to the end of the documents."""
    accumulator = Accumulator(stream.moments, next(session.model.parameters()).device)
    for window in windows(documents, stream.places[0], stream.layout, WINDOW):
        bar.update(window.place.documents - bar.n)
        _add(session, stream, window.rows, accumulator)
        stream = replace(stream, places=(window.place,))
        if file.is_due():
            stream = replace(stream, moments=accumulator.moments())
            file.save(stream)
    return replace(stream, moments=accumulator.moments())


def _add(
    session: Session, stream: WriteStream, rows: Sequence[Row], accumulator: Accumulator
) -> None:
    """Run some rows and add their writes; rows by length, in the order given."""
    layout, limit = stream.layout, stream.tokens_per_pass
    halve = session.halve(_longest(layout))

    def passes_of(chosen: Sequence[int]) -> tuple[int, Callable[[int], int]]:
        length = len(rows[chosen[0]].tokens)

        def smaller(size: int) -> int:
            nonlocal limit  # for the other rows, too
            half = halve(size)
            limit = min(limit, half * length)
            return half

        return _rows_per_pass(session, limit, length), smaller

    def take(site: int, chosen: Sequence[int], values: Float[Tensor, "row pos d_model"]) -> None:
        kept = layout.kept(torch.stack([rows[number].tokens for number in chosen]))
        vectors = values.flatten(0, 1) if kept.all() else values[kept.to(values.device)]
        # the sum is faster to check, and not finite for other reasons at most in vain
        if not vectors.sum(dtype=torch.float32).isfinite():
            _require_finite(values, kept, stream.sites[site], [rows[i].document for i in chosen])
        accumulator.add(site, vectors)

    run_by_length(session, [row.tokens for row in rows], take, passes_of)


def _rows_per_pass(session: Session, tokens: int, length: int) -> int:
    if session.other_hooks.one_row:
        return 1
    batch_size = session.options.get("batch_size")
    return max(1, min(tokens // length, tokens if batch_size is None else int(batch_size)))


def _require_finite(
    values: Float[Tensor, "row pos d_model"],
    kept: Bool[Tensor, "row pos"],
    site: Site,
    documents: Sequence[str],
) -> None:
    wrong = (~values.isfinite().all(dim=-1).cpu() & kept).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        raise ValueError(
            f"The writes hold NaN or inf, first at {site.place}, position {position} of a row of "
            f"{documents[row]} ({values.dtype}).{overflow_advice(values.dtype)}"
        )


def _require_writes(stream: WriteStream) -> None:
    if not stream.tokens:
        empty = ", which are all empty" if stream.documents else ""
        raise ValueError(f"There are no texts: {stream.documents} documents were read{empty}.")
    if not len(stream):
        raise ValueError(
            f"No writes are left: `positions` and `skip_bos` exclude all {stream.tokens} tokens."
        )
    if not stream.moments.scatter.isfinite().all():
        raise ValueError(
            "The writes are too large to be squared in float32; load the model with "
            "dtype=torch.float32, so that they are squared in float64."
        )
