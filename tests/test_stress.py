"""The worst gains: next to an exhaustive search, to random gains and to single measurements."""

from itertools import product

import pytest
import torch

import mechsvd as ms

pytestmark = pytest.mark.filterwarnings("ignore")


def test_they_are_nearly_as_bad_as_the_worst_of_all_vertices(real):
    """With six free directions all 64 on-off patterns can be tried."""
    svd, free = real.svd, [0, 1, 2, 3, 5, 8]
    kept = [j for j in range(svd.rank) if j not in free]
    task = ms.Task(real.task.tokens[:14], 6)
    gains = torch.ones(64, svd.rank)
    gains[:, free] = torch.tensor([*product((0.0, 1.0), repeat=6)])
    all_patterns = ms.measure(
        real.model, task, ms.gate(svd, gains, rest=1.0), metric=ms.kl_divergence
    )
    found = ms.worst_gains(real.model, task, svd, kept, metric=ms.kl_divergence)
    assert float(found.effects[0]) >= 0.9 * float(all_patterns.effect.max())
    assert (found.gains[0, kept] == 1).all()


def test_the_effect_is_that_of_the_gains_and_worse_than_64_random_ones(real):
    tasks = [real.task, ms.Task(real.task.tokens[:10], 4)]
    kept = real.svd.rank // 2
    found = ms.worst_gains(real.model, tasks, real.svd, kept, steps=6)
    stress = ms.measure_faithfulness(real.model, tasks, real.svd, kept).stress
    for i, task in enumerate(tasks):
        edit = ms.gate(real.svd, found.gains[i], rest=1.0)
        effect = float(ms.measure(real.model, task, [edit]).effect)
        assert float(found.effects[i]) == pytest.approx(effect, abs=1e-2)
        assert effect > float(stress[i].max())
    assert (found.path.diff(dim=1) >= 0).all()
    assert list(found.to_pandas().columns) == ["task", "effect", "dropped"]
    assert "2 text(s)" in repr(found)


def test_the_gradient_of_the_first_step_is_that_of_finite_differences(real):
    """Of one direction left free, the cost is highest at an end of its gain."""
    task, svd = ms.Task(real.task.tokens[:10], 4), real.svd
    kept = [j for j in range(svd.rank) if j != 1]
    found = ms.worst_gains(real.model, task, svd, kept, steps=8)
    line = torch.linspace(0, 1, 21)
    gains = torch.ones(21, svd.rank)
    gains[:, 1] = line
    effects = ms.measure(real.model, task, ms.gate(svd, gains, rest=1.0)).effect
    assert float(found.effects[0]) == pytest.approx(float(effects.max()), abs=2e-2)


def test_a_metric_without_a_slope_gives_the_worst_start_and_the_model_is_as_it_was(real):
    task = ms.Task(real.task.tokens[:10], 4)
    found = ms.worst_gains(real.model, task, real.svd, 3, metric=ms.greedy_share, steps=1)
    assert 0 <= float(found.effects[0]) <= 1
    assert all(parameter.grad is None for parameter in real.model.parameters())


@pytest.mark.parametrize(
    ("kept", "steps", "message"),
    [
        (0, 3, "neither none nor all of them"),
        ([1, 1], 3, "`kept` is"),
        (2, 0, "`steps` is 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(real, kept, steps, message):
    with pytest.raises(ValueError, match=message):
        ms.worst_gains(real.model, real.task, real.svd, kept, steps=steps)
