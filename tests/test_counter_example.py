"""The shortform's counter-example, f = ∏ wᵢ (a path through a network), against its closed forms.

Every factor is needed as much as any other: without one, nothing is left. The gradient says the opposite.
"""

import pytest
import torch

import mechsvd as ms

W = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
F = float(W.prod())


def product(w):
    return w.prod()


@pytest.fixture(scope="module")
def coordinates():
    return ms.hessian_attribution_of(product, W, bases={"coordinates": torch.eye(5)}).bases[
        "coordinates"
    ]


def test_the_gradient_is_inverse_to_the_factor(coordinates):
    torch.testing.assert_close(coordinates.slopes, F / W)
    assert coordinates.slopes.argmax() == W.argmin()


def test_the_linear_score_gives_each_factor_everything(coordinates):
    torch.testing.assert_close(coordinates.linear, torch.full((5,), F).double())


def test_the_measured_score_gives_each_factor_everything_too_and_is_right(coordinates):
    torch.testing.assert_close(coordinates.measured, torch.full((5,), F).double())
    torch.testing.assert_close(coordinates.share, torch.ones(5).double())


def test_the_path_integral_shares_alike_and_completely(coordinates):
    torch.testing.assert_close(coordinates.integrated, torch.full((5,), F / 5).double())
    assert coordinates.path_error < 1e-12 * F


def test_no_factor_bends_f_alone(coordinates):
    assert not coordinates.eigenvalues.any()
    # but the whole curvature lies between them: ∂²f/∂wᵢ∂wⱼ = f / wᵢwⱼ, the row norms of which are the residuals
    hessian = F * (1 / W[:, None] / W - torch.diag(W**-2))
    torch.testing.assert_close(coordinates.residuals, hessian.norm(dim=0))


@pytest.mark.parametrize("n", [2, 5, 9])
def test_equal_factors_are_one_component_in_the_hessian_basis(n):
    a = 1.3
    found = ms.hessian_attribution_of(product, torch.full((n,), a, dtype=torch.float64))
    f = a**n
    # H = f/a² (11ᵀ − I): the diagonal direction with (n − 1) f/a², and n − 1 others with −f/a²
    top, rest = int(found.projections.abs().argmax()), found.projections.abs() < 1e-9
    assert int(rest.sum()) == n - 1
    assert float(found.eigenvalues[top]) == pytest.approx((n - 1) * f / a**2)
    torch.testing.assert_close(
        found.eigenvalues[rest], torch.full((n - 1,), -f / a**2, dtype=torch.float64)
    )
    assert float(found.projections[top].abs()) == pytest.approx(n**0.5 * a)
    assert float(found.measured[top]) == pytest.approx(
        f
    )  # it holds all of w, so without it nothing is left
    assert float(found.integrated[top]) == pytest.approx(f)
    assert float(found.linear[top]) == pytest.approx(n * f)
    assert float(found.quadratic[top]) == pytest.approx(n * f - (n - 1) * n * f / 2)
    torch.testing.assert_close(
        found.measured[rest], torch.zeros(n - 1, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_two_factors_come_apart_into_independent_components():
    a, b = 3.0, 2.0
    found = ms.hessian_attribution_of(product, torch.tensor([a, b], dtype=torch.float64))
    torch.testing.assert_close(found.eigenvalues, torch.tensor([1.0, -1.0]).double())
    # f = ((a + b)/2)² − ((a − b)/2)²: one square each
    squares = torch.tensor([(a + b) ** 2 / 4, -((a - b) ** 2) / 4]).double()
    for name in ("measured", "quadratic", "integrated"):
        torch.testing.assert_close(getattr(found, name), squares)
    torch.testing.assert_close(found.linear, 2 * squares)
    assert float(found.measured.sum()) == pytest.approx(a * b)


@pytest.mark.parametrize("seed", range(3))
def test_of_any_quadratic_function_the_hessian_basis_gives_independent_components(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix, b, w = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 6), (6,), (6,))
    )
    matrix = matrix + matrix.T

    def f(x):
        return x @ matrix @ x / 2 + b @ x + 7

    found = ms.hessian_attribution_of(f, w)
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(found.eigenvalues, values[values.abs().argsort(descending=True)])
    torch.testing.assert_close(found.measured, found.quadratic)
    assert float(found.measured.sum()) == pytest.approx(found.value - found.baseline)
    other = ms.hessian_attribution_of(f, w, seed=seed).control
    torch.testing.assert_close(other.measured, other.quadratic)
    assert float(other.measured.sum()) != pytest.approx(
        found.value - found.baseline, rel=0.01
    )  # they interact


def test_a_linear_function_has_no_curvature_and_all_estimates_are_right():
    b, w = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([2.0, 1.0, 4.0]).double()
    found = ms.hessian_attribution_of(
        lambda x: b @ x, w, bases={"coordinates": torch.eye(3)}
    ).bases["coordinates"]
    for name in ("measured", "linear", "quadratic", "integrated"):
        torch.testing.assert_close(getattr(found, name), b * w)
    assert not found.eigenvalues.any()


def test_a_long_vector_goes_through_lanczos():
    entries, generator = 2100, torch.Generator().manual_seed(0)
    scales, w = (
        (-0.97) ** torch.arange(entries).double(),
        torch.randn(entries, generator=generator).double(),
    )
    found = ms.hessian_attribution_of(
        lambda x: (scales * x.square()).sum() / 2, w, pairs=6, tolerance=1e-8
    )
    assert found.products < entries
    expected = scales[scales.abs().argsort(descending=True)][:6]
    torch.testing.assert_close(found.eigenvalues.abs(), expected.abs())
    torch.testing.assert_close(found.measured, found.quadratic)
