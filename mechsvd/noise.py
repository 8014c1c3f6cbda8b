"""How far a log-probability moves for no reason: over batch sizes, and over writes that move as rounding moves them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.edits import Edit

NOISE_ROWS = 8  # of the pass that measures it
UNITS = 8.0  # of rounding: what a product of many terms loses


def spread_by_rounding(log_probs: Callable[[Edit], Float[Tensor, " row"]], dtype: torch.dtype) -> float:
    """The spread of a log-probability, in nats, under an edit that makes `NOISE_ROWS` rows of slightly moved writes.

    Where a float64 model computes inside in float32, as transformers' norms do, such small moves vanish: then as in float32.

    Args:
        log_probs: the log-probabilities that such an edit gives, and the clean ones that they are held against.
        dtype: of the model, whose precision sets the size of the moves.
    """
    return _spread(log_probs, torch.finfo(dtype).eps) or _spread(log_probs, torch.finfo(torch.float32).eps)


def _spread(log_probs: Callable[[Edit], Float[Tensor, " row"]], precision: float) -> float:
    generator = torch.Generator().manual_seed(0)

    def rounded(x: Tensor, hook: Any = None) -> Tensor:
        """One row as it is, and others whose entries move by up to some units of rounding."""
        units = torch.empty(NOISE_ROWS, *x.shape[1:]).uniform_(-UNITS, UNITS, generator=generator)
        units[0] = 0
        return torch.addcmul(x, x, units.to(x), value=precision)

    values = log_probs(rounded)
    return float(values.max() - values.min())
