"""Parts that all figures share: axes, lines, heat maps, colours."""

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import cycle
from math import isclose, log10
from os import PathLike
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import sample_colorscale
from torch import Tensor

from mechsvd.figures.display import label
from mechsvd.results import require_kind

MANY_POINTS = 5000  # above this, draw with WebGL
UNITS = "residual-stream units"
# to be told apart on white and on black
EDITED, ATTEMPTED, CLEAN = "#3a7fc9", "#d1662a", "#808080"
DISTINCT = ("#3a7fc9", "#d1662a", "#2a9d6f", "#9c6bc4", "#a0a0a0", "#c2a83e")
TEMPLATE = "mechsvd"
INSTALL_IMAGES = (
    "run `pip install 'mechsvd[images]'`, and `plotly_get_chrome` if no Chrome is installed"
)


def empty_figure(
    title: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False
) -> go.Figure:
    """A figure with titled axes and no data; all figures share this layout.

    Its looks are those of the template "mechsvd", unless the user has set a default template.
    """
    figure = go.Figure(
        layout={
            "title": {"text": title},
            "xaxis": {"title": {"text": x}, "type": "log" if log_x else "linear"},
            "yaxis": {"title": {"text": y}, "type": "log" if log_y else "linear"},
            "margin": {"l": 70, "r": 30, "t": 50, "b": 55},
            "showlegend": False,
        }
    )
    has_own = pio.templates.default not in ("plotly", "none", "", None)
    return figure if has_own else figure.update_layout(template=TEMPLATE)


def _template() -> go.layout.Template:
    """The looks of all figures: decades on logarithmic axes, and little ink."""
    axis = {"showline": True, "linecolor": "#999", "zeroline": False, "exponentformat": "power"}
    own = {
        "title": {"font": {"size": 16}},
        "xaxis": axis,
        "yaxis": axis,
        "colorway": DISTINCT,
    }
    template = go.layout.Template(pio.templates["plotly_white"])
    return template.update(layout=own)


pio.templates[TEMPLATE] = _template()  # known by its name; the default stays as it is


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


def by_name(results: Any, kind: type, alone: str) -> dict[str, Any]:
    """One result or several by name, as several by name.

    Raises:
        TypeError: something is not of the kind.
        ValueError: there are none.
    """
    named = dict(results) if isinstance(results, Mapping) else {alone: results}
    if not named:
        raise ValueError(f"There is no {kind.__name__} to draw; give at least one, by its name.")
    for one in named.values():
        require_kind(one, kind)
    return named


def colours_of(named: Mapping[str, Any]) -> Any:
    """A colour for each of several results, and the usual one for a single result."""
    return zip(cycle(DISTINCT) if len(named) > 1 else [EDITED], named.items(), strict=False)


def with_clean_of(figure: go.Figure, values: Mapping[str, Tensor]) -> go.Figure:
    """Add the clean values of several results: one line if all are equal, else one for each."""
    cleans = {name: float(value) for name, value in values.items()}
    first, *others = cleans.values()
    if all(isclose(first, other, rel_tol=1e-3) for other in others):
        return with_clean(figure, next(iter(values.values())))
    for colour, (name, value) in colours_of(values):
        with_clean(figure, value, f"{label(name)}: ", colour)
    return figure


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


def with_clean(figure: go.Figure, value: Tensor, name: str = "", colour: str = CLEAN) -> go.Figure:
    """Add a clean run's value to a figure, as a dashed line with its number."""
    clean = float(value)
    figure.add_hline(y=clean, line={"color": colour, "dash": "dash", "width": 1.2})
    # a shape has no legend entry and no hover, so the number is an annotation
    return figure.add_annotation(
        x=1,
        xref="paper",
        y=_on_axis(figure, clean),
        text=f"{name}clean {clean:.4g}",
        font={"color": colour},
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


def data(figure: go.Figure) -> Any:
    """What a figure draws, as a table.

    Returns:
        One row per point: trace (its name), x, y, and z for heat maps.

    Example:
        >>> ms.figures.data(ms.figures.singular_values(svd)).shape
        (128, 3)
    """
    import pandas as pd

    tables = []
    for number, trace in enumerate(figure.data):
        name = trace.name or f"trace {number}"
        z = getattr(trace, "z", None)
        if z is None:
            columns = {"x": [*trace.x], "y": [*trace.y]}
        else:
            pairs = [(x, y) for y in trace.y for x in trace.x]
            values = [value for row in z for value in row]
            columns = {"x": [x for x, _ in pairs], "y": [y for _, y in pairs], "z": values}
        tables.append(pd.DataFrame({"trace": name, **columns}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def find_chrome() -> str | None:
    """The browser that kaleido would draw static images with; None if it or kaleido is missing."""
    try:
        if find_spec("kaleido") is None:
            return None
        from choreographer.browsers.chromium import Chromium
    except ImportError:
        return None
    path = Chromium.find_browser(skip_local=False)
    return None if path is None else str(path)


def save_image(
    figure: go.Figure,
    path: str | PathLike[str],
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | None = None,
) -> None:
    """Save a figure as a static image (.png, .svg, .pdf).

    This needs kaleido and Chrome.

    Args:
        width, height: in pixels; by default those of the figure.
        scale: pixels of the file for each, such as 2 for print.

    Raises:
        RuntimeError: one of them is missing. The message says how to install it.

    Example:
        >>> figure = ms.figures.surprise(sweep)
        >>> ms.figures.save_image(figure, "surprise.png")  # doctest: +SKIP
    """
    try:
        figure.write_image(Path(path).expanduser(), width=width, height=height, scale=scale)
    except Exception as error:
        if not any(word in str(error).lower() for word in ("kaleido", "chrome")):
            raise
        raise RuntimeError(
            f"Static images need kaleido and Chrome: {INSTALL_IMAGES}; "
            "`figure.write_html(…)` needs neither."
        ) from error
