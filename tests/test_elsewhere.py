"""Edits are functions of tensors, so they act where TransformerLens is not: in plain torch hooks, and in nnsight."""

import pytest
import torch

import mechsvd as ms


@pytest.fixture
def clipped(embedded, meaning, meaning_svd):
    """An edit, and the logits that our hooks give with it."""
    edit = ms.keep(meaning_svd.subspace(32))
    with torch.no_grad():
        hooks = ms.fwd_hooks(embedded, edit)
        return edit, embedded.run_with_hooks(meaning.tokens[None], fwd_hooks=hooks)


def test_forward_hooks_of_torch_on_a_hugging_face_model(plain, meaning, clipped):
    edit, expected = clipped
    with torch.no_grad():
        before = plain(meaning.tokens[None]).logits
    for layer in plain.model.layers:
        layer.self_attn.register_forward_hook(lambda module, x, y: (edit(y[0]), *y[1:]))
        layer.mlp.register_forward_hook(lambda module, x, y: edit(y))
    with torch.no_grad():
        logits = plain(meaning.tokens[None]).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    assert (before - expected).abs().max() > 1


def test_a_trace_of_nnsight(plain, embedded, meaning, clipped):
    nnsight = pytest.importorskip("nnsight")
    edit, expected = clipped
    traced = nnsight.LanguageModel(plain, tokenizer=embedded.tokenizer)
    with torch.no_grad(), traced.trace(meaning.tokens[None]):
        for layer in traced.model.layers:
            layer.self_attn.output[0][:] = edit(layer.self_attn.output[0])
            layer.mlp.output = edit(layer.mlp.output)
        logits = traced.lm_head.output.save()
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
