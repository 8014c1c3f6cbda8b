"""A number of each text under several conditions, such as orders: a point per text, and the mean."""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import plotly.graph_objects as go
import torch

from mechsvd.experiments.intervals import interval_columns
from mechsvd.figures.display import label
from mechsvd.figures.style import CLEAN, DISTINCT, empty_figure, finish

NARROW = 0.6  # width of the points of a condition, of 1
WIDEST = 12  # characters of a line of a condition's name


def strip(
    numbers: Mapping[str, Sequence[int | float]],
    texts: Sequence[str],
    title: str,
    y: str,
    reference: float | None = None,
) -> go.Figure:
    """A point for each text under each condition, and the mean with a 95 % interval over texts.

    Args:
        numbers: of each condition, one per text.
        reference: is drawn as a dashed line.
    """
    figure = empty_figure(title, "", y)
    for place, (name, values) in enumerate(numbers.items()):
        count = len(values)
        spread = [place + NARROW * ((i + 0.5) / count - 0.5) for i in range(count)]
        figure.add_trace(
            go.Scatter(
                x=spread,
                y=list(values),
                mode="markers",
                name=label(name),
                marker={"color": DISTINCT[place % len(DISTINCT)], "size": 6, "opacity": 0.7},
                customdata=[label(text) for text in texts],
                hovertemplate=f"%{{customdata}}<br>{label(name)}<br>%{{y:.4g}}<extra></extra>",
            )
        )
    if len(texts) > 1:
        figure.add_trace(_means(numbers))
    if reference is not None:
        figure.add_hline(y=reference, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    ticks = ["<br>".join(map(label, wrap(name, WIDEST))) for name in numbers]
    figure.update_xaxes(tickvals=[*range(len(ticks))], ticktext=ticks, showgrid=False)
    return finish(figure, legend=False)


def _means(numbers: Mapping[str, Sequence[int | float]]) -> go.Scatter:
    values = torch.tensor([[*own] for own in numbers.values()], dtype=torch.float64).T
    found = interval_columns(values, 0.95)
    mean, low, high = found["mean"], found["low"], found["high"]
    return go.Scatter(
        x=[*range(len(mean))],
        y=mean,
        mode="markers",
        name="mean",
        marker={"color": CLEAN, "symbol": "line-ew-open", "size": 26, "line": {"width": 2}},
        error_y={"array": high - mean, "arrayminus": mean - low, "thickness": 1.5, "width": 4},
        customdata=[*zip(low, high, strict=True)],
        hovertemplate="mean %{y:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g})<extra></extra>",
    )
