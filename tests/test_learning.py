"""A learned subspace: planted truth, finite differences, plain runs, and every subset of 8 directions."""

from itertools import combinations

import pytest
import torch

import mechsvd as ms
from mechsvd.engine.session import open_session
from mechsvd.experiments.descent import Texts

from .conftest import tiny, tiny_task
from .planted import divergence, planted, projecting, with_eight_dimensions

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_planted_subspace_is_found():
    """The last MLP writes in all directions alike, and four of them are read."""
    task = tiny_task(40, 2)
    model, subspace = planted(4, whitened_on=[task])
    where = {"layers": [1], "components": ["mlp"]}
    svd = ms.decompose(ms.collect_writes(model, task, **where))
    assert float(ms.overlap([svd.subspace(4), subspace]).values[0, 1]) < 1
    found = ms.learn_subspace(model, task, 4, start=svd, steps=200, **where)
    assert float(found.losses.min()) < 0.01 * float(found.losses[0])
    assert float(ms.overlap([found.subspace, subspace]).values[0, 1]) > 3.9


def test_the_loss_is_that_of_plain_runs_and_the_best_point_is_returned(real):
    tasks = [ms.Task(real.task.tokens[:12], 5), ms.Task(real.task.tokens[1:11], 6)]
    tasks.append(ms.Task(real.task.tokens[:12], 8))
    found = ms.learn_subspace(real.model, tasks, 9, start=real.svd, steps=5)
    loss = lambda basis: [divergence(real.model, task, projecting(basis)) for task in tasks]
    starts = loss(real.svd.directions[:, :9])
    assert float(found.losses[0]) == pytest.approx(sum(starts) / 3, rel=1e-4)
    assert found.divergences.tolist() == pytest.approx(loss(found.subspace.basis), rel=1e-3)
    assert float(found.losses.min()) == pytest.approx(float(found.divergences.mean()))
    table = found.to_pandas()
    assert table["step"].tolist() == list(range(6))
    assert "9 for all sites, on 3 text(s)" in repr(found)


@pytest.mark.parametrize("per", ["pool", "site"])
def test_the_gradient_is_that_of_finite_differences(per):
    model = tiny("Llama")
    tasks = [tiny_task(seed=1), tiny_task(12, 6), tiny_task(seed=2)]
    count = 4 if per == "site" else 1
    bases = torch.stack([ms.random_subspace(32, 5, seed).basis for seed in range(count)])
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(bases.shape, generator=generator, dtype=torch.float64)
    with open_session(model, tasks, gradients=True) as session:
        texts = Texts.of(session)
        _, slope = texts.slopes(bases)
        ahead, behind = (texts.slopes(bases + h * way)[0].double().mean() for h in (2e-3, -2e-3))
        (one,) = (Texts(session, texts.clean, texts.by_length, 1).slopes(bases)[1],)
    measured = float(ahead - behind) / 4e-3
    assert float((slope.double() * way).sum()) == pytest.approx(measured, rel=2e-2)
    torch.testing.assert_close(one, slope, rtol=1e-3, atol=1e-5)  # text by text


@pytest.mark.parametrize("per", ["pool", "site"])
def test_bases_are_orthonormal_and_fit_their_sites(real, per):
    task = ms.Task(real.task.tokens[:12], 5)
    found = ms.learn_subspace(real.model, task, 7, per=per, steps=8)
    assert len(found.bases) == (2 * real.n_layers if per == "site" else 1)
    for one in found.bases:
        exact = one.basis.double()
        assert float((exact.T @ exact - torch.eye(7).double()).abs().max()) < 1e-5
        assert one.source.tokens == (tuple(task.tokens.tolist()),)
    kept = ms.measure(real.model, task, [ms.keep(found.subspace)], metric=ms.kl_divergence)
    assert float(kept.effect) == pytest.approx(float(found.losses.min()), rel=1e-3)
    plain = divergence(
        real.model, task, lambda i: projecting(found.bases[i % len(found.bases)].basis)(i)
    )
    assert float(kept.effect) == pytest.approx(plain, rel=1e-3)
    assert found.losses[-1] < found.losses[0]


def test_on_its_own_text_it_is_at_least_as_good_as_every_order(real):
    task, svd, model, k = ms.Task(real.task.tokens[:20], 8), real.svd, real.model, 12
    ranking = ms.rank_directions(model, task, svd)
    orders = {
        "σ": ms.order_by_singular_value(svd),
        "effect": ms.order_by_effect(ranking),
        "divergence": ms.order_by_effect(ranking, by="kl_divergence"),
        "compromise": ms.order_by_compromise(svd, ranking),
        "elimination": ms.order_by_elimination(model, task, svd, share=0.3),
        "random": ms.order_at_random(svd),
    }
    edits = [ms.keep(svd.directions[:, order[:k]]) for order in orders.values()]
    edits += [
        ms.keep(ms.balanced_directions(model, task, svd, side=side), k)
        for side in ("read", "write")
    ]
    others = ms.measure(model, task, edits, metric=ms.kl_divergence).effect
    found = ms.learn_subspace(model, task, k, start=svd, steps=60)
    assert float(found.losses.min()) < 0.5 * float(others.min())


def test_every_subset_of_eight_directions_bounds_all_orders_from_below():
    """And the learned subspace, which need be no subset, bounds the subsets."""
    model, task = with_eight_dimensions(), tiny_task(14, 4)
    svd = ms.decompose(ms.collect_writes(model, task))
    assert svd.rank == svd.d_model == 8
    ranking = ms.rank_directions(model, task, svd)
    orders = [
        ms.order_by_singular_value(svd),
        ms.order_by_effect(ranking),
        ms.order_by_effect(ranking, by="kl_divergence"),
        ms.order_by_elimination(model, task, svd, share=0),
        *[ms.order_at_random(svd, seed) for seed in range(5)],
    ]
    for k in (3, 5):
        subsets = torch.zeros(0, 8)
        for subset in combinations(range(8), k):
            row = torch.zeros(1, 8)
            row[0, list(subset)] = 1
            subsets = torch.cat([subsets, row])
        every = ms.measure(model, task, ms.gate(svd, subsets), metric=ms.kl_divergence).effect
        least = float(every.min())
        places = int(every.argmin())
        plain = divergence(model, task, projecting(svd.directions[:, subsets[places] == 1]))
        assert least == pytest.approx(plain, rel=1e-3)
        for order in orders:
            sweep = ms.sweep_rank(model, task, svd, [k], order, metric=ms.kl_divergence)
            assert float(sweep.measurement.value) >= least * (1 - 1e-4)
        learned = ms.learn_subspace(model, task, k, steps=100)
        assert float(learned.losses.min()) < least


def test_a_random_start_follows_its_seed_and_reaches_the_same_depth(real):
    task = ms.Task(real.task.tokens[:14], 6)
    starts = [
        ms.learn_subspace(real.model, task, 10, start="random", seed=seed, steps=25)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(starts[0].losses, starts[1].losses)
    assert not torch.equal(starts[0].losses, starts[2].losses)
    first = ms.random_subspace(real.d_model, real.d_model).basis[:, :10]
    assert float(starts[0].losses[0]) == pytest.approx(
        divergence(real.model, task, projecting(first)), rel=1e-3
    )
    for found in starts:
        assert float(found.losses.min()) < 0.3 * float(found.losses[0])


def test_layers_and_positions_limit_where_it_acts(real):
    task = ms.Task(real.task.tokens[:12], 6)
    options = {"layers": [1], "positions": range(3, 9)}
    found = ms.learn_subspace(real.model, task, 4, per="site", steps=3, **options)
    assert [one.source.hooks for one in found.bases] == [
        ("blocks.1.hook_attn_out",),
        ("blocks.1.hook_mlp_out",),
    ]
    kept = ms.measure(
        real.model, task, [ms.keep(found.subspace)], metric=ms.kl_divergence, **options
    )
    assert float(kept.effect) == pytest.approx(float(found.losses.min()), rel=2e-2, abs=1e-7)
    again = ms.learn_subspace(
        real.model, task, 4, per="site", start=list(found.bases)[::-1], steps=0, **options
    )
    assert float(again.losses[0]) == pytest.approx(float(found.losses.min()), rel=2e-2, abs=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 33}, "`rank` is 33, but must be a whole number from 1 to 32"),
        ({"per": "layer"}, "`per` is 'layer'"),
        ({"start": "best"}, "`start` is 'best', but must be 'random'"),
        ({"start": [torch.eye(32)]}, "`start` holds 1 bases, but one is learned"),
        ({"start": torch.eye(16)}, "`start` has d_model 16, but the model's is 32"),
        ({"steps": -1}, "`steps` is -1"),
    ],
)
def test_what_cannot_be_learned_is_refused(change, message):
    given = {"rank": 3, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        ms.learn_subspace(tiny("Llama"), tiny_task(), **given)
