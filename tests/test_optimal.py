"""Optimal constants cost no more than means; rankings under baselines are those of single calls."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.optimal import _minimum

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def texts(real):
    prompts = ("Once upon a time", "One day, a big")
    tasks = [ms.Task.from_text(real.model, p, max_new_tokens=12) for p in prompts]
    length = min(len(task.tokens) for task in tasks)
    return [ms.Task(task.tokens[:length], task.prompt_length) for task in tasks]


@pytest.fixture(scope="module")
def compared(real, texts):
    svd = ms.decompose(ms.collect_writes(real.model, texts))
    svd = replace(
        svd,
        singular_values=svd.singular_values[:48],
        directions=svd.directions[:, :48],
        left=svd.left[..., :48],
    )
    return svd, ms.compare_baselines(real.model, texts, svd)


def test_the_optimal_constant_costs_no_more_than_the_mean(compared):
    _, found = compared
    assert found.names == ("zero", "mean", "resample", "optimal")
    costs = dict(zip(found.names, found.effects, strict=True))
    worse = costs["optimal"] - costs["mean"]
    assert int((worse > 1e-5).sum()) <= 1  # the parabola may be wrong far from the mean,
    assert float(worse.max()) < 1e-3  # but not by much
    assert costs["optimal"].mean() < costs["mean"].mean() < costs["zero"].mean()


def test_the_comparison_is_that_of_single_rankings(real, texts, compared):
    svd, found = compared
    mean = ms.mean_baseline(ms.collect_writes(real.model, texts))
    for name, baseline in (("zero", None), ("mean", mean)):
        effects = [
            ms.rank_directions(
                real.model, task, svd, baseline=baseline, metric=ms.kl_divergence
            ).to_pandas()["kl_divergence"]
            for task in texts
        ]
        row = found.effects[found.names.index(name)]
        np.testing.assert_allclose(row.numpy(), np.mean(effects, axis=0), atol=1e-6)
    table = found.to_pandas()
    expected = np.corrcoef(*(np.argsort(np.argsort(e)) for e in found.effects[:2].numpy()))[0, 1]
    assert table["correlation with mean"][0] == pytest.approx(expected)


def test_the_shifts_and_the_search_are_what_a_single_measurement_says(real, texts):
    task = texts[0]
    svd = ms.decompose(ms.collect_writes(real.model, task))
    found = ms.optimal_baseline(real.model, task, svd)
    mean = ms.mean_baseline(ms.collect_writes(real.model, task))
    j = 3
    v = svd.directions[:, j]
    for row, shift in enumerate((-1, 0, 1)):
        points = mean.values + shift * found.steps[:, j].float()[None, :, None, None] * v
        shifted = ms.Baseline(points, mean.sites, "shifted mean", source=mean.source)
        edit = ms.ablate(v[:, None], baseline=shifted)
        cost = ms.measure(real.model, task, [edit], metric=ms.kl_divergence).effect
        assert float(found.costs[row, j]) == pytest.approx(float(cost), rel=1e-2, abs=1e-6)
    constants = (found.shifts * found.steps) @ svd.directions.double().T
    expected = mean.values.double() + constants[None, :, None]
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-4, atol=1e-4)
    assert (found.excess >= 0).all()
    assert float(found.excess.max()) <= float(found.costs[1].max())
    assert "a fine search is better by up to" in repr(found)


def test_the_minimum_of_a_parabola_is_its_vertex_and_of_a_hill_an_end():
    x = torch.tensor([-1.0, 0.0, 1.0]).double()
    parabola, hill, line = 2 * (x - 0.7) ** 2 + 1, -(x**2) + 0.1 * x, 5 * x
    found = _minimum(torch.stack([parabola, hill, line], dim=1))
    assert found.tolist() == pytest.approx([0.7, -1, -1])


def test_texts_without_a_partner_are_compared_without_resampling(real):
    task = ms.Task(tokens=real.task.tokens[:8], prompt_length=4)
    svd = ms.decompose(ms.collect_writes(real.model, task))
    assert ms.compare_baselines(real.model, task, svd).names == ("zero", "mean", "optimal")
