import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.ridge import effective_directions
from tests.conftest import loop_log_prob


def test_each_row_is_one_run_with_every_write_shrunk(embedded, meaning, meaning_svd):
    alphas = [0.0, 3.0, 1e3, 1e5]
    found = ms.sweep_ridge(embedded, meaning, meaning_svd, alphas)
    v, s = meaning_svd.directions, meaning_svd.singular_values
    for alpha, log_probs in zip(alphas, found.measurement.log_probs, strict=True):

        def edit(x, hook, a=alpha):
            return x @ v @ torch.diag(s**2 / (s**2 + a)) @ v.T

        expected = loop_log_prob(embedded, meaning, edit, range(6))
        torch.testing.assert_close(log_probs.double(), expected, rtol=1e-4, atol=2e-4)


def test_the_effective_number_is_the_trace_of_the_shrinkage(real):
    alphas = torch.tensor([0.0, 0.5, 40.0], dtype=torch.float64)
    expected = [float(ms.shrink(real.svd, a).gains.double().sum()) for a in alphas.tolist()]
    torch.testing.assert_close(
        effective_directions(real.svd, alphas), torch.tensor(expected).double(), rtol=1e-5, atol=0
    )


def test_the_default_strengths_are_evenly_spaced_in_effective_directions(real):
    found = ms.sweep_ridge(real.model, real.task, real.svd)
    assert len(found.alphas) == 64
    expected = torch.linspace(real.d_model / 64, real.d_model, 64).double()
    torch.testing.assert_close(found.effective_directions, expected, rtol=0, atol=0.01)
    assert float(found.alphas[-1]) == 0
    assert float(found.measurement.log_prob[-1]) == pytest.approx(
        float(found.measurement.clean_run.log_prob), abs=1e-4
    )
    table = found.to_pandas()
    assert list(table) == [
        "alpha",
        "effective_directions",
        "directions_left",
        "log_prob",
        "probability",
        "surprise",
        "orig_delta",
        "kept_delta",
        "kl_divergence",
        "absolute_change",
    ]
    assert (table.alpha.diff().dropna() < 0).all()
    assert (table.kept_delta <= table.orig_delta * 1.0001).all()


def test_few_effective_directions_may_be_many_that_are_left(real):
    found = ms.sweep_ridge(real.model, real.task, real.svd)
    squares = real.svd.singular_values.double().square()
    for alpha, left in zip(found.alphas.tolist(), found.directions_left.tolist(), strict=True):
        assert left == sum(s / (s + alpha) > 0.1 for s in squares.tolist())
    assert (found.directions_left.double() > found.effective_directions).double().mean() > 0.5


def test_few_directions_are_swept_too(real, silent):
    svd = ms.decompose(ms.collect_writes(real.model, real.task, layers=[0], positions=[0, 1, 2]))
    found = ms.sweep_ridge(real.model, real.task, svd, layers=[0])
    assert float(found.effective_directions[-1]) == pytest.approx(svd.rank)
    assert found.measurement.log_probs.isfinite().all()


def test_a_ridge_sweep_is_saved_and_loaded(real, tmp_path):
    found = ms.sweep_ridge(real.model, real.task, real.svd, [1.0, 0.0])
    found.save(tmp_path / "ridge.safetensors")
    loaded = ms.RidgeSweep.load(tmp_path / "ridge.safetensors")
    assert loaded.to_pandas().equals(found.to_pandas())
    assert repr(loaded) == repr(found)
    assert len(repr(found).splitlines()) == 3
