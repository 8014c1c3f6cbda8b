"""Every form of positions means what its numbers mean, text by text."""

import pytest
import torch

import mechsvd as ms
from mechsvd.model.positions import absolute_positions, positions_in
from tests.conftest import tiny, tiny_task


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (3, (3,)),
        (-1, (8,)),
        ("last", (7,)),
        (slice(-3, None), (6, 7, 8)),
        (slice(1, 6, 2), (1, 3, 5)),
        (range(2, 4), (2, 3)),
        ([-2, 0, 7], (0, 7)),
        (torch.tensor([4, 1]), (1, 4)),
        (torch.arange(9) > 6, (7, 8)),
        (torch.stack([torch.arange(12) > 6, torch.arange(12) < 2]), (0, 1)),
        (None, None),
    ],
)
def test_forms(form, expected):
    assert positions_in(form, length=9, last=7, text=1, texts=2) == expected or (
        isinstance(form, torch.Tensor)
        and positions_in(form, length=9, last=7, text=0, texts=1) == expected
    )


def test_forms_for_unknown_lengths():
    assert absolute_positions(4) == (4,)
    assert absolute_positions(slice(2, 5)) == absolute_positions([4, 3, 2]) == (2, 3, 4)
    assert absolute_positions(None) is None
    for form in (-1, slice(2, None), slice(-3, -1), "last", torch.ones(4).bool()):
        with pytest.raises(ValueError, match="length of the text"):
            absolute_positions(form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("first", "the only word is 'last'"),
        (2.5, "give a whole number, a list or range"),
        ([1, "a"], "must be whole numbers, but holds 'a'"),
        ([9], r"No positions \[9\]: the text has 0 to 8"),
        ([-10], r"No positions \[-10\]"),
        (slice(5, 5), "is empty"),
        (torch.zeros(9).bool(), "is empty"),
        (torch.ones(8).bool(), r"mask of shape \[8\]"),
        (torch.ones(3, 9).bool(), r"\[3, 9\], but must be \[pos\], or \[text, pos\] with 1 texts"),
    ],
)
def test_refusals(form, message):
    with pytest.raises((TypeError, ValueError), match=message):
        positions_in(form, length=9, last=7)


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


@pytest.fixture(scope="module")
def texts():
    return [tiny_task(7, 4, seed=1), tiny_task(9, 5, seed=2), tiny_task(7, 3, seed=3)]


def test_a_mask_edits_each_text_at_its_own_positions(model, texts):
    edits = [ms.keep(ms.span(torch.randn(32, 3))), lambda x, hook: 0.5 * x]
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 8] = mask[2, [0, 5]] = True
    together = ms.measure(model, texts, edits, positions=mask)
    for row, (own, found) in enumerate(zip(texts, together, strict=True)):
        alone = ms.measure(model, own, edits, positions=mask[row].nonzero().flatten().tolist())
        torch.testing.assert_close(found.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.orig_delta, alone.orig_delta, atol=1e-5, rtol=1e-5)


def test_last_is_the_place_of_the_last_prediction_of_each_text(model, texts):
    edits = [ms.ablate(ms.span(torch.randn(32, 3)))]
    together = ms.measure(model, texts, edits, positions="last")
    for own, found in zip(texts, together, strict=True):
        alone = ms.measure(model, own, edits, positions=[len(own.tokens) - 2])
        torch.testing.assert_close(found.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)
        changed = found.log_probs - found.clean_run.log_probs
        assert (changed[0, :-1].abs() < 1e-5).all()
        assert changed[0, -1].abs() > 1e-4


def test_writes_are_collected_at_the_positions_of_each_text(model, texts):
    writes = ms.collect_writes(model, texts, positions=slice(-2, None))
    assert writes.positions.tolist() == [5, 6, 7, 8, 5, 6]
    assert writes.task_index.tolist() == [0, 0, 1, 1, 2, 2]


def test_calls_that_regroup_texts_refuse_a_mask_per_text(model, texts):
    mask = torch.ones(3, 9, dtype=torch.bool)
    for call in (ms.fit_and_measure, ms.compare_with_random_texts):
        with pytest.raises(ValueError, match="runs texts in other groups"):
            call(model, texts, positions=mask)


def test_positions_after_the_last_prediction_are_warned_of():
    model, task = tiny("Llama"), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    with pytest.warns(UserWarning, match='come after the last scored prediction.*"last" is that'):
        found = ms.measure(model, task, ms.keep(svd, 2), positions=-1)
    assert float(found.kl_divergence) == pytest.approx(0, abs=1e-9)
