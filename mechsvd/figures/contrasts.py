"""Plotly figures of contrasts between groups of texts."""

import plotly.graph_objects as go

from mechsvd.experiments.contrast_results import Contrast
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import heat_map
from mechsvd.results import require_kind

NAMES = {"special": "special", "singular": "top singular", "random": "random"}


@multiples
def contrast_map(contrast: Contrast, method: str = "special") -> go.Figure:
    """What removing each group's directions costs the held-out texts of every group.

    Args:
        contrast: one, or several by name, which are drawn side by side on one scale.
        method: "special", or a control: "singular" or "random".

    Raises:
        ValueError: another method.

    Example:
        >>> ms.figures.contrast_map(special).data[0].z.shape
        (2, 2)
    """
    require_kind(contrast, Contrast)
    costs = contrast.matrix(method)
    names = [label(name) for name in contrast.groups]
    title = f"Removing {contrast.k} {NAMES[method]} directions of a group"
    hover = (
        "directions of %{y}<br>removed from held-out texts of %{x}<br>"
        "%{z:.4g} nats per token<extra></extra>"
    )
    figure = heat_map(
        title, "measured on held-out texts of", costs, names, names, "KL, nats per token", hover
    )
    figure.update_traces(text=[[f"{x:.2g}" for x in row] for row in costs.tolist()])
    return (
        figure.update_traces(texttemplate="%{text}", zmin=0)
        .update_yaxes(title="directions removed of", autorange="reversed")
        .update_xaxes(type="category")
    )
