import math

import pytest
import torch

import mechsvd as ms
from mechsvd.edits.gates import Gate
from mechsvd.engine.passes import _Setup, measure
from mechsvd.model.evaluation import other_hooks
from tests.conftest import loop_log_prob, tiny, tiny_task
from tests.test_subspace import orthonormal

pytestmark = pytest.mark.older


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


BASIS = orthonormal(32, 32, seed=5).float()
STACKS = {
    "ranks": Gate(BASIS, (torch.arange(32) < torch.arange(33)[:, None]).float()),
    "single directions": Gate(BASIS, 1 - torch.eye(32), 1.0),
    "ridge": Gate(BASIS[:, :20], torch.rand(7, 20, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("components", [("attn", "mlp"), ("attn",), ("mlp",)])
def test_a_stack_equals_the_loop_of_single_runs(llama, name, components):
    stack, task = STACKS[name], tiny_task()
    measured = measure(llama, task, stack, components=components)
    for row in range(0, len(stack), 5):
        single = Gate(stack.basis, stack.gains[row], stack.rest)
        expected = loop_log_prob(
            llama, task, lambda x, hook, single=single: single(x), range(2), components
        )
        torch.testing.assert_close(measured.log_probs[row].double(), expected, rtol=0, atol=1e-4)


def test_the_batch_size_does_not_matter(llama):
    task, whole = tiny_task(), measure(llama, tiny_task(), STACKS["ranks"], batch_size=33)
    for size in (1, 2, 7):
        part = measure(llama, task, STACKS["ranks"], batch_size=size)
        for name in ("log_probs", "orig_deltas", "kept_deltas"):
            torch.testing.assert_close(
                getattr(part, name), getattr(whole, name), rtol=1e-4, atol=1e-4
            )


def test_deltas_are_root_mean_square_norms_of_attempted_and_kept_writes(llama):
    task, kept = tiny_task(), BASIS[:, :4] @ BASIS[:, :4].T
    seen = []
    clip = lambda x, hook: seen.append(x.double()) or x @ kept
    loop_log_prob(llama, task, clip, range(2))
    attempted = torch.stack([x[0].norm(dim=-1).square().mean().sqrt() for x in seen])
    let_through = torch.stack(
        [(x[0] @ kept.double()).norm(dim=-1).square().mean().sqrt() for x in seen]
    )
    measured = measure(llama, task, STACKS["ranks"][[4]])
    torch.testing.assert_close(measured.orig_deltas[0].double(), attempted, rtol=1e-5, atol=0)
    torch.testing.assert_close(measured.kept_deltas[0].double(), let_through, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        measured.orig_delta[0].double(), attempted.square().mean().sqrt(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        measured.kept_delta[0].double(), let_through.square().mean().sqrt(), rtol=1e-5, atol=0
    )


def test_the_clean_run_is_the_models_own(llama):
    task = tiny_task()
    clean = measure(llama, task, STACKS["ranks"][[0]]).clean
    with torch.no_grad():
        logits = llama(task.tokens[None])[0, task.scored]
    torch.testing.assert_close(
        clean.log_probs[0], logits.log_softmax(-1).gather(-1, task.continuation[:, None])[:, 0]
    )
    torch.testing.assert_close(clean.orig_deltas, clean.kept_deltas)


def test_edits_of_any_kind_run_as_rows_of_one_batch(llama):
    edits = [
        ms.chain(),
        ms.shift(torch.ones(32)),
        ms.chain(ms.keep(ms.Subspace(BASIS[:, :9])), ms.shift(torch.ones(32))),
        lambda x, hook: 2 * x,
    ]
    measured = measure(llama, tiny_task(), edits)
    for row, edit in enumerate(edits):
        torch.testing.assert_close(
            measured.log_probs[row].double(),
            loop_log_prob(llama, tiny_task(), edit, range(2)),
            rtol=0,
            atol=1e-4,
        )


def test_positions_and_layers_limit_the_edit_and_the_deltas(llama):
    task, single = tiny_task(), Gate(BASIS, STACKS["ranks"].gains[3])
    measured = measure(llama, task, STACKS["ranks"][[3]], positions=[2, 6], layers=[1])
    mask = torch.zeros(9, 1, dtype=torch.bool)
    mask[[2, 6]] = True
    seen = []
    edit = lambda x, hook: seen.append(x[0, [2, 6]]) or torch.where(mask, single(x), x)
    torch.testing.assert_close(
        measured.log_probs[0].double(), loop_log_prob(llama, task, edit, [1]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        measured.orig_deltas[0], torch.stack([x.norm(dim=-1).square().mean().sqrt() for x in seen])
    )
    with pytest.raises(ValueError, match=r"No positions \[9\]: the text has 0 to 8"):
        measure(llama, task, STACKS["ranks"], positions=[9])


def test_many_edits_share_few_forward_passes(llama, monkeypatch):
    runs = []
    run = type(llama).run_with_hooks
    ms.self_check(llama)
    monkeypatch.setattr(
        type(llama),
        "run_with_hooks",
        lambda self, tokens, **kw: runs.append(tokens.shape) or run(self, tokens, **kw),
    )
    measure(llama, tiny_task(), STACKS["ranks"])
    assert len(runs) <= 2  # 33 edits and the clean run
    assert all(shape == (1, 9) for shape in runs)  # rows part at the first write


@pytest.mark.fault(26)
def test_out_of_memory_halves_the_batch_and_loses_nothing(llama, monkeypatch):
    model, task = tiny("Llama"), tiny_task()
    expected = measure(model, task, STACKS["ranks"])
    forward, sizes = _Setup.forward, []

    def limited(self, stacks, texts, rows):
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, stacks, texts, rows)

    monkeypatch.setattr(_Setup, "forward", limited)
    with pytest.warns(UserWarning, match="Out of memory") as said:
        measured = measure(model, task, STACKS["ranks"], batch_size=33)
    assert str(said[0].message) == "Out of memory with 33 edits per forward pass; going on with 16."
    torch.testing.assert_close(measured.log_probs, expected.log_probs, rtol=0, atol=1e-4)
    assert sizes[:5] == [
        33,
        16,
        8,
        4,
        4,
    ]  # the clean run in the first; at full rank it is the clean run


@pytest.mark.fault(26)
def test_out_of_memory_with_one_edit_says_how_much_is_needed(monkeypatch):
    model = tiny("Llama")

    def fail(self, stacks, texts, rows):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(_Setup, "forward", fail)
    with pytest.raises(
        MemoryError, match=r"One edit alone does not fit into memory: about \d+ MiB"
    ):
        measure(model, tiny_task(), STACKS["ranks"], batch_size=1)


@pytest.mark.fault(37)
def test_the_noise_floor_is_measured_on_request_and_sees_the_dtype(llama):
    assert measure(llama, tiny_task(), [ms.chain()]).noise_floor is None
    single = measure(llama, tiny_task(), STACKS["ranks"], noise_floor=True).noise_floor
    assert 0 <= single < 1e-3
    from tests.conftest import tiny_hf

    floors = {}
    for architecture in ("GPT-2", "Llama"):
        double = tiny(architecture, tiny_hf(architecture).double())
        floors[architecture] = measure(
            double, tiny_task(), [ms.chain()] * 3, noise_floor=True
        ).noise_floor
    assert 0 < floors["GPT-2"] < 1e-11
    assert 1e-8 < floors["Llama"] < 1e-4  # transformers computes its norms in float32 even here


@pytest.mark.fault(22)
def test_the_model_is_left_as_it_was_found_after_a_fault(llama):
    def fail(x, hook=None):
        raise ValueError("no")

    llama.train(True)
    with pytest.raises(ValueError, match="failed at layer 0 attn: no"):
        measure(llama, tiny_task(), [fail])
    assert llama.training
    assert not other_hooks(llama)
    assert torch.is_grad_enabled()
    llama.train(False)


@pytest.mark.fault(18)
def test_a_basis_of_another_model_or_size_is_refused(llama, embedded, meaning_svd):
    other = tiny("Qwen2")
    svd = ms.decompose(ms.collect_writes(other, [tiny_task(seed=s) for s in range(3)]))
    with pytest.raises(
        ValueError,
        match=r"The basis and the model come from different models.*weights: .*\(Qwen2\)",
    ):
        ms.sweep_rank(llama, tiny_task(), svd)
    ms.sweep_rank(llama, tiny_task(), svd, ranks=[3], check=False)  # on request
    with pytest.raises(ValueError, match="d_model 128, but the model's is 32"):
        ms.sweep_rank(llama, tiny_task(), meaning_svd)


def test_edits_that_give_nan_warn_and_stay_in_the_table(llama):
    with pytest.warns(UserWarning, match=r"Edits \[1\] gave log-probabilities that are not finite"):
        measured = measure(llama, tiny_task(), [ms.chain(), lambda x, hook: x / 0])
    assert measured.log_probs[0].isfinite().all()


@pytest.mark.fault(36)
def test_a_very_improbable_text_stays_finite_in_nats(embedded, meaning, meaning_svd):
    table = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[0]).to_pandas()
    (surprise,) = table["surprise"]
    assert surprise > 50
    assert table["probability"].iloc[0] == pytest.approx(math.exp(-surprise), rel=1e-4, abs=0)


@pytest.mark.fault(2)
def test_half_precision_models_work(silent):
    model = tiny("Llama").to(torch.bfloat16)
    svd = ms.decompose(ms.collect_writes(model, tiny_task()))
    sweep = ms.sweep_rank(model, tiny_task(), svd, ranks=[0, svd.rank])
    assert sweep.measurement.log_probs.dtype == torch.float32
    torch.testing.assert_close(
        sweep.measurement.log_prob[1:], sweep.measurement.clean.log_prob, rtol=0.1, atol=0.5
    )


def test_tables_and_the_printed_form(llama):
    measured = measure(llama, tiny_task(), STACKS["ridge"])
    assert list(measured.to_pandas().columns) == [
        "log_prob",
        "probability",
        "surprise",
        "orig_delta",
        "kept_delta",
        "kl_divergence",
        "absolute_change",
    ]
    by_site = measured.sites_to_pandas()
    assert len(by_site) == 7 * 4
    assert by_site.iloc[5].to_dict() == {
        "edit": 1, "layer": 0, "component": "mlp",
        "orig_delta": pytest.approx(float(measured.orig_deltas[1, 1])), "kept_delta": pytest.approx(float(measured.kept_deltas[1, 1])),
    }  # fmt: skip
    assert len(repr(measured).splitlines()) == 3
