"""Everything once more without TransformerLens and without mechsvd: raw modules, forward hooks, float64, one run a rank."""

import numpy as np
import pytest
import torch

import mechsvd as ms


def size(writes):
    return np.sqrt((writes.numpy() ** 2).sum(-1).mean())


def test_singular_values_pooled_and_per_layer(real, reference):
    _, writes, _ = reference.run(lambda x: x)
    collected = ms.collect_writes(real.model, real.task)
    svd = ms.decompose(collected)
    expected = np.linalg.svd(writes.reshape(-1, real.d_model).numpy(), compute_uv=False)
    np.testing.assert_allclose(svd.singular_values.numpy(), expected, rtol=1e-4)
    with pytest.warns(
        UserWarning, match=f"{2 * len(real.task.tokens)} writes in each of {real.n_layers} layers"
    ):
        layers = ms.decompose(collected, per_layer=True)
    for layer, found in enumerate(layers):
        expected = np.linalg.svd(
            writes[2 * layer : 2 * layer + 2].reshape(-1, real.d_model).numpy(), compute_uv=False
        )
        np.testing.assert_allclose(found.singular_values.numpy(), expected[: found.rank], rtol=1e-4)


def test_log_probabilities_and_deltas_of_every_rank(real, reference):
    _, writes, _ = reference.run(lambda x: x)
    directions = np.linalg.svd(writes.reshape(-1, real.d_model).numpy(), full_matrices=False)[2].T
    sweep = ms.sweep_rank(real.model, real.task, real.svd).to_pandas()
    assert len(sweep) == real.d_model + 1
    for rank in range(real.d_model + 1):
        projector = torch.from_numpy(directions[:, :rank] @ directions[:, :rank].T)
        log_prob, attempted, kept = reference.run(lambda x, p=projector: x @ p)
        row = sweep.iloc[rank]
        assert row.log_prob == pytest.approx(log_prob, abs=1e-3), rank
        assert row.orig_delta == pytest.approx(size(attempted), rel=1e-4), rank
        assert row.kept_delta == pytest.approx(size(kept), rel=1e-4), rank


def test_the_clean_run(real, reference):
    log_prob, writes, _ = reference.run(lambda x: x)
    clean = ms.sweep_rank(real.model, real.task, real.svd, ranks=[0]).measurement.clean
    assert float(clean.log_prob) == pytest.approx(log_prob, abs=1e-4)
    np.testing.assert_allclose(clean.orig_deltas[0].numpy(), [size(w) for w in writes], rtol=1e-4)
