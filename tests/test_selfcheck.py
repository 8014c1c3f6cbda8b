import pytest
import torch

import mechsvd as ms
from mechsvd.selfcheck import SelfCheck, require_sound, self_check
from tests.conftest import ACCEPTED, loop_log_prob, tiny, tiny_hf, tiny_task

pytestmark = pytest.mark.older


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_the_writes_of_an_architecture_make_up_its_stream_and_the_sweep_equals_the_loop(architecture, silent):
    model, task = tiny(architecture), tiny_task()
    check = require_sound(model)
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
        lambda module, inputs, output: (output[0] if isinstance(output, tuple) else output) * (1 + strength)
    )
    return tiny("Llama", hf_model)


def test_a_model_with_a_write_that_no_hook_sees_is_refused_with_block_and_error():
    model = third_write(0.05)
    with pytest.raises(
        ValueError, match=r"in block 1, resid_pre \+ attn_out \+ mlp_out differs from resid_post by 0.0\d+ of its size"
    ):
        ms.collect_writes(model, tiny_task())
    assert "in block 1" in repr(self_check(model))


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
        "unembedding": {"scored_error": 0.1},
    }
    for sentence, change in cases.items():
        assert sentence in SelfCheck(**{**good, **change}).failure
    assert not SelfCheck(**{**good, "sharing_error": float("inf")}).shares_prefix


def test_it_is_measured_once_a_model(monkeypatch):
    model = tiny("Llama")
    first = self_check(model)
    monkeypatch.setattr("mechsvd.selfcheck._measure", lambda model: pytest.fail("measured again"))
    assert self_check(model) is first


def test_real_models_pass(embedded, stories):
    for model in (embedded, stories):
        assert require_sound(model).block_error.max() < 1e-6
        assert len(self_check(model).to_pandas()) == model.cfg.n_layers
