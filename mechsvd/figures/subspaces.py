"""Subspaces compared → plotly figures."""

from collections.abc import Sequence

import plotly.graph_objects as go
import torch

from mechsvd.figures.display import label
from mechsvd.figures.style import CLEAN, EDITED, empty_figure, heat_map, line
from mechsvd.linalg.comparison import Overlap, Pool
from mechsvd.results import require_kind


def overlap_map(found: Overlap, names: Sequence[str] | None = None) -> go.Figure:
    """Overlap of each pair of subspaces relative to random ones of the same ranks, and how many dimensions they share.

    Raises:
        ValueError: another number of names than of subspaces.
    """
    require_kind(found, Overlap)
    ranks = [round(rank) for rank in found.values.diagonal().tolist()]
    given = [f"subspace {i}" for i in range(len(ranks))] if names is None else names
    if len(given) != len(ranks):
        raise ValueError(
            f"`names` has {len(given)} entries for {len(ranks)} subspaces; give one for each."
        )
    labels = [f"{label(name)}<br>(rank {rank})" for name, rank in zip(given, ranks, strict=True)]
    ratio = found.ratio.masked_fill(torch.eye(len(ranks), dtype=torch.bool), torch.nan)
    figure = heat_map(
        "Overlap relative to random subspaces", "", ratio, labels, labels, "× random", ""
    )
    widest = max(0.05, float((ratio - 1).abs().nan_to_num().max()))
    pairs = [[(i, j) for j in range(len(ranks))] for i in range(len(ranks))]
    text = [
        ["" if i == j else f"{ratio[i, j]:.3f}<br>{found.values[i, j]:.1f} shared" for i, j in row]
        for row in pairs
    ]
    shared = (
        "%{y} and %{x}<br>%{customdata:.2f} dimensions shared<br>%{z:.4f} × random<extra></extra>"
    )
    figure.update_traces(
        text=text, texttemplate="%{text}", customdata=found.values.numpy(), hovertemplate=shared
    )
    figure.update_traces(colorscale="RdBu", reversescale=True, zmin=1 - widest, zmax=1 + widest)
    return figure.update_yaxes(title=None, autorange="reversed").update_xaxes(
        title=None, type="category"
    )


def pooled_spectrum(found: Pool) -> go.Figure:
    """Singular values of the bases side by side, and the band that random subspaces of the same ranks give."""
    require_kind(found, Pool)
    figure = empty_figure(
        "Singular values of all bases side by side", "direction", "singular value"
    )
    places = list(range(len(found.singular_values)))
    band = [*found.random_high.tolist(), *found.random_low.flip(0).tolist()]
    figure.add_trace(
        go.Scatter(
            x=places + places[::-1],
            y=band,
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor="#cfcfcf",
            name="random band",
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        line(
            places,
            found.random_mean,
            "random mean",
            CLEAN,
            hover="direction %{x}<br>random %{y:.4f}",
        )
    )
    figure.add_trace(
        line(
            places,
            found.singular_values,
            "these bases",
            EDITED,
            hover="direction %{x}<br>σ = %{y:.4f}",
        )
    )
    return figure.update_layout(showlegend=True)
