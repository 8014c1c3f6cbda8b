"""Attributions → plotly figures."""

from collections.abc import Callable, Mapping
from itertools import cycle

import plotly.graph_objects as go
import torch
from torch import Tensor

from mechsvd.attribution.scores import Attribution, Order
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import (
    ATTEMPTED,
    CLEAN,
    DISTINCT,
    EDITED,
    empty_figure,
    finish,
    line,
    scatter,
)
from mechsvd.results import require_kind, require_same_model

ORDERED = {
    "eigenvalue": "in the order of the table",
    "projection": "by falling |u·w|",
    "measured": "by falling measured score",
}
ESTIMATES = {"linear": ATTEMPTED, "quadratic": EDITED, "integrated": "#a0a0a0"}


@multiples
def hessian_spectrum(attribution: Attribution, order: Order = "eigenvalue") -> go.Figure:
    """Eigenvalues in the order of the table, with residuals as error bars.

    Pairs that did not converge are hollow.

    Args:
        attribution: one, or several by name, which are drawn side by side.
        order: see `Attribution.order`.

    Example:
        >>> ms.figures.hessian_spectrum(attribution).layout.yaxis.title.text
        'eigenvalue (of the probability)'
    """
    require_kind(attribution, Attribution)
    rows = attribution.order(order)
    figure = empty_figure(
        "Eigenvalues of the Hessian",
        f"direction, {_ordered(order)}",
        f"eigenvalue (of the {label(attribution.objective)})",
    )
    hover = (
        "direction %{customdata[2]:.0f}<br>λ = %{y:.4g}<br>residual %{customdata[0]:.1e}"
        "<br>u·w = %{customdata[1]:.3g}<extra></extra>"
    )
    figure.add_trace(
        scatter(len(attribution))(
            y=attribution.eigenvalues[rows].numpy(),
            error_y={"array": attribution.residuals[rows].numpy(), "thickness": 1, "width": 0},
            mode="markers",
            marker={
                "color": EDITED,
                "size": 6,
                "symbol": [
                    "circle" if c else "circle-open" for c in attribution.converged[rows].tolist()
                ],
            },
            customdata=torch.stack(
                [attribution.residuals[rows], attribution.projections[rows], rows.double()], dim=1
            ).numpy(),
            hovertemplate=hover,
        )
    )
    return figure.add_hline(y=0, line={"color": CLEAN, "width": 1})


@multiples
def estimate_errors(attribution: Attribution) -> go.Figure:
    """Relative error of each estimate against the size of the measured score.

    Scores within the noise floor are left out. The dashed line is at 10 %.
    The larger the step, the less an estimate at w says about it.

    Args:
        attribution: one, or several by name, which are drawn side by side.

    Example:
        >>> ms.figures.estimate_errors(attribution).layout.yaxis.title.text
        'relative error of the estimate'
    """
    require_kind(attribution, Attribution)
    loud = ~attribution.is_noise
    x = f"|measured score| (of the {label(attribution.objective)})"
    figure = empty_figure(
        "Estimates against measured scores",
        x,
        "relative error of the estimate",
        log_x=True,
        log_y=True,
    )
    for name, colour in ESTIMATES.items():
        figure.add_trace(
            scatter(len(attribution))(
                x=attribution.measured[loud].abs().numpy(),
                y=attribution.error(name)[loud].numpy(),
                customdata=loud.nonzero()[:, 0].numpy(),
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6, "opacity": 0.8},
                hovertemplate="direction %{customdata}<br>measured %{x:.4g}"
                f"<br>{name}: off by %{{y:.2%}}<extra></extra>",
            )
        )
    figure.add_hline(y=0.1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return finish(figure)


def accumulated_scores(bases: Mapping[str, Attribution], order: Order = "measured") -> go.Figure:
    """Cumulative sum of the measured scores, largest first, for several bases of the same w.

    The unit is a share of f(w) − f(0). A basis with few strong directions rises fast.
    A complete basis of directions that do not interact ends at 1. The line at 1 is drawn if a
    curve comes near it. Above 1, directions do the same work, and removing either one costs all
    of it.

    Args:
        order: another order of the directions; see `Attribution.order`.

    Raises:
        ValueError: there are no attributions, or they are of different functions or models.

    Example:
        >>> len(ms.figures.accumulated_scores({"largest eigenvalues": attribution}).data)
        1
    """
    figure = empty_figure(
        "How fast the scores accumulate",
        f"directions, {_ordered(order)}",
        "sum of the scores (share of f(w) − f(0))",
    )
    hover = "first %{x} directions<br>%{y:.3f} of f(w) − f(0)"

    def shares(attribution: Attribution) -> Tensor:
        if order == "measured":  # the largest share first, also where f(0) is above f(w)
            return attribution.share.sort(descending=True).values
        return attribution.share[attribution.order(order)]

    figure = _accumulated(figure, bases, shares, hover)
    if max(max(trace.y) for trace in figure.data) > 1 / 3:
        figure.add_hline(y=1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return figure


def accumulated_shares(bases: Mapping[str, Attribution], order: Order = "projection") -> go.Figure:
    """Cumulative share of ‖w‖² that the directions hold, for several bases of the same w.

    The axis is logarithmic: the largest eigenvalues' directions may hold a tiny share of the
    weights. Directions from w end at 1.

    Args:
        order: of the directions; see `Attribution.order`.

    Raises:
        ValueError: there are no attributions, or they are of different functions or models.

    Example:
        >>> len(ms.figures.accumulated_shares({"largest eigenvalues": attribution}).data)
        1
    """
    figure = empty_figure(
        "How much of w the directions hold",
        f"directions, {_ordered(order)}",
        "sum of (u·w)² (share of ‖w‖²)",
        log_y=True,
    )
    hover = "first %{x} directions<br>%{y:.3g} of ‖w‖²"
    figure = _accumulated(figure, bases, lambda a: a.held[a.order(order)], hover)
    return finish(figure.add_hline(y=1, line={"color": CLEAN, "dash": "dash", "width": 1.2}))


def _accumulated(
    figure: go.Figure,
    bases: Mapping[str, Attribution],
    values_of: Callable[[Attribution], Tensor],
    hover: str,
) -> go.Figure:
    """Add a line of cumulative sums per basis; refuse bases of different functions."""
    require_kind(bases, Mapping)
    if not bases:
        raise ValueError(
            "There are no attributions to compare; give at least one, by the name of its basis."
        )
    first = next(iter(bases.values()))
    for colour, (name, attribution) in zip(cycle(DISTINCT), bases.items(), strict=False):
        require_kind(attribution, Attribution)
        require_same_model(first.source, attribution.source, "The attributions")
        if _function(attribution) != _function(first):
            functions = "; ".join(f"{a.objective} over {a.over[:60]}" for a in (first, attribution))
            raise ValueError(
                f"The attributions are of different functions: {functions}; or of different texts."
            )
        sums, places = values_of(attribution).cumsum(0), range(1, len(attribution) + 1)
        shown = f"{label(name)}<br>{hover}"
        figure.add_trace(line(places, sums, label(name), colour, hover=shown))
    return figure.update_layout(showlegend=True)


def _ordered(order: str) -> str:
    if order not in ORDERED:
        raise ValueError(f"`order` is {order!r:.40}, but must be one of {list(ORDERED)}.")
    return ORDERED[order]


def _function(attribution: Attribution) -> tuple[object, ...]:
    source = attribution.source
    return attribution.objective, attribution.over, attribution.parts, source and source.tokens
