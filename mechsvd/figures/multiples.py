"""Small multiples: the same figure of several results, side by side on one scale."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from math import ceil
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechsvd.checks import require_whole
from mechsvd.figures.display import label
from mechsvd.figures.style import empty_figure, texts_by_name
from mechsvd.results import OverTexts, require_kind

FEW = 12  # panels; more are smaller
COLUMNS = (4, 8)  # panels per row, of few and of many
HEIGHTS = (190, 115)  # pixels of a panel
BAR = 180  # pixels of the colour bar

One = TypeVar("One")
Options = ParamSpec("Options")


def side_by_side(figures: Mapping[str, go.Figure], columns: int | None = None) -> go.Figure:
    """Several figures of one kind as small multiples, on one scale.

    Heat maps share one colour axis. Curves share their axes, and the legend switches a curve on or
    off in every panel.

    Args:
        figures: by name, which is the title of the panel; drawn by one function.
        columns: panels per row, at most; by default 4, and 8 of more than 12 figures.

    Raises:
        TypeError: something is not a figure.
        ValueError: there are no figures, or no columns.

    Example:
        >>> import plotly.graph_objects as go
        >>> maps = {name: go.Figure(go.Heatmap(z=[[z]])) for name, z in (("a", 1), ("b", 5))}
        >>> ms.figures.side_by_side(maps).layout.coloraxis.cmax
        5.0
    """
    require_kind(figures, Mapping)
    if not figures:
        raise ValueError(
            "There are no figures to lay side by side; give at least one, by its name."
        )
    for one in figures.values():
        require_kind(one, go.Figure)
    chosen = COLUMNS[len(figures) > FEW] if columns is None else columns
    columns = min(require_whole("columns", chosen, 1), len(figures))
    first = next(iter(figures.values()))
    joined = _panels([_titled(name, one) for name, one in figures.items()], columns, first)
    shown: set[str] = set()
    traces: list[Any] = []
    marks: dict[str, list[Any]] = {"shapes": [], "annotations": [*joined.layout.annotations]}
    for number, one in enumerate(figures.values()):
        place = "" if number == 0 else str(number + 1)
        traces += _traces(one, place, shown)
        for kind, found in marks.items():
            found += [_moved(mark, place) for mark in getattr(one.layout, kind)]
    joined.add_traces(traces).update_layout(**marks)
    _share_colours(joined)
    return joined.update_layout(showlegend=first.layout.showlegend)


def multiples(
    draw: Callable[Concatenate[One, Options], go.Figure],
) -> Callable[Concatenate[One | OverTexts | Mapping[str, One], Options], go.Figure]:
    """Let a figure of one result take several, by name or of texts, and draw small multiples."""

    @wraps(draw)
    def drawn(*values: Any, **options: Any) -> go.Figure:
        bound = signature(draw).bind(*values, **options)
        name, result = next(iter(bound.arguments.items()))
        result = bound.arguments[name] = texts_by_name(result)
        if not isinstance(result, Mapping):
            return draw(*bound.args, **bound.kwargs)
        figures = {}
        for key, one in result.items():
            bound.arguments[name] = one
            figures[key] = draw(*bound.args, **bound.kwargs)
        return side_by_side(figures)

    return drawn


def _titled(name: str, figure: go.Figure) -> str:
    """The title of a panel: its name, what its own title adds, and its lines, such as clean."""
    _, *own = (figure.layout.title.text or "").split("<br>")
    return ", ".join([label(name), *own, *(s.name for s in figure.layout.shapes if s.name)])


def _panels(titles: list[str], columns: int, first: go.Figure) -> go.Figure:
    """Empty panels with the axes of the first figure, all on its scale."""
    rows = ceil(len(titles) / columns)
    axes = {letter: getattr(first.layout, f"{letter}axis") for letter in "xy"}
    x, y = (axes[letter].title.text or "" for letter in "xy")
    height = 130 + HEIGHTS[len(titles) > FEW] * rows
    layout = empty_figure((first.layout.title.text or "").split("<br>")[0], "", "").layout
    joined = make_subplots(
        rows,
        columns,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.05 / columns,
        vertical_spacing=35 / height,
        subplot_titles=titles,
        x_title=x,
        y_title=y,
    )
    joined.update_annotations(font_size=12)
    joined.update_annotations(selector={"textangle": -90}, xshift=-62)  # of the y axis
    same = {"title", "anchor", "domain", "matches"}
    for letter, update in (("x", joined.update_xaxes), ("y", joined.update_yaxes)):
        own = axes[letter].to_plotly_json()
        update({key: value for key, value in own.items() if key not in same})
    joined.update_layout(template=layout.template, title=layout.title, height=height)
    return joined.update_layout(margin={"l": 100, "r": 30, "t": 85, "b": 65})


def _traces(one: go.Figure, place: str, shown: set[str]) -> list[Any]:
    """A figure's traces on the axes of its panel; each name is once in the legend."""
    traces = []
    for trace in one.data:
        own = {**trace.to_plotly_json(), "xaxis": f"x{place}", "yaxis": f"y{place}"}
        if trace.name and trace.type != "heatmap" and trace.showlegend is not False:
            own |= {"legendgroup": trace.name, "showlegend": trace.name not in shown}
            shown.add(trace.name)
        traces.append(own)
    return traces


def _moved(mark: Any, place: str) -> dict[str, Any]:
    """A line or a note on the axes of a panel."""
    moved = {key: value for key, value in mark.to_plotly_json().items() if key != "showlegend"}
    for letter in "xy":
        reference = getattr(mark, f"{letter}ref") or letter
        own = f"{letter}{place}"
        moved[f"{letter}ref"] = own if reference == letter else f"{own} domain"
    return moved


def _share_colours(joined: go.Figure) -> None:
    """Give all heat maps one colour axis, from the smallest value to the largest."""
    maps = [trace for trace in joined.data if trace.type == "heatmap"]
    if not maps:
        return
    first = maps[0]
    ends = [[np.nanmin(np.asarray(m.z, dtype=float)) if m.zmin is None else m.zmin for m in maps]]
    ends += [[np.nanmax(np.asarray(m.z, dtype=float)) if m.zmax is None else m.zmax for m in maps]]
    colours: dict[str, Any] = {"cmin": float(min(ends[0])), "cmax": float(max(ends[1]))}
    colours |= {"colorscale": first.colorscale, "reversescale": first.reversescale}
    place = {"lenmode": "pixels", "len": BAR, "y": 1, "yanchor": "top"}
    colours["colorbar"] = first.colorbar.to_plotly_json() | place
    joined.update_layout(coloraxis=colours)
    for trace in maps:
        trace.update(colorscale=None, zmin=None, zmax=None, colorbar=None, reversescale=None)
        trace.coloraxis = "coloraxis"
