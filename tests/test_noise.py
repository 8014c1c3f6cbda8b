"""The noise floor: small perturbations of the writes, always the same ones."""

import pytest
import torch

from mechsvd.engine.noise import NOISE_ROWS, UNITS, _Perturbations, spread_by_rounding

X = torch.randn(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def perturbed(eps, rows):
    rows = torch.tensor(rows)
    return _Perturbations(eps)[rows](X.expand(len(rows), -1, -1))


def test_the_first_row_is_left_and_the_others_move_by_some_units_of_rounding():
    eps = torch.finfo(torch.float32).eps
    assert len(_Perturbations(eps)) == NOISE_ROWS
    moves = (perturbed(eps, range(NOISE_ROWS)) - X) / X / eps
    assert torch.equal(moves[0], torch.zeros_like(moves[0]))
    sizes = moves[1:].abs().amax(dim=(1, 2))
    assert ((sizes > UNITS / 2) & (sizes <= UNITS * 1.001)).all()


def test_a_row_moves_the_same_way_in_every_batch():
    eps = torch.finfo(torch.float32).eps
    whole = perturbed(eps, range(NOISE_ROWS))
    assert torch.equal(perturbed(eps, [6, 2]), whole[[6, 2]])
    assert torch.equal(perturbed(eps, [3]), whole[[3]])


@pytest.mark.parametrize("slope", [1.0, -3.0])
def test_the_spread_is_that_of_the_log_probabilities(slope):
    def log_probs(stack):
        rows = stack[torch.arange(len(stack))](X.expand(len(stack), -1, -1)).sum(dim=(1, 2))
        return slope * torch.stack([rows, 2 * rows])  # of two texts

    eps = torch.finfo(torch.float32).eps
    sums = perturbed(eps, range(NOISE_ROWS)).sum(dim=(1, 2))
    expected = abs(slope) * float(sums.max() - sums.min())
    found = spread_by_rounding(log_probs, torch.float32)
    assert found.tolist() == pytest.approx([expected, 2 * expected], rel=1e-6)


def test_where_float64_moves_vanish_those_of_float32_are_taken():
    precisions = []

    def log_probs(stack):
        precisions.append(stack.precision)
        rows = stack[torch.arange(len(stack))](X.expand(len(stack), -1, -1)).float()
        return torch.stack([rows[:, 0, 0].round(decimals=7).double(), exact(stack)])

    def exact(stack):  # of another text, where they do not vanish
        return stack[torch.arange(len(stack))](X.expand(len(stack), -1, -1))[:, 0, 0]

    first, second = spread_by_rounding(log_probs, torch.float64)
    assert first > 1e-9 > second > 0
    assert precisions == [torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps]
