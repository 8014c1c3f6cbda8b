"""How far a log-probability moves for no reason: over batch sizes, and over writes that move as rounding moves them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.edits.maps import Edit, Stack

NOISE_ROWS = 8  # whose spread is measured
UNITS = 8.0  # of rounding: what a product of many terms loses


def spread_by_rounding(
    log_probs: Callable[[Stack], Float[Tensor, " row"]], dtype: torch.dtype
) -> float:
    """The spread of a log-probability, in nats, under `NOISE_ROWS` edits that move the writes slightly.

    Where a float64 model computes inside in float32, as transformers' norms do, such small moves vanish: then as in float32.

    Args:
        log_probs: the log-probabilities that such edits give, and the clean ones that they are compared with.
        dtype: of the model, whose precision sets the size of the moves.
    """
    values = log_probs(_Moved(torch.finfo(dtype).eps))
    if values.max() == values.min():
        values = log_probs(_Moved(torch.finfo(torch.float32).eps))
    return float(values.max() - values.min())


@dataclass(frozen=True)
class _Moved:
    """Edits that move each entry of the writes by up to some units of rounding, always the same; the first one moves nothing."""

    precision: float

    def __len__(self) -> int:
        return NOISE_ROWS

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Edit:
        generator = torch.Generator().manual_seed(0)

        def moved(x: Tensor, hook: Any = None) -> Tensor:
            units = torch.empty(NOISE_ROWS, *x.shape[1:]).uniform_(
                -UNITS, UNITS, generator=generator
            )
            units[0] = 0
            return torch.addcmul(x, x, units[rows].to(x), value=self.precision)

        return moved
