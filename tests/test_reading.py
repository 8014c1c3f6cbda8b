"""Positions are absolute, however a text is read."""

import pytest
import torch

import mechsvd as ms
from mechsvd.model.cache import taking_cache
from tests.conftest import ACCEPTED, tiny, tiny_task

POSITIONS = [1, 6, 7]


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


def zero(x, hook):
    return x * 0


def in_chunks(model, tokens, lengths, hooks):
    """Logits of a text that is read in chunks with a KV cache."""
    found, cache = [], None
    # some versions of TransformerLens lose the cache without our adapter
    with torch.no_grad(), model.hooks(fwd_hooks=hooks), taking_cache(model):
        for chunk in tokens.split(lengths):
            logits, cache = model(
                chunk[None], return_type="logits_and_cache", use_cache=True, past_key_values=cache
            )
            found.append(logits[0])
    return torch.cat(found)


def at_once(model, tokens, hooks=()):
    with torch.no_grad():
        return model.run_with_hooks(tokens[None], fwd_hooks=list(hooks))[0]


@pytest.mark.fault(42)
@pytest.mark.parametrize("architecture", ACCEPTED)
def test_a_text_read_in_chunks_is_edited_where_the_whole_text_is(architecture):
    model, tokens = tiny(architecture), tiny_task().tokens
    for where in ({}, {"layers": 1}, {"components": ("mlp",)}):
        hooks = ms.fwd_hooks(model, zero, positions=POSITIONS, **where)
        whole = at_once(model, tokens, hooks)
        assert (whole - at_once(model, tokens)).abs().max() > 1e-3
        for lengths in ([5, 4], [6, 1, 1, 1], [1] * 9, [2, 6, 1]):
            torch.testing.assert_close(
                in_chunks(model, tokens, lengths, hooks), whole, rtol=0, atol=1e-4
            )


@pytest.mark.fault(42)
def test_the_same_hooks_serve_a_second_text(llama):
    hooks = ms.fwd_hooks(llama, zero, positions=[0])
    token = torch.tensor([5])
    first, second = at_once(llama, token, hooks), at_once(llama, token, hooks)
    torch.testing.assert_close(first, second)
    assert (first - at_once(llama, token)).abs().max() > 1e-3


@pytest.mark.fault(42)
def test_real_models_read_in_chunks(real):
    tokens = real.task.tokens
    hooks = ms.fwd_hooks(real.model, zero, positions=[6, 7])
    chunks = in_chunks(real.model, tokens, [5, 2, len(tokens) - 7], hooks)
    torch.testing.assert_close(chunks, at_once(real.model, tokens, hooks), rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [3, 4])
def test_a_cache_that_forgets_tells_the_position_all_the_same(window):
    from tests.conftest import tiny_hf

    hf_model = tiny_hf("Mistral")
    hf_model.config.sliding_window = window
    model, tokens = tiny("Mistral", hf_model), tiny_task().tokens
    hooks = ms.fwd_hooks(model, zero, positions=POSITIONS)
    torch.testing.assert_close(
        in_chunks(model, tokens, [5, 2, 2], hooks),
        in_chunks(model, tokens, [7, 2], hooks),
        rtol=0,
        atol=1e-4,
    )


def test_a_cache_of_fixed_size_tells_the_position_too(llama):
    from transformers import StaticCache

    tokens, hooks = tiny_task().tokens, ms.fwd_hooks(llama, zero, positions=POSITIONS)
    cache = StaticCache(config=llama.original_model.config, max_cache_len=32)
    with torch.no_grad(), llama.hooks(fwd_hooks=hooks), taking_cache(llama):
        found = [llama(chunk[None], past_key_values=cache)[0] for chunk in tokens.split([5, 4])]
    torch.testing.assert_close(torch.cat(found), at_once(llama, tokens, hooks), rtol=0, atol=1e-4)


@pytest.mark.fault(42)
def test_hooks_without_the_one_that_watches_are_refused_in_the_run(llama):
    with pytest.raises(
        RuntimeError,
        match=r"`positions` of layer 0 attn cannot be told.*pass all hooks that `fwd_hooks` gives",
    ):
        at_once(llama, tiny_task().tokens, ms.fwd_hooks(llama, zero, positions=[2])[1:])


def test_a_first_layer_without_attention_is_refused(silent):
    hybrid = tiny("Lfm2")
    with pytest.raises(ValueError, match="`positions` need attention.*layer 0 has none"):
        ms.fwd_hooks(hybrid, zero, positions=[2], missing="skip")


def test_nothing_of_ours_is_left_on_the_model(llama):
    at_once(llama, tiny_task().tokens, ms.fwd_hooks(llama, zero, positions=[2]))
    left = [
        hook.__module__ for module in llama.modules() for hook in module._forward_pre_hooks.values()
    ]
    assert not [module for module in left if module.startswith("mechsvd")]
