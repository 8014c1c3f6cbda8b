"""Other people's hooks, and the state of the model: everything equals the plain loop, and nothing is left behind."""

import warnings
from dataclasses import replace

import pytest
import torch

import mechsvd as ms
from mechsvd.model.evaluation import evaluation, other_hooks
from mechsvd.model.runs import run_model
from tests.conftest import tiny, tiny_task

pytestmark = pytest.mark.older


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


@pytest.fixture(scope="module")
def gpt2():
    return tiny("GPT-2")  # whose configuration has dropout


def zero_position(x, hook):
    x[0, 2] = 0  # TransformerLens users index the batch, and write in place
    return x


def swap_positions(x, hook):
    y = x.clone()
    y[0, 1], y[0, 3] = x[0, 3], x[0, 1]
    return y


def drop_first_head(x, hook):
    y = x.clone()
    y[0, 0] = 0
    return y


HOOKS = {
    "in place on the stream": [("blocks.1.hook_resid_pre", zero_position)],
    "on a write": [("blocks.0.hook_mlp_out", swap_positions)],
    "on an attention pattern and the stream": [
        ("blocks.0.attn.hook_pattern", drop_first_head),
        ("blocks.1.hook_resid_post", swap_positions),
    ],
}
SIZES = (None, 1, 3)


def plain(model, task, edit, **where):
    """The oracle: the model run once, on one row, by its own `run_with_hooks`."""
    with torch.no_grad():
        logits = model.run_with_hooks(
            task.tokens[None], fwd_hooks=ms.fwd_hooks(model, edit, check=False, **where)
        )
    return (
        logits[0, task.scored].double().log_softmax(-1).gather(-1, task.continuation[:, None]).sum()
    )


@pytest.fixture(params=[*HOOKS, "torch's own hook"])
def hooked(request, llama):
    if request.param in HOOKS:
        with llama.hooks(fwd_hooks=HOOKS[request.param]):
            yield llama
    else:
        module = llama.blocks[1].mlp.out.original_component
        handle = module.register_forward_hook(
            lambda module, args, out: zero_position(out.clone(), None)
        )
        yield llama
        handle.remove()


@pytest.fixture(scope="module")
def svd(llama):
    return ms.decompose(ms.collect_writes(llama, [tiny_task(seed=i) for i in range(5)]))


@pytest.mark.fault(41)
def test_every_sweep_and_ranking_equals_the_plain_loop_at_every_batch_size(hooked, svd, silent):
    task, ranks, order = tiny_task(seed=1), [0, 3, 20, 31], torch.randperm(32).tolist()
    few = replace(
        svd,
        singular_values=svd.singular_values[:6],
        directions=svd.directions[:, :6],
        left=svd.left[..., :6],
    )
    kept = [
        plain(
            hooked, task, ms.keep(svd.directions[:, order[:k]]) if k else ms.ablate(torch.eye(32))
        )
        for k in ranks
    ]
    removed = [plain(hooked, task, ms.ablate(svd.directions[:, [j]])) for j in range(6)]
    shrunk = [plain(hooked, task, ms.shrink(svd, alpha)) for alpha in (0.1, 10.0)]
    close = {"rtol": 0, "atol": 1e-4}
    for size in SIZES:
        options = {"batch_size": size, "progress": False}
        sweep = ms.sweep_rank(hooked, task, svd, ranks, order, **options).measurement
        torch.testing.assert_close(sweep.log_prob, torch.stack(kept), **close)
        torch.testing.assert_close(
            sweep.clean.log_prob[0], plain(hooked, task, ms.chain()), **close
        )
        ranking = ms.rank_directions(hooked, task, few, **options).measurement
        torch.testing.assert_close(ranking.log_prob, torch.stack(removed), **close)
        ridge = ms.sweep_ridge(hooked, task, svd, [0.1, 10.0], **options).measurement
        torch.testing.assert_close(ridge.log_prob, torch.stack(shrunk), **close)


@pytest.mark.fault(41)
def test_every_edit_and_position_equals_the_plain_loop_at_every_batch_size(hooked, svd, silent):
    task = tiny_task(seed=2)
    edits = [
        ms.keep(svd.subspace(9)),
        ms.shift(torch.ones(32)),
        lambda x, hook: x * 0.5,
        ms.chain(),
    ]
    for where in ({}, {"layers": 1, "positions": [1, 2, 5]}, {"components": ("mlp",)}):
        expected = torch.stack([plain(hooked, task, edit, **where) for edit in edits])
        for size in SIZES:
            found = ms.measure(hooked, task, edits, batch_size=size, noise_floor=True, **where)
            torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-4)
            assert found.noise_floor < 1e-3


@pytest.mark.fault(41)
def test_critical_ranks_equal_those_of_the_plain_loop(hooked, svd, silent):
    task = tiny_task(seed=3)
    clean = plain(hooked, task, ms.chain())
    every = [
        plain(hooked, task, ms.keep(svd.directions[:, :k]) if k else ms.ablate(torch.eye(32)))
        for k in range(33)
    ]
    reached = [k for k, log_prob in enumerate(every) if log_prob >= clean - 0.5]
    found = ms.critical_rank(hooked, task, svd, tolerance=0.5, exhaustive=True)
    assert found.rank == reached[0]


def test_writes_of_several_tasks_are_those_of_each_alone(hooked, silent):
    tasks = [tiny_task(seed=i) for i in range(3)]
    together = ms.collect_writes(hooked, tasks)
    for number, task in enumerate(tasks):
        alone = []
        with torch.no_grad():
            keep = [
                (site.hook_name, lambda x, hook, alone=alone: alone.append(x[0].clone()))
                for site in together.sites
            ]
            hooked.run_with_hooks(task.tokens[None], fwd_hooks=keep)
        found = together.values[:, together.task_index == number]
        torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.fault(41)
def test_texts_of_several_edits_are_those_of_each_alone(hooked, svd, silent):
    start = tiny_task(length=6, prompt_length=5).tokens
    edits = [None, ms.keep(svd.subspace(20)), ms.keep(svd.subspace(4)), ms.shift(torch.ones(32))]
    together = ms.generate_tasks(hooked, start, edits, max_new_tokens=4, use_kv_cache=False)
    for edit, task in zip(edits, together, strict=True):
        tokens = start
        for _ in range(4):
            with torch.no_grad():
                hooks = ms.fwd_hooks(hooked, edit) if edit else []
                tokens = torch.cat(
                    [
                        tokens,
                        hooked.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, -1:].argmax(-1),
                    ]
                )
        assert task.tokens.tolist() == tokens[: len(task.tokens)].tolist()


@pytest.mark.fault(41)
@pytest.mark.parametrize("hooked", ["in place on the stream", "torch's own hook"], indirect=True)
def test_attributions_and_gradients_are_those_of_single_rows(hooked, svd, silent):
    task = tiny_task(seed=1)
    one = ms.hessian_attribution(hooked, task, svd, batch_size=1, path_steps=8)
    many = ms.hessian_attribution(hooked, task, svd, path_steps=8)
    torch.testing.assert_close(many.measured, one.measured)
    torch.testing.assert_close(many.integrated, one.integrated)
    removed = [
        plain(hooked, task, ms.gate(svd, 1 - one.projections[i] * one.vectors[:, i])).exp()
        for i in (0, 5)
    ]
    expected = plain(hooked, task, ms.chain()).exp() - torch.stack(removed)
    torch.testing.assert_close(
        one.measured[[0, 5]], expected, rtol=1e-2, atol=1e-6 * float(one.value)
    )
    both = ms.collect_gradients(hooked, [task, tiny_task(seed=2)], svd)
    alone = ms.collect_gradients(hooked, task, svd)
    torch.testing.assert_close(both.values[: len(alone)], alone.values)


@pytest.mark.fault(41)
def test_hooks_that_act_on_every_row_take_the_fast_way_and_provenance_says_which(
    llama, svd, silent, monkeypatch
):
    task, runs, run = tiny_task(), [], type(llama).run_with_hooks
    monkeypatch.setattr(
        type(llama),
        "run_with_hooks",
        lambda self, tokens, **kw: runs.append(len(tokens)) or run(self, tokens, **kw),
    )
    with llama.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: 0.5 * x)]):
        slow = ms.sweep_rank(llama, task, svd)
        runs_alone, _ = len(runs), runs.clear()
        fast = ms.sweep_rank(llama, task, svd, batched_hooks=True)
    assert len(runs) <= 2 < runs_alone == 33
    torch.testing.assert_close(
        slow.measurement.log_prob, fast.measurement.log_prob, rtol=0, atol=1e-4
    )
    assert slow.source.notes == ("hooks of the user at blocks.1.hook_resid_pre, one row per pass",)
    assert fast.source.notes == (
        "hooks of the user at blocks.1.hook_resid_pre, many rows per pass",
    )


def test_the_warning_names_the_hook_and_the_line_as_the_user_wrote_them_once_a_call(llama, svd):
    with (
        llama.hooks(fwd_hooks=HOOKS["in place on the stream"]),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        ms.critical_rank(llama, tiny_task(), svd)  # several rounds
    (warning,) = [w for w in said if "hooks" in str(w.message)]
    assert (
        "already has hooks at blocks.1.hook_resid_pre; they are kept, and results include them"
        in str(warning.message)
    )
    assert "`batched_hooks=True` says that yours act on every row" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.fault(44)
@pytest.mark.parametrize("patched", [False, True])
def test_torch_hooks_and_patched_forwards_are_noticed_and_recorded(patched, silent):
    model, task = tiny("Llama"), tiny_task()
    module = model.blocks[1].mlp.out.original_component
    before = ms.measure(model, task, [ms.chain()])
    assert before.source.notes == ()
    if patched:
        forward = module.forward
        module.forward = lambda *args, **options: 2 * forward(*args, **options)
    else:
        module.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(
        UserWarning,
        match=r"already has hooks at blocks\.1\.mlp\.down_proj \(a (patched forward|torch hook)\)",
    ):
        after = ms.measure(model, task, [ms.chain()])
    assert "blocks.1.mlp" in after.source.notes[0]
    assert abs(float(after.clean.log_prob - before.clean.log_prob)) > 1e-3


@pytest.mark.fault(44, 16)
def test_a_torch_hook_that_breaks_the_stream_is_refused_with_its_place(silent):
    model = tiny("Llama")
    ms.self_check(model)  # remembered, but for the model without the hook
    model.original_model.model.layers[0].register_forward_hook(
        lambda m, args, out: 2 * (out[0] if isinstance(out, tuple) else out)
    )
    with pytest.raises(
        ValueError,
        match=r"cannot use this model.*perhaps because of what is on it at blocks\.0.*torch hook",
    ):
        ms.measure(model, tiny_task(), [ms.chain()])


@pytest.mark.parametrize("architecture", ["Llama", "OPT", "GPT-2"])
def test_what_the_libraries_put_on_a_model_is_not_the_users(architecture):
    assert other_hooks(tiny(architecture)) == []


@pytest.mark.fault(24)
def test_dropout_in_train_mode_is_left_for_the_call_and_restored_with_a_warning(gpt2):
    gpt2.train(True)
    with pytest.warns(UserWarning, match="train mode"), evaluation(gpt2):
        assert not gpt2.training
        assert not torch.is_grad_enabled()
    assert gpt2.training
    assert torch.is_grad_enabled()
    gpt2.train(False)


def test_train_mode_without_dropout_is_left_in_silence(llama):
    llama.train(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with evaluation(llama):
            assert not llama.training
    assert llama.training
    llama.train(False)


@pytest.mark.fault(24)
def test_the_mode_of_every_module_is_restored_the_wrapped_models_too(llama, silent):
    llama.original_model.train(True)  # which does not show in `llama.training`
    llama.blocks[0].eval()
    before = [module.training for module in llama.modules()]
    with evaluation(llama):
        assert not any(module.training for module in llama.original_model.modules())
    assert [module.training for module in llama.modules()] == before
    llama.original_model.train(False)


@pytest.mark.fault(22)
def test_an_exception_leaves_no_hook_and_restores_the_mode(llama):
    def fail(x, hook=None):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), evaluation(llama):
        run_model(llama, tiny_task().tokens[None], [("blocks.0.hook_attn_out", fail)])
    assert not other_hooks(llama)
    assert torch.is_grad_enabled()


@pytest.mark.fault(23)
def test_the_users_hooks_are_kept_take_part_and_are_noted(llama):
    tokens = tiny_task().tokens[None]
    llama.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    try:
        with (
            pytest.warns(
                UserWarning,
                match=r"already has hooks at blocks.0.hook_mlp_out.*results include them",
            ),
            evaluation(llama) as others,
        ):
            with_theirs = run_model(
                llama,
                tokens,
                [("blocks.1.hook_mlp_out", lambda x, hook=None: x)],
                scored=slice(2, 4),
            )
        assert others.notes == ("hooks of the user at blocks.0.hook_mlp_out, one row per pass",)
        assert other_hooks(llama) == ["blocks.0.hook_mlp_out"]
    finally:
        llama.reset_hooks()
    with torch.no_grad():
        assert (with_theirs - run_model(llama, tokens, scored=slice(2, 4))).abs().max() > 1e-3
