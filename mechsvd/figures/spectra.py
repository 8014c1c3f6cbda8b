"""Plotly figures of spectra and of the writers of directions."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from mechsvd.checks import with_plain_arguments
from mechsvd.engine.writes import Writes
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import (
    UNITS,
    by_name,
    colours_of,
    empty_figure,
    finish,
    heat_map,
    line,
    shades,
)
from mechsvd.linalg.decomposition import Decomposition
from mechsvd.results import require_kind, require_same_model


@with_plain_arguments
def singular_values(
    svd: Decomposition | Mapping[str, Decomposition], *, log: bool = False
) -> go.Figure:
    """Singular values, descending; `log` makes the axis logarithmic.

    Args:
        svd: one, or several by name.

    Example:
        >>> ms.figures.singular_values(svd, log=True).layout.yaxis.type
        'log'
    """
    svds = by_name(svd, Decomposition, "σ")
    figure = empty_figure(
        "Singular values of all writes", "direction", f"singular value ({UNITS})", log_y=log
    )
    for colour, (name, one) in colours_of(svds):
        which = f"{label(name)}<br>" if len(svds) > 1 else ""
        hover = f"{which}direction %{{x}}<br>σ = %{{y:.4g}}"
        figure.add_trace(
            line(range(one.rank), one.singular_values, label(name), colour, hover=hover)
        )
    return finish(figure, legend=len(svds) > 1)


def cumulative_singular_values(svd: Decomposition | Mapping[str, Decomposition]) -> go.Figure:
    """Cumulative sum of the singular values against a logarithmic axis of directions.

    Args:
        svd: one, or several by name.

    Example:
        >>> ms.figures.cumulative_singular_values(svd).layout.xaxis.type
        'log'
    """
    svds = by_name(svd, Decomposition, "Σσ")
    figure = empty_figure(
        "Cumulative sum of singular values",
        "directions (log axis)",
        f"sum of singular values ({UNITS})",
        log_x=True,
    )
    for colour, (name, one) in colours_of(svds):
        sums = one.singular_values.cpu().double().cumsum(0)
        which = f"{label(name)}<br>" if len(svds) > 1 else ""
        hover = f"{which}first %{{x}} directions<br>Σσ = %{{y:.4g}} (%{{customdata:.1%}})"
        trace = line(range(1, one.rank + 1), sums, label(name), colour, hover=hover)
        figure.add_trace(trace.update(customdata=(sums / sums[-1]).numpy() if len(sums) else None))
    return finish(figure, legend=len(svds) > 1)


@multiples
def layer_spectra(layers: Sequence[Decomposition]) -> go.Figure:
    """Singular values of every layer's writes, on a logarithmic axis.

    Early layers are dark, late layers are bright.

    Args:
        layers: of one text, or of several by name, which are drawn side by side on one scale.

    Example:
        >>> len(ms.figures.layer_spectra(ms.decompose(writes, per="layer")).data)
        6
    """
    figure = empty_figure(
        "Singular values, layer by layer", "direction", f"singular value ({UNITS})", log_y=True
    )
    for colour, svd in zip(shades(len(layers)), layers, strict=True):
        hover = f"layer {svd.layer}<br>direction %{{x}}<br>σ = %{{y:.4g}}"
        figure.add_trace(
            line(range(svd.rank), svd.singular_values, f"layer {svd.layer}", colour, hover=hover)
        )
    return finish(figure)


def writer_map(svd: Decomposition, writes: Writes, direction: int = 0) -> go.Figure:
    """Share of each site and token in a direction: the squared left singular vector.

    `side_by_side` joins those of several texts on one scale.

    Example:
        >>> ms.figures.writer_map(svd, writes, direction=0).data[0].z.shape
        (12, 21)
    """
    require_kind(svd, Decomposition)
    if svd.is_streamed:
        raise ValueError(
            "The writes of this decomposition were streamed, so nothing is known of single "
            f"positions; `svd.writer_map({direction})` has the share of each site."
        )
    if svd.left.shape[:2] != writes.values.shape[:2]:
        raise ValueError(
            f"The decomposition is of {list(svd.left.shape[:2])} sites and positions, but these "
            f"writes have {list(writes.values.shape[:2])}; pass the writes that it was made from."
        )
    require_same_model(svd.source, writes.source, "The decomposition and the writes")
    labels = [
        f"{position}: {label(piece)}"
        for position, piece in zip(writes.positions.tolist(), _pieces(writes), strict=True)
    ]
    shares = 100 * svd.writer_map(direction)
    sigma = float(svd.singular_values[direction])
    title = f"Who writes direction {direction}<br>σ = {sigma:.4g}"
    hover = (
        f"site %{{y}}<br>token %{{customdata}}<br>%{{z:.2f}} % of direction {direction}"
        f"<br>σ = {sigma:.4g}<extra></extra>"
    )
    return heat_map(
        title, "position", shares, _columns(writes), writes.sites, "share (%)", hover, labels
    )


def _pieces(writes: Writes) -> Sequence[str]:
    return writes.pieces or [f"[{token}]" for token in writes.tokens.tolist()]


def _columns(writes: Writes) -> list[int]:
    has_many_tasks = int(writes.task_index.max()) > 0  # positions repeat from text to text
    return list(range(len(writes.positions))) if has_many_tasks else writes.positions.tolist()
