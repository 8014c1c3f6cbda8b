import pytest
import torch

from mechsvd.linalg.subspace import Subspace, complete, span


def orthonormal(d_model, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_model, rank, generator=generator, dtype=torch.float64))[0]


@pytest.mark.fault(17)
def test_span_reports_the_rank_of_dependent_vectors_and_spans_them():
    basis = orthonormal(10, 3)
    vectors = torch.cat(
        [basis @ torch.randn(3, 5, dtype=torch.float64), torch.zeros(10, 1, dtype=torch.float64)],
        dim=1,
    )
    found = span(vectors)
    assert found.rank == 3
    torch.testing.assert_close(found.basis @ found.basis.T, basis @ basis.T)


def test_complete_keeps_the_given_directions_first_and_is_orthonormal():
    basis = orthonormal(9, 4)
    whole = complete(basis)
    torch.testing.assert_close(whole[:, :4], basis)
    torch.testing.assert_close(whole.T @ whole, torch.eye(9, dtype=torch.float64))


@pytest.mark.fault(17)
def test_a_basis_that_is_not_orthonormal_is_refused_with_the_measure():
    basis = orthonormal(6, 3)
    basis[:, 2] = basis[:, 0]
    with pytest.raises(
        ValueError, match=r"differs from the identity by 1 at columns \(0, 2\).*span"
    ):
        Subspace(basis)


@pytest.mark.fault(17)
def test_zero_and_unnormalised_vectors_are_refused():
    with pytest.raises(ValueError, match="orthonormal"):
        Subspace(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="orthonormal"):
        Subspace(2 * torch.eye(4)[:, :2])


@pytest.mark.fault(18)
def test_a_transposed_basis_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="transposed"):
        Subspace(orthonormal(8, 3).T)


@pytest.mark.fault(17)
def test_nan_and_empty_bases_are_refused():
    with pytest.raises(ValueError, match=r"columns \[1\] hold NaN"):
        Subspace(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="float matrix of shape"):
        Subspace(torch.zeros(0, 0))


def test_vectors_that_are_none_or_zero_span_nothing():
    for count in (0, 2):
        with pytest.raises(ValueError, match="none or all zero"):
            span(torch.zeros(4, count))


def test_a_subspace_prints_itself_in_three_lines():
    assert len(repr(Subspace(torch.eye(3)[:, :2])).splitlines()) == 3
