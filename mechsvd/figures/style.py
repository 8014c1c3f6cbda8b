"""Parts that all figures share: axes, lines, heat maps, colours."""

from math import log10
from os import PathLike
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

MANY_POINTS = 5000  # above this, draw with WebGL
UNITS = "residual-stream units"
EDITED, ATTEMPTED, CLEAN = "#1f5fa8", "#d1662a", "#5a5a5a"
DISTINCT = ("#1f5fa8", "#d1662a", "#2a9d6f", "#8e5bb5", "#a0a0a0", "#c2a83e")


def empty_figure(
    title: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False
) -> go.Figure:
    """A figure with titled axes and no data; all figures share this layout."""
    axes = {
        "showline": True,
        "linecolor": "#999",
        "gridcolor": "#eee",
        "zeroline": False,
        "exponentformat": "power",
    }
    return go.Figure(
        layout={
            "template": "plotly_white",
            "title": {"text": title, "font": {"size": 16}},
            "xaxis": {"title": {"text": x}, "type": "log" if log_x else "linear", **axes},
            "yaxis": {"title": {"text": y}, "type": "log" if log_y else "linear", **axes},
            "margin": {"l": 70, "r": 30, "t": 50, "b": 55},
            "showlegend": False,
        }
    )


def line(x: Any, y: Tensor, name: str, colour: str, *, hover: str) -> Any:
    """A line, with markers if there are few points; WebGL draws very many points."""
    draw = scatter(len(y))
    marker = {"size": 4} if len(y) <= 40 else None
    mode = "lines+markers" if marker else "lines"
    values = y.cpu().double().numpy()
    style = {"color": colour, "width": 1.8}
    return draw(
        x=_numbers(x),
        y=values,
        name=name,
        mode=mode,
        marker=marker,
        line=style,
        hovertemplate=hover + "<extra></extra>",
    )


def scatter(points: int) -> Any:
    """The trace class for this number of points; WebGL draws very many."""
    return go.Scattergl if points > MANY_POINTS else go.Scatter


def heat_map(
    title: str,
    x: str,
    z: Tensor,
    columns: Any,
    sites: Any,
    unit: str,
    hover: str,
    labels: Any = None,
) -> go.Figure:
    """A heat map of values by site (or another name) and column."""
    figure = empty_figure(title, x, "site").update_yaxes(type="category")
    figure.add_trace(
        go.Heatmap(
            x=columns,
            y=[str(site) for site in sites],
            z=z.cpu().double().numpy(),
            customdata=None if labels is None else [labels] * len(sites),
            colorscale="Viridis",
            colorbar={"title": {"text": unit}},
            hovertemplate=hover,
        )
    )
    return figure


def with_clean(figure: go.Figure, value: Tensor) -> go.Figure:
    """Add the clean run's value to a figure, as a dashed line with its number."""
    clean = float(value)
    figure.add_hline(y=clean, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    # a shape has no legend entry and no hover, so the number is an annotation
    return figure.add_annotation(
        x=1,
        xref="paper",
        y=_on_axis(figure, clean),
        text=f"clean {clean:.4g}",
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
    )


def shades(count: int) -> list[str]:
    """Colours from dark to bright."""
    return sample_colorscale("Viridis", [i / max(1, count - 1) * 0.9 for i in range(count)])


def _on_axis(figure: go.Figure, value: float) -> float:
    # on logarithmic axes plotly takes the logarithm for annotations, but not for shapes
    return log10(value) if figure.layout.yaxis.type == "log" and value > 0 else value


def _numbers(x: Any) -> list[Any]:
    return x.tolist() if isinstance(x, Tensor) else list(x)


def save_image(figure: go.Figure, path: str | PathLike[str]) -> None:
    """Save a figure as a static image (.png, .svg, .pdf).

    This needs kaleido and Chrome.

    Raises:
        RuntimeError: one of them is missing. The message says how to install it.
    """
    try:
        figure.write_image(path)
    except Exception as error:
        if not any(word in str(error).lower() for word in ("kaleido", "chrome")):
            raise
        raise RuntimeError(
            "Static images need kaleido and Chrome: run `pip install 'mechsvd[images]'`, and "
            "`plotly_get_chrome` if no Chrome is installed; `figure.write_html(…)` needs neither."
        ) from error
