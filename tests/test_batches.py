import weakref

import pytest
import torch

from mechsvd.engine.batches import PATIENCE, run_batches


def halve(size):
    if size == 1:
        raise MemoryError("one row alone")
    return size // 2


def run(forward, count, size):
    return run_batches(forward, torch.arange(count), size, halve, progress=False)


def test_every_row_runs_once_in_order_whatever_fits():
    for fits in (1, 2, 3, 7, 50):

        def forward(rows, fits=fits):
            if len(rows) > fits:
                raise torch.OutOfMemoryError("out of memory")
            return rows

        assert torch.cat(run(forward, 41, 16)).tolist() == list(range(41))


@pytest.mark.fault(26)
def test_when_it_tries_again_nothing_of_the_failed_pass_is_held():
    activations = []

    def forward(rows):
        assert not any(
            activation() is not None for activation in activations
        )  # they would fill the memory that is short
        activation = torch.ones(len(rows))
        activations.append(weakref.ref(activation))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return rows

    assert len(torch.cat(run(forward, 20, 16))) == 20


@pytest.mark.fault(46)
def test_after_memory_ran_out_for_a_moment_the_passes_grow_again():
    sizes = []

    def forward(rows):
        sizes.append(len(rows))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("another program took it")
        return rows

    run(forward, 40 * PATIENCE, 16)
    assert sizes[:2] == [16, 8]
    assert sizes[-2] == 16
    assert sizes.index(8, 1) + 2 * PATIENCE == sizes.index(16, 1)


@pytest.mark.fault(46)
def test_where_memory_stays_short_few_passes_are_wasted():
    sizes = []

    def forward(rows):
        sizes.append(len(rows))
        if len(rows) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return rows

    run(forward, 5000, 16)
    assert sum(size > 8 for size in sizes) <= 7  # each time it waits twice as long before it tries


def test_another_error_is_not_taken_for_memory():
    def forward(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(forward, 4, 2)
