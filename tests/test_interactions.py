"""Interactions of pairs of directions, against plain loops, closed forms and planted partners."""

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.attribution.objective import objective_over
from mechsvd.engine.session import open_session
from mechsvd.model.evaluation import evaluation
from tests.conftest import tiny, tiny_hf, tiny_task

W = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def removed(f, w, *directions):
    """f(w) minus f without the parts of w along some directions, one after the other."""
    left = w - sum(u * (u @ w) for u in directions)
    return float(f(w) - f(left))


def test_every_pair_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    f = lambda w: (a @ w).tanh().prod() + w.square().sum().sin()
    basis = ms.random_subspace(5, 4, seed=9).basis
    found = ms.interactions_of(f, W, {"mine": basis, "axes": torch.eye(5).double()}, draws=3)
    assert found.names == ("mine", "axes")
    assert len(found.basis) == 6 + 10
    for place in range(len(found.basis)):
        columns = [basis, torch.eye(5).double()][found.basis[place]]
        u, v = columns[:, found.first[place]], columns[:, found.second[place]]
        alone, other, both = removed(f, W, u), removed(f, W, v), removed(f, W, u, v)
        assert float(found.first_scores[0, 0, place]) == pytest.approx(alone, abs=1e-12)
        assert float(found.second_scores[0, 0, place]) == pytest.approx(other, abs=1e-12)
        assert float(found.both_scores[0, 0, place]) == pytest.approx(both, abs=1e-12)
        assert float(found.interaction[0, 0, place]) == pytest.approx(alone + other - both)
    for draw in (1, 2, 3):  # random bases of the same span
        turn = ms.random_subspace(4, 4, seed=draw).basis
        columns = basis @ turn
        for place in range(6):
            u, v = columns[:, found.first[place]], columns[:, found.second[place]]
            together = removed(f, W, u) + removed(f, W, v) - removed(f, W, u, v)
            assert float(found.interaction[0, draw, place]) == pytest.approx(together, abs=1e-12)
    assert float(found.whole[0, 0]) == pytest.approx(removed(f, W, *basis.T), abs=1e-12)
    inside = float((basis.T @ W).square().sum() / W.square().sum())
    assert found.held[0].tolist() == pytest.approx([inside, 1.0])
    assert float(found.values) == pytest.approx(float(f(W)))


def test_factors_of_a_product_interact_wholly():
    found = ms.interactions_of(torch.prod, W, {"factors": torch.eye(5)}, draws=5)
    f = W.prod()  # without one, or two, nothing is left: each cost is f, so f + f − f is shared
    torch.testing.assert_close(found.interaction[0, 0], f.expand(10))
    torch.testing.assert_close(found.relative[0, 0], torch.full((10,), 1 / 3).double())


def test_in_a_quadratic_function_the_eigenbasis_is_independent_and_random_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix, w = half + half.T, torch.randn(30, generator=generator, dtype=torch.float64)
    f = lambda x: x @ matrix @ x / 2 + x.sum()
    for basis in ("largest", "from_w"):  # Ritz vectors make the matrix diagonal, converged or not
        attribution = ms.hessian_attribution_of(f, w, basis=basis, pairs=8)
        found = ms.interactions_of(f, w, attribution, rows=8)
        assert float(found.interaction[0, 0].abs().max()) < 1e-10
        # and in a random basis it is aᵀHb
        u = attribution.vectors[:, attribution.order("measured")[:8]]
        turned = u @ ms.random_subspace(8, 8, seed=1).basis
        parts = turned * (turned.T @ w)
        one, other = torch.triu_indices(8, 8, 1)
        expected = (parts.T @ matrix @ parts)[one, other]
        torch.testing.assert_close(found.interaction[0, 1], expected, rtol=1e-9, atol=1e-10)
        table = found.summary()
        assert list(table.p_value) == [1 / 20]
        assert float(table["median"][0]) < 1e-10 < float(table.random_low[0])
        assert float(table.held[0]) == pytest.approx(float(attribution.held.sum()))


def test_planted_partners_are_found_and_the_others_are_independent():
    def f(w):  # 0 and 1 back each other up, 2 and 3 need each other, 4 works alone
        return torch.maximum(w[0], w[1]) + w[2] * w[3] + w[4].sin()

    found = ms.interactions_of(f, torch.tensor([2.0, 2, 3, 3, 1]).double(), {"axes": torch.eye(5)})
    table = found.to_pandas().set_index(["first", "second"])
    assert table.interaction[0, 1] == pytest.approx(-2)  # either one alone is enough
    assert table.relative[0, 1] == pytest.approx(1)
    assert table.interaction[2, 3] == pytest.approx(9)  # each one alone costs the product
    others = table.drop(index=[(0, 1), (2, 3)])
    assert others.interaction.abs().max() < 1e-12
    assert table.is_noise.sum() == 8


def test_over_a_model_every_pair_equals_its_own_run(silent):
    model, tasks = tiny("Llama", tiny_hf("Llama").double()), [tiny_task(), tiny_task(seed=1)]
    over = "blocks.1.mlp.*"
    attribution = ms.hessian_attribution(
        model, tasks[0], over, objective="log_prob", basis="from_w", pairs=5, path_steps=2
    )
    found = ms.interactions(model, tasks, over, attribution, rows=3, draws=2, order="projection")
    rows = attribution.projections.abs().argsort(descending=True)[:3].tolist()
    assert found.first.tolist() == [rows[0], rows[0], rows[1]]
    assert found.second.tolist() == [rows[1], rows[2], rows[2]]
    assert found.objective == "log_prob"
    for number, task in enumerate(tasks):
        with open_session(model, [task], gradients=True) as session:
            f = objective_over(session, task, over)
        with evaluation(model, gradients=True), torch.no_grad():
            log_prob = lambda w, f=f: f.log_prob(w[None])[0]
            for place in range(3):
                u, v = (attribution.vectors[:, k[place]] for k in (found.first, found.second))
                costs = [removed(log_prob, f.point, *d) for d in ((u,), (v,), (u, v))]
                mine = (found.first_scores, found.second_scores, found.both_scores)
                for cost, scores in zip(costs, mine, strict=True):
                    assert float(scores[number, 0, place]) == pytest.approx(cost, abs=1e-9)
    measured = ms.measure(model, tasks, [ms.chain()]).parts
    clean = [float(part.clean_run.log_prob) for part in measured]
    assert found.values.tolist() == pytest.approx(clean)
    table = found.to_pandas()
    assert list(table)[:4] == ["task", "basis", "first", "second"]
    assert len(table) == 6
    assert list(found.summary().task) == [0, 1]


def test_gains_and_their_bases_share_one_run_and_the_batch_size_changes_nothing(real, silent):
    model, task, svd = real.model, real.task, real.svd
    bases = {"singular": torch.eye(svd.rank)[:, :6]}
    attribution = ms.hessian_attribution(model, task, svd, pairs=6, bases=bases, path_steps=2)
    options = {"rows": 4, "draws": 2}
    found = ms.interactions(model, task, svd, attribution, **options)
    assert found.names == ("Hessian", "singular")
    small = ms.interactions(model, task, svd, attribution, batch_size=3, **options)
    noise = 4 * attribution.noise_floor
    torch.testing.assert_close(found.interaction, small.interaction, rtol=0, atol=noise)
    # single removals are those of the attribution
    for number, part in enumerate((attribution, attribution.bases["singular"])):
        places = found.basis == number
        expected = part.measured[found.first[places]]
        torch.testing.assert_close(found.first_scores[0, 0, places], expected, rtol=0, atol=noise)
    assert len(repr(found).splitlines()) == 3
    both = dict(zip(found.names, found.summary("relative")["median"], strict=True))
    assert all(0 <= value <= 1 for value in both.values())


def test_medians_totals_and_their_random_bases_are_those_of_numpy(real, silent):
    found = ms.interactions(
        real.model, real.task, real.svd, {"singular": torch.eye(real.d_model)[:, :5]}, draws=9
    )
    sizes = found.interaction[0].abs().numpy()
    table = found.summary().iloc[0]
    assert table["median"] == pytest.approx(np.sort(sizes[0])[4])  # of 10 pairs, the lower middle
    random = np.sort(sizes[1:], axis=1)[:, 4]
    assert table.random_median == pytest.approx(np.median(random))
    assert table.random_low == pytest.approx(np.quantile(random, 0.025))
    assert table.random_high == pytest.approx(np.quantile(random, 0.975))
    assert table.p_value == pytest.approx((1 + (random <= np.sort(sizes[0])[4]).sum()) / 10)
    total = found.summary(total=True).iloc[0]
    assert total["sum"] == pytest.approx(sizes[0].sum())
    assert total.random_sum == pytest.approx(np.median(sizes[1:].sum(axis=1)))


def test_interactions_are_saved_and_loaded(real, tmp_path, silent):
    found = ms.interactions(
        real.model, real.task, real.svd, {"singular": torch.eye(real.d_model)}, rows=[7, 0, 3],
        draws=1,
    )  # fmt: skip
    assert found.first.tolist() == [7, 7, 0]
    found.save(tmp_path / "i.safetensors")
    loaded = ms.Interactions.load(tmp_path / "i.safetensors")
    assert loaded.to_pandas().equals(found.to_pandas())
    assert repr(loaded) == repr(found)


def test_an_attribution_of_another_w_or_model_is_refused(real, silent):
    model, task = real.model, real.task
    norms = ms.hessian_attribution(model, task, "blocks.0.ln1.weight", path_steps=2)
    with pytest.raises(ValueError, match=r"The attribution is over weights blocks.0.ln1.weight, b"):
        ms.interactions(model, task, "blocks.1.ln1.weight", norms)
    with pytest.raises(ValueError, match="The attribution and the model come from different"):
        ms.interactions(ms.reinitialised(model, 0), task, "blocks.0.ln1.weight", norms)
    with pytest.raises(ValueError, match=r"attribution has columns of .* entries, but w has"):
        ms.interactions(model, task, "blocks.0.mlp.in.weight", norms)
    change = ms.hessian_attribution(
        model, task, "blocks.0.ln1.weight", metric=ms.cross_entropy, path_steps=2
    )
    with pytest.raises(ValueError, match="attribution is of 'cross_entropy'; pass the same"):
        ms.interactions(model, task, "blocks.0.ln1.weight", change)
    found = ms.interactions(
        model, task, "blocks.0.ln1.weight", change, metric=ms.cross_entropy, rows=3, draws=1
    )
    assert found.objective == "cross_entropy"
    torch.testing.assert_close(
        found.first_scores[0, 0, :2].max(), change.measured.max(), rtol=1e-3, atol=1e-6
    )
