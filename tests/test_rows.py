"""Documents become the same rows wherever a run begins, and a place is only good for its documents."""

import random
from itertools import pairwise

import pytest
import torch

import mechsvd as ms
from mechsvd.model.corpus import Document, read_documents
from mechsvd.model.rows import Layout, first_place, layout_of, require_end, windows

BOS = 0


def documents_of(lists):
    return [
        Document(f"text {i}", bytes(ids), lambda ids=ids: torch.tensor(ids, dtype=torch.int64))
        for i, ids in enumerate(lists)
    ]


def corpus(seed, with_bos=True):
    """Documents of 0 to 40 tokens, after BOS."""
    rng = random.Random(seed)
    lists = [[rng.randint(1, 99) for _ in range(rng.randint(0, 40))] for _ in range(30)]
    return [[BOS, *ids] if with_bos and ids else ids for ids in lists]


def rows_of(lists, layout, size=10**9, start=None, documents=None):
    found = list(windows(iter(documents_of(lists)), start or first_place(None), layout, size))
    return [row.tokens.tolist() for window in found for row in window.rows], found[-1].place


def plain(context=12, packing=False, bos=BOS, **changes):
    return Layout(context, packing, **({"skip_bos": False, "positions": None} | changes), bos=bos)


def cut(ids, context, bos):
    """The oracle: the rows of one document, each with BOS if the document has it."""
    if not ids or ids[0] != bos:
        return [ids[i : i + context] for i in range(0, len(ids), context)]
    text = ids[1:]
    return [[bos, *text[i : i + context - 1]] for i in range(0, max(1, len(text)), context - 1)]


@pytest.mark.parametrize("with_bos", [True, False])
def test_a_document_is_a_row_or_goes_on_in_rows_that_begin_with_bos_as_it_does(with_bos):
    lists = corpus(0, with_bos)
    rows, place = rows_of(lists, plain())
    assert rows == [row for ids in lists for row in cut(ids, 12, BOS)]
    assert place.documents == 30
    assert place.tokens == sum(map(len, rows))
    assert place.empty == sum(not ids for ids in lists) > 0
    assert place.split == sum(len(ids) > 12 for ids in lists) > 0
    assert len(place.rest) == 0


def test_packed_rows_hold_all_tokens_in_order_and_all_but_the_last_are_full():
    lists = corpus(1)
    rows, place = rows_of(lists, plain(packing=True))
    assert [len(row) for row in rows[:-1]] == [12] * (len(rows) - 1)
    assert all(row[0] == BOS for row in rows)
    words = [t for ids in lists for t in ids if t != BOS]
    assert [t for row in rows for t in row if t != BOS] == words
    assert sum(row[1:].count(BOS) for row in rows) > 5  # documents begin within rows
    assert not any(a == b == BOS for row in rows for a, b in pairwise(row))
    bare, _ = rows_of(corpus(1, with_bos=False), plain(packing=True))
    assert [t for row in bare for t in row] == words
    assert place.split == 0


@pytest.mark.parametrize("packing", [False, True])
def test_from_every_place_the_rest_is_the_rest_of_the_whole(packing):
    lists, layout = corpus(0), plain(packing=packing)
    whole, end = rows_of(lists, layout)
    for size in (17, 50, 200):
        done = []
        for window in windows(iter(documents_of(lists)), first_place(None), layout, size):
            done += [row.tokens.tolist() for row in window.rows]
            rest, last = rows_of(lists, layout, size=31, start=window.place)
            assert done + rest == whole
            assert last.fingerprint == end.fingerprint
            assert (last.documents, last.tokens) == (end.documents, end.tokens)
            assert (last.split, last.empty) == (end.split, end.empty)


def test_windows_follow_the_tokens_not_the_run():
    lists, layout = corpus(3), plain()
    places = [w.place for w in windows(iter(documents_of(lists)), first_place(None), layout, 60)]
    again = [w.place for w in windows(iter(documents_of(lists)), places[2], layout, 60)]
    assert [p.tokens for p in again] == [p.tokens for p in places[3:]]
    assert all(torch.equal(a.rest, b.rest) for a, b in zip(again, places[3:], strict=True))


def test_what_was_read_is_not_tokenised_again():
    lists, layout, read = corpus(3), plain(), []
    *_, place = (w.place for w in windows(iter(documents_of(lists)), first_place(None), layout, 50))

    def counted(document):
        return document._replace(read=lambda: read.append(document) or document.read())

    list(windows(map(counted, documents_of([*lists, [BOS, 5]])), place, layout, 50))
    assert [document.place for document in read] == ["text 30"]


def test_other_documents_than_those_that_were_read_are_refused():
    lists, layout = corpus(5), plain()
    _, place = rows_of(lists[:20], layout)
    changed = [*lists[:7], [BOS, 1, 1], *lists[8:]]
    with pytest.raises(ValueError, match="The first 20 documents are not those"):
        rows_of(changed, layout, start=place)
    with pytest.raises(ValueError, match="The source has 9 documents, but 20 had been read"):
        rows_of(lists[:9], layout, start=place)
    with pytest.raises(ValueError, match="finished after 20 documents, but the source has more"):
        require_end(iter(documents_of(lists)), place)
    require_end(iter(documents_of(lists[:20])), place)
    joined = [*lists[:5], lists[5] + lists[6], [], *lists[7:]]  # the same bytes, cut elsewhere
    with pytest.raises(ValueError, match="are not those"):
        rows_of(joined, layout, start=place)


def test_positions_and_bos_count_as_asked():
    rows = torch.tensor([[BOS, 4, 5, 6], [BOS, 7, BOS, 8]])
    assert plain().kept(rows).all()
    skipping = plain(skip_bos=True).kept(rows)
    assert skipping.tolist() == [[False, True, True, True]] * 2
    packed = plain(packing=True, skip_bos=True).kept(rows)
    assert packed.tolist() == [[False, True, True, True], [False, True, False, True]]
    some = plain(positions=(0, 2, 9), skip_bos=True).kept(rows)
    assert some.tolist() == [[False, False, True, False]] * 2
    assert plain(skip_bos=True, bos=None).kept(rows).all()


def test_a_shard_is_every_nth_document(embedded):
    texts = [f"text {i}" for i in range(11)]
    found = [list(read_documents(embedded, texts, (i, 4))) for i in range(4)]
    assert [d.place for d in found[1]] == ["text 1", "text 5", "text 9"]
    assert sum(map(len, found)) == 11
    for wrong in ((4, 4), (-1, 2), (0, 0), 3, "01", (0, 1, 2), (0.0, 2)):
        with pytest.raises(ValueError, match=r"`shard` is .*, but must be \(i, n\)"):
            first_place(wrong)


def test_tasks_texts_and_rows_of_datasets_are_documents_and_bad_ones_are_named(embedded):
    task = ms.Task(torch.tensor([0, 5, 6]), 1)
    rows = [task, "I believe", {"text": "I believe"}, ("I", " believe"), "", {"text": ""}]
    found = [d.read().tolist() for d in read_documents(embedded, rows, (0, 1))]
    assert found[0] == [0, 5, 6]
    assert found[1] == found[2] == found[3]
    assert found[1][0] == embedded.tokenizer.bos_token_id
    assert found[4:] == [[], []]
    for wrong, message in ((3, "text 1 must be a prompt"), ({"title": "x"}, "text 1 has no")):
        with pytest.raises((TypeError, ValueError), match=message):
            list(read_documents(embedded, ["I", wrong], (0, 1)))
    unknown = ms.Task(torch.tensor([0, 5, 10**6]), 1)
    _, document = read_documents(embedded, [task, unknown], (0, 1))
    layout = layout_of(embedded, None, False, False, None)
    with pytest.raises(ValueError, match="text 1: Token ids run from 0 to 1000000"):
        list(windows(iter([document]), first_place(None), layout, 9))


def test_options_that_cannot_be_are_refused(embedded):
    assert layout_of(embedded, None, False, False, [3, 1]).positions == (1, 3)
    assert layout_of(embedded, None, False, False, None).context == embedded.cfg.n_ctx
    for context in (1, 0, 257, 8.0, True):
        with pytest.raises(ValueError, match="`context` is .*, but must be a whole number from 2"):
            layout_of(embedded, context, False, False, None)
    with pytest.raises(TypeError, match="`packing` is 1, but must be True or False"):
        layout_of(embedded, None, 1, False, None)
