"""Noise floor: how much a metric changes under rounding-size perturbations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.edits.maps import Edit, Stack

NOISE_ROWS = 8  # perturbed rows whose spread is measured
UNITS = 8.0  # of rounding: what a product of many terms loses


def spread_by_rounding(
    values_under: Callable[[Stack], Float[Tensor, "text row"]], dtype: torch.dtype
) -> Float[Tensor, " text"]:
    """The spread of a metric under `NOISE_ROWS` small changes of the writes, for each text.

    A float64 model may compute parts in float32, as transformers' norms do, where such small
    changes vanish. They are then repeated at float32 size.

    Args:
        values_under: returns the metric under such edits, after the clean values.
        dtype: of the model; its precision sets the size of the changes.
    """
    spread = _spread(values_under(_Perturbations(torch.finfo(dtype).eps)))
    if spread.all():
        return spread
    single = _spread(values_under(_Perturbations(torch.finfo(torch.float32).eps)))
    return torch.where(spread > 0, spread, single)


def _spread(values: Float[Tensor, "text row"]) -> Float[Tensor, " text"]:
    return values.amax(dim=1) - values.amin(dim=1)


@dataclass(frozen=True)
class _Perturbations:
    """Edits that change each entry of the writes by up to `UNITS` units of rounding.

    The changes are always the same; the first edit changes nothing.
    """

    precision: float

    def __len__(self) -> int:
        return NOISE_ROWS

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Edit:
        return partial(self._perturbed, rows, torch.Generator().manual_seed(0))

    def _perturbed(
        self, rows: Tensor, generator: torch.Generator, x: Tensor, hook: Any = None
    ) -> Tensor:
        units = torch.empty(NOISE_ROWS, *x.shape[1:]).uniform_(-UNITS, UNITS, generator=generator)
        units[0] = 0
        return torch.addcmul(x, x, units[rows].to(x), value=self.precision)
