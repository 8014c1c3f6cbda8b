import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.ranking import Ranking
from tests.conftest import loop_log_prob, tiny_hf, tiny_task
from tests.conftest import tiny as bridge


@pytest.fixture(scope="module")
def ranking(embedded, meaning, meaning_svd):
    return ms.rank_directions(embedded, meaning, meaning_svd)


def test_every_effect_equals_that_of_a_loop(embedded, meaning, meaning_svd, ranking):
    clean = loop_log_prob(embedded, meaning, lambda x, hook: x, range(6)).sum()
    for direction in range(0, 128, 17):
        v = meaning_svd.directions[:, direction]
        expected = (
            clean
            - loop_log_prob(
                embedded, meaning, lambda x, hook, v=v: x - (x @ v)[..., None] * v, range(6)
            ).sum()
        )
        assert float(ranking.effect[direction]) == pytest.approx(float(expected), abs=1e-3)


@pytest.fixture(scope="module")
def exact_effects(real, reference):
    """The effect of every direction from raw modules in float64."""
    clean, effects = reference.run(lambda x: x)[0], []
    for v in real.svd.directions.double().T:
        effects.append(clean - reference.run(lambda x, v=v: x - (x @ v)[..., None] * v)[0])
    return torch.tensor(effects, dtype=torch.float64)


def test_all_effects_on_a_real_model_agree_with_raw_modules_in_float64(real, exact_effects):
    found = ms.rank_directions(real.model, real.task, real.svd)
    assert len(found.effect) == real.d_model
    torch.testing.assert_close(found.effect.double(), exact_effects, rtol=1e-6, atol=1e-3)


def planted_model():
    """Every output projection but one is nearly silenced, and that one writes along a single direction."""
    hf_model = tiny_hf("Llama")
    with torch.no_grad():
        for layer in hf_model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        planted = torch.nn.functional.normalize(torch.randn(32), dim=0)
        hf_model.model.layers[1].mlp.down_proj.weight.copy_(torch.outer(planted, torch.randn(64)))
    return bridge("Llama", hf_model), planted


def own_text(model, seed):
    """What the planted direction makes the model say."""
    prompt = tiny_task(length=10, seed=seed).tokens[None]
    options = {
        "max_new_tokens": 20,
        "do_sample": False,
        "return_type": "tokens",
        "verbose": False,
        "stop_at_eos": False,
    }
    return ms.Task(tokens=model.generate(prompt, **options)[0], prompt_length=10)


def test_a_direction_that_alone_carries_the_answer_is_ranked_first(silent):
    model, planted = planted_model()
    task = own_text(model, 0)
    svd = ms.decompose(ms.collect_writes(model, task))
    first = int(ms.order_by_effect(ms.rank_directions(model, task, svd))[0])
    assert abs(float(svd.directions[:, first] @ planted)) > 0.999


def test_over_12_texts_a_planted_direction_is_found_by_both_corrections(silent):
    """And the interval covers its effect on the population, here 60 further texts."""
    model, planted = planted_model()
    texts = [own_text(model, seed) for seed in range(72)]
    svd = ms.decompose(ms.collect_writes(model, texts[:12]))
    first = int((svd.directions.T @ planted).abs().argmax())
    table = ms.rank_directions(model, texts[:12], svd).summary().set_index("direction")
    found = table.loc[first]
    assert found["mean"] == table["mean"].max()
    assert max(found.p_value, found.p_family, found.q_value) <= 0.05
    others = ms.measure(model, texts[12:], [ms.ablate(svd.directions[:, first : first + 1])])
    assert found.low <= float(others.effect.mean()) <= found.high


@pytest.mark.fault(37)
def test_the_noise_floor_is_small_and_marks_ties(ranking):
    assert 0 < ranking.noise_floor < 1e-3
    assert ranking.is_noise.sum() < 64
    assert ranking.is_noise.tolist() == (ranking.effect.abs() <= ranking.noise_floor).tolist()


def test_the_orders_are_permutations_with_the_ends_of_the_compromise(meaning_svd, ranking):
    everything = torch.arange(128)
    orders = [
        ms.order_by_singular_value(meaning_svd),
        ms.order_by_effect(ranking),
        ms.order_by_compromise(meaning_svd, ranking),
        ms.order_at_random(meaning_svd, seed=1),
    ]
    assert all(torch.equal(order.sort().values, everything) for order in orders)
    assert (ranking.effect[orders[1]].diff() <= 0).all()
    assert torch.equal(ms.order_by_compromise(meaning_svd, ranking, weight=0.0), orders[0])
    assert torch.equal(ms.order_by_compromise(meaning_svd, ranking, weight=1.0), orders[1])
    assert torch.equal(ms.order_at_random(meaning_svd, seed=1), orders[3])
    assert not torch.equal(ms.order_at_random(meaning_svd, seed=2), orders[3])


def test_the_compromise_is_the_mean_of_both_places():
    svd = ms.decompose(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))[None])
    said = torch.ones(4, 1, dtype=torch.bool)
    ones, sites = torch.ones(4, 1), (ms.Site(0, "mlp", "blocks.0.hook_mlp_out"),)
    measured = ms.Measurement(
        torch.tensor([[-3.0], [-1.0], [-9.0], [-2.0]]), said, ones, ones, sites
    )
    from dataclasses import replace

    clean = ms.Measurement(torch.zeros(1, 1), said[:1], ones[:1], ones[:1], sites)
    ranking = Ranking(
        svd.singular_values, replace(measured, clean=clean)
    )  # effects 3, 1, 9, 2: places 1, 3, 0, 2
    assert ms.order_by_effect(ranking).tolist() == [2, 0, 3, 1]
    assert ms.order_by_compromise(svd, ranking).tolist() == [0, 2, 1, 3]  # means ½, 2, 1, 2½


def test_a_bad_weight_and_a_ranking_of_something_else_are_refused(meaning_svd, ranking):
    with pytest.raises(ValueError, match=r"`weight` is 1\.5"):
        ms.order_by_compromise(meaning_svd, ranking, weight=1.5)
    with pytest.raises(ValueError, match="of 128 directions, but the decomposition has 2"):
        ms.order_by_compromise(ms.decompose(torch.eye(2)[None]), ranking)


def test_the_table_the_printed_form_and_saving(ranking, tmp_path):
    assert list(ranking.to_pandas().columns) == [
        "direction",
        "singular_value",
        "log_prob",
        "effect",
        "is_noise",
        "kl_divergence",
        "absolute_change",
    ]
    assert len(repr(ranking).splitlines()) == 3
    ranking.save(tmp_path / "r.safetensors")
    assert torch.equal(Ranking.load(tmp_path / "r.safetensors").effect, ranking.effect)


@pytest.mark.fault(37)
def test_the_noise_floor_is_of_the_size_of_the_errors(real, exact_effects):
    found = ms.rank_directions(real.model, real.task, real.svd)
    errors = (found.effect.double() - exact_effects).abs()
    # all effects share the error of the clean run, so by the floor alone a text has luck or not
    assert (errors <= 2 * found.noise_floor).float().mean() > 0.9
    assert found.noise_floor < 10 * float(errors.max())


def test_a_compromise_with_a_ranking_of_other_directions_is_refused(embedded, ranking):
    task = ms.Task.from_text(embedded, ms.SHORTFORM_PROMPTS["launch"], max_new_tokens=12)
    other = ms.decompose(ms.collect_writes(embedded, task))
    with pytest.raises(ValueError, match="The ranking is of other directions"):
        ms.order_by_compromise(other, ranking)


def test_directions_can_be_ranked_after_others_are_removed(embedded, meaning, meaning_svd):
    ranking = ms.rank_directions(embedded, meaning, meaning_svd, after=[4, 9])
    for j in (0, 4, 50):
        removed = sorted({4, 9, j})
        edit = ms.ablate(meaning_svd.directions[:, removed])
        expected = ms.measure(embedded, meaning, [edit]).effect
        assert float(ranking.effect[j]) == pytest.approx(float(expected), abs=1e-3)
    with pytest.raises(ValueError, match=r"`after` is \[128\], but must be directions of a single"):
        ms.rank_directions(embedded, meaning, meaning_svd, after=[128])


def test_a_large_gain_is_named_beside_the_most_damage(embedded, meaning, meaning_svd):
    doubt = ms.Metric(
        "doubt", "", lambda logits, clean, task: -(logits[:, -1].softmax(-1) ** 2).sum(-1)
    )
    ranking = ms.rank_directions(embedded, meaning, meaning_svd, metric=doubt)
    largest = int(ranking.effect.abs().argmax())
    named = f"the largest change is a gain, {float(ranking.effect[largest]):.4g}, of {largest}"
    assert (named in repr(ranking)) == bool(ranking.effect[largest] < 0)
    reverse = ms.Metric("doubt", "", doubt.function, better="less")
    other = ms.rank_directions(embedded, meaning, meaning_svd, metric=reverse)
    assert ("the largest change is a gain" in repr(other)) != ("a gain" in repr(ranking))
