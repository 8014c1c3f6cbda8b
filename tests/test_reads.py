"""Gradients of random outputs: their second moment is the Fisher information, by plain loops."""

import pytest
import torch

import mechsvd as ms

from .conftest import tiny, tiny_task
from .planted import planted

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.older]


def exact_information(model, task, site, position):
    """Σ over scored positions and tokens of p · g gᵀ, with g by one backward pass each."""
    shift = torch.zeros(model.cfg.d_model, requires_grad=True)

    def add(x, hook=None):
        mask = torch.zeros(x.shape[1], 1)
        mask[position] = 1
        return x + mask * shift

    logits = model.run_with_hooks(task.tokens[None], fwd_hooks=[(site.hook_name, add)])
    predictions = logits[0, task.prompt_length - 1 : -1].log_softmax(-1)
    slopes = torch.autograd.grad(
        predictions.flatten(), shift, torch.eye(predictions.numel()), is_grads_batched=True
    )[0].double()
    return (slopes * predictions.detach().double().exp().flatten()[:, None]).T @ slopes


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_the_second_moment_is_the_fisher_information_of_all_predictions(architecture):
    model, task = tiny(architecture), tiny_task()
    reads = ms.collect_reads(model, task, draws=3000, seed=1)
    sites = ms.find_sites(model)
    for number, position in ((0, 2), (3, 5)):
        exact = exact_information(model, task, sites[number], position)
        own = reads.values[number, reads.positions == position].double()
        found = own.T @ own / reads.draws
        assert float(found.trace()) == pytest.approx(float(exact.trace()), rel=0.1)
        assert float((found - exact).norm() / exact.norm()) < 0.15


def test_half_of_it_is_the_divergence_that_a_small_change_costs():
    """At the last site, where no later layer bends what a change does."""
    model, task, position = tiny("Llama"), tiny_task(), 6
    site = ms.find_sites(model)[-1]
    reads = ms.collect_reads(model, task, draws=1000)
    own = reads.values[-1, reads.positions == position].double()
    information = own.T @ own / reads.draws
    change = 0.02 * torch.linalg.eigh(information)[1][:, -1]
    edit = lambda x, hook: x + change.float()
    options = {"layers": [site.layer], "components": ["mlp"], "positions": [position]}
    cost = ms.measure(model, task, [edit], metric=ms.kl_divergence, **options).effect
    expected = 0.5 * float(change @ information @ change)
    assert float(cost) * len(task.continuation) == pytest.approx(expected, rel=0.15)


def test_only_what_is_read_has_a_gradient():
    model, subspace = planted()
    reads = ms.collect_reads(model, tiny_task(), draws=4)
    values = reads.values.flatten(0, 1)
    outside = values - values @ subspace.basis @ subspace.basis.T
    assert float(outside.norm() / values.norm()) < 1e-4


def test_later_writes_and_texts_cannot_be_read_by_earlier_predictions(real):
    tasks = [ms.Task(real.task.tokens[:9], 5), ms.Task(real.task.tokens[:12], 4)]
    reads = ms.collect_reads(real.model, tasks, draws=3, positions=[2, 5, 7])
    assert reads.values.shape == (2 * real.n_layers, 2 * 3 * 3, real.d_model)
    assert reads.positions.tolist() == [2, 5, 7] * 6
    assert reads.task_index.tolist() == [0] * 9 + [1] * 9
    assert reads.draw.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    last = ms.collect_reads(real.model, tasks[0], draws=3, positions=[8])
    assert not last.values.any()  # what follows the last scored position is not predicted


def test_batches_change_nothing_and_seeds_do(real):
    task = ms.Task(real.task.tokens[:10], 5)
    whole = ms.collect_reads(real.model, task, draws=5)
    single = ms.collect_reads(real.model, task, draws=5, batch_size=1)
    torch.testing.assert_close(whole.values, single.values, rtol=1e-3, atol=1e-5)
    assert not torch.equal(whole.values, ms.collect_reads(real.model, task, draws=5, seed=9).values)
    assert all(parameter.grad is None for parameter in real.model.parameters())
    part = whole.at(whole.draw == 2)
    assert torch.equal(part.values, whole.values[:, 20:30])
    assert "5 random outputs" in repr(whole)
    assert len(whole.to_pandas()) == 2 * real.n_layers
    with pytest.raises(ValueError, match="`draws` is 0"):
        ms.collect_reads(real.model, task, draws=0)
