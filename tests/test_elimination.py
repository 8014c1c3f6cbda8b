"""The order by elimination is that of a plain greedy search."""

import pytest
import torch

import mechsvd as ms

from .conftest import tiny_task
from .planted import divergence, planted, projecting, with_eight_dimensions

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.older]


def greedy(model, tasks, directions, going_of):
    """Remove the cheapest again and again, each measured by a plain run of each text."""
    remaining, removed = list(range(directions.shape[1])), []
    while len(remaining) > 1:
        costs = {}
        for j in remaining:
            basis = directions[:, [i for i in remaining if i != j]]
            costs[j] = sum(divergence(model, task, projecting(basis)) for task in tasks)
        going = sorted(remaining, key=costs.get)[: going_of(len(remaining))]
        removed += going
        remaining = [i for i in remaining if i not in going]
    return (removed + remaining)[::-1]


@pytest.mark.parametrize(
    ("share", "going_of"), [(0, lambda n: 1), (0.4, lambda n: max(1, int(0.4 * n)))]
)
def test_it_is_that_of_a_plain_search(share, going_of):
    model, tasks = with_eight_dimensions(), [tiny_task(12, 5), tiny_task(9, 4, seed=1)]
    svd = ms.decompose(ms.collect_writes(model, tasks))
    found = ms.order_by_elimination(model, tasks, svd, share=share)
    assert found.tolist() == greedy(model, tasks, svd.directions, going_of)
    assert sorted(found.tolist()) == list(range(8))


def test_directions_that_nothing_reads_go_first():
    model, subspace = planted(rank=6)
    tasks = [tiny_task(14, 3, seed=seed) for seed in range(3)]
    full = ms.decompose(ms.collect_writes(model, tasks))
    outside = torch.linalg.qr(subspace.basis, mode="complete").Q[:, 6:]
    mixed = torch.cat([outside, subspace.basis], dim=1)  # the planted ones last
    svd = ms.Decomposition(full.singular_values, mixed, full.left, source=full.source)
    order = ms.order_by_elimination(model, tasks, svd)
    assert sorted(order[:6].tolist()) == list(range(26, 32))


def test_on_the_text_itself_it_keeps_more_than_singular_values(real):
    task = ms.Task(real.task.tokens[:20], 8)
    order = ms.order_by_elimination(real.model, task, real.svd, share=0.25)
    k = real.svd.rank // 2
    costs = [
        float(
            ms.sweep_rank(
                real.model, task, real.svd, [k], o, metric=ms.kl_divergence
            ).measurement.value
        )
        for o in (None, order)
    ]
    assert costs[1] < 0.8 * costs[0]


@pytest.mark.parametrize("share", [-0.1, 1, True])
def test_a_share_out_of_range_is_refused(share):
    model, task = with_eight_dimensions(), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    with pytest.raises(ValueError, match="`share` is .*, but must be from 0 to below 1"):
        ms.order_by_elimination(model, task, svd, share=share)
