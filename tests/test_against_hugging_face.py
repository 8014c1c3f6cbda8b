"""Everything once more without TransformerLens and without mechsvd: raw modules, forward hooks, float64, one run a rank."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mechsvd as ms
from tests.conftest import STORIES


class Reference:
    """A Llama in float64 whose attention and MLP outputs are seen, and replaced, at their output projections."""

    def __init__(self, directory, tokens, prompt_length):
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.tokens, self.prompt_length = tokens, prompt_length
        layers = self.model.model.layers
        self.outputs = [
            module for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]

    def run(self, edit):
        attempted, kept = [], []

        def hook(module, inputs, output):
            edited = edit(output)
            attempted.append(output[0])
            kept.append(edited[0])
            return edited

        handles = [module.register_forward_hook(hook) for module in self.outputs]
        with torch.no_grad():
            log_probs = self.model(self.tokens[None]).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        scored = [
            log_probs[i - 1, self.tokens[i]].item()
            for i in range(self.prompt_length, len(self.tokens))
        ]
        return sum(scored), torch.stack(attempted), torch.stack(kept)


def size(writes):
    return np.sqrt((writes.numpy() ** 2).sum(-1).mean())


@pytest.fixture(scope="module")
def reference(story_task):
    return Reference(STORIES, story_task.tokens, story_task.prompt_length)


def test_singular_values_pooled_and_per_layer(stories, story_task, reference):
    _, writes, _ = reference.run(lambda x: x)
    collected = ms.collect_writes(stories, story_task)
    svd = ms.decompose(collected)
    expected = np.linalg.svd(writes.reshape(-1, 64).numpy(), compute_uv=False)
    np.testing.assert_allclose(svd.singular_values.numpy(), expected, rtol=1e-4)
    with pytest.warns(UserWarning, match="56 writes in each of 5 layers"):
        layers = ms.decompose(collected, per_layer=True)
    for layer, found in enumerate(layers):
        expected = np.linalg.svd(
            writes[2 * layer : 2 * layer + 2].reshape(-1, 64).numpy(), compute_uv=False
        )
        np.testing.assert_allclose(found.singular_values.numpy(), expected[: found.rank], rtol=1e-4)


def test_log_probabilities_and_deltas_of_every_rank(stories, story_task, reference):
    _, writes, _ = reference.run(lambda x: x)
    directions = np.linalg.svd(writes.reshape(-1, 64).numpy(), full_matrices=False)[2].T
    sweep = ms.sweep_rank(
        stories, story_task, ms.decompose(ms.collect_writes(stories, story_task))
    ).to_pandas()
    for rank in range(65):
        projector = torch.from_numpy(directions[:, :rank] @ directions[:, :rank].T)
        log_prob, attempted, kept = reference.run(lambda x, p=projector: x @ p)
        row = sweep.iloc[rank]
        assert row.log_prob == pytest.approx(log_prob, abs=1e-3), rank
        assert row.orig_delta == pytest.approx(size(attempted), rel=1e-4), rank
        assert row.kept_delta == pytest.approx(size(kept), rel=1e-4), rank


def test_the_clean_run(stories, story_task, reference):
    log_prob, writes, _ = reference.run(lambda x: x)
    svd = ms.decompose(ms.collect_writes(stories, story_task))
    clean = ms.sweep_rank(stories, story_task, svd, ranks=[0]).measurement.clean
    assert float(clean.log_prob) == pytest.approx(log_prob, abs=1e-4)
    np.testing.assert_allclose(clean.orig_deltas[0].numpy(), [size(w) for w in writes], rtol=1e-4)
