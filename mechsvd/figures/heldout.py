"""Plotly figures of held-out texts: means over texts, with bands."""

from typing import Any

import plotly.graph_objects as go
import torch

from mechsvd.experiments.heldout import HeldOut
from mechsvd.figures.style import DISTINCT, empty_figure, line
from mechsvd.results import require_kind

FLOOR = 1e-6  # below it, a logarithmic axis shows rounding only


def held_out(found: HeldOut, order: str = "singular value") -> go.Figure:
    """KL divergence against the number of kept directions, by what the directions are fitted on.

    Lines are means over the texts, bands 95 % intervals of the means. Bases per site are dashed.
    """
    require_kind(found, HeldOut)
    figure = empty_figure(
        f"Held-out texts ({len(found.fold)} texts)",
        "kept directions",
        "KL divergence of clean ‖ edited (nats per token)",
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
        x = [*table["rank"], *table["rank"][::-1]]
        y = [*table["high"], *table["low"].clip(lower=FLOOR)[::-1]]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                fill="toself",
                fillcolor=colour,
                opacity=0.12,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    return figure.update_layout(showlegend=True)


def _tensor(column: Any) -> torch.Tensor:
    return torch.tensor(column.to_numpy())
