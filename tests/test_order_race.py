"""Orders and bases on own and held-out texts: each number is that of a single call."""

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd import figures
from mechsvd.experiments import order_race
from mechsvd.experiments.heldout import decompose_texts, folds_of

from .conftest import tiny, tiny_task
from .test_results import same

pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = [3, 9]


@pytest.fixture(scope="module")
def texts():
    return [tiny_task(11, 5, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def found(texts):
    return ms.compare_orders(tiny("Llama"), texts, RANKS, steps=4, seed=2)


def kept(model, task, basis, k):
    edit = ms.keep(basis, k)
    return float(ms.measure(model, task, [edit], metric=ms.kl_divergence).effect)


def test_each_number_is_that_of_a_single_measurement(found, texts):
    model, fold = tiny("Llama"), folds_of(4, None, 2, 2)
    assert torch.equal(found.fold, fold)
    writes, reads = ms.collect_writes(model, texts), ms.collect_reads(model, texts, seed=2)
    for i, task in enumerate(texts):
        for side, fitted in (
            ("own text", [i]),
            ("other texts", [j for j in range(4) if fold[j] != fold[i]]),
        ):
            svd, sites = (decompose_texts(writes, fitted, per) for per in ("pool", "site"))
            own = reads.at(torch.isin(reads.task_index, torch.tensor(fitted)))
            tasks = [texts[j] for j in fitted]
            ranking = ms.rank_directions(model, tasks, svd)
            effect = ms.order_by_effect(ranking, by="kl_divergence")
            gone = ms.order_by_elimination(model, tasks, svd)
            bases = {
                ("singular value", "pooled"): svd,
                ("effect", "pooled"): svd.directions[:, effect],
                ("elimination", "pooled"): svd.directions[:, gone],
                ("shuffled", "pooled"): svd.directions[:, ms.order_at_random(svd, 2)],
                ("gradients", "pooled"): ms.decompose(own),
                ("singular value", "per site"): sites,
                ("gradients", "per site"): ms.decompose(own, per="site"),
            }
            for key, basis in bases.items():
                for place, k in enumerate(RANKS):
                    expected = kept(model, task, basis, k)
                    measured = float(found.of(*key, side)[place, i])
                    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-6), key


def test_balanced_directions_and_random_subspaces_are_those_of_their_calls(found, texts):
    model = tiny("Llama")
    for draw in (0, 7):
        basis = ms.random_subspace(32, 32, 2 + draw).basis.float()
        expected = [[kept(model, task, basis, k) for task in texts] for k in RANKS]
        np.testing.assert_allclose(found.random[draw].numpy(), expected, rtol=1e-3)
    assert len(found.random) == 20
    writes, fitted = ms.collect_writes(model, texts), [0]
    reads = ms.collect_reads(model, texts, seed=2)
    own = reads.at(reads.task_index == 0)
    for side, name in (("write", "balanced"), ("read", "balanced, read")):
        svd = order_race.balanced_with(decompose_texts(writes, fitted, "pool"), own, side)
        assert float(found.of(name, fitted="own text")[1, 0]) == pytest.approx(
            kept(model, texts[0], svd, 9), rel=1e-3
        )


def test_the_learned_end_bounds_all_orders_on_what_it_was_fitted_on(found):
    for basis in ("pooled", "per site"):
        learned = found.of("learned", basis, "own text")
        for order, kind in zip(found.orders, found.bases, strict=True):
            if kind == basis:
                assert (learned <= found.of(order, basis, "own text") * (1 + 1e-4)).all(), order


def test_it_bounds_them_on_a_trained_model_too(real):
    tokens = real.task.tokens
    tasks = [ms.Task(tokens[:16], 8), ms.Task(tokens[1:17], 8)]
    names = ("singular value", "effect", "balanced", "gradients", "learned")
    found = ms.compare_orders(real.model, tasks, [12], orders=names, steps=25)
    others = [
        found.of(order, fitted="own text")
        for order, basis in zip(found.orders, found.bases, strict=True)
        if basis == "pooled" and order != "learned"
    ]
    learned = found.of("learned", fitted="own text")
    assert (learned < 0.5 * torch.stack(others).amin(dim=0)).all()


def test_tables_hold_means_and_intervals_over_the_texts(found):
    table, summary = found.to_pandas(), found.summary()
    assert len(table) == (2 * len(found.orders) + 1) * 2 * 4
    own = table[(table["order"] == "balanced") & (table["basis"] == "pooled")]
    own = own[(own["fitted"] == "other texts") & (own["rank"] == 9)]
    np.testing.assert_allclose(own["kl_divergence"], found.of("balanced")[1].numpy())
    row = summary[(summary["order"] == "balanced") & (summary["basis"] == "pooled")]
    row = row[(row["fitted"] == "other texts") & (row["rank"] == 9)].iloc[0]
    assert row["mean"] == pytest.approx(own["kl_divergence"].mean())
    assert row["low"] <= row["mean"] <= row["high"]
    assert row["n"] == 4
    gap = (found.of("balanced") - found.of("singular value"))[1]
    assert row["difference"] == pytest.approx(float(gap.mean()))
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    random = summary[summary["fitted"] == "nothing"]
    assert random["mean"].tolist() == pytest.approx(found.random.mean(dim=(0, 2)).tolist())
    reference = summary[(summary["order"] == "singular value") & (summary["basis"] == "pooled")]
    assert (reference["difference"] == 0).all()


def test_it_saves_prints_and_is_drawn_with_its_bands(found, tmp_path):
    found.save(tmp_path / "race")
    assert same(ms.OrderComparison.load(tmp_path / "race"), found)
    assert len(repr(found).splitlines()) == 3
    figure = figures.race_of_orders(found)
    figure.to_json()
    curves = [trace for trace in figure.data if trace.mode]
    assert len(curves) == 2 * len(found.orders) + 2  # random subspaces on both sides
    summary = found.summary()
    chosen = summary[(summary["order"] == "elimination") & (summary["fitted"] == "own text")]
    (drawn,) = [c for c in curves if c.name == "elimination, pooled" and c.xaxis == "x"]
    np.testing.assert_allclose(drawn.y, chosen["mean"])
    assert list(drawn.x) == RANKS
    assert "nats per token" in figure.layout.yaxis.title.text
    dashes = {c.name: c.line.dash for c in curves}
    assert (dashes["learned, per site"], dashes["learned, pooled"]) == ("dash", "solid")


def test_a_missing_order_is_named(found):
    with pytest.raises(KeyError, match="No order .*'sigma'"):
        found.of("sigma")
    with pytest.raises(KeyError, match="fitted on 'all'"):
        found.of("effect", fitted="all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [0, 3]}, r"`ranks` is \[0, 3\], but must be from 1 to 32"),
        ({"ranks": [40]}, r"`ranks` is \[40\]"),
        ({"orders": ["sigma"]}, "`orders` holds 'sigma', but must be of"),
        ({"orders": ["learned"]}, "a learned subspace begins at an order"),
        ({"folds": 9}, "`folds` is 9, but must be from 2 to the 4 texts"),
        ({"groups": [1] * 4}, "held-out texts need at least two"),
    ],
)
def test_what_cannot_be_compared_is_refused(texts, change, message):
    given = {"ranks": [3], "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        ms.compare_orders(tiny("Llama"), texts, **given)
