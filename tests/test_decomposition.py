import math

import pytest
import scipy.linalg
import torch

from mechsvd.linalg.decomposition import decompose
from mechsvd.linalg.svd import thin_svd
from tests.test_subspace import orthonormal


def prescribed(n, d_model, spectrum):
    """A sample with these singular values."""
    rank = len(spectrum)
    return (
        orthonormal(n, rank, seed=3)
        @ torch.diag(torch.tensor(spectrum, dtype=torch.float64))
        @ orthonormal(d_model, rank, seed=4).T
    )


@pytest.mark.parametrize(("n", "d_model"), [(200, 12), (40, 40)])
def test_it_recovers_a_prescribed_spectrum_and_its_projectors(n, d_model):
    spectrum = [100.0, 30.0, 29.0, 1.0, 1e-3, 1e-4]
    vectors = prescribed(n, d_model, spectrum)
    svd = decompose(vectors.reshape(4, n // 4, d_model))
    torch.testing.assert_close(
        svd.singular_values[:6], torch.tensor(spectrum, dtype=torch.float64), rtol=1e-5, atol=0
    )
    right = torch.linalg.svd(vectors)[2][:4]
    torch.testing.assert_close(
        svd.directions[:, :4] @ svd.directions[:, :4].T, right.T @ right, rtol=0, atol=1e-9
    )


@pytest.mark.fault(4)
def test_fewer_writes_than_dimensions_warn_and_give_as_many_directions(recwarn):
    svd = decompose(torch.randn(2, 5, 30, dtype=torch.float64))
    assert svd.rank == 10
    assert "10 writes for 30 dimensions: the decomposition has 10 directions" in str(
        recwarn.pop(UserWarning).message
    )


def test_gram_and_thin_svd_agree():
    vectors = prescribed(60, 20, [9.0, 5.0, 2.0, 1e-2])[None]
    _, sizes, directions = thin_svd(vectors)
    left, reference, right = torch.linalg.svd(vectors, full_matrices=False)
    torch.testing.assert_close(sizes[0, :4], reference[0, :4])
    torch.testing.assert_close(directions[0, :, :4].abs(), right[0, :4].T.abs())
    assert left.shape == (1, 60, 20)


def test_left_vectors_rebuild_the_writes_and_shares_sum_to_one():
    values = torch.randn(3, 20, 8)
    svd = decompose(values)
    rebuilt = (svd.left * svd.singular_values) @ svd.directions.T
    torch.testing.assert_close(rebuilt, values, rtol=1e-5, atol=1e-5)
    for direction in range(svd.rank):
        assert math.isclose(float(svd.writer_map(direction).sum()), 1.0, rel_tol=1e-5)


def test_signs_are_fixed_by_the_largest_entry():
    svd = decompose(torch.randn(3, 20, 8))
    assert (svd.directions.gather(0, svd.directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_nothing_is_centred_unless_asked():
    values = torch.randn(2, 30, 4, dtype=torch.float64) + 5
    flat = values.reshape(-1, 4)
    torch.testing.assert_close(decompose(values).singular_values, torch.linalg.svdvals(flat))
    torch.testing.assert_close(
        decompose(values, center=True).singular_values, torch.linalg.svdvals(flat - flat.mean(0))
    )


@pytest.mark.fault(4)
@pytest.mark.filterwarnings("ignore:.*unseen")
def test_one_write_and_all_zero_writes_are_never_nan():
    one = decompose(torch.tensor([[[3.0, 4.0]]]))
    assert one.rank == 1
    torch.testing.assert_close(one.singular_values, torch.tensor([5.0]))
    torch.testing.assert_close(one.directions[:, 0], torch.tensor([0.6, 0.8]))
    for shape in [(1, 1, 3), (2, 10, 3)]:
        zero = decompose(torch.zeros(shape))
        assert zero.rank == 0
        assert zero.directions.shape == (3, 0)
        assert len(zero.to_pandas()) == 0


@pytest.mark.fault(4)
def test_all_zero_writes_warn():
    with pytest.warns(UserWarning, match="all writes are zero"):
        decompose(torch.zeros(2, 10, 3))


@pytest.mark.fault(2)
def test_half_precision_writes_are_decomposed_as_their_exact_values():
    values = torch.randn(2, 40, 6).to(torch.bfloat16)
    svd = decompose(values)
    assert svd.directions.dtype == torch.float32
    torch.testing.assert_close(
        svd.singular_values.double(),
        torch.linalg.svdvals(values.double().reshape(-1, 6)),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.fault(3)
def test_not_converging_falls_back_to_scipy_and_is_right(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    tall, wide = (
        torch.randn(2, 40, 6, dtype=torch.float64),
        torch.randn(1, 6, 6, dtype=torch.float64),
    )
    expected = [scipy.linalg.svdvals(v.reshape(-1, 6).numpy()) for v in (tall, wide)]
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    for values, sizes in zip((tall, wide), expected, strict=True):
        torch.testing.assert_close(decompose(values).singular_values, torch.from_numpy(sizes))


@pytest.mark.fault(3)
def test_two_drivers_that_fail_are_an_error_in_words(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no")

    def fail_too(*args, **kwargs):
        raise scipy.linalg.LinAlgError("neither")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(scipy.linalg, "eigh", fail_too)
    with pytest.raises(
        RuntimeError,
        match=r"The SVD of a matrix of shape \[6, 6\] did not converge, nor with a second driver \(neither\)",
    ):
        decompose(torch.randn(2, 40, 6))


def test_centring_is_noted(embedded, meaning):
    import mechsvd as ms

    assert "centred" in ms.decompose(ms.collect_writes(embedded, meaning), center=True).source.notes


@pytest.mark.fault(1)
def test_nan_in_a_sample_is_refused_with_its_place():
    values = torch.randn(2, 4, 3)
    values[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="site 1, position 2"):
        decompose(values)
    with pytest.raises(ValueError, match="non-empty"):
        decompose(torch.zeros(0, 3, 2))
    with pytest.raises(ValueError, match="needs to know the sites"):
        decompose(torch.randn(2, 9, 3), per_layer=True)


@pytest.mark.fault(19)
def test_a_rank_that_does_not_exist_is_refused():
    svd = decompose(torch.randn(2, 9, 3))
    for rank in (-1, 4, True):
        with pytest.raises(
            ValueError, match=r"`rank` is .*, but the decomposition has 3 directions; choose 0 to 3"
        ):
            svd.subspace(rank)
    with pytest.raises(ValueError, match="directions 0 to 2"):
        svd.writer_map(3)


def test_the_table_and_the_printed_form():
    svd = decompose(torch.randn(2, 9, 3))
    table = svd.to_pandas()
    assert list(table.columns) == ["direction", "singular_value", "cumulative_share"]
    assert table["cumulative_share"].iloc[-1] == pytest.approx(1)
    assert len(repr(svd).splitlines()) == 3


@pytest.mark.fault(1, 36)
@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160, 1e200])
def test_writes_whose_squares_leave_double_precision_are_decomposed_all_the_same(size):
    for shape in ((1, 40, 6), (2, 2, 6)):
        values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        right, scaled = decompose(values), decompose(values * size)
        torch.testing.assert_close(scaled.singular_values / size, right.singular_values)
        torch.testing.assert_close(scaled.directions, right.directions)
