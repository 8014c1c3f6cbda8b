"""Ridge by curvature against its minimum, plain loops and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd import figures
from mechsvd.attribution.curvature_ridge import curvature_gains
from mechsvd.attribution.objective import objective_over
from mechsvd.engine.session import open_session
from mechsvd.model.evaluation import evaluation
from tests.conftest import tiny, tiny_hf, tiny_task


@pytest.fixture(scope="module")
def exact():
    return tiny("Llama", tiny_hf("Llama").double()), [tiny_task(), tiny_task(seed=1)]


@pytest.fixture(scope="module")
def over_an_mlp(exact):
    model, tasks = exact
    return ms.hessian_attribution(
        model, tasks[0], "blocks.1.mlp.*", objective="log_prob", basis="from_w", pairs=6,
        path_steps=2,
    )  # fmt: skip


def test_the_gains_minimise_what_they_promise():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    matrix, w = half + half.T, torch.randn(7, generator=generator, dtype=torch.float64)
    values, u = torch.linalg.eigh(matrix)
    size = u @ values.abs().diag() @ u.T
    alpha = 0.7
    gains = curvature_gains(values, torch.tensor([alpha], dtype=torch.float64))[0]
    shrunk = u @ (gains * (u.T @ w))
    # the normal equations of ridge regression, (|H| + α) v = |H| w
    expected = torch.linalg.solve(size + alpha * torch.eye(7).double(), size @ w)
    torch.testing.assert_close(shrunk, expected)
    v = shrunk.clone().requires_grad_()
    loss = (v - w) @ size @ (v - w) + alpha * v @ v
    (slope,) = torch.autograd.grad(loss, v)
    assert float(slope.abs().max()) < 1e-12


def test_each_strength_and_clip_equals_its_own_run(exact, over_an_mlp):
    model, tasks = exact
    alphas, over = [0.0, 0.3, 1e9], "blocks.1.mlp.*"
    for rest in (0.0, 1.0):
        found = ms.shrink_by_curvature(model, tasks, over, over_an_mlp, alphas, rest=rest)
        u, sizes = over_an_mlp.vectors, over_an_mlp.eigenvalues.abs()
        assert (sizes.diff() <= 0).all()
        for number, task in enumerate(tasks):
            with open_session(model, [task], gradients=True) as session:
                f = objective_over(session, task, over)
            w = f.point
            left = w - u @ (u.T @ w)
            with evaluation(model, gradients=True), torch.no_grad():
                run = lambda v, f=f: float(f.log_prob(v[None])[0])
                for place, alpha in enumerate(alphas):
                    gains = sizes / (sizes + alpha)
                    expected = run(u @ (gains * (u.T @ w)) + rest * left)
                    assert float(found.ridge_values[number, place]) == pytest.approx(expected)
                for kept in (0, 2, 6):
                    expected = run(u[:, :kept] @ (u[:, :kept].T @ w) + rest * left)
                    assert float(found.clip_values[number, kept]) == pytest.approx(expected)
    clean = float(ms.measure(model, tasks[1], [ms.chain()]).clean_run.log_prob)
    assert float(found.values[1]) == pytest.approx(clean)
    assert float(found.ridge_values[0, 0]) == pytest.approx(float(found.values[0]))  # α = 0


def test_the_default_strengths_are_evenly_spaced_and_the_table_says_what_is_left(real, silent):
    attribution = ms.hessian_attribution(
        real.model, real.task, real.svd, objective="log_prob", path_steps=2,
        bases={"few": torch.eye(real.d_model)[:, :3]},
    )  # fmt: skip
    found = ms.shrink_by_curvature(real.model, real.task, real.svd, attribution)
    expected = torch.linspace(real.d_model / 64, real.d_model, 64).double()
    torch.testing.assert_close(found.effective_directions, expected, rtol=0, atol=0.02)
    table = found.to_pandas()
    ridge, clip = table[table.kind == "ridge"], table[table.kind == "clip"]
    assert len(ridge) == 64
    assert list(clip.directions_left) == list(range(real.d_model + 1))
    sizes, held = attribution.eigenvalues.abs().numpy(), attribution.held.numpy()
    for row in ridge.iloc[::9].itertuples():
        gains = sizes / (sizes + row.alpha)
        assert row.directions_left == (gains > 0.1).sum()
        assert row.effective_directions == pytest.approx(gains.sum())
        assert row.held == pytest.approx((gains**2 * held).sum())
    np.testing.assert_allclose(clip.held, [0, *held.cumsum()], atol=1e-12)
    assert ridge.value.iloc[-1] == pytest.approx(attribution.value, abs=1e-3)
    assert clip.value.iloc[0] == pytest.approx(attribution.baseline, rel=1e-4)
    assert len(repr(found).splitlines()) == 3
    figure = figures.curvature_ridge(found)
    assert [trace.name for trace in figure.data] == ["clipped", "ridge", "ridge, gains above 0.1"]
    np.testing.assert_allclose(figure.data[1].x, found.effective_directions.numpy())
    np.testing.assert_allclose(figure.data[2].x, found.directions_left.numpy())
    np.testing.assert_allclose(figure.data[0].y, found.clip_values[0].numpy())
    np.testing.assert_allclose(figure.data[2].y, found.ridge_values[0].numpy())


def test_a_ridge_by_curvature_is_saved_and_loaded(exact, over_an_mlp, tmp_path):
    model, tasks = exact
    found = ms.shrink_by_curvature(model, tasks, "blocks.1.mlp.*", over_an_mlp)
    found.save(tmp_path / "r.safetensors")
    loaded = ms.CurvatureRidge.load(tmp_path / "r.safetensors")
    assert loaded.to_pandas().equals(found.to_pandas())
    assert list(found.to_pandas().columns[:2]) == ["task", "kind"]
    assert repr(loaded) == repr(found)


def test_no_curvature_is_refused(exact):
    model, tasks = exact
    flat = ms.hessian_attribution(
        model, tasks[0], "blocks.1.ln2.weight", pairs=3, objective="log_prob", path_steps=2
    )
    with pytest.raises(ValueError, match="All eigenvalues are 0, so there is no curvature"):
        ms.shrink_by_curvature(
            model, tasks[0], "blocks.1.ln2.weight", replace(flat, eigenvalues=0 * flat.eigenvalues)
        )
