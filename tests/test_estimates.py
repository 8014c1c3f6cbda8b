"""Estimates from derivatives, against the exact ranking, finite differences and closed forms."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import beta, binomtest, spearmanr

import mechsvd as ms
from mechsvd.attribution.agreement import share_interval, spread_sample
from mechsvd.attribution.curvature import Function
from mechsvd.attribution.slopes import effects_from
from tests.conftest import load_real, tiny, tiny_task


def recall(estimate, exact, top=32):
    first, second = (set(x.argsort(descending=True)[:top].tolist()) for x in (estimate, exact))
    return len(first & second) / top


@functools.cache
def text(name, number):
    """One of several texts of a trained model, its directions, and the exact ranking."""
    model = load_real(name).model
    if name == "embedded":
        prompt = [*ms.SHORTFORM_PROMPTS.values()][number]
        task = ms.Task.from_text(model, prompt, max_new_tokens=20)
    else:
        task = ms.tasks_from(model, "tests/stories.jsonl")[number]
    svd = ms.decompose(ms.collect_writes(model, task))
    return task, svd, ms.rank_directions(model, task, svd).effect


def point_function(values, entries, dtype=torch.float64):
    return Function(values, torch.ones(entries, dtype=dtype), 64, lambda size: size // 2)


def removed_one_by_one(values, entries):
    rows = 1 - torch.eye(entries, dtype=torch.float64)
    return (values(torch.ones(1, entries, dtype=torch.float64)) - values(rows)).detach()


# closed forms


def test_order_1_is_exact_for_a_linear_function_and_order_2_for_a_quadratic_one():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, generator=generator, dtype=torch.float64)
    q = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    linear = lambda rows: rows @ a + 3
    quadratic = lambda rows: rows @ a + ((rows @ q) * rows).sum(-1)
    assert torch.allclose(effects_from(point_function(linear, 7), 1, 0, 1, 0), a)
    exact = removed_one_by_one(quadratic, 7)
    found = effects_from(point_function(quadratic, 7), 2, 7, 1, 0)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    first = effects_from(point_function(quadratic, 7), 1, 0, 1, 0)
    torch.testing.assert_close(first - exact, q.diagonal(), rtol=0, atol=1e-12)


def test_the_path_is_exact_for_a_sum_of_functions_of_one_gain_each_and_sums_to_all_removed():
    a = torch.linspace(0.3, 2, 7, dtype=torch.float64)
    apart = lambda rows: (a * rows).sin().sum(-1)
    found = effects_from(point_function(apart, 7), "path", 0, 12, 0)
    torch.testing.assert_close(found, a.sin(), rtol=0, atol=1e-12)
    mixed = lambda rows: (rows @ a).tanh() + (rows.square() @ a)
    found = effects_from(point_function(mixed, 7), "path", 0, 40, 0)
    whole = mixed(torch.ones(1, 7).double()) - mixed(torch.zeros(1, 7).double())
    assert float(found.sum()) == pytest.approx(float(whole), abs=1e-9)


def test_random_signs_estimate_the_second_derivatives_without_bias():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    quadratic = lambda rows: ((rows @ q) * rows).sum(-1)
    exact = removed_one_by_one(quadratic, 6)
    found = torch.stack(
        [effects_from(point_function(quadratic, 6), 2, 2, 1, seed) for seed in range(400)]
    )
    error = (found.mean(0) - exact) / (found.std(0) / 20)
    assert float(error.abs().max()) < 4
    assert float(found.std(0).min()) > 0.1
    diagonal = lambda rows: rows.square() @ torch.arange(6).double()
    once = effects_from(point_function(diagonal, 6), 2, 1, 1, 0)  # no other entries, no noise
    torch.testing.assert_close(once, torch.arange(6).double(), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def linear_model():
    """A Llama whose last norm does next to nothing, so that logits are linear in the last write."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, intermediate_size=64, num_key_value_heads=2,
        pad_token_id=None, rms_norm_eps=1e8,
    )  # fmt: skip
    plain = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=3.0 if parameter.ndim > 1 else 30.0)
    return tiny("Llama", plain)


@pytest.mark.parametrize(("power", "order"), [(1, 1), (2, 2)])
def test_a_metric_that_is_linear_or_quadratic_in_the_gains_is_estimated_exactly(
    linear_model, power, order, silent
):
    task, where = tiny_task(), {"layers": [1], "components": ["mlp"]}
    svd = ms.decompose(ms.collect_writes(linear_model, task, **where))

    def metric(logits, clean, task):
        return logits[:, 0, 7] ** power

    exact = ms.rank_directions(linear_model, task, svd, metric=metric, **where).effect
    found = ms.estimate_ranking(
        linear_model, task, svd, order, metric=metric, calibrate=False, **where
    )
    size = float(exact.abs().max())
    torch.testing.assert_close(found.estimate / size, exact / size, rtol=0, atol=2e-4)
    lower = ms.estimate_ranking(linear_model, task, svd, 1, metric=metric, calibrate=False, **where)
    if power == 2:  # what order 1 leaves out is seen
        assert float((lower.estimate - exact).abs().max()) > 0.01 * size


# finite differences


def differences(real, some, baseline=None):
    """First and second differences of the measured metric in some gains, each of a fitting step."""
    found = {}
    for step in (0.01, 0.05):
        rows = torch.ones(2, len(some), real.svd.rank)
        for i, j in enumerate(some.tolist()):
            rows[0, i, j], rows[1, i, j] = 1 + step, 1 - step
        stack = ms.gate(real.svd, rows.flatten(0, 1), rest=1.0, baseline=baseline)
        measured = ms.measure(real.model, real.task, stack)
        (up, down), clean = measured.value.view(2, -1), measured.clean.value
        found[step] = (up - down) / (2 * step), (up + down - 2 * clean) / step**2
    return found[0.01][0], found[0.05][1]


def test_order_1_and_2_are_the_differences_of_the_measured_metric(real):
    some = torch.tensor([0, 1, 5, 20, 40])
    first, second = (
        ms.estimate_ranking(real.model, real.task, real.svd, order, calibrate=False).estimate
        for order in (1, 2)
    )
    slope, curvature = differences(real, some)
    torch.testing.assert_close(first[some], slope, rtol=0.02, atol=5e-3)
    torch.testing.assert_close((first - second)[some], curvature / 2, rtol=0.1, atol=2e-2)


def test_the_slope_about_a_baseline_is_another_and_is_that_of_the_baseline(real):
    some = torch.tensor([0, 1, 5, 20, 40])
    mean = ms.mean_baseline(ms.collect_writes(real.model, real.task))
    own, zero = (
        ms.estimate_ranking(real.model, real.task, real.svd, baseline=m, calibrate=False)
        for m in (mean, None)
    )
    slope, _ = differences(real, some, mean)
    torch.testing.assert_close(own.derivative[some], slope, rtol=0.02, atol=5e-3)
    assert float((own.derivative - zero.derivative)[some].abs().max()) > 0.05
    exact = ms.rank_directions(real.model, real.task, real.svd, baseline=mean).effect
    run = own.is_exact
    torch.testing.assert_close(own.exact[run], exact[run], rtol=1e-4, atol=1e-4)


# the trained models


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_parts_are_what_their_names_say(real, number):
    task, svd, exact = text(real.name, number)
    found = ms.estimate_ranking(real.model, task, svd)
    run = found.is_exact
    torch.testing.assert_close(found.exact[run], exact[run], rtol=1e-4, atol=1e-4)
    assert int(found.is_sampled.sum()) == max(8, -(-svd.rank // 20))
    assert found.cost == pytest.approx((3 + int(run.sum())) / svd.rank)
    squares = svd.singular_values.double().square()
    errors = (found.exact - found.derivative) / squares
    low, high = np.quantile(errors[run].numpy(), [0.25, 0.75])
    shown = 0.0 if low < 0 < high else min(low, high, key=abs)
    assert found.correction == pytest.approx(shown, abs=1e-12)
    torch.testing.assert_close(found.estimate, found.derivative + found.correction * squares)
    assert torch.equal(found.effect, torch.where(run, found.exact, found.estimate))
    places = run.nonzero().flatten().tolist()
    for place, held in zip(places, found.held_out().tolist(), strict=True):
        others = [e for j, e in enumerate(errors.tolist()) if run[j] and j != place]
        low, high = np.quantile(others, [0.25, 0.75])
        a = 0.0 if low < 0 < high or shown == 0 else min(low, high, key=abs)
        own = float(found.derivative[place] + a * squares[place])
        assert held == pytest.approx(own, rel=1e-5, abs=1e-9)
    table = found.to_pandas()
    assert list(table.direction) == list(range(svd.rank))
    assert np.isnan(table.exact).sum() == svd.rank - int(run.sum())


def test_the_correction_and_the_second_order_bring_estimates_nearer_to_the_exact_ranking(real):
    """Numbers that the documentation tells: Spearman and recall of the top 32, per order."""
    rows = {}
    for number in range(4):
        task, svd, exact = text(real.name, number)
        for order in (1, 2, "path"):
            for calibrate in (False, True):
                found = ms.estimate_ranking(real.model, task, svd, order, calibrate=calibrate)
                agreement = (
                    float(spearmanr(found.estimate, exact).statistic),
                    recall(found.estimate, exact),
                )
                rows.setdefault((order, calibrate), []).append(agreement)
    mean = {key: np.mean(values, axis=0) for key, values in rows.items()}
    # derivatives alone, and with the correction: what one gradient and eight runs give
    plain, corrected = {"embedded": (0.80, 0.80), "stories260k": (0.55, 0.83)}[real.name]
    assert mean[1, False][0] == pytest.approx(plain, abs=0.05)
    assert mean[1, True][0] > corrected - 0.05
    assert mean[1, True][1] > 0.78  # of the top 32; the goal of 0.95 needs more runs
    assert mean[2, True][0] > mean[1, True][0]
    assert mean["path", False][0] < mean[2, True][0] - 0.1


def test_refinement_finds_the_top_at_a_fraction_of_the_exact_work(real):
    """About 0.95 of the top 32: a fifth of the work on the embedded model, half on stories260k."""
    budget = {"embedded": 0.25, "stories260k": 0.4}[real.name]
    before, after = [], []
    for number in range(4):
        task, svd, exact = text(real.name, number)
        found = ms.estimate_ranking(real.model, task, svd)
        better = ms.refine_ranking(real.model, task, svd, found, budget)
        new = better.is_exact & ~found.is_exact
        assert int(new.sum()) == -(-int(1e6 * budget * svd.rank) // int(1e6))
        torch.testing.assert_close(better.exact[new], exact[new], rtol=1e-4, atol=1e-4)
        # those in doubt come first, by the definition written out
        assert float(found.doubt()[new].max()) <= float(found.doubt()[~better.is_exact].min())
        assert torch.equal(better.is_sampled, found.is_sampled)
        before.append(recall(found.effect, exact))
        after.append(recall(better.effect, exact))
    assert np.mean(after) >= 0.94
    assert np.mean(before) < np.mean(after) - 0.05
    everything = ms.refine_ranking(real.model, task, svd, found, 1.0)
    torch.testing.assert_close(everything.effect, exact, rtol=1e-4, atol=1e-4)
    assert everything.agreement().missed_high[0] == 0
    assert not everything.is_flagged().any()


def test_the_intervals_hold_what_the_exact_ranking_gives(real):
    held, bounded, counted = [], [], 0
    for number in range(3):
        task, svd, exact = text(real.name, number)
        found = ms.estimate_ranking(real.model, task, svd, calibrate=False)
        for seed in range(40):
            sampled = spread_sample(found.derivative, 12, seed)
            chosen = torch.zeros(svd.rank, dtype=torch.bool)
            chosen[sampled] = True
            sample = replace(
                found, exact=torch.where(chosen, exact, torch.nan), is_sampled=chosen, seed=seed
            )
            row = sample.agreement().iloc[0]
            true = float(spearmanr(sample.estimate, exact).statistic)
            held.append(row.spearman_low <= true <= row.spearman_high)
            top = set(exact.argsort(descending=True)[:32].tolist())
            reported = set(sample.order_by_estimate()[:32].tolist())
            bounded.append(len(top - reported) <= row.missed_high)
            counted += row.sampled == 12
    assert counted == 120
    assert np.mean(held) > 0.8
    assert np.mean(bounded) > 0.95


def test_a_divergence_has_a_slope_of_zero_and_a_curvature(real):
    task, svd, _ = text(real.name, 0)
    exact = ms.rank_directions(real.model, task, svd, metric=ms.kl_divergence).effect
    with pytest.warns(UserWarning, match="has no slope at the clean run.*Use order=2"):
        first = ms.estimate_ranking(real.model, task, svd, 1, metric=ms.kl_divergence)
    assert float(first.derivative.abs().max()) < 1e-4
    second = ms.estimate_ranking(real.model, task, svd, 2, metric=ms.kl_divergence, calibrate=False)
    assert float(second.estimate.min()) > -1e-4  # damage is positive where less is better
    assert float(spearmanr(second.estimate, exact).statistic) > 0.9
    few = ms.estimate_ranking(
        real.model, task, svd, 2, metric=ms.kl_divergence, products=4, calibrate=False
    )
    assert (few.products, second.products) == (4, svd.rank)
    assert few.cost < second.cost / 5


def test_a_choice_is_estimated_in_logits(real):
    task, svd, _ = text(real.name, 0)
    metric = ms.logit_difference(5, 9)
    exact = ms.rank_directions(real.model, task, svd, metric=metric).effect
    found = ms.estimate_ranking(real.model, task, svd, 2, metric=metric, calibrate=False)
    assert (found.metric, found.unit) == ("logit_difference", "logits")
    assert float(spearmanr(found.estimate, exact).statistic) > 0.8


def test_each_site_has_its_own_basis_and_several_texts_their_own_parts(real, silent):
    tasks = [text(real.name, number)[0] for number in range(2)]
    bases = ms.decompose(ms.collect_writes(real.model, tasks), per="site")
    exact = ms.rank_directions(real.model, tasks, bases)
    found = ms.estimate_ranking(real.model, tasks, bases, calibrate=False)
    assert found.effect.shape == exact.effect.shape
    for part, ranking in zip(found.parts, exact.parts, strict=True):
        assert part.names == ranking.names
        run = part.is_exact
        torch.testing.assert_close(part.exact[run], ranking.effect[run], rtol=1e-4, atol=1e-4)
        assert float(spearmanr(part.estimate, ranking.effect).statistic) > 0.6
        assert list(part.to_pandas().basis) == list(ranking.to_pandas().basis)
    assert list(found.agreement().task) == [0, 1]
    better = ms.refine_ranking(real.model, tasks, bases, found, 0.02)
    assert all((b.is_exact & ~p.is_exact).any() for b, p in zip(better, found, strict=True))


def test_bare_directions_have_the_estimates_of_their_decomposition(real, tmp_path):
    task, svd, _ = text(real.name, 0)
    found, bare = (ms.estimate_ranking(real.model, task, basis) for basis in (svd, svd.directions))
    torch.testing.assert_close(bare.derivative, found.derivative, rtol=1e-4, atol=1e-6)
    assert bare.singular_values.isnan().all()
    assert bare.effect.isfinite().all()
    bare.save(tmp_path / "bare")
    refined = ms.refine_ranking(
        real.model, task, svd.subspace(svd.rank), ms.load(tmp_path / "bare")
    )
    exact = ms.rank_directions(real.model, task, svd).effect.double()
    run = refined.is_exact
    assert int(run.sum()) > int(bare.is_exact.sum())
    torch.testing.assert_close(refined.exact[run], exact[run], rtol=1e-4, atol=1e-4)


def test_an_estimate_survives_saving_and_gives_an_order_for_a_sweep(real, tmp_path):
    task, svd, _ = text(real.name, 0)
    found = ms.estimate_ranking(real.model, task, svd)
    found.save(tmp_path / "a")
    again = ms.RankingEstimate.load(tmp_path / "a")
    assert torch.equal(again.effect, found.effect)
    assert repr(again) == repr(found)
    order = again.order_by_estimate()
    assert sorted(order.tolist()) == list(range(svd.rank))
    sweep = ms.sweep_rank(real.model, task, svd, ranks=[8], order=order)
    assert torch.equal(sweep.order.cpu(), order)
    refined = ms.refine_ranking(real.model, task, svd, again, 0.1)
    assert int(refined.is_exact.sum()) > int(found.is_exact.sum())


def test_the_model_is_left_as_it_was_and_a_seed_gives_the_same(real):
    task, svd, _ = text(real.name, 0)
    wants = [p.requires_grad for p in real.model.parameters()]
    first, second, other = (
        ms.estimate_ranking(real.model, task, svd, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first.effect, second.effect)
    assert not torch.equal(first.is_sampled, other.is_sampled)
    assert [p.requires_grad for p in real.model.parameters()] == wants
    assert all(p.grad is None for p in real.model.parameters())


def test_a_refinement_of_something_else_is_refused(real, silent):
    task, svd, _ = text(real.name, 0)
    other, _, _ = text(real.name, 1)
    found = ms.estimate_ranking(real.model, task, svd)
    rows = [
        ((other, svd, found), {}, "is of 1 other texts"),
        ((task, svd, found), {"metric": ms.kl_divergence}, "is in `log_prob`, but `metric`"),
        (
            (task, ms.decompose(ms.collect_writes(real.model, task, layers=[0])), found),
            {},
            "direct",
        ),
    ]
    for given, options, sentence in rows:
        with pytest.raises(ValueError, match=sentence):
            ms.refine_ranking(real.model, *given, **options)


# statistics


def test_a_share_has_the_exact_binomial_interval():
    for hits, count in ((0, 8), (3, 8), (8, 8), (5, 40)):
        share, low, high = share_interval(hits, count, 0.95)
        exact = binomtest(hits, count).proportion_ci(0.95, method="exact")
        assert (share, low, high) == pytest.approx((hits / count, exact.low, exact.high), abs=1e-9)
    # the one-sided limit of none in eight, in closed form
    from mechsvd.attribution.agreement import upper_share

    assert upper_share(0, 8, 0.95) == pytest.approx(1 - 0.05 ** (1 / 8))
    assert beta.ppf(0.95, 1, 8) == pytest.approx(1 - 0.05 ** (1 / 8))


def test_a_sample_takes_one_of_each_block_and_every_direction_has_its_chance():
    values = torch.randn(40, generator=torch.Generator().manual_seed(1))
    places = values.argsort(descending=True).argsort()
    counts = torch.zeros(40)
    for seed in range(400):
        chosen = spread_sample(values, 8, seed)
        assert sorted((places[chosen] // 5).tolist()) == list(range(8))
        counts[chosen] += 1
    assert 50 < float(counts.min()) <= float(counts.max()) < 115  # 80 ± 8 each
