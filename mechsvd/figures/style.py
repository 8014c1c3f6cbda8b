"""Parts that all figures share: axes, lines, heat maps, colours."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from math import ceil, floor, inf, isclose, log10
from os import PathLike
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import sample_colorscale
from torch import Tensor

from mechsvd.figures.display import label
from mechsvd.results import OverTexts, require_kind

MANY_POINTS = 5000  # above this, draw with WebGL
UNITS = "residual-stream units"
TOP = 58  # pixels above a figure with a title of one line, for the title and the mode bar
# to be told apart on white and on black
EDITED, ATTEMPTED, CLEAN = "#3a7fc9", "#d1662a", "#808080"
DISTINCT = (
    "#3a7fc9", "#d1662a", "#2a9d6f", "#9c6bc4", "#a0a0a0", "#c2a83e", "#cf5c8d", "#3aa6b9",
)  # fmt: skip
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
    has_own = pio.templates.default not in ("plotly", "none", "", None)
    return go.Figure(
        layout={
            "template": pio.templates.default if has_own else TEMPLATE,
            "title": {"text": title},
            "xaxis": {"title": {"text": x}, "type": "log" if log_x else "linear"},
            "yaxis": {"title": {"text": y}, "type": "log" if log_y else "linear"},
            "margin": {"l": 70, "r": 30, "t": TOP, "b": 55},
            "showlegend": False,
        }
    )


def _template() -> go.layout.Template:
    """The looks of all figures: decades on logarithmic axes, and little ink."""
    axis = {"showline": True, "linecolor": "#999", "zeroline": False, "exponentformat": "power"}
    below_the_mode_bar = {
        "x": 0.02,
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 28},
    }
    own = {
        "title": {"font": {"size": 16}, **below_the_mode_bar},
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


def texts_by_name(results: Any) -> Any:
    """The results of several texts by the numbers of the texts; anything else as it is."""
    if not isinstance(results, OverTexts):
        return results
    return {f"text {number}": one for number, one in enumerate(results.parts)}


def by_name(results: Any, kind: type, alone: str) -> dict[str, Any]:
    """One result, or several by name or of several texts, as several by name.

    Raises:
        TypeError: something is not of the kind.
        ValueError: there are none.
    """
    several = texts_by_name(results)
    named = dict(several) if isinstance(several, Mapping) else {alone: several}
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
    lines = [
        _clean_line(value, f"{label(name)}: ", colour)
        for colour, (name, value) in colours_of(values)
    ]
    return figure.update_layout(shapes=[*figure.layout.shapes, *lines])


def finish(figure: go.Figure, *, legend: bool = True) -> go.Figure:
    """Show the legend or hide it, leave room for the title, put logarithmic ticks at decades."""
    lines = (figure.layout.title.text or "").count("<br>")
    figure.update_layout(margin_t=TOP + 20 * lines)
    for letter in "xy":
        axes = figure.select_xaxes() if letter == "x" else figure.select_yaxes()
        for axis in axes:
            if axis.type == "log":
                axis.dtick = _ticks([getattr(trace, letter) for trace in figure.data])
    return figure.update_layout(showlegend=legend)


def _ticks(columns: Sequence[Any]) -> int | str | None:
    """The step of a logarithmic axis: decades, or 1, 2 and 5 where it has fewer than three."""
    values = [float(value) for column in columns if column is not None for value in column]
    logs = [log10(value) for value in values if 0 < value < inf]
    if not logs:
        return None
    decades = floor(max(logs)) - ceil(min(logs)) + 1
    if decades >= 3:
        return ceil(decades / 9)
    return "D2" if max(logs) - min(logs) > 0.5 else None


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
    figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)
    return finish(figure, legend=False)


def with_clean(figure: go.Figure, value: Tensor) -> go.Figure:
    """Add a clean run's value to a figure, as a dashed line with its number in the legend."""
    return figure.update_layout(shapes=[*figure.layout.shapes, _clean_line(value)])


def _clean_line(value: Tensor, name: str = "", colour: str = CLEAN) -> dict[str, Any]:
    named = {"name": f"{name}clean {float(value):.4g}", "showlegend": True}
    return level(float(value), colour, "dash") | named


def level(y: float, colour: str, dash: str) -> dict[str, Any]:
    """A line across a figure, as a shape; many at once cost less than `add_hline` for each."""
    style = {"color": colour, "dash": dash, "width": 1.2}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": style}


def shades(count: int) -> list[str]:
    """Colours from dark to bright, which stand out on black and on white."""
    return sample_colorscale("Viridis", [0.2 + 0.7 * i / max(1, count - 1) for i in range(count)])


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
