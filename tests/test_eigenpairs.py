import pytest
import torch

from mechsvd.linalg.eigenpairs import BLOCK, capacity, dense_eigenpairs, lanczos


def symmetric(spectrum, seed=0):
    """A matrix with a prescribed spectrum, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis * spectrum @ basis.T


def found_by_lanczos(matrix, pairs, tolerance=1e-9, max_products=4000, block=BLOCK, seed=0):
    start = torch.randn(
        len(matrix), block, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(matrix)
    return lanczos(
        lambda v: matrix @ v, start, pairs, tolerance=tolerance, max_products=max_products
    )


SPECTRA = {
    "both ends": torch.linspace(-1, 1, 300, dtype=torch.float64) ** 3,
    "falling fast": torch.tensor([(-0.8) ** i for i in range(300)], dtype=torch.float64),
    "three alike, and both signs": torch.cat(
        [torch.tensor([5.0, 5, 5, -5, -5, 4, -3]), torch.linspace(-1, 1, 293)]
    ).double(),
    "ten alike": torch.cat(
        [torch.full((10,), 3.0), torch.linspace(1, 2, 20), torch.linspace(-0.9, 0.9, 270)]
    ).double(),
    "thirty alike, and nothing else": torch.cat(
        [torch.full((30,), 3.0), torch.zeros(270)]
    ).double(),
    "of low rank": torch.cat([torch.tensor([3.0, -2, 1]), torch.zeros(297)]).double(),
    "zero": torch.zeros(300, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("pairs", [1, 7, 20])
def test_lanczos_finds_the_eigenpairs_of_eigh_at_both_ends(name, pairs):
    spectrum = SPECTRA[name]
    matrix = symmetric(spectrum)
    found = found_by_lanczos(matrix, pairs)
    expected = torch.linalg.eigvalsh(matrix)
    expected = expected[expected.abs().argsort(descending=True)][:pairs]
    torch.testing.assert_close(found.values.abs(), expected.abs(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        found.vectors.T @ found.vectors, torch.eye(pairs, dtype=torch.float64), rtol=0, atol=1e-10
    )
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (residuals <= 1e-9 * found.values.abs() + 1e-8).all()


def test_a_restart_keeps_what_was_found():
    matrix = symmetric(
        torch.linspace(-1, 1, 400, dtype=torch.float64)
    )  # evenly spaced: slow, so that it restarts
    found = found_by_lanczos(matrix, 6)
    assert found.products > 2 * capacity(6)
    expected = torch.linalg.eigvalsh(matrix).abs().sort(descending=True).values[:6]
    torch.testing.assert_close(found.values.abs(), expected, rtol=1e-9, atol=0)


def test_single_precision_has_no_ghosts():
    spectrum = torch.cat([torch.tensor([1000.0, -900.0, 10.0, -9.0]), torch.linspace(-8, 8, 496)])
    matrix = symmetric(spectrum.double()).float()
    found = found_by_lanczos(matrix, 10, tolerance=1e-5)
    expected = spectrum[spectrum.abs().argsort(descending=True)][:10].double()
    torch.testing.assert_close(found.values.abs(), expected.abs(), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(10), rtol=0, atol=1e-5)


@pytest.mark.fault(35)
def test_products_that_run_out_leave_honest_residuals():
    matrix = symmetric(torch.linspace(-1, 1, 400, dtype=torch.float64))
    found = found_by_lanczos(matrix, 6, max_products=40)
    assert found.products == 40
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    exact = torch.linalg.eigvalsh(matrix)
    assert residuals.max() > 1e-3
    assert ((found.values[:, None] - exact).abs().min(dim=1).values <= residuals).all()


def test_the_same_start_gives_the_same_pairs():
    matrix = symmetric(SPECTRA["both ends"])
    first, second = found_by_lanczos(matrix, 7), found_by_lanczos(matrix, 7)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)


def test_a_dense_matrix_is_solved_by_size_with_its_signs():
    spectrum = torch.tensor([-3.0, 2.0, 1.0, -0.5]).double()
    matrix = symmetric(spectrum)
    found = dense_eigenpairs(matrix, 3)
    torch.testing.assert_close(found.values, spectrum[:3])
    torch.testing.assert_close(matrix @ found.vectors, found.vectors * found.values)
    assert (found.vectors.gather(0, found.vectors.abs().argmax(dim=0, keepdim=True)) > 0).all()
