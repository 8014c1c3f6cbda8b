"""Plotly figures of held-out texts: means over texts, with bands."""

from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mechsvd.experiments.heldout import HeldOut
from mechsvd.experiments.order_comparison import SIDES, OrderComparison
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import DISTINCT, TOP, empty_figure, finish, line
from mechsvd.results import require_kind

SYMBOLS = ("circle", "square", "diamond")  # where there are more lines than colours
FLOOR = 1e-6  # below it, a logarithmic axis shows rounding only


@multiples
def held_out(found: HeldOut, order: str = "singular value") -> go.Figure:
    """KL divergence against the number of kept directions, by what the directions are fitted on.

    Lines are means over the texts, bands 95 % intervals of the means. Bases per site are dashed.

    Args:
        found: one, or several by name, which are drawn side by side on one scale.
        order: of the directions.

    Example:
        >>> ms.figures.held_out(held_out).layout.xaxis.title.text
        'kept directions'
    """
    require_kind(found, HeldOut)
    figure = empty_figure(
        f"Held-out texts ({len(found.fold)} texts)",
        "kept directions",
        "KL(clean ‖ edited) (nats per token)",
        log_y=True,
    )
    fitted = list(dict.fromkeys(fit.fitted for fit in found.fits))
    for fit in found.fits:
        if fit.order not in (order, "random"):
            continue
        colour = DISTINCT[fitted.index(fit.fitted) % len(DISTINCT)]
        table = fit.sweeps.summary("kl_divergence")
        table = table[table["mean"] > FLOOR]
        name = f"{fit.fitted}, {fit.basis}"
        hover = f"{name}<br>k = %{{x}}<br>%{{y:.3g}} nats per token"
        drawn = line(table["rank"], _tensor(table["mean"]), name, colour, hover=hover)
        dash = "dash" if fit.basis == "per site" else "solid"
        figure.add_trace(drawn.update(mode="lines", line={"dash": dash}))
        figure.add_trace(_band(table, "rank", colour))
    return finish(figure)


def orders_on_texts(found: OrderComparison, confidence: float = 0.95) -> go.Figure:
    """KL divergence against the number of kept directions, for orders and bases; see the race.

    On the left the directions are fitted on the text itself, on the right on others. Lines are
    means over the texts, bands intervals of the means. Bases per site are dashed.
    """
    require_kind(found, OrderComparison)
    layout = empty_figure(
        f"Race of the orders ({len(found.fold)} texts)",
        "kept directions (per site: of each basis)",
        "KL divergence of clean ‖ kept (nats per token)",
        log_y=True,
    ).layout
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=SIDES)
    figure.update_layout(layout).update_xaxes(layout.xaxis).update_yaxes(type="log")
    summary = found.summary(confidence)
    names = list(dict.fromkeys(summary["order"]))
    for (order, basis, fitted), table in summary.groupby(["order", "basis", "fitted"], sort=False):
        colour = DISTINCT[names.index(order) % len(DISTINCT)]
        symbol = SYMBOLS[names.index(order) // len(DISTINCT) % len(SYMBOLS)]
        table = table[table["mean"] > FLOOR].sort_values("rank")
        name = f"{label(order)}, {label(basis)}"
        hover = f"{name}<br>k = %{{x}}<br>%{{y:.3g}} nats per token"
        dash = "dash" if basis == "per site" else "solid"
        # random subspaces are fitted on nothing, so they stand on both sides
        for column in [1 + SIDES.index(fitted)] if fitted in SIDES else [1, 2]:
            curve = line(table["rank"], _tensor(table["mean"]), name, colour, hover=hover)
            curve.update(line={"dash": dash}, legendgroup=name, mode="lines+markers")
            curve.update(marker={"symbol": symbol, "size": 6}, showlegend=column == 2)
            figure.add_trace(curve, 1, column)
            figure.add_trace(_band(table, "rank", colour), 1, column)
    return finish(figure).update_layout(margin_t=TOP + 25)  # for the titles of both sides


def _band(table: Any, x: str, colour: str) -> go.Scatter:
    """The interval of each row as a band around a line."""
    return go.Scatter(
        x=[*table[x], *table[x][::-1]],
        y=[*table["high"], *table["low"].clip(lower=FLOOR)[::-1]],
        fill="toself",
        fillcolor=colour,
        opacity=0.12,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _tensor(column: Any) -> torch.Tensor:
    return torch.tensor(column.to_numpy())
