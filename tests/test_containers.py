"""Tables, rows and padded batches as sources of texts, in every form in which people have them."""

from collections import namedtuple
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch

import mechsvd as ms
from mechsvd.model.texts import read_texts

PAIRS = [("I believe", " it"), ("We think", " so")]
FRAME = pd.DataFrame(PAIRS, columns=["prompt", "continuation"])
Swapped = namedtuple("Swapped", "continuation prompt")


class Batch(Mapping):
    """Like a tokenizer's batch: a mapping that is no dict."""

    def __init__(self, **columns):
        self.columns = columns

    def __getitem__(self, name):
        return self.columns[name]

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return len(self.columns)


class Polars:
    """What a data frame of Polars has: it iterates over its columns."""

    def __init__(self, frame):
        self.columns, self.frame = [*frame.columns], frame

    def __iter__(self):
        return (self.frame[name] for name in self.columns)

    def __getitem__(self, name):
        return self.frame[name]

    def to_dicts(self):
        return self.frame.to_dict("records")


def read(source):
    return [(text.prompt, text.continuation) for text in read_texts(source)]


FORMS = {
    "data frame": lambda: FRAME,
    "its columns in another order": lambda: FRAME[["continuation", "prompt"]],
    "with an index, a label and a missing value": lambda: FRAME.assign(label=[0, None]).set_index(
        pd.Index(["x", "y"])
    ),
    "dict of columns": lambda: FRAME.to_dict("list"),
    "of arrays": lambda: {name: np.array(FRAME[name]) for name in FRAME},
    "of series": lambda: dict(FRAME.items()),
    "of tuples, with another column": lambda: {
        **{name: tuple(FRAME[name]) for name in FRAME},
        "label": torch.tensor([0, 1]),
    },
    "a mapping that is no dict": lambda: Batch(**FRAME.to_dict("list")),
    "as pandas writes JSON": lambda: FRAME.to_dict(),
    "split": lambda: FRAME.to_dict("split"),
    "records": lambda: FRAME.to_dict("records"),
    "rows of a frame": lambda: [FRAME.iloc[0], FRAME.iloc[1]],
    "itertuples": lambda: FRAME.itertuples(),
    "named tuples": lambda: [Swapped(*pair[::-1]) for pair in PAIRS],
    "an array of pairs": lambda: FRAME.to_numpy(),
    "a structured array": lambda: np.array(
        [pair[::-1] for pair in PAIRS], dtype=[("continuation", "U9"), ("prompt", "U9")]
    ),
    "records of a frame": lambda: FRAME.to_records(),
    "a frame of Polars": lambda: Polars(FRAME),
    "such frames in pieces": lambda: [Polars(FRAME[:1]), Polars(FRAME[1:])],
    "frames in pieces": lambda: iter([FRAME[:1], FRAME[1:]]),
    "batches of columns": lambda: [FRAME[:1].to_dict("list"), FRAME[1:].to_dict("list")],
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_gives_its_rows(form):
    assert read(FORMS[form]()) == PAIRS


@pytest.mark.fault(56)
@pytest.mark.parametrize("format", [None, "torch", "numpy", "pandas", "arrow"])
def test_data_sets_give_their_rows_in_every_format(format):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_pandas(FRAME.assign(label=[3, 4])).with_format(format)
    ways = {
        "data set": data,
        "slice": data[:2],
        "iterable": data.to_iterable_dataset().with_format(format),
        "batches": data.iter(batch_size=2),
    }
    for way, source in ways.items():
        assert read(source) == PAIRS, way
    assert read(data[0]) == PAIRS[:1]
    assert [prompt for prompt, _ in read(data["prompt"])] == [prompt for prompt, _ in PAIRS]
    with pytest.raises(TypeError, match=r"DatasetDict of several tables, \['train', 'test'\]"):
        read(datasets.DatasetDict(train=data, test=data))


@pytest.mark.fault(56)
def test_one_row_is_one_text_and_names_stay_names():
    for row in (FRAME.iloc[0], FRAME.to_dict("records")[0], {"text": PAIRS[0][0], "label": 1}):
        assert [prompt for prompt, _ in read(row)] == ["I believe"]
    assert [prompt for prompt, _ in read({"a": "I believe", "wrong": "We"})] == ["I believe", "We"]
    assert read({"a": list(PAIRS[0]), "b": PAIRS[1]}) == PAIRS
    assert read({"prompt": {"prompt": "I believe", "continuation": " it"}}) == PAIRS[:1]


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("source", "match"),
    [
        (pd.DataFrame({"question": ["a"]}), r"columns \['question'\].*`prompt` or `text`"),
        ({"continuation": ["a"], "name": ["b"]}, "`prompt` or `text`"),
        (
            {"prompt": ["a", "b"], "continuation": ["c"]},
            "`continuation` has 1 values, but `prompt`",
        ),
        ({"prompt": ["a", "b"], "group": "c"}, "`group` has 'c'"),
        ({"text": "I believe", "url": "We think"}, "one row of a table or texts by their names"),
        (pd.concat([FRAME, FRAME], axis=1), r"\['continuation', 'prompt'\] twice"),
        (np.array("I believe"), "must be a file or a list of texts, but is ndarray"),
        (Polars(FRAME[["continuation"]]), "none of them is `prompt` or `text`"),
        ({"train": Polars(FRAME)}, r"several tables, \['train'\]"),
        ({"train": FRAME, "test": FRAME}, r"several tables, \['train', 'test'\]"),
        (pd.DataFrame({"prompt": [None, "a"]}), "text 0 has no `prompt`"),
    ],
)
def test_what_may_mean_several_things_is_refused_by_name(source, match):
    with pytest.raises((ValueError, TypeError), match=match):
        read(source)


def padded(side, tokenizer, texts=("I believe it", "We think of the whole"), **more):
    tokenizer.padding_side = side
    return tokenizer([*texts], padding=True, **more)


@pytest.mark.fault(56)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_rows_of_a_padded_batch_lose_their_pads(embedded, side, tensors, silent):
    tokenizer, was = embedded.tokenizer, embedded.tokenizer.padding_side
    texts = ("I believe it", "We think of the whole")
    try:
        batch = padded(side, tokenizer, return_tensors=tensors)
        tasks = ms.tasks_from(embedded, batch, max_new_tokens=3)
        stream = ms.stream_writes(embedded, batch, layers=[0])
    finally:
        tokenizer.padding_side = was
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in expected}) == 2
    assert [task.tokens[: task.prompt_length].tolist() for task in tasks] == expected
    assert stream.tokens == sum(map(len, expected))


@pytest.mark.fault(56)
def test_labels_say_what_is_scored(embedded, silent):
    row = {"input_ids": [0, 5, 9, 7, 1, 1], "attention_mask": [1, 1, 1, 1, 0, 0]}
    for labels in ([-100, -100, 9, 7, -100, -100], torch.tensor([-100, -100, 9, 7, 1, 1])):
        (task,) = ms.tasks_from(embedded, [{**row, "labels": labels}])
        assert (task.tokens.tolist(), task.prompt_length) == ([0, 5, 9, 7], 2)
    (task,) = ms.tasks_from(embedded, {**row, "labels": [0, 5, 9, 7, -100, -100]})
    assert (task.tokens.tolist(), task.prompt_length) == ([0, 5, 9, 7], 1)
    for text in ({"text": "I believe"}, {}):  # tokens and their labels say more than the text
        (task,) = ms.tasks_from(embedded, [{**row, **text, "labels": [-100, -100, -100, 7, 1, 1]}])
        assert task.continuation.tolist() == [7]


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "`attention_mask` has a hole at position 1"),
        ({"attention_mask": [0, 0, 0, 0]}, "`attention_mask` leaves no token"),
        ({"attention_mask": [1, 1]}, "`attention_mask` has 2 entries for 4 tokens"),
        ({"labels": [-100, 5, -100, 7]}, "`labels` has a hole at position 2"),
        ({"labels": [-100, -100, -100, -100]}, "`labels` leaves no token"),
        ({"labels": [5, 9, 7, -100]}, "position 0 is 5, but the token there is 0.*not shifted"),
        ({"labels": [0, -100, -100, -100]}, "only the first token"),
        ({"continuation": " it"}, "`continuation` beside `input_ids` says nothing"),
        ({"wrong": " it"}, "`wrong` beside `input_ids` says nothing"),
        ({"input_ids": [0, 5, -100, -100]}, "-100 is no token: it marks what is not scored"),
        ({"input_ids": [0, 5.5, 9, 7]}, "`input_ids` must be a row of whole numbers"),
    ],
)
def test_masks_and_labels_that_cannot_be_are_refused_by_name(embedded, row, match):
    with pytest.raises((ValueError, TypeError), match=f"text 0.*{match}"):
        ms.tasks_from(embedded, [{"input_ids": [0, 5, 9, 7], **row}])


@pytest.mark.fault(56)
def test_pads_in_a_task_of_bare_tokens_are_warned_of(embedded, meaning_svd):
    ids, pad = [0, 42, 498, 386], embedded.tokenizer.eos_token_id
    for tokens, words in (
        (ids + [pad] * 4, f"ends in 4 tokens {pad}"),
        (ids + [pad] * 2, f"ends in 2 tokens {pad}"),
        ([pad] * 2 + ids, f"begins with 2 tokens {pad}"),
    ):
        task = ms.Task(torch.tensor(tokens), 3)
        with pytest.warns(UserWarning, match=f"{words}, which look like the pads") as caught:
            ms.measure(embedded, task, [ms.keep(meaning_svd, 3)])
        assert sum("pads" in str(one.message) for one in caught) == 1


@pytest.mark.fault(56)
@pytest.mark.parametrize("row", [[1, 1, 1, 0, 42, 498], [0, 42, 498, 1, 1]])
def test_pads_in_bare_tokens_of_a_prompt_or_a_corpus_are_warned_of(embedded, row):
    ids = torch.tensor(row)
    for call in (
        lambda: ms.generate_tasks(embedded, ids, [None], max_new_tokens=1),
        lambda: ms.stream_writes(embedded, {"input_ids": ids[None]}, layers=[0]),
        lambda: ms.stream_writes(embedded, [ms.Task(ids, 2)], layers=[0]),
    ):
        with pytest.warns(UserWarning, match="tokens 1, which look like the pads"):
            call()


@pytest.mark.fault(56)
def test_masks_and_labels_are_no_part_of_a_task(embedded):
    ids = torch.tensor([0, 42, 498, 1, 1])
    with pytest.raises(TypeError, match="takes no attention mask: give `input_ids`"):
        ms.Task(ids, 2, torch.tensor([1, 1, 1, 0, 0]))
    with pytest.raises(ValueError, match="-100 is no token"):
        ms.collect_writes(embedded, ms.Task(torch.tensor([0, 42, -100, -100]), 2))
