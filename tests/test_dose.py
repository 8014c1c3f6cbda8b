"""The dose–response curve: a loop of plain hooks, next to changes of equal energy."""

import pytest
import torch

import mechsvd as ms

pytestmark = pytest.mark.filterwarnings("ignore")
GAINS = [0.0, 0.5, 1.0, 1.7]


@pytest.fixture(scope="module")
def found(real):
    return ms.dose_response(real.model, real.task, real.svd, [0, 2, 5], GAINS, seed=4)


def test_it_is_the_loop_of_one_run_per_direction_and_gain(real, found):
    names = [site.hook_name for site in ms.find_sites(real.model)]

    def log_prob(edit):
        with torch.no_grad():
            hooks = [(name, edit) for name in names]
            logits = real.model.run_with_hooks(real.task.tokens[None], fwd_hooks=hooks)
        chosen = logits[0, real.task.scored].double().log_softmax(-1)
        return float(chosen.gather(1, real.task.continuation[:, None]).sum())

    clean = log_prob(lambda x, hook: x)
    for row, direction in enumerate((0, 2, 5)):
        v = real.svd.directions[:, direction]
        for column, gain in enumerate(GAINS):
            edited = log_prob(
                lambda x, hook, v=v, gain=gain: x + (gain - 1) * (x @ v)[..., None] * v
            )
            assert float(found.effects[0, row, column]) == pytest.approx(clean - edited, abs=2e-3)
    assert found.effects[:, :, 2].abs().max() == 0 == found.random_effects[:, :, 2].abs().max()


def test_random_directions_change_the_writes_by_the_same_energy(real, monkeypatch):
    from mechsvd.experiments import dose

    stacks = []

    def kept(model, task, stack, **options):
        stacks.append(stack)
        return measure(model, task, stack, **options)

    measure = dose.measure
    monkeypatch.setattr(dose, "measure", kept)
    ms.dose_response(real.model, real.task, real.svd, [0, 3], [0.0, 2.0], seed=1)
    writes = ms.collect_writes(real.model, real.task).values.flatten(0, 1).double()
    own, random = (
        [float((stack[row](writes) - writes).square().sum()) for row in range(4)]
        for stack in stacks
    )
    assert own == pytest.approx(random, rel=1e-3)
    expected = real.svd.singular_values[[0, 0, 3, 3]].double().square().tolist()
    assert own == pytest.approx(expected, rel=1e-3)


def test_the_line_goes_through_the_clean_run_and_fits_best(found):
    table, summary = found.to_pandas(), found.summary()
    for direction in (0, 2, 5):
        rows = table[table.direction == direction]
        dose, effect = rows.gain - 1, rows.effect
        slope = (dose * effect).sum() / (dose**2).sum()
        row = summary[summary.direction == direction].iloc[0]
        assert row.slope == pytest.approx(slope)
        assert row.departure == pytest.approx((effect - slope * dose).abs().max())
        left, whole = ((effect - slope * dose) ** 2).sum(), (effect**2).sum()
        assert row.r_squared == pytest.approx(1 - left / whole)


def test_a_feature_that_acts_linearly_has_a_fit_of_one(real):
    """A planted metric: linear in the logits, at a hook point right before the unembedding."""
    at = {"at": "ln_final.hook_normalized"}
    svd = ms.decompose(ms.collect_writes(real.model, real.task, **at))
    found = ms.dose_response(
        real.model, real.task, svd, [0, 1], metric=ms.logit_difference(5, 9), **at
    )
    summary = found.summary()
    assert summary.r_squared.tolist() == pytest.approx([1, 1], abs=1e-2)
    assert summary.random_r_squared.tolist() == pytest.approx([1, 1], abs=1e-2)  # of small effects
    assert found.unit == "logits"


def test_several_texts_are_rows_of_one_result(real):
    other = ms.Task(tokens=real.task.tokens[:9], prompt_length=4)
    both = ms.dose_response(real.model, [real.task, other], real.svd, [1], [0.0, 2.0])
    alone = ms.dose_response(real.model, other, real.svd, [1], [0.0, 2.0])
    torch.testing.assert_close(both.effects[1:], alone.effects, rtol=0, atol=1e-4)
    assert both.to_pandas()["task"].tolist() == [0, 0, 1, 1]
