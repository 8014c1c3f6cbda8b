"""What is said of an attribution that should not be trusted, or not wholly; each is said where the user's call stands."""

import math

from mechsvd.attribution.curvature import Curvature
from mechsvd.attribution.scores import Attribution
from mechsvd.checks import warn
from mechsvd.linalg.eigenpairs import BLOCK


def warn_unlike_values(curvature: Curvature, noise: float) -> None:
    """Warn where f, run a step along its gradient, does not rise as the gradient says: something in the model hides its slope."""
    gradient = curvature.gradient.detach()
    size = float(gradient.norm())
    if size == 0:
        return
    step = 0.01 / size  # f, relative to its clean value or in nats, should rise by 0.02
    rise = curvature.function.rise(gradient / size, step)
    if abs(rise - 0.02) > 0.004 + 10 * noise:
        warn(
            f"The gradient says that f rises by 0.02 along itself, but running the model says {rise:.4f}: something in it hides "
            "the slope, such as a hook that detaches, or half precision. What is measured is right; eigenvalues and estimates are "
            "not.",
        )


def warn_unconverged(scored: Attribution, most: int | None) -> None:
    """Warn of pairs that Lanczos left unconverged (`most` are the products it might use), or of a Hessian that is all rounding."""
    missed = int((~scored.converged).sum())
    if missed if most is not None else missed == len(scored) and scored.eigenvalues.any():
        more = (
            " Allow more `max_products`, or ask for fewer `pairs`; or"
            if most and scored.products + BLOCK > most
            else " Perhaps"
        )
        warn(
            f"{missed} of {len(scored)} eigenpairs did not converge to a residual of {scored.tolerance:g}·|λ| in {scored.products} "
            f"products; the table marks them.{more} rounding allows no better: a model in dtype=torch.float64 rounds less.",
        )


def warn_undefined(scored: Attribution, curvature: Curvature, steps: int) -> None:
    """Warn of an f without derivatives, or that is not finite where components are removed, and of a path integral that so many
    `steps` leave rough."""
    said = ""
    if not curvature.gradient.any() and not scored.eigenvalues.any():
        hidden = "though removing components changes it: something hides its slope, such as a hook that detaches"
        nothing = "so there is nothing to attribute"
        why = hidden if scored.measured.any() else nothing
        said = f"f does not depend on w here: its gradient and its Hessian are zero, {why}."
    elif not math.isfinite(scored.baseline) or not scored.measured.isfinite().all():
        said = "f is not finite at w = 0, or where some components are removed; shares and the path integral are undefined there."
    elif scored.path_error > 0.05 * abs(scored.value - scored.baseline):
        said = (
            f"Integrated gradients are rough here: with {steps} steps along the path their sum misses f(w) − f(0) = "
            f"{scored.value - scored.baseline:.3g} by {scored.path_error:.3g}. More steps (`path_steps`) come nearer; what is "
            "measured needs none."
        )
    if said:
        warn(said)
