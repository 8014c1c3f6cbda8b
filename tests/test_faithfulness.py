"""Faithfulness: every number counted again from single calls, and planted curves."""

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.faithfulness import STRESS, areas

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def found(real):
    tasks = [real.task, ms.Task(real.task.tokens[:10], 4)]
    return tasks, ms.measure_faithfulness(real.model, tasks, real.svd, [0, 2, 5], seed=3)


def test_every_number_is_that_of_single_measurements(real, found):
    tasks, result = found
    table = result.to_pandas()
    d, svd = real.d_model, real.svd
    unseen = torch.eye(d) - svd.directions @ svd.directions.T
    for row, task in table.iterrows():

        def effect(gains, rest=0.0, task=tasks[row]):
            p = svd.directions @ torch.diag(gains) @ svd.directions.T + rest * unseen
            return ms.measure(real.model, task, [lambda x, hook: x @ p])

        kept = torch.zeros(svd.rank)
        kept[[0, 2, 5]] = 1
        alone = effect(kept)
        change = (alone.log_probs - alone.clean_run.log_probs)[0]
        assert task["effect"] == pytest.approx(float(alone.effect), abs=2e-3)
        assert task["mean_abs_change"] == pytest.approx(float(change.abs().mean()), abs=1e-3)
        assert task["abs_mean_change"] == pytest.approx(float(change.mean().abs()), abs=1e-3)
        assert task["worst_token"] == int(change.abs().argmax())
        assert task["kl_divergence"] == pytest.approx(float(alone.kl_divergence), abs=1e-3)
        assert task["effect_of_the_rest"] == pytest.approx(
            float(effect(1 - kept, 1.0).effect), abs=2e-3
        )
        losses = []
        for j in (0, 2, 5):
            gains = kept.clone()
            gains[j] = 0
            losses.append(float(effect(gains).effect) - float(alone.effect))
        assert task["least_needed"] == pytest.approx(min(losses), abs=4e-3)
    singles = ms.rank_directions(real.model, tasks[1], svd).effect
    total = float(singles.sum() - singles[[0, 2, 5]].sum())
    assert float(result.single[1]) == pytest.approx(total, abs=1e-2)
    assert table["non_additivity"][1] == pytest.approx(table["effect"][1] / total, rel=1e-2)


def test_tokens_that_cancel_are_seen(found):
    table = found[1].to_pandas()
    assert (table["mean_abs_change"] >= table["abs_mean_change"] - 1e-9).all()
    assert (table["worst_change"] >= table["mean_abs_change"]).all()
    assert found[1].stress.shape == (2, STRESS)
    assert (table["stress_worst"] >= table["stress_mean"]).all()


def test_random_gains_repeat_with_the_seed_and_lie_between(real, found):
    again = ms.measure_faithfulness(real.model, found[0], real.svd, [0, 2, 5], seed=3)
    torch.testing.assert_close(again.stress, found[1].stress, rtol=0, atol=1e-3)
    other = ms.measure_faithfulness(real.model, found[0], real.svd, [0, 2, 5], seed=4)
    assert not torch.allclose(other.stress, found[1].stress, atol=1e-3)


def test_areas_of_known_curves(real):
    svd, task = real.svd, real.task
    sweep = ms.sweep_rank(real.model, task, svd)
    row = areas(sweep).iloc[0]
    ranks, values = sweep.ranks.numpy(), sweep.measurement.log_prob.numpy()
    scaled = (values - values[0]) / (float(sweep.measurement.clean_run.log_prob) - values[0])
    trapezoid = np.sum((scaled[1:] + scaled[:-1]) / 2 * np.diff(ranks)) / ranks[-1]
    assert row["cpr"] == pytest.approx(trapezoid)
    gap = abs(1 - scaled)
    assert row["cmd"] == pytest.approx(np.sum((gap[1:] + gap[:-1]) / 2) / ranks[-1])
    logs = np.log(ranks[1:])
    log_area = np.sum((scaled[2:] + scaled[1:-1]) / 2 * np.diff(logs)) / (logs[-1] - logs[0])
    assert row["cpr_log"] == pytest.approx(log_area)
    with pytest.raises(ValueError, match="its areas need rank 0 and at least two others"):
        areas(ms.sweep_rank(real.model, task, svd, [3, 4, 5]))


@pytest.mark.fault(19)
@pytest.mark.parametrize("kept", [[], [0, 0], [-1], 0, [10**6]])
def test_directions_that_make_no_set_are_refused(real, kept):
    with pytest.raises(ValueError, match="`kept`"):
        ms.measure_faithfulness(real.model, real.task, real.svd, kept)
