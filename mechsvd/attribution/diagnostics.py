"""Warnings about attributions that are not fully reliable, raised at the user's call."""

import math

from mechsvd.attribution.curvature import Curvature
from mechsvd.attribution.scores import Attribution
from mechsvd.checks import warn
from mechsvd.linalg.eigenpairs import BLOCK


def warn_unlike_values(curvature: Curvature, noise: float, baseline: float) -> None:
    """Warn if f does not rise along its gradient as the gradient says.

    Then something in the model hides the slope. Nothing is said where the rise would be rounding,
    as at the minimum of a divergence.

    Args:
        noise: rounding noise of f.
        baseline: f(0).
    """
    gradient, value = curvature.gradient.detach(), float(curvature.value)
    size = float(gradient.norm())
    if size == 0:
        return
    # f, relative to its clean value or in nats, should rise by 0.02; other metrics by less, so
    # that the step stays small
    step = min(0.01 / size, 1e-3 * float(curvature.w.detach().norm()))
    expected = 2 * step * size
    if expected <= max(100 * noise, 1e-5 * max(abs(value), abs(value - baseline))):
        return
    rise = curvature.function.rise(gradient / size, step)
    if abs(rise - expected) > 0.2 * expected + 10 * noise:
        warn(
            f"The gradient says that f rises by {expected:.2g} along itself, but running the model "
            f"says {rise:.4g}: something in it hides the slope, such as a hook that detaches, or "
            "half precision. Measured scores are right; eigenvalues and estimates are not.",
        )


def warn_unconverged(attribution: Attribution, max_products: int | None) -> None:
    """Warn of pairs that did not converge, or of a Hessian that is all rounding.

    Args:
        max_products: products that Lanczos might use; None where it was not used.
    """
    count, missed = len(attribution), int((~attribution.converged).sum())
    is_all_rounding = missed == count and attribution.eigenvalues.any()
    if missed if max_products is not None else is_all_rounding:
        advice = (
            " Allow more `max_products`, or ask for fewer `pairs`; or"
            if max_products and attribution.products + BLOCK > max_products
            else " Perhaps"
        )
        warn(
            f"{missed} of {count} eigenpairs did not converge to a residual of "
            f"{attribution.tolerance:g}·|λ| in {attribution.products} products; the table marks "
            f"them.{advice} rounding allows no better: a model in dtype=torch.float64 rounds less.",
        )


def warn_undefined(attribution: Attribution, curvature: Curvature, steps: int) -> None:
    """Warn of an f without derivatives, of values that are not finite, or of a rough path integral.

    Args:
        steps: nodes of the path integral.
    """
    message, change = "", attribution.value - attribution.baseline
    if not curvature.gradient.any() and not attribution.eigenvalues.any():
        hidden = (
            "though removing directions changes it: it is flat or has a kink here, or something "
            "hides its slope, such as a hook that detaches"
        )
        why = hidden if attribution.measured.any() else "so there is nothing to attribute"
        message = f"f does not depend on w here: its gradient and its Hessian are zero, {why}."
    elif not math.isfinite(attribution.baseline) or not attribution.measured.isfinite().all():
        message = (
            "f is not finite at w = 0, or with some directions removed; shares and the path "
            "integral are undefined there."
        )
    elif attribution.path_error > 0.05 * abs(change):
        message = (
            f"Integrated gradients are rough here: with {steps} steps along the path their sum "
            f"misses f(w) − f(0) = {attribution.value:.3g} − {attribution.baseline:.3g} = "
            f"{change:.3g} by {attribution.path_error:.3g}. More steps "
            "(`path_steps`) come nearer; measured scores need none."
        )
    if message:
        warn(message)
