"""Rows that share the keys and values before the edited positions give what whole rows give."""

import pytest
import torch

import mechsvd as ms
from mechsvd.model import beginnings
from mechsvd.model.selfcheck import self_check
from tests.conftest import ACCEPTED, tiny, tiny_hf, tiny_task

pytestmark = pytest.mark.older

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def begun(monkeypatch):
    """The lengths of the beginnings that were read outside self-checks, and the tokens of all passes."""
    lengths, tokens = [], []

    def read(model, rows):
        lengths.append(rows.shape)
        return beginnings.read_beginning(model, rows)

    def run(model, rows, *args, **options):
        tokens.append(tuple(rows.shape))
        return original(model, rows, *args, **options)

    from mechsvd.engine import metrics

    original = metrics.run_model
    monkeypatch.setattr("mechsvd.engine.passes.read_beginning", read)
    monkeypatch.setattr(metrics, "run_model", run)
    return lengths, tokens


def assert_same(found, expected):
    for name in ("log_probs", "kl_divergences", "orig_delta", "kept_delta", "value"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **CLOSE)
    assert found.log_probs.shape == expected.log_probs.shape


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_every_architecture(architecture, begun, silent):
    model, task = tiny(architecture), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    positions = range(task.prompt_length - 1, len(task.tokens))
    sweep = ms.sweep_rank(model, task, svd, [0, 3, 17], positions=positions)
    whole = ms.sweep_rank(model, task, svd, [0, 3, 17], positions=positions, fast=False)
    assert_same(sweep.measurement, whole.measurement)
    assert len(begun[0]) == self_check(model).goes_on
    assert self_check(model).goes_on


def test_a_trained_model_in_batches_of_any_size(real, begun):
    model, task, svd = real.model, real.task, real.svd
    last = len(task.tokens) - 3
    options = {"positions": [last, last + 1], "metric": ms.logit_difference(5, 7)}
    whole = ms.sweep_rank(model, task, svd, fast=False, **options).measurement
    assert begun[0] == []
    for batch_size in (None, 1, 7):
        sweep = ms.sweep_rank(model, task, svd, batch_size=batch_size, **options)
        assert_same(sweep.measurement, whole)
    start = min(last, task.prompt_length - 1)
    assert begun[0] == [(1, start)] * 3
    assert {length for _, length in begun[1]} == {len(task.tokens), len(task.tokens) - start}


def test_several_texts_each_go_on_from_their_own(real, begun):
    model, ids = real.model, real.task.tokens
    texts = [ms.Task(torch.cat([ids[:1], ids[i : i + 13]]), 9 + i) for i in (1, 2, 3)]
    ranking = ms.rank_directions(model, texts, real.svd, positions=range(9, 14))
    whole = ms.rank_directions(model, texts, real.svd, positions=range(9, 14), fast=False)
    assert begun[0] == [(3, 9)]
    for found, expected in zip(ranking, whole, strict=True):
        assert_same(found.measurement, expected.measurement)


def test_edits_of_late_layers_only_and_baselines_by_position(real):
    model, task, svd = real.model, real.task, real.svd
    donor = ms.Task(torch.cat([task.tokens[:1], task.tokens[1:].flip(0)]), task.prompt_length)
    edits = [
        ms.ablate(svd.subspace(3), baseline=ms.donor_baseline(model, donor)),
        lambda x, hook: 0.5 * x,
        ms.keep(svd.subspace(9)),
    ]
    options = {
        "positions": range(task.prompt_length, len(task.tokens)),
        "layers": [real.n_layers - 1],
    }
    found = ms.measure(model, task, edits, noise_floor=True, **options)
    assert_same(found, ms.measure(model, task, edits, fast=False, **options))
    assert 0 < found.noise_floor < 1e-2


@pytest.mark.parametrize("positions", [[0], range(5), [1]])
def test_positions_that_begin_early_run_whole(positions, real, begun):
    ms.measure(real.model, real.task, [ms.keep(real.svd.subspace(3))], positions=positions)
    assert begun[0] == []


def test_hooks_of_users_see_whole_texts(real, begun):
    seen = []

    def see(x, hook):
        seen.append(x.shape[1])

    edits, last = [lambda x, hook: 0 * x], len(real.task.tokens) - 2
    with (
        real.model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", see)]),
        pytest.warns(match="already has hooks"),
    ):
        ms.measure(real.model, real.task, edits, positions=[last])
    assert begun[0] == []
    assert set(seen) == {len(real.task.tokens)}


def test_a_model_that_keeps_something_else_runs_whole(monkeypatch, begun):
    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr("mechsvd.model.probing.read_beginning", refuse)
    model, task = tiny("Llama", hf_model=tiny_hf("Llama")), tiny_task()
    assert self_check(model).beginning_error == float("inf")
    ms.measure(model, task, [ms.keep(ms.span(torch.randn(32, 2)))], positions=[8])
    assert begun[0] == []


def test_a_model_that_forgets_its_beginning_runs_whole(monkeypatch, begun):
    def forget(layer, texts, keys, values, *_, **__):
        return keys, values

    monkeypatch.setattr(beginnings, "_after", forget)
    model = tiny("Llama", hf_model=tiny_hf("Llama"))
    assert self_check(model).beginning_error > 1e-3
    assert not self_check(model).goes_on
