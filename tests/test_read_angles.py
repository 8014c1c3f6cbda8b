"""Angles between what is written and what is read are those of two plain SVDs."""

import numpy as np
import pytest
import scipy.linalg
import torch

import mechsvd as ms

from .conftest import tiny_task
from .planted import planted

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.older]


def test_angles_at_each_site_are_those_of_the_two_eigenbases(real):
    tasks = [ms.Task(real.task.tokens[:14], 6), ms.Task(real.task.tokens[:11], 5)]
    found = ms.read_write_angles(real.model, tasks, 5, draws=6, null_draws=100)
    samples = (ms.collect_writes(real.model, tasks), ms.collect_reads(real.model, tasks, draws=6))
    for site in (0, 3):
        a, b = (np.linalg.svd(s.values[site].double().numpy())[2][:5].T for s in samples)
        expected = np.sort(scipy.linalg.subspace_angles(a, b))
        np.testing.assert_allclose(found.angles[site].numpy(), expected, atol=1e-4)
    table = found.to_pandas()
    assert list(table["component"][:2]) == ["attn", "mlp"]
    drawn = found.random.cos().square().sum(dim=1)
    error = 4 * float(drawn.std()) / 10
    assert found.expected == 25 / real.d_model == pytest.approx(float(drawn.mean()), abs=error)
    np.testing.assert_allclose(table["shared"], found.angles.cos().square().sum(dim=1), rtol=1e-6)
    assert len(repr(found).splitlines()) == 3


def test_angles_of_a_planted_model_show_what_is_read():
    """All 32 dimensions are written, six are read: the spans of six share what chance gives."""
    model, subspace = planted()
    tasks = [tiny_task(14, 3, seed=seed) for seed in range(4)]
    found = ms.read_write_angles(model, tasks, 6)
    writes = ms.decompose(ms.collect_writes(model, tasks), per="site")
    for site in (0, 1):
        expected = ms.principal_angles(writes[site].subspace(6), subspace)
        torch.testing.assert_close(found.angles[site], expected, atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="`rank` is 7, but .* that are read"):
        ms.read_write_angles(model, tasks[0], 7)
