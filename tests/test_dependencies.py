"""What TransformerLens and transformers may get wrong, and what we do about it."""

import warnings

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, Phi3Config

import mechsvd as ms
from mechsvd.model import cache
from mechsvd.model.cache import drops_cache, taking_cache
from mechsvd.model.probing import probe_length, probe_tokens, turning_points
from mechsvd.model.reference import NoReferenceError, plain_logits
from mechsvd.model.selfcheck import keeps_cache, self_check
from tests.conftest import random_weights, tiny, tiny_hf, tiny_task

pytestmark = pytest.mark.older
PROMPT = "I believe the meaning of life is"
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(cache, "_WARNED", set())


def of(config):
    """A bridge of a random model of a configuration."""
    return tiny(config.model_type, random_weights(config))


def long_rope():
    return of(
        Phi3Config(
            **SIZES,
            max_position_embeddings=128,
            original_max_position_embeddings=16,
            rope_parameters=LONG_ROPE,
        )
    )


def greedy_by_loop(model, prompt, count):
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[0].tolist()


def drop(bridge, k, v, **_):
    return k, v


def forget_last(bridge, k, v, **options):
    held = options.get("cache") or options.get("past_key_values") or options.get("layer_past")
    if held is None:
        return k, v
    keys, values = held.update(k, v, bridge._layer_idx)
    whole = keys.shape[-2] == k.shape[-2]
    return (keys, values) if whole else (keys[..., 1:, :], values[..., 1:, :])


def break_cache(monkeypatch, change):
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    monkeypatch.setattr(AttentionBridge, "_update_kv_cache", change)
    monkeypatch.setattr(cache, "_renames", lambda model: [])


@pytest.mark.fault(51)
@pytest.mark.parametrize("change", [drop, forget_last])
def test_a_cache_that_is_lost_or_off_by_one_is_found_and_text_is_that_of_the_plain_loop(
    monkeypatch, unwarned, change
):
    model, start = tiny("Llama"), tiny_task().tokens[:5]
    expected = greedy_by_loop(model, start.tolist(), 8)
    break_cache(monkeypatch, change)
    with pytest.warns(UserWarning, match=r"through the model's cache .* \(error .*transformers 5"):
        (task,) = ms.generate_tasks(model, start, [None], max_new_tokens=8)
    assert task.tokens.tolist() == expected[: len(task.tokens)]
    check = self_check(model)
    assert check.failure is None
    assert not check.keeps_cache
    assert not check.goes_on
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        ms.generate_tasks(model, start, [None], max_new_tokens=8)


@pytest.mark.fault(51)
def test_a_cache_whose_positions_are_shifted_is_found(monkeypatch):
    from transformers.cache_utils import DynamicLayer

    length = DynamicLayer.get_seq_length
    monkeypatch.setattr(
        DynamicLayer,
        "get_seq_length",
        lambda self, *args: length(self, *args) + (length(self, *args) > 0),
    )
    model = tiny("GPT-2")
    check = self_check(model)
    assert not check.keeps_cache
    assert not check.goes_on
    assert not keeps_cache(model, 20)


@pytest.mark.fault(52)
def test_a_scale_of_attention_that_the_bridge_ignores_is_refused():
    model = of(
        GPT2Config(
            vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, scale_attn_weights=False
        )
    )
    with pytest.raises(
        ValueError, match=r"on a text of 12 tokens, TransformerLens's logits differ"
    ):
        ms.collect_writes(model, tiny_task())
    assert self_check(model).reference_error > 1e-2


@pytest.mark.fault(52)
def test_a_softcap_that_the_bridge_leaves_out_is_refused(monkeypatch):
    model = tiny("Gemma-2")
    assert self_check(model).failure is None
    other = tiny("Gemma-2")
    for layer in other.original_model.model.layers:
        layer.self_attn.original_component.attn_logit_softcapping = None
    other.original_model.config.attn_logit_softcapping = 0.5
    assert "logits differ" in self_check(other).failure
    gemma = of(Gemma3TextConfig(**SIZES, head_dim=8, attn_logit_softcapping=0.5, sliding_window=8))
    assert "logits differ" in self_check(gemma).failure


@pytest.mark.fault(54)
def test_a_float16_overflow_at_bos_alone_is_refused():
    hf_model = tiny_hf("Llama")
    layer, model = hf_model.model.layers[0], tiny("Llama", hf_model)
    with torch.no_grad():  # a neuron that BOS alone drives beyond 65504
        hf_model.get_input_embeddings().weight[model.tokenizer.bos_token_id, 3] = 1e3
        layer.post_attention_layernorm.weight[3] = 1
        for read in (layer.mlp.gate_proj, layer.mlp.up_proj):
            read.weight[0] = 60 * torch.eye(32)[3]
    assert self_check(model).failure is None
    model = model.to(torch.float16)
    with pytest.raises(
        ValueError,
        match=r"NaN or inf.*position 0.*float16 overflows: load the model with dtype=torch",
    ):
        ms.collect_writes(model, tiny_task())


@pytest.mark.fault(53)
def test_rotary_factors_by_length_are_not_shared_beyond_it_and_are_below(unwarned):
    model = long_rope()
    assert 16 in turning_points(model)
    assert probe_length(model, 16) == probe_length(model, 12)
    check = self_check(model, 17)
    assert check.failure is None
    assert not check.goes_on
    assert not check.keeps_cache
    with pytest.warns(UserWarning, match="read in chunks through the model's cache"):
        assert not keeps_cache(model, 17)


@pytest.mark.fault(53)
@pytest.mark.parametrize("fast", [True, False])
def test_shared_prefixes_equal_whole_runs_across_an_original_context(fast):
    model = long_rope()
    tokens = torch.cat([torch.tensor([0]), torch.arange(20, 56)])
    for length in (12, 16, 17, 18, 30):
        task = ms.Task(tokens[:length], length - 3)
        edits = [ms.keep(ms.span(torch.randn(32, 5)))]
        whole = ms.measure(model, task, edits, positions=[length - 3, length - 2], fast=False)
        one = ms.measure(model, task, edits, positions=[length - 3, length - 2], fast=fast)
        hooks = ms.fwd_hooks(model, edits[0], positions=[length - 3, length - 2])
        with torch.no_grad():
            logits = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)
        expected = logits[0, task.scored].log_softmax(-1).gather(1, task.continuation[:, None])
        torch.testing.assert_close(one.log_probs[0], expected[:, 0], rtol=0, atol=1e-4)
        torch.testing.assert_close(one.log_prob, whole.log_prob, rtol=0, atol=1e-4)


@pytest.mark.fault(53)
@pytest.mark.filterwarnings("ignore:A text of")
def test_greedy_text_across_an_original_context_is_that_of_the_plain_loop():
    model, start = long_rope(), torch.tensor([0, 20, 21, 22, 23, 24, 25])
    (task,) = ms.generate_tasks(model, start, [None], max_new_tokens=16)
    assert task.tokens.tolist() == greedy_by_loop(model, start.tolist(), 16)[: len(task.tokens)]


@pytest.mark.fault(51)
def test_a_hook_that_changes_what_follows_is_found(monkeypatch):
    """As if a hook that returns nothing still replaced its value, by a little."""
    from transformer_lens.hook_points import HookPoint

    monkeypatch.setattr(HookPoint, "forward", lambda self, x: x * 1.01 if self.fwd_hooks else x)
    check = self_check(tiny("Llama"))
    assert "in block 0" in check.failure
    assert check.reference_error > 1e-3


def test_the_plain_model_is_transformers_own_and_shares_the_weights():
    hf_model = tiny_hf("Gemma-2")
    tokens = tiny_task().tokens[None]
    with torch.no_grad():
        expected = hf_model(tokens).logits[:, -3:]
    model = tiny("Gemma-2", hf_model)
    torch.testing.assert_close(plain_logits(model, tokens, 3), expected)
    with torch.no_grad():
        hf_model.get_input_embeddings().weight.mul_(0.5)
    assert (plain_logits(model, tokens, 3) - expected).abs().max() > 1e-3


def test_what_is_not_the_plain_model_is_not_compared_and_says_why():
    model = tiny("Llama")
    handle = model.original_model.register_forward_hook(lambda *_: None)
    with pytest.raises(NoReferenceError, match="a torch hook"):
        plain_logits(model, tiny_task().tokens[None], 2)
    assert "not compared, since" in repr(self_check(model))
    handle.remove()
    joint = tiny("GPT-2")
    with torch.no_grad():
        joint.blocks[1].attn.k.weight.mul_(0.5)  # a copy of the bridge's own
    check = self_check(joint)  # or a view, in TransformerLens 3.9
    assert "changed in the bridge" in check.unreferenced or check.reference_error < 1e-5
    assert check.failure is None
    model.compatibility_mode = True
    assert self_check(model).unreferenced == "its weights were processed"


def test_the_probe_crosses_what_depends_on_length_and_no_more():
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=40, max_position_embeddings=512)
    model = of(config)
    assert [probe_length(model, n) for n in (5, 40, 41, None)] == [12, 12, 44, 44]
    model.original_model.config.sliding_window = 300
    assert [probe_length(model, n) for n in (None, 300, 301, 900)] == [12, 12, 304, 304]
    rows = probe_tokens(model, 30, rows=2)
    assert rows.shape == (2, 30)
    assert rows[:, 0].tolist() == [model.tokenizer.bos_token_id] * 2
    assert not torch.isin(rows[:, 1:], torch.tensor(model.tokenizer.all_special_ids)).any()
    assert (rows[0, 1:] != rows[1, 1:]).any()


@pytest.mark.fault(51)
def test_the_adapter_is_there_for_a_run_only_and_other_versions_need_none(unwarned):
    model = tiny("Llama")
    is_dropped = drops_cache(model)
    with taking_cache(model):
        assert ("_update_kv_cache" in vars(model.blocks[0].attn)) == is_dropped
    assert "_update_kv_cache" not in vars(model.blocks[0].attn)
    if not is_dropped:
        return
    with pytest.warns(UserWarning, match="lose the cache.*own `generate`.*use_past_kv_cache=False"):
        cache.warn_dropped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.warn_dropped(model)


@pytest.mark.fault(52)
def test_a_model_that_cannot_run_at_all_is_refused_in_words(silent, monkeypatch):
    model = tiny("Llama")
    monkeypatch.setattr(
        type(model.original_model), "forward", lambda *_, **__: [][1]
    )  # as if transformers had changed
    sentence = r"transformers [\d.]+ cannot run this model, with or without mechsvd \(IndexError"
    with pytest.raises(ValueError, match=sentence):
        ms.collect_writes(model, tiny_task())
    with pytest.raises(ValueError, match=sentence):
        ms.generate(model, "I believe", max_new_tokens=2)


def test_a_vocabulary_that_the_model_pads_with_masked_logits_passes():
    hf_model = tiny_hf("Llama")
    hf_model.lm_head.bias = torch.nn.Parameter(torch.zeros(256))
    model = tiny("Llama", hf_model)
    with torch.no_grad():
        for module in (model.unembed, hf_model.lm_head):
            if getattr(module, "bias", None) is not None:
                module.bias[250:] = -torch.inf
    check = self_check(model)
    assert check.failure is None
    assert check.keeps_cache
    with torch.no_grad():
        assert torch.isneginf(model(tiny_task().tokens[None])[..., 250:]).all()


def test_no_notice_of_other_libraries_for_their_own_callers_comes_from_our_calls(tmp_path):
    """Each is a change to come, and reaches the user's notebook; a new one needs a mend."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = ms.load_model()
        task = ms.Task.from_text(model, PROMPT, max_new_tokens=4)
        svd = ms.decompose(ms.collect_writes(model, task))
        ms.sweep_rank(model, task, svd, [0, 64]).save(tmp_path / "sweep.safetensors")
        ms.measure(model, task, [ms.keep(svd, 9)], positions="last")
        ms.generate(model, PROMPT, ms.keep(svd, 64), max_new_tokens=3)
        ms.hessian_attribution(model, task, svd, pairs=2, path_steps=1)
        ms.figures.surprise(ms.sweep_rank(model, task, svd, [0, 64])).to_json()
    notices = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    assert not [str(w.message) for w in seen if issubclass(w.category, notices)]


@pytest.mark.fault(53)
def test_a_long_text_adds_to_what_short_ones_showed(monkeypatch):
    config = Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=200,
        max_position_embeddings=512,
        layer_types=["sliding_attention"] * 2,
    )
    model = of(config)
    short, long = self_check(model), self_check(model, 300)
    assert (short.length, long.length) == (12, 204)
    assert long.failure is None
    assert long.keeps_cache
    assert long.goes_on
    assert (long.block_error == short.block_error).all()
    assert long.fused_error >= short.fused_error
    masks = "transformers.models.gemma3.modeling_gemma3.create_sliding_window_causal_mask"
    from transformers.masking_utils import create_causal_mask

    other = of(config)  # and then no window, as if the bridge left it out
    monkeypatch.setattr(masks, create_causal_mask)
    assert self_check(other).failure is None
    assert "on a text of 204 tokens" in self_check(other, 300).failure
