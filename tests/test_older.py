"""The same numbers from a `HookedTransformer` and a `TransformerBridge` of the same raw weights (transformer-lens 3.9)."""

import dataclasses

import pytest
import torch

import mechsvd as ms
from mechsvd.model.cache import taking_cache
from mechsvd.model.evaluation import other_hooks
from mechsvd.model.identity import processing_state
from mechsvd.model.selfcheck import require_sound
from tests.conftest import loop_log_prob, tiny_hf, tiny_task

pytestmark = pytest.mark.older

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:
    pytest.skip("HookedTransformer left TransformerLens with 4.0", allow_module_level=True)


def hooked(hf_model, tokenizer=None):
    """A HookedTransformer of a Hugging Face model's raw weights: nothing folded, nothing centred."""
    from transformer_lens.pretrained.weight_conversions import (
        convert_gpt2_weights,
        convert_llama_weights,
    )

    config, is_llama = hf_model.config, hf_model.config.model_type == "llama"
    sizes = {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "device": "cpu",
    }
    if is_llama:
        sizes |= {
            "d_mlp": config.intermediate_size,
            "act_fn": "silu",
            "normalization_type": "RMS",
            "eps": config.rms_norm_eps,
            "gated_mlp": True,
            "final_rms": True,
            "positional_embedding_type": "rotary",
            "rotary_dim": config.hidden_size // config.num_attention_heads,
            "rotary_adjacent_pairs": False,
            "rotary_base": 10000,
            "n_key_value_heads": config.num_key_value_heads,
        }
        convert = convert_llama_weights
    else:
        sizes |= {
            "d_mlp": 4 * config.hidden_size,
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "eps": config.layer_norm_epsilon,
        }
        convert = convert_gpt2_weights
    model = HookedTransformer(
        HookedTransformerConfig(**sizes, model_name="hooked"), tokenizer=tokenizer
    )
    model.load_state_dict(convert(hf_model, model.cfg), strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def pair(real):
    """A trained model as both classes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(real.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real.directory)
    return hooked(hf_model, tokenizer), ms.load_model(real.directory, device="cpu")


def test_streams_are_the_same(pair):
    texts = ["Once upon a time", "There was a boy. " * 9]
    streams = [ms.stream_writes(model, texts, context=24) for model in pair]
    for name in ("count", "mean", "scatter"):
        one, other = (getattr(stream.moments, name) for stream in streams)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    sizes = streams[0].decompose().singular_values
    torch.testing.assert_close(sizes, streams[1].decompose().singular_values, rtol=1e-3, atol=1e-3)


def test_tasks_writes_singular_values_and_sweeps_are_the_same(pair):
    found = []
    for model in pair:
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
        writes = ms.collect_writes(model, task)
        svd = ms.decompose(writes)
        found.append((task, writes, svd, ms.sweep_rank(model, task, svd)))
    (task, writes, svd, sweep), (task_b, writes_b, svd_b, sweep_b) = found
    assert task.tokens.tolist() == task_b.tokens.tolist()
    assert task.pieces == task_b.pieces
    torch.testing.assert_close(writes.values, writes_b.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(svd.singular_values, svd_b.singular_values, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        sweep.measurement.log_prob, sweep_b.measurement.log_prob, rtol=0, atol=1e-3
    )
    torch.testing.assert_close(
        sweep.measurement.orig_deltas, sweep_b.measurement.orig_deltas, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        sweep.measurement.kept_deltas, sweep_b.measurement.kept_deltas, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "at", ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z", "ln_final.hook_normalized"]
)
def test_other_hook_points_are_the_same(pair, at):
    found = []
    for model in pair:
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
        writes = ms.collect_writes(model, task, at=at)
        svd = ms.decompose(writes)
        ranks = [0, svd.rank // 2, svd.rank]
        found.append((writes, ms.sweep_rank(model, task, svd, ranks, at=at)))
    (writes, sweep), (writes_b, sweep_b) = found
    torch.testing.assert_close(writes.values, writes_b.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sweep.measurement.log_prob, sweep_b.measurement.log_prob, rtol=0, atol=1e-2
    )


def test_only_the_bridge_warns_that_its_middle_of_the_stream_is_the_input_of_a_norm(pair, recwarn):
    for model, expected in zip(pair, (0, 1), strict=True):
        task = ms.Task(tokens=torch.tensor([1, 5, 9]), prompt_length=1)
        recwarn.clear()
        ms.collect_writes(model, task, at="blocks.1.hook_resid_mid")
        assert sum("the input of a norm" in str(w.message) for w in recwarn) == expected


def test_metrics_baselines_and_bases_of_sites_are_the_same(pair):
    found = []
    for model in pair:
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=12)
        writes = ms.collect_writes(model, task)
        bases = ms.decompose(writes, per="site")
        choice = ms.logit_difference(int(task.continuation[0]), 5)
        mean, options = ms.mean_baseline(writes), {"metric": choice}
        sweep = ms.sweep_rank(model, task, bases, [0, 5, 12], baseline=mean, **options)
        ranking = ms.rank_directions(model, task, ms.decompose(writes), baseline=mean, **options)
        found.append((sweep.measurement.value, ranking.effect))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_rankings_critical_ranks_and_texts_are_the_same(pair):
    found = []
    for model in pair:
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
        svd = ms.decompose(ms.collect_writes(model, task))
        edits = [None, *(ms.keep(svd.subspace(rank)) for rank in (60, 40, 20))]
        texts = [
            ms.generate(model, prompt, edits, max_new_tokens=12)
            for prompt in ("Once upon a time", "")
        ]
        drawn = ms.generate(
            model, "Once upon a time", edits, max_new_tokens=12, temperature=0.8, seed=5
        )
        critical = ms.critical_rank(model, task, svd, 1.0, exhaustive=True)
        greedy = ms.critical_rank(model, task, svd, criterion=ms.same_greedy_text)
        found.append(
            (ms.rank_directions(model, task, svd).effect, critical.rank, greedy.rank, texts, drawn)
        )
        assert not other_hooks(model)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-3)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("kind", ["gains", "writes", "norms", "weights"])
def test_attributions_are_the_same(pair, kind):
    found = []
    for model, weights in zip(pair, (["blocks.2.mlp.W_*"], "blocks.2.mlp.*"), strict=True):
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
        over = {
            "gains": lambda model=model, task=task: ms.decompose(ms.collect_writes(model, task)),
            "writes": lambda model=model: ms.find_sites(model, layers=[1]),
            "norms": lambda model=model: "blocks.2.ln?.w*",
            "weights": lambda weights=weights: weights,
        }[kind]()
        positions = [7] if kind == "writes" else None
        before = [weight.clone() for weight in model.parameters()]
        found.append(
            ms.hessian_attribution(
                model, task, over, pairs=10, positions=positions, objective="log_prob"
            )
        )
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    one, other = found
    assert len(one.vectors) == len(other.vectors)
    for name in ("eigenvalues", "measured", "integrated"):
        scale = float(getattr(other, name).abs().max())
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-2, atol=2e-4 * scale
        )
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues, rtol=1e-3, atol=0)


def test_directions_from_w_and_their_interactions_are_the_same(pair, silent):
    found = []
    for model, over in zip(pair, (["blocks.2.mlp.W_*"], "blocks.2.mlp.*"), strict=True):
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
        options = {"objective": "log_prob", "basis": "from_w", "pairs": 5, "path_steps": 2}
        attribution = ms.hessian_attribution(model, task, over, **options)
        pairs = ms.interactions(model, task, over, attribution, order="eigenvalue", draws=2)
        ridge = ms.shrink_by_curvature(model, task, over, attribution, [0.0, 1.0])
        found.append((attribution, pairs, ridge))
    (one, first, left), (other, second, right) = found
    assert float(one.held.sum()) == pytest.approx(1, abs=1e-6)
    for name in ("eigenvalues", "held", "measured"):  # entries of w stand in another order
        scale = float(getattr(other, name).abs().max())
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-2, atol=1e-3 * scale
        )
    scale = float(second.interaction.abs().max())
    torch.testing.assert_close(first.interaction, second.interaction, rtol=2e-2, atol=5e-3 * scale)
    torch.testing.assert_close(left.ridge_values, right.ridge_values, rtol=1e-3, atol=1e-2)


def test_weights_that_a_processed_bridge_keeps_as_copies_are_refused(silent):
    model = ms.load_model(device="cpu")
    model.enable_compatibility_mode()
    task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=5)
    with pytest.raises(
        ValueError,
        match="computes with copies of 3 of the weights, blocks.2.mlp.gate.weight and others",
    ):
        ms.hessian_attribution(model, task, "blocks.2.mlp.*", pairs=2)


def test_a_model_without_a_tokenizer_goes_on_from_token_ids(silent):
    model, start = hooked(tiny_hf("GPT-2")), tiny_task().tokens[:5]
    kept = ms.keep(torch.eye(32)[:, :20])
    (task,) = ms.generate_tasks(model, start, [kept], max_new_tokens=4)
    tokens = start
    for _ in range(4):
        logits = model.run_with_hooks(tokens[None], fwd_hooks=ms.fwd_hooks(model, kept))
        tokens = torch.cat([tokens, logits[0, -1].argmax()[None]])
    assert task.tokens.tolist() == tokens.tolist()
    assert ms.generate(model, start, kept, max_new_tokens=4).startswith("[0]")


def test_their_self_checks_pass_and_rows_share_a_prefix(pair):
    for model in pair:
        assert require_sound(model)[0].shares_prefix
        assert processing_state(model) == "raw"


@pytest.mark.fault(20)
def test_hooks_compose_and_positions_are_absolute_with_a_cache(pair):
    for model in pair:
        tokens = model.to_tokens("Once upon a time")
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_type": "tokens",
            "verbose": False,
            "stop_at_eos": False,
        }
        texts = []
        for cached in (True, False):
            hooks = ms.fwd_hooks(model, lambda x, hook: -3 * x, positions=[tokens.shape[1] + 1])
            with model.hooks(fwd_hooks=hooks), taking_cache(model):  # else some versions lose it
                texts.append(model.generate(tokens, use_past_kv_cache=cached, **options).tolist())
        assert texts[0] == texts[1]
        assert not other_hooks(model)


def test_gpt2_with_biases_gives_the_sweep_of_the_loop(silent):
    model, task = hooked(tiny_hf("GPT-2")), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    sweep = ms.sweep_rank(model, task, svd, ranks=[0, 9])
    kept = svd.directions[:, :9] @ svd.directions[:, :9].T
    expected = loop_log_prob(model, task, lambda x, hook: x @ kept, range(2))
    torch.testing.assert_close(sweep.measurement.log_probs[1].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.fault(25)
def test_processed_weights_are_another_state_and_their_bases_are_refused(silent):
    raw, processed = hooked(tiny_hf("GPT-2")), hooked(tiny_hf("GPT-2"))
    processed.process_weights_()
    assert "normalization folded" in processing_state(processed)
    assert "writing weights centred" in processing_state(processed)
    svd = ms.decompose(ms.collect_writes(raw, tiny_task()))
    with pytest.raises(ValueError, match="processing: "):
        ms.sweep_rank(processed, tiny_task(), svd)


@pytest.mark.fault(23, 24)
def test_the_users_hooks_and_train_mode_survive(pair):
    model = pair[0]
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x)
    model.train(True)
    try:
        with pytest.warns(UserWarning, match="train mode|already has hooks"):
            ms.collect_writes(model, tiny_task())
        assert other_hooks(model) == ["blocks.0.hook_mlp_out"]
        assert model.training
    finally:
        model.reset_hooks()
        model.train(False)


@pytest.mark.fault(14)
def test_an_attention_only_model_needs_the_missing_component_to_be_skipped():
    config = HookedTransformerConfig(
        d_model=16,
        n_layers=2,
        n_heads=2,
        d_head=8,
        n_ctx=32,
        d_vocab=300,
        attn_only=True,
        normalization_type="LN",
        seed=0,
    )
    model = HookedTransformer(config).eval()
    with pytest.raises(KeyError, match=r"blocks\.0\.hook_mlp_out.*missing='skip'"):
        ms.collect_writes(model, tiny_task())
    assert len(ms.collect_writes(model, tiny_task(), missing="skip").sites) == 2
    assert len(ms.collect_writes(model, tiny_task(), components="attn").sites) == 2


def test_an_edit_is_not_folded_into_a_hooked_transformer(tmp_path):
    model, task = hooked(tiny_hf("Llama")), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    with pytest.raises(ValueError, match="is a HookedTransformer, so the weights of its Hugging"):
        ms.fold(model, ms.keep(svd, 5), tmp_path / "out", task)
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_cards_of_directions_are_the_same(pair):
    hooked_model, bridge = pair
    task = ms.Task.from_text(bridge, "Once upon a time", max_new_tokens=6)
    svd = ms.decompose(ms.collect_writes(bridge, task))
    first, second = (
        ms.describe(model, dataclasses.replace(svd, source=None), [0, 3], task)
        for model in (hooked_model, bridge)
    )
    for column in ("read", "local", "measured"):
        own, other = getattr(first.tokens, column), getattr(second.tokens, column)
        torch.testing.assert_close(own, other, atol=2e-3, rtol=2e-3)
    assert first.writers.is_split.all()
    assert second.writers.is_split.all()
    assert first.writers.share_kinds == second.writers.share_kinds
    torch.testing.assert_close(
        first.writers.coefficients, second.writers.coefficients, atol=2e-3, rtol=1e-3
    )
    heads = torch.tensor([kind == "head" for kind in first.writers.share_kinds])
    torch.testing.assert_close(
        first.writers.shares[heads], second.writers.shares[heads], atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(first.writers.induction, second.writers.induction, atol=1e-4, rtol=0)
