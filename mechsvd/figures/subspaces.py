"""Plotly figures of subspace comparisons."""

from collections.abc import Sequence

import plotly.graph_objects as go
import torch

from mechsvd.experiments.anchors import FORCED, OverlapAnchors
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import CLEAN, DISTINCT, EDITED, empty_figure, heat_map, line
from mechsvd.linalg.comparison import Overlap, Pool
from mechsvd.results import require_kind

WRITTEN = 12  # subspaces at most, for numbers in the cells: the browser takes seconds for 50


@multiples
def overlap_map(overlap: Overlap, names: Sequence[str] | None = None) -> go.Figure:
    """Overlap of each pair of subspaces, relative to random ones of the same ranks.

    Each cell also says how many dimensions the pair shares; of more than 12 subspaces, hovering
    does.

    Args:
        overlap: one, or several by name, which are drawn side by side on one scale.
        names: of the subspaces.

    Raises:
        ValueError: the numbers of names and subspaces differ.

    Example:
        >>> ms.figures.overlap_map(overlaps).data[0].z.shape
        (2, 2)
    """
    require_kind(overlap, Overlap)
    ranks = [round(rank) for rank in overlap.values.diagonal().tolist()]
    names = [f"subspace {i}" for i in range(len(ranks))] if names is None else names
    if len(names) != len(ranks):
        raise ValueError(
            f"`names` has {len(names)} entries for {len(ranks)} subspaces; give one for each."
        )
    labels = [
        f"{label(name)}<br>(rank {rank})" if len(ranks) <= WRITTEN else label(name)
        for name, rank in zip(names, ranks, strict=True)
    ]
    ratio = overlap.ratio.masked_fill(torch.eye(len(ranks), dtype=torch.bool), torch.nan)
    figure = heat_map(
        "Overlap relative to random subspaces", "", ratio, labels, labels, "× random", ""
    )
    widest = max(0.05, float((ratio - 1).abs().nan_to_num().max()))
    pairs = [[(i, j) for j in range(len(ranks))] for i in range(len(ranks))]
    text = [
        [
            "" if i == j else f"{ratio[i, j]:.3f}<br>{overlap.values[i, j]:.1f} shared"
            for i, j in row
        ]
        for row in pairs
    ]
    hover = (
        "%{y} and %{x}<br>%{customdata:.2f} dimensions shared<br>%{z:.4f} × random<extra></extra>"
    )
    if len(ranks) <= WRITTEN:
        figure.update_traces(text=text, texttemplate="%{text}")
    figure.update_traces(customdata=overlap.values.numpy(), hovertemplate=hover)
    figure.update_traces(colorscale="RdBu", reversescale=True, zmin=1 - widest, zmax=1 + widest)
    ticks = torch.linspace(max(0.0, 1 - widest), 1 + widest, 5).tolist()  # no ratio is below 0
    figure.update_traces(colorbar={"tickvals": ticks, "tickformat": ".3g"})
    return figure.update_yaxes(title=None, autorange="reversed").update_xaxes(
        title=None, type="category"
    )


@multiples
def pooled_spectrum(pool: Pool) -> go.Figure:
    """Singular values of the concatenated bases, with the band of random subspaces.

    95 % of random spectra lie in the band as a whole.

    Args:
        pool: one, or several by name, which are drawn side by side on one scale.

    Example:
        >>> ms.figures.pooled_spectrum(ms.pool([svd.subspace(8), mine])).layout.yaxis.title.text
        'singular value'
    """
    require_kind(pool, Pool)
    figure = empty_figure(
        "Singular values of all bases side by side", "direction", "singular value"
    )
    places = list(range(len(pool.singular_values)))
    band = [*pool.random_high.tolist(), *pool.random_low.flip(0).tolist()]
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
            pool.random_mean,
            "random mean",
            CLEAN,
            hover="direction %{x}<br>random %{y:.4f}",
        )
    )
    figure.add_trace(
        line(
            places,
            pool.singular_values,
            "these bases",
            EDITED,
            hover="direction %{x}<br>σ = %{y:.4f}",
        )
    )
    return figure.update_layout(showlegend=True)


@multiples
def overlap_anchors(anchors: OverlapAnchors) -> go.Figure:
    """Chance-corrected overlap against the rank, one line per kind, with intervals over texts.

    0 is the mean of random subspaces, and 1 is the same subspace. What is computed and not measured
    is grey: dotted for random subspaces, dashed for what is forced.

    Args:
        anchors: one, or several by name, which are drawn side by side on one scale.

    Example:
        >>> ms.figures.overlap_anchors(anchors).layout.xaxis.title.text
        'rank k'
    """
    require_kind(anchors, OverlapAnchors)
    figure = empty_figure(
        "Overlap of texts, next to its anchors", "rank k", "chance-corrected overlap"
    )
    order = anchors.ranks.argsort()
    ranks, is_one = anchors.ranks[order], len(anchors.ranks) == 1
    if is_one:  # each kind at a place of its own
        figure.update_xaxes(title_text=f"rank k = {int(ranks)}", showticklabels=False)
    for number, kind in enumerate(anchors.kinds):
        values = anchors.chance_corrected[number, order]
        colour = DISTINCT[number % len(DISTINCT)] if anchors.pairs[number] else CLEAN
        k = int(ranks) if is_one else "%{x}"
        hover = f"{label(kind)}<br>k = {k}<br>overlap %{{y:.4f}}<br>%{{customdata:.2f}} shared"
        trace = line([number] if is_one else ranks, values, label(kind), colour, hover=hover)
        trace.mode = "markers" if is_one else trace.mode
        trace.customdata = anchors.shared[number, order].numpy()
        if not anchors.pairs[number]:
            trace.line.dash = "dash" if kind == FORCED else "dot"
        low, high = anchors.low[number, order], anchors.high[number, order]
        if anchors.pairs[number] and bool(low.isfinite().all()):
            trace.error_y = {
                "type": "data",
                "symmetric": False,
                "array": (high - values).numpy(),
                "arrayminus": (values - low).numpy(),
                "thickness": 1,
            }
        figure.add_trace(trace)
    return figure.update_layout(showlegend=True)
