"""Targets that are no inputs: an answer read at the last position, as in modular addition."""

from functools import partial

import pytest
import torch

import mechsvd as ms
from tests.conftest import known, tiny, tiny_task

pytestmark = pytest.mark.older

P = 11


@pytest.fixture(scope="module")
def adder():
    """A small transformer of the modular-addition shape: three tokens, no "=" among its outputs."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=3, d_head=8, n_heads=2, d_mlp=32, act_fn="relu",
        d_vocab=P + 1, d_vocab_out=P, normalization_type=None, seed=0, device="cpu",
    )  # fmt: skip
    return known(HookedTransformer(config))


def task_of(a, b):
    return ms.Task(torch.tensor([a, b, P]), 3, targets=torch.tensor([(a + b) % P]))


@pytest.fixture(scope="module")
def tasks():
    return [task_of(2, 9), task_of(3, 3), task_of(10, 4)]


def test_a_task_with_targets():
    task = task_of(3, 4)
    assert task.scored == slice(2, 3)
    assert task.continuation.tolist() == [7]
    assert task.text() == ("[3][4][11]", "[7]")
    two = ms.Task(torch.tensor([1, 2, 3]), 2, targets=torch.tensor([5, 6]))
    assert two.scored == slice(1, 3)
    for wrong in (1, 3):
        with pytest.raises(ValueError, match="`prompt_length` must be 2"):
            ms.Task(torch.tensor([1, 2, 3]), wrong, targets=torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="Targets that are no inputs are given as `targets`"):
        ms.Task(torch.tensor([1, 2, 3]), 3)
    with pytest.raises(TypeError, match="`targets` must be a tensor"):
        ms.Task(torch.tensor([1, 2, 3]), 3, targets=[4])


def test_targets_are_saved(tmp_path):
    task_of(3, 4).save(tmp_path / "task")
    assert ms.load(tmp_path / "task").targets.tolist() == [7]


def clip(kept, x, hook):
    return x @ kept


def test_the_sum_is_scored_at_the_last_position_against_a_loop(adder, tasks):
    svd = ms.decompose(ms.collect_writes(adder, tasks))
    sweeps = ms.sweep_rank(adder, tasks, svd)
    names = [site.hook_name for site in ms.find_sites(adder)]
    for task, sweep in zip(tasks, sweeps.parts, strict=True):
        for k, found in zip(sweep.ranks.tolist(), sweep.measurement.log_prob, strict=True):
            kept = svd.directions[:, :k] @ svd.directions[:, :k].T
            hooks = [(name, partial(clip, kept)) for name in names]
            logits = adder.run_with_hooks(task.tokens[None], fwd_hooks=hooks)
            assert logits.shape == (1, 3, P)
            expected = logits[0, -1].log_softmax(-1)[task.targets[0]]
            assert float(found) == pytest.approx(float(expected.detach()), abs=1e-4)


def test_every_kind_of_call_takes_it(adder, tasks):
    svd = ms.decompose(ms.collect_writes(adder, tasks))
    choice = ms.logit_difference(3, 4)
    assert ms.rank_directions(adder, tasks, svd, metric=choice).summary() is not None
    assert ms.critical_rank(adder, tasks[0], svd).rank is not None
    attribution = ms.hessian_attribution(adder, tasks[0], svd, objective="log_prob")
    assert attribution.to_pandas()["measured"].notna().all()
    found = ms.fit_and_measure(adder, tasks, folds=3)
    assert len(found.summary()) > 3
    table = ms.measure(adder, tasks[0], [ms.chain()]).tokens_to_pandas()
    assert [*table["position"]] == [3]
    assert table["token"].isna().all()


@pytest.mark.fault(11)
def test_answers_that_the_model_does_not_predict_are_refused(adder):
    with pytest.raises(ValueError, match="the model predicts 0 to 10"):
        ms.measure(adder, ms.Task(torch.tensor([1, 2, 11]), 2), [ms.chain()])
    with pytest.raises(ValueError, match="the model predicts 0 to 10"):
        ms.measure(adder, task_of(1, 2), [ms.chain()], metric=ms.logit_difference(11, 3))


def test_targets_on_a_model_of_text_are_what_the_next_tokens_would_be():
    model, task = tiny("Llama"), tiny_task()
    inputs = ms.Task(task.tokens[:-1], task.prompt_length, targets=task.continuation)
    edits = [lambda x, hook: 0.5 * x]
    found, expected = (ms.measure(model, one, edits) for one in (inputs, task))
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)


def test_texts_alone_are_collected(real):
    texts = ["I believe", "Once upon a time"]
    writes = ms.collect_writes(real.model, texts)
    assert writes.task_index.max() == 1
    task = ms.Task.from_text(real.model, texts[1], max_new_tokens=1)
    expected = ms.collect_writes(real.model, task, positions=slice(0, -1))
    own = writes.select(tasks=1)
    assert own.tokens.tolist() == task.tokens[:-1].tolist()
    torch.testing.assert_close(own.values, expected.values, rtol=1e-4, atol=1e-5)
    one = ms.collect_writes(real.model, texts[0])
    assert one.tokens.tolist() == writes.select(tasks=0).tokens.tolist()
