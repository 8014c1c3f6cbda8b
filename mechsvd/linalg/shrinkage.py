"""Ridge regression's gains, their effective number, and strengths that space it evenly.

Tensors only.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEFT = 0.1  # a direction with a larger gain is still there


def ridge_gains(
    singular_values: Float[Tensor, " rank"], alpha: Float[Tensor, "*edit"]
) -> Float[Tensor, "*edit rank"]:
    """The gains s²/(s² + alpha) of `shrink`, per strength."""
    squares = singular_values.square()
    return squares / (squares + alpha[..., None].to(squares))


def effective_number(
    singular_values: Float[Tensor, " rank"], alphas: Float[Tensor, " edit"]
) -> Float[Tensor, " edit"]:
    """Σ s²/(s² + alpha), ridge regression's effective degrees of freedom, per strength.

    Reference: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 2nd ed.,
        eq. 3.50.
    """
    return ridge_gains(singular_values.cpu().double(), alphas).sum(dim=-1)


def evenly_spaced_strengths(
    singular_values: Float[Tensor, " rank"], count: int
) -> Float[Tensor, " edit"]:
    """Falling strengths with evenly spaced effective numbers; the last one is 0.

    Args:
        singular_values: above 0.
    """
    import numpy as np

    sizes = singular_values.cpu().double().sort(descending=True).values
    squares = sizes.square()
    exponents = torch.linspace(
        float(squares[-1].log()) - 7, float(squares.sum().log()) + 7, 4096, dtype=torch.float64
    )
    numbers = effective_number(sizes, exponents.exp())  # falling
    targets = torch.linspace(0, len(sizes), count + 1, dtype=torch.float64)[1:-1]
    spaced = np.interp(targets.numpy(), numbers.flip(0).numpy(), exponents.flip(0).numpy())
    return torch.cat([torch.from_numpy(spaced).exp(), torch.zeros(1, dtype=torch.float64)])


def require_strengths(alphas: Any) -> Float[Tensor, " edit"]:
    """Take strengths as a list of numbers from 0, in double precision on the CPU.

    Raises:
        TypeError: they are not numbers.
        ValueError: one is below 0, NaN or inf, or there are none.
    """
    if isinstance(alphas, str) or not isinstance(alphas, Iterable):
        raise TypeError(f"`alphas` must be a list of numbers, but is {alphas!r:.40}.")
    try:
        strengths = torch.as_tensor(
            alphas if isinstance(alphas, Tensor) else list(alphas), dtype=torch.float64
        ).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`alphas` must be a list of numbers, but is {alphas!r:.40}.") from error
    is_valid = strengths.isfinite().all() and (strengths >= 0).all()
    if strengths.ndim != 1 or len(strengths) == 0 or not is_valid:
        raise ValueError(
            f"`alphas` must be finite numbers from 0, at least one, but is {alphas!r:.60}."
        )
    return strengths
