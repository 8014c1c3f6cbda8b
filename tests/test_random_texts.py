"""Texts against random ones: what exchanging a text and its twin does, chance, and real texts."""

import random

import pytest
import torch

import mechsvd as ms
from mechsvd.demo.language import write
from mechsvd.experiments.random_texts import (
    ALPHA,
    OVERLAP,
    OWN,
    RandomTextComparison,
    columns_of,
    compare_with_random_texts,
    numbers_of,
)
from mechsvd.experiments.random_texts import Numbers as Measured
from mechsvd.experiments.statistics import sign_flip
from mechsvd.report import top

from .conftest import tiny, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(texts, seed):
    """Numbers of texts and of pairs, as independent of which are twins as can be."""
    generator = torch.Generator().manual_seed(seed)
    own, by_site, trend, breadth = torch.randn(4, texts, generator=generator, dtype=torch.float64)
    pairs = torch.randn(texts, texts, generator=generator, dtype=torch.float64)
    more = breadth[:, None] - 2 * own + pairs  # a text both needs and offers directions
    shared = own[:, None] + own + pairs + pairs.T
    return Measured(
        own, by_site, trend, lambda i, j: float(more[i, j]), lambda i, j: float(shared[i, j]), 8
    )


def effects(numbers, places=None):
    return torch.stack([column.effects for column in columns_of(numbers, places)], dim=1)


def test_exchanging_a_text_and_its_twin_flips_its_effects_and_no_others():
    numbers = drawn(14, 0)
    before = effects(numbers)
    for text in (0, 3, 6):
        places = [*range(14)]
        places[text], places[text + 7] = text + 7, text
        signs = torch.ones(7, 1).double()
        signs[text] = -1
        torch.testing.assert_close(effects(numbers, places), signs * before)
    both = [*range(7, 14), *range(7)]
    torch.testing.assert_close(effects(numbers, both), -before)


def test_the_mean_effect_is_the_difference_of_the_means():
    for column in columns_of(drawn(12, 1)):
        assert float(column.effects.mean()) == pytest.approx(column.means[0] - column.means[1])


def test_by_chance_something_is_told_as_often_as_alpha_says():
    """Numbers of pairs depend on both texts: an error that counts pairs as independent shows here."""
    least = torch.stack([sign_flip(effects(drawn(16, seed))).p_family.min() for seed in range(400)])
    for alpha, most in ((0.05, 31), (0.2, 99)):  # upper 99 % limits of the binomial
        assert int((least <= alpha).sum()) <= most
    assert int((least <= 0.2).sum()) >= 50  # and the test is not empty


@pytest.fixture(scope="module")
def null_numbers():
    """Random tokens in a model that learnt nothing."""
    model = ms.reinitialised(tiny("Llama"), 1)
    texts = [tiny_task(8, 6, seed) for seed in range(16)]
    return numbers_of(model, texts, 0.3, {"progress": False})


def test_of_a_null_model_and_random_tokens_the_report_claims_nothing(null_numbers):
    """100 ways to call half of the texts real: a claim in at most 5 of them."""
    generator, claims = torch.Generator().manual_seed(3), 0
    for _ in range(100):
        places = torch.randperm(16, generator=generator).tolist()
        columns = columns_of(null_numbers, places)
        values = torch.stack([column.effects for column in columns], dim=1)
        test = sign_flip(values)
        found = RandomTextComparison(
            tuple(column.question for column in columns),
            tuple(column.unit for column in columns),
            torch.tensor([column.means for column in columns]).double(),
            values,
            test.p_value,
            test.p_family,
            ALPHA,
            0,
        )
        said = top.against_random(found)
        assert len(said) == 5
        claims += any(one.is_told for one in said.values())
    assert claims <= 5


def test_real_texts_of_one_kind_differ_from_random_ones(embedded):
    rng, texts = random.Random(0), []
    while len(texts) < 8:
        ids = embedded.to_tokens(write("reflection", rng)[0])[0, :16].cpu()
        if len(ids) == 16:
            texts.append(ms.Task(ids, 8))
    found = compare_with_random_texts(embedded, texts)
    table = found.to_pandas().set_index("question")
    assert table.verdict[OWN] == "less"
    assert table.p_family[OWN] <= 0.01
    assert "1 of 5" in repr(found) or f"{(table.p_family <= ALPHA).sum()} of 5" in repr(found)
    svds = [ms.decompose(ms.collect_writes(embedded, text)) for text in texts]
    overlap = ms.overlap([svd.subspace(16) for svd in svds]).values
    mean = (overlap.sum() - overlap.trace()) / 56
    assert table.texts[OVERLAP] == pytest.approx(float(mean), rel=1e-5)
    step = [*range(0, svds[0].rank, 4), svds[0].rank]
    ranks = []
    for text, svd in zip(texts, svds, strict=True):
        curve = ms.sweep_rank(embedded, text, svd, step).to_pandas()
        far = curve["rank"][curve["kl_divergence"] * 8 > 1.0].max()
        ranks.append(curve["rank"][curve["rank"] > far].min())
    assert table.texts[OWN] == pytest.approx(sum(ranks) / 8)
    row, said = table.loc[OWN], top.against_random(found)[OWN]
    assert said.is_told
    assert said.sentence == (
        "Texts need fewer of their own directions than random tokens do: "
        f"{row.texts:.3g} directions against {row.random_texts:.3g}, a difference of "
        f"−{-row.difference:.3g} (−{-row.low:.3g} to −{-row.high:.3g}), p = {row.p_family:.2g}."
    )


@pytest.fixture(scope="module")
def four():
    return compare_with_random_texts(tiny("Llama"), [tiny_task(seed=i) for i in range(4)])


def test_four_texts_cannot_tell_and_say_so(four):
    assert set(four.to_pandas().verdict) == {"cannot tell"}
    assert "4 texts can show p = 0.12 at best" in repr(four)
    assert "4 texts can show 0.12 at best" in top._how(four)
    assert not any(one.is_told for one in top.against_random(four).values())


def test_a_saved_comparison_is_the_same(four, tmp_path):
    four.save(tmp_path / "found.safetensors")
    loaded = RandomTextComparison.load(tmp_path / "found.safetensors")
    assert loaded.to_pandas().equals(four.to_pandas())


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (1, {}, "One text given, but what a single text shows"),
        (2, {"nats": 0.0}, "`nats` is 0.0, but must be finite and above 0"),
        (2, {"alpha": float("nan")}, "`alpha` is nan"),
        (2, {"seed": -1}, "`seed` is -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(embedded, texts, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compare_with_random_texts(embedded, [tiny_task(seed=i) for i in range(texts)], **options)
