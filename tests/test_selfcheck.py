import pytest
import torch

import mechsvd as ms
from mechsvd.model.selfcheck import SelfCheck, require_sound, self_check
from tests.conftest import ACCEPTED, loop_log_prob, tiny, tiny_hf, tiny_task

pytestmark = pytest.mark.older


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_the_writes_of_an_architecture_make_up_its_stream_and_the_sweep_equals_the_loop(
    architecture, silent
):
    model, task = tiny(architecture), tiny_task()
    check, notes = require_sound(model)
    assert notes == ()
    assert check.block_error.max() < 1e-6
    assert check.stream_error == 0
    assert check.output_change > 1e-2
    svd = ms.decompose(ms.collect_writes(model, task))
    sweep = ms.sweep_rank(model, task, svd, ranks=[0, 3, 17, svd.rank])
    for rank, log_probs in zip([0, 3, 17, svd.rank], sweep.measurement.log_probs, strict=True):
        kept = svd.directions[:, :rank] @ svd.directions[:, :rank].T
        expected = loop_log_prob(model, task, lambda x, hook, kept=kept: x @ kept, range(2))
        torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-4)


def third_write(strength):
    """A model whose second block adds something that no hook sees."""
    hf_model = tiny_hf("Llama")
    block = hf_model.model.layers[1]
    block.register_forward_hook(
        lambda module, inputs, output: (
            (output[0] if isinstance(output, tuple) else output) * (1 + strength)
        )
    )
    return tiny("Llama", hf_model)


@pytest.mark.fault(16)
def test_a_model_with_a_write_that_no_hook_sees_is_refused_with_block_and_error():
    model = third_write(0.05)
    with pytest.raises(
        ValueError,
        match=r"in block 1, resid_pre \+ attn_out \+ mlp_out differs from resid_post by 0.0\d+ of the size of its terms",
    ):
        ms.collect_writes(model, tiny_task())
    assert "in block 1" in repr(self_check(model))


@pytest.mark.fault(16)
def test_a_change_between_the_last_block_and_the_final_norm_is_refused_too(silent):
    model = tiny("Llama")
    model.original_model.model.layers[1].register_forward_hook(
        lambda module, inputs, output: (
            1.05 * output if isinstance(output, torch.Tensor) else (1.05 * output[0], *output[1:])
        )
    )
    assert self_check(model).block_error.tolist() == pytest.approx([0, 0.025], abs=0.01)
    with pytest.raises(
        ValueError, match=r"block 1, .* perhaps because of what is on it at blocks.1"
    ):
        ms.collect_writes(model, tiny_task())


def test_a_model_that_does_not_pass_its_final_norm_is_checked_to_its_last_block(monkeypatch):
    monkeypatch.setattr(
        "mechsvd.model.selfcheck.end_of_stream", lambda model: "blocks.0.attn.hook_hidden_states"
    )  # which never fires
    assert self_check(tiny("Llama")).failure is None
    assert "in block 1" in self_check(third_write(0.05)).failure


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.float64, 1e-5)]
)
def test_the_tolerance_is_a_few_roundings_of_the_dtype(dtype, precision):
    """A hidden write of five times of it is refused, one of a hundredth of it is rounding."""
    assert self_check(third_write(precision / 100).to(dtype)).failure is None
    refused = self_check(third_write(5 * precision).to(dtype))
    assert precision < float(refused.block_error[1]) < 5 * precision
    assert "in block 1" in refused.failure
    assert refused.tolerance == pytest.approx(precision, rel=0.1)


@pytest.mark.fault(16)
def test_a_refused_model_runs_on_request_and_every_result_records_it(silent):
    model, task = third_write(0.05), tiny_task()
    writes = ms.collect_writes(model, task, check=False)
    sweep = ms.sweep_rank(model, task, ms.decompose(writes), ranks=[1], check=False)
    assert "self-check skipped" in writes.source.notes
    assert "self-check skipped" in sweep.measurement.source.notes


def test_a_model_without_sites_is_refused():
    with pytest.raises(KeyError, match="No hook point"):
        ms.collect_writes(tiny("Mamba"), tiny_task())


def test_each_failure_has_its_sentence():
    good = {
        "block_error": torch.zeros(2),
        "stream_error": 0.0,
        "unchecked": (),
        "output_change": 1.0,
        "scored_error": 0.0,
        "sharing_error": 0.0,
        "tolerance": 1e-5,
    }
    assert SelfCheck(**good).failure is None
    assert SelfCheck(**good).shares_prefix
    cases = {
        "in block 1": {"block_error": torch.tensor([0.0, float("nan")])},
        "still changes": {"stream_error": 0.1},
        "do not act": {"output_change": 0.0},
    }
    for sentence, change in cases.items():
        assert sentence in SelfCheck(**{**good, **change}).failure
    assert not SelfCheck(**{**good, "sharing_error": float("inf")}).shares_prefix
    assert not SelfCheck(**{**good, "scored_error": 0.1}).scores_alone
    assert (
        SelfCheck(**{**good, "block_error": torch.tensor([0.0, 0.5]), "unchecked": (1,)}).failure
        is None
    )


def test_it_is_measured_once_a_model(monkeypatch):
    model = tiny("Llama")
    first = self_check(model)
    monkeypatch.setattr(
        "mechsvd.model.selfcheck._measure", lambda model: pytest.fail("measured again")
    )
    assert self_check(model) is first


def test_the_users_hooks_are_set_aside_and_come_back(silent):
    model = tiny("Llama")
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x + 1)
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    with torch.no_grad():
        before = model(tiny_task().tokens[None])
        assert self_check(model).failure is None
        torch.testing.assert_close(model(tiny_task().tokens[None]), before)
    model.reset_hooks()
    with torch.no_grad():
        assert (model(tiny_task().tokens[None]) - before).abs().max() > 1e-3


def test_it_is_measured_again_in_another_dtype():
    model = tiny("Llama")
    single = self_check(model)
    assert self_check(model.to(torch.bfloat16)).tolerance > single.tolerance


@pytest.mark.fault(16)
def test_a_small_hidden_write_is_noticed_beside_a_huge_entry_of_the_stream():
    hf_model = tiny_hf("Llama")
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[:, 3] = 3000.0
    hidden = torch.full((32,), 0.02)
    hidden[3] = 0
    hf_model.model.layers[0].register_forward_hook(
        lambda m, i, out: (out[0] if isinstance(out, tuple) else out) + hidden
    )
    with pytest.raises(ValueError, match="in block 0"):
        require_sound(tiny("Llama", hf_model))


@pytest.mark.fault(14)
def test_a_hybrid_is_refused_and_accepted_without_its_other_layers_on_request(silent):
    model, task = tiny("Lfm2"), tiny_task()
    with pytest.raises(KeyError, match=r"No hook point `blocks\.0\.hook_attn_out`"):
        ms.collect_writes(model, task)
    writes = ms.collect_writes(model, task, missing="skip")
    assert [str(site) for site in writes.sites] == ["0 mlp", "1 attn", "1 mlp"]
    assert writes.source.notes == ("layers without all hooks: [0]",)
    svd = ms.decompose(writes)
    sweep = ms.sweep_rank(model, task, svd, ranks=[3], missing="skip")
    kept = svd.directions[:, :3] @ svd.directions[:, :3].T
    hooks = [(site.hook_name, lambda x, hook: x @ kept) for site in writes.sites]
    with torch.no_grad():
        logits = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)[
            0, task.scored
        ].log_softmax(-1)
    torch.testing.assert_close(
        sweep.measurement.log_probs[0],
        logits.gather(-1, task.continuation[:, None])[:, 0],
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("components", [("attn",), ("mlp",)])
@pytest.mark.parametrize("architecture", ["OPT", "GPT-NeoX", "Bloom"])
def test_rows_part_wherever_the_first_edit_is(architecture, components, silent):
    model, task = tiny(architecture), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task, components=components))
    sweep = ms.sweep_rank(model, task, svd, ranks=[2], components=components)
    kept = svd.directions[:, :2] @ svd.directions[:, :2].T
    expected = loop_log_prob(model, task, lambda x, hook: x @ kept, range(2), components)
    torch.testing.assert_close(sweep.measurement.log_probs[0].double(), expected, rtol=0, atol=1e-4)


def test_real_models_pass(real):
    assert require_sound(real.model)[0].block_error.max() < 1e-6
    assert len(self_check(real.model).to_pandas()) == real.n_layers
