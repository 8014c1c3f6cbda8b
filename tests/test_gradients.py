import pytest
import torch

import mechsvd as ms
from tests.conftest import tiny, tiny_hf, tiny_task


def test_each_gradient_is_that_of_one_tokens_log_probability(silent):
    model, task = tiny("Llama", tiny_hf("Llama").double()), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    found = ms.collect_gradients(model, [task, tiny_task(seed=1, length=8)], svd)
    assert len(found) == 4 + 3
    assert found.task_index.tolist() == [0] * 4 + [1] * 3
    assert found.tokens[:4].tolist() == task.continuation.tolist()
    step = 1e-4 * torch.eye(svd.rank, dtype=torch.float64)
    up, down = (
        ms.measure(model, task, ms.gate(svd, 1 + sign * step)).log_probs for sign in (1, -1)
    )
    torch.testing.assert_close(found.values[:4], ((up - down) / 2e-4).T, rtol=1e-3, atol=1e-2)
    whole = ms.hessian_attribution(
        model, task, svd, objective="log_prob", bases={"singular": torch.eye(svd.rank)}
    ).bases["singular"]
    torch.testing.assert_close(found.values[:4].sum(dim=0), whole.slopes, rtol=1e-6, atol=1e-9)


def test_the_basis_holds_the_eigenvectors_of_the_second_moment(real):
    gradients = ms.collect_gradients(real.model, real.task, real.svd)
    found = ms.gradient_basis(gradients)
    g = gradients.values.double()
    moment = g.T @ g / len(g)
    values = torch.linalg.eigvalsh(moment).flip(0)[: found.rank]
    torch.testing.assert_close(
        found.singular_values.double() ** 2 / len(g), values, rtol=1e-5, atol=1e-9
    )
    v = found.directions.double()
    torch.testing.assert_close(
        v.T @ moment @ v, values.diag(), rtol=1e-3, atol=1e-6 * float(values[0])
    )
    assert found.rank == len(real.task.continuation)
    scored = ms.hessian_attribution(
        real.model, real.task, real.svd, objective="log_prob", bases={"gradients": found}
    ).bases["gradients"]
    assert len(scored) == found.rank
    # the gradient of the sum lies in the span of the gradients of its terms
    assert float(scored.slopes.norm()) == pytest.approx(float(g.sum(dim=0).norm()), rel=1e-4)


def test_gradients_at_checkpoints_are_put_together(real):
    from copy import deepcopy

    first = ms.collect_gradients(real.model, real.task, real.svd)
    moved = deepcopy(real.model)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.mul_(0.9)
    with pytest.raises(ValueError, match="come from different models"):
        ms.collect_gradients(moved, real.task, real.svd)
    second = ms.collect_gradients(moved, real.task, real.svd, check=False)
    assert "self-check skipped" in second.source.notes
    both = ms.gradient_basis([first, second])
    squares = torch.cat([first.values, second.values]).double().square().sum()
    assert float(both.singular_values.double().square().sum()) == pytest.approx(
        float(squares), rel=1e-5
    )
    assert both.left.shape[1] == len(first) + len(second)


def test_gradients_of_weights(real):
    found = ms.collect_gradients(real.model, real.task, "blocks.2.mlp.*")
    tokens, weights = len(real.task.continuation), 3 * real.model.cfg.d_mlp * real.d_model
    assert found.values.shape == (tokens, weights)
    basis = ms.gradient_basis(found)
    assert basis.directions.shape == (weights, tokens)


def test_gradients_are_saved_and_loaded(real, tmp_path):
    found = ms.collect_gradients(
        real.model, real.task, ms.find_sites(real.model, layers=[1]), positions=[3]
    )
    found.save(tmp_path / "g.safetensors")
    loaded = ms.Gradients.load(tmp_path / "g.safetensors")
    assert torch.equal(loaded.values, found.values)
    assert (
        loaded.parts
        == found.parts
        == tuple((f"blocks.1.hook_{c}_out", (1, real.d_model)) for c in ("attn", "mlp"))
    )
    assert len(repr(loaded).splitlines()) == 3
    assert list(loaded.to_pandas()) == ["task", "token", "norm"]


@pytest.mark.fault(25)
def test_gradients_of_different_w_are_not_mixed(real):
    norms = [
        ms.collect_gradients(real.model, real.task, f"blocks.{layer}.ln1.weight")
        for layer in (0, 1)
    ]
    with pytest.raises(ValueError, match="with respect to different w"):
        ms.gradient_basis(norms)
