import pytest
import torch

from mechsvd.edits.bases import ablate, gate, keep, shrink
from mechsvd.edits.gates import Gate
from mechsvd.edits.maps import chain, shift
from mechsvd.linalg.decomposition import decompose
from mechsvd.linalg.subspace import Subspace, complete
from tests.test_subspace import orthonormal

X = torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(basis, gains, rest, x):
    """The definition, with a d × d matrix."""
    projector = basis @ basis.T
    return x @ (basis @ torch.diag(gains) @ basis.T).T + rest * (x - x @ projector)


def test_keep_is_a_projection():
    edit = keep(Subspace(orthonormal(12, 5)))
    torch.testing.assert_close(edit(edit(X)), edit(X))


def test_keep_and_ablate_add_up_to_the_identity():
    subspace = Subspace(orthonormal(12, 5))
    torch.testing.assert_close(keep(subspace)(X) + ablate(subspace)(X), X)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("rest", [0.0, 1.0, 0.3])
def test_a_gate_equals_its_definition(rank, rest):
    basis = orthonormal(12, rank)
    gains = torch.rand(rank, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).round(
        decimals=1
    )
    torch.testing.assert_close(gate(basis, gains, rest=rest)(X), dense(basis, gains, rest, X))


@pytest.mark.parametrize("rest", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("kind", ["ranks", "single directions", "random"])
@pytest.mark.parametrize("rank", [12, 9])
def test_a_stack_equals_its_edits_one_by_one(kind, rest, rank):
    basis = orthonormal(12, rank)
    gains = {
        "ranks": (torch.arange(rank) < torch.tensor([0, 3, 8, rank])[:, None]).double(),
        "single directions": 1 - torch.eye(rank, dtype=torch.float64)[[0, 4, 2, 8]],
        "random": torch.rand(4, rank, dtype=torch.float64),
    }[kind]
    stacked = gate(basis, gains, rest=rest)(X)
    for row in range(4):
        torch.testing.assert_close(stacked[row], dense(basis, gains[row], rest, X[row]))


def test_a_stack_shares_one_row_among_all_its_edits():
    gains = torch.rand(3, 12, dtype=torch.float64)
    stack = gate(orthonormal(12, 12), gains)
    torch.testing.assert_close(stack(X[:1]), stack(X[:1].expand(3, -1, -1)))
    identity = gate(orthonormal(12, 12), torch.ones(3, 12, dtype=torch.float64), rest=1.0)
    torch.testing.assert_close(identity(X[:1]), X[:1].expand(3, -1, -1))


def test_one_direction_is_removed_by_its_own_column_and_a_high_rank_by_the_smaller_side():
    basis = orthonormal(64, 64)
    single = gate(basis, 1 - torch.eye(64, dtype=torch.float64)[:16], rest=1.0)
    assert single._plan.columns.shape == (16, 64, 1)
    high = gate(basis, (torch.arange(64) < torch.tensor([60, 61])[:, None]).double())
    assert high._plan.columns.shape == (64, 4)
    assert high.costs.tolist() == [[60, 61], [4, 3]]


def test_edits_computed_the_same_way_are_neighbours():
    ranks = gate(orthonormal(8, 8), (torch.arange(8) < torch.arange(9)[:, None]).double())
    assert ranks.order_by_cost().tolist() == [0, 1, 2, 3, 4, 8, 7, 6, 5]
    assert ranks[ranks.order_by_cost()[5:]]._plan.columns.shape == (8, 3)


def test_a_completed_basis_gives_the_same_clip():
    basis = orthonormal(12, 9)
    gains = (torch.arange(9) < 7).double()
    padded = torch.cat([gains, torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(gate(complete(basis), padded)(X), gate(basis, gains)(X))


def test_an_edit_returns_a_new_tensor_and_leaves_its_input():
    for edit in (
        keep(Subspace(orthonormal(12, 12))),
        gate(orthonormal(12, 12), torch.ones(12), rest=1.0),
        shift(torch.ones(12)),
    ):
        before = X.clone()
        edit(X).add_(1.0)
        assert torch.equal(X, before)


@pytest.mark.fault(2)
def test_removal_in_half_precision_is_computed_in_single():
    x, basis = X.to(torch.bfloat16), orthonormal(12, 1).float()
    removed = ablate(Subspace(basis))(x)
    assert removed.dtype == torch.bfloat16
    exact = x.double() - (x.double() @ basis.double()) @ basis.double().T
    torch.testing.assert_close(
        removed, exact.to(torch.bfloat16), rtol=0.01, atol=1e-6
    )  # one rounding, not a sum of them


def test_shrink_has_the_gains_of_ridge_regression():
    svd = decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None])
    x = torch.ones(1, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(
        shrink(svd, 2.0)(x), torch.tensor([[[9 / 11, 4 / 6, 1 / 3]]], dtype=torch.float64)
    )
    torch.testing.assert_close(shrink(svd, 0.0)(x), x)


def test_chain_applies_the_first_edit_first():
    basis = orthonormal(12, 3)
    shifted = shift(torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(
        chain(shifted, ablate(Subspace(basis)))(X), ablate(Subspace(basis))(X + 1)
    )
    torch.testing.assert_close(chain()(X), X)


def test_gradients_flow_through_gains_and_writes():
    gains = torch.rand(12, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda g, v: Gate(orthonormal(12, 12), g)(v), (gains, x[:1, :2])
    )


@pytest.mark.parametrize("rest", [0.0, 1.0])
@pytest.mark.parametrize("rank", [3, 12])
def test_gains_that_change_nothing_have_gradients_too(rest, rank):
    gains = (
        torch.stack([torch.ones(rank), torch.zeros(rank), torch.arange(rank) % 2.0])
        .double()
        .requires_grad_()
    )
    basis, x = orthonormal(12, rank), X[:1].expand(3, -1, -1)
    (slope,) = torch.autograd.grad(Gate(basis, gains, rest)(x).square().sum() / 2, gains)
    # of half the squared size in a direction's gain: the gain times the squared size of what the direction holds
    torch.testing.assert_close(slope, gains.detach() * (x @ basis).square().sum(dim=1))


@pytest.mark.fault(19)
def test_bad_gains_are_refused():
    basis = orthonormal(12, 3)
    with pytest.raises(ValueError, match=r"\[2\], but the basis has 3 directions"):
        gate(basis, torch.ones(2))
    with pytest.raises(ValueError, match="NaN or inf"):
        gate(basis, torch.tensor([1.0, float("nan"), 0.0]))
    with pytest.raises(ValueError, match="NaN or inf"):
        gate(basis, torch.ones(3), rest=float("inf"))
    with pytest.raises(ValueError, match="orthonormal"):
        gate(torch.ones(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match="`alpha` is -1"):
        shrink(decompose(torch.eye(2)[None]), -1.0)
    with pytest.raises(ValueError, match="`vector` must be finite"):
        shift(torch.tensor([1.0, float("nan")]))


def test_a_gate_first_used_without_gradients_gives_them_later():
    gains, x = torch.rand(3, requires_grad=True), torch.randn(2, 5, 4)
    edit = gate(torch.eye(4)[:, :3], gains)
    plain = keep(torch.eye(4)[:, :2])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            edit(x), plain(x)
    for _ in range(2):  # a graph of its own each time
        (slope,) = torch.autograd.grad(edit(x).sum(), gains)
        torch.testing.assert_close(slope, x[..., :3].sum(dim=(0, 1)))
    written = x.clone().requires_grad_()
    plain(written).sum().backward()
    assert written.grad[..., :2].eq(1).all()
    assert written.grad[..., 2:].eq(0).all()


@pytest.mark.parametrize("rank", [0, 3, 12])
@pytest.mark.parametrize("gains", ["zeros", "ones", "mixed"])
def test_a_rest_for_each_edit_equals_a_number_for_each(rank, gains):
    basis, rests = orthonormal(12, rank), torch.tensor([0.0, 1.0, 0.3, -2.0], dtype=torch.float64)
    made = {
        "zeros": torch.zeros(4, rank),
        "ones": torch.ones(4, rank),
        "mixed": torch.arange(4.0 * rank).view(4, rank) % 3,
    }
    stack = gate(basis, made[gains].double(), rests)
    assert len(stack) == 4
    expected = [gate(basis, g, float(r)) for g, r in zip(stack.gains, rests, strict=True)]
    x = X[:1] if len(X) else X
    torch.testing.assert_close(
        stack(x.expand(4, -1, -1)), torch.cat([edit(x) for edit in expected])
    )
    torch.testing.assert_close(stack[2](x), expected[2](x))
    order = stack.order_by_cost()
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(
        stack[order](x.expand(4, -1, -1)), torch.cat([expected[i](x) for i in order])
    )
    assert stack.changes_nothing.tolist() == [bool(edit.changes_nothing.all()) for edit in expected]


def test_a_rest_has_a_gradient():
    basis = orthonormal(12, 3)
    rest = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    gains = torch.ones(2, 3, dtype=torch.float64)
    x = X[:1].expand(2, -1, -1)
    (slope,) = torch.autograd.grad(gate(basis, gains, rest)(x).sum(), rest)
    outside = x - x @ basis @ basis.T
    torch.testing.assert_close(slope, outside.sum(dim=(1, 2)))


def test_a_rest_of_another_length_is_refused():
    with pytest.raises(
        ValueError, match=r"`rest` has shape \[3\], but must be one number per edit, \[2\]"
    ):
        gate(orthonormal(12, 3), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="must be finite"):
        gate(orthonormal(12, 3), torch.ones(3), float("nan"))
