"""Plotly figures of results, one function per figure.

No function shows a figure, sets global state or runs a model.

Example:
    >>> ms.figures.data(ms.figures.surprise(sweep)).columns.tolist()
    ['trace', 'x', 'y']
"""

from mechsvd.figures.attribution import (
    accumulated_scores,
    accumulated_shares,
    estimate_errors,
    hessian_spectrum,
)
from mechsvd.figures.contrasts import contrast_map
from mechsvd.figures.estimates import estimated_effects
from mechsvd.figures.heldout import held_out
from mechsvd.figures.multiples import side_by_side
from mechsvd.figures.pairs import curvature_ridge, interactions
from mechsvd.figures.rankings import baseline_correlations, direction_effects, dose_response
from mechsvd.figures.spectra import (
    cumulative_singular_values,
    layer_spectra,
    singular_values,
    writer_map,
)
from mechsvd.figures.style import data, save_image
from mechsvd.figures.subspaces import overlap_anchors, overlap_map, pooled_spectrum
from mechsvd.figures.sweeps import (
    clip_and_ridge,
    delta_map,
    deltas,
    margins,
    metric,
    probability,
    race_of_orders,
    surprise,
)

__all__ = [  # noqa: RUF022 (grouped by purpose)
    "singular_values", "cumulative_singular_values", "layer_spectra", "writer_map",
    "probability", "surprise", "metric", "deltas", "delta_map", "direction_effects",
    "race_of_orders", "margins", "clip_and_ridge", "dose_response", "baseline_correlations",
    "held_out", "contrast_map", "overlap_anchors",
    "estimated_effects", "hessian_spectrum", "estimate_errors", "accumulated_scores",
    "accumulated_shares", "interactions", "curvature_ridge", "overlap_map", "pooled_spectrum",
    "side_by_side", "data", "save_image",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__]
