"""Fused kernels give what the plain ones give, to rounding; where they may not run or differ, the plain ones do."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mechsvd as ms
from mechsvd.engine.metrics import READY
from mechsvd.engine.session import open_session
from mechsvd.model import fused
from mechsvd.model.runs import run_model
from mechsvd.model.selfcheck import self_check
from tests.conftest import ACCEPTED, loop_log_prob, tiny, tiny_task

pytestmark = pytest.mark.older

CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def runs(monkeypatch):
    """The models of the passes on fused kernels."""
    models = []

    @contextmanager
    def counted(model):
        models.append(model)
        with fused.fused_kernels(model):
            yield

    monkeypatch.setattr("mechsvd.model.runs.fused_kernels", counted)
    return models


def assert_fast_equals_plain(model, task, svd, runs, ranks):
    """The sweep by both kernels, in every metric; the second one must be fast, the first one not."""
    runs.clear()
    plain = ms.sweep_rank(model, task, svd, ranks, fast=False).measurement
    assert runs == []
    fast = ms.sweep_rank(model, task, svd, ranks).measurement
    assert runs
    for name in (*READY, "orig_delta", "kept_delta", "log_probs"):
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.clean.log_probs, plain.clean.log_probs, **CLOSE)
    chosen = {"metric": ms.logit_difference(5, 7)}
    both = [ms.sweep_rank(model, task, svd, ranks, fast=fast, **chosen) for fast in (False, True)]
    torch.testing.assert_close(both[0].measurement.value, both[1].measurement.value, **CLOSE)


def state(model):
    """What fused kernels touch: methods that modules have of their own, and the options of the model."""
    modules = list(nn.Module.modules(model.original_model))
    methods = [{"forward", "_reconstruct_attention"} & vars(module).keys() for module in modules]
    return methods, [str(fused._options_of(module)) for module in modules]


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_every_architecture_runs_fused_kernels_and_its_sweep_is_the_same(
    architecture, runs, silent
):
    model, task = tiny(architecture), tiny_task()
    assert self_check(model).fused_error < 1e-5
    svd = ms.decompose(ms.collect_writes(model, task))
    assert_fast_equals_plain(model, task, svd, runs, [0, 3, 17])


def test_the_sweep_of_a_trained_model_is_the_same(real, runs):
    assert_fast_equals_plain(real.model, real.task, real.svd, runs, [0, 5, real.svd.rank // 2])
    fast, plain = (
        ms.collect_writes(real.model, real.task, fast=is_fast) for is_fast in (True, False)
    )
    assert (fast.values - plain.values).abs().max() < 1e-5 * plain.values.abs().max()


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


@pytest.fixture(scope="module")
def svd(llama):
    return ms.decompose(ms.collect_writes(llama, [tiny_task(seed=i) for i in range(5)]))


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores", "hook_z"])
def test_a_hook_inside_attention_still_sees_and_changes_its_values(point, llama, svd, runs, silent):
    seen = []

    def change(x, hook):
        seen.append(tuple(x.shape))
        return 0.5 * x

    kept = svd.directions[:, :9] @ svd.directions[:, :9].T
    with llama.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", change)]):
        expected = loop_log_prob(llama, tiny_task(), lambda x, hook: x @ kept, range(2))
        count = len(seen)
        for batched in (False, True):
            sweep = ms.sweep_rank(llama, tiny_task(), svd, [9], batched_hooks=batched)
            torch.testing.assert_close(sweep.measurement.log_probs[0].double(), expected, **CLOSE)
    assert len(seen) > count
    assert runs == []


def test_values_elsewhere_and_other_peoples_torch_hooks_take_the_plain_kernels(llama, runs, silent):
    ms.collect_writes(llama, tiny_task(), at="blocks.*.attn.hook_z")
    assert runs == []
    handle = llama.blocks[0].mlp.original_component.register_forward_hook(lambda *inputs: None)
    self_check(llama)
    runs.clear()
    ms.collect_writes(llama, tiny_task())
    handle.remove()
    assert runs == []
    ms.collect_writes(llama, tiny_task())
    assert runs == [llama]


@pytest.mark.fault(34)
def test_gradients_and_hessians_take_the_plain_kernels(llama, svd, runs, silent):
    few = ms.decompose(ms.collect_writes(llama, tiny_task(), fast=False))
    for call in (
        lambda **options: ms.collect_gradients(llama, tiny_task(), few, **options).values,
        lambda **options: ms.hessian_attribution(llama, tiny_task(), few, **options).eigenvalues,
    ):
        assert torch.equal(call(), call(fast=False))
    assert runs == []


@pytest.mark.fault(22)
@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_restored_when_a_pass_stops_inside_a_hook(architecture, error, silent):
    model = tiny(architecture)
    before = state(model)
    assert self_check(model).runs_fused
    assert state(model) == before

    def stop(x, hook=None):
        assert state(model) != before
        raise error("stopped here")

    with pytest.raises(error, match="stopped here"):
        ms.measure(model, tiny_task(), [stop])
    assert state(model) == before


def test_a_model_and_a_session_inside_another_do_not_disturb_it(llama, svd, runs, silent):
    other, task = tiny("GPT-2"), tiny_task()
    kept = ms.keep(svd.subspace(9))
    alone = ms.measure(llama, task, [kept]).log_probs
    alone_other = ms.measure(other, task, [ms.chain()]).log_probs
    before, found = [state(model) for model in (llama, other)], []

    def around(x, hook=None):
        found.append(ms.measure(other, task, [ms.chain()]).log_probs)
        return kept(x)

    with open_session(llama, [task]) as session:
        assert session.check.runs_fused
        torch.testing.assert_close(ms.measure(llama, task, [around]).log_probs, alone, **CLOSE)
        assert torch.equal(ms.measure(llama, task, [kept]).log_probs, alone)
    assert torch.equal(found[0], alone_other)
    assert [state(model) for model in (llama, other)] == before
    assert {id(llama), id(other)} <= {id(model) for model in runs}


WRONG = {
    "attention that sees what follows": (
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask, is_causal: nn.functional.scaled_dot_product_attention(q, k, v),
    ),
    "the exact GELU": ("gelu", lambda x, approximate: nn.functional.gelu(x)),
    "an error": ("gelu", lambda x: x),
    "NaN": ("gelu", lambda x, approximate: x * float("nan")),
    "a norm with another epsilon": (
        "rms_norm",
        lambda x, shape, weight, eps: nn.functional.rms_norm(x, shape, None, 1e-2),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_kernels_are_noticed_and_the_plain_ones_run(what, runs, monkeypatch, silent):
    model, task = tiny("Llama" if "norm" in what else "GPT-2"), tiny_task()
    before = state(model)
    monkeypatch.setattr(fused, *WRONG[what])
    check = self_check(model)
    assert not check.runs_fused
    assert "fused kernels: not used" in repr(check)
    assert check.failure is None
    runs.clear()
    svd = ms.decompose(ms.collect_writes(model, task))
    expected = loop_log_prob(
        model, task, lambda x, hook: x @ svd.directions @ svd.directions.T, [0, 1]
    )
    log_probs = ms.sweep_rank(model, task, svd, [svd.rank]).measurement.log_probs
    torch.testing.assert_close(log_probs[0].double(), expected, **CLOSE)
    assert runs == []
    assert state(model) == before


def test_a_scale_per_layer_that_our_attention_does_not_know_is_noticed(silent):
    from transformers import AutoModelForCausalLM, GPT2Config

    sizes = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    hf_model = AutoModelForCausalLM.from_config(
        GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True), attn_implementation="eager"
    ).eval()
    hf_model.config.architectures = ["GPT2LMHeadModel"]
    nn.init.normal_(hf_model.transformer.h[1].attn.c_attn.weight)
    assert not self_check(tiny("GPT-2", hf_model)).runs_fused


def test_weights_that_were_edited_after_the_self_check_count(silent, runs):
    for architecture in ("GPT-2", "Llama"):
        model, task = tiny(architecture), tiny_task()
        before = ms.measure(model, task, [ms.chain()]).log_probs
        with torch.no_grad():
            model.blocks[0].attn.q.weight.mul_(3)
        fast, plain = (
            ms.measure(model, task, [ms.chain()], fast=is_fast).log_probs
            for is_fast in (True, False)
        )
        torch.testing.assert_close(fast, plain, **CLOSE)
        assert (fast - before).abs().max() > 1e-3
    assert runs


class Sizes(TorchDispatchMode):
    """Notes how large tensors are, with squares of a length as the last axes."""

    def __init__(self, length):
        super().__init__()
        self.square, self.largest = (length, length), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and tuple(x.shape[-2:]) == self.square:
                self.largest = max(self.largest, x.numel())
        return outputs


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "GPT-NeoX", "OPT"])
def test_a_long_text_needs_no_tensor_of_batch_heads_and_tokens_squared(architecture):
    from transformers import AutoModelForCausalLM

    from tests.conftest import _configurations

    config = _configurations()[architecture]()
    config.max_position_embeddings = 1024
    hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    hf_model.config.architectures = [type(hf_model).__name__]
    model, tokens = tiny(architecture, hf_model), torch.randint(3, 256, (2, 1024))
    largest = {}
    for is_fused in (True, False):
        with torch.no_grad(), Sizes(1024) as sizes:
            run_model(model, tokens, fused=is_fused)
        largest[is_fused] = sizes.largest
    assert largest[False] >= 2 * 4 * 1024**2
    assert largest[True] <= 1024**2  # at most a mask for all rows and heads


def test_fused_kernels_round_as_their_dtype_does(llama):
    errors = {dtype: self_check(llama.to(dtype)) for dtype in (torch.bfloat16, torch.float64)}
    llama.to(torch.float32)
    assert errors[torch.bfloat16].runs_fused
    assert not errors[torch.float64].runs_fused  # its norms compute in float32, and must go on so
    assert errors[torch.float64].fused_error < 1e-5 < errors[torch.bfloat16].fused_error


def test_a_hooked_transformer_takes_the_plain_kernels(runs, silent):
    pytest.importorskip("transformer_lens.HookedTransformer")
    from tests.conftest import tiny_hf
    from tests.test_older import hooked

    model, task = hooked(tiny_hf("GPT-2")), tiny_task()
    assert self_check(model).fused_error == float("inf")
    svd = ms.decompose(ms.collect_writes(model, task))
    runs.clear()
    ms.sweep_rank(model, task, svd, [3])
    assert runs == []
