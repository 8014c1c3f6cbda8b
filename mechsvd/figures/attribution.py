"""Attributions → plotly figures."""

from collections.abc import Mapping
from itertools import cycle

import plotly.graph_objects as go
import torch

from mechsvd.attribution.scores import Attribution
from mechsvd.figures.display import label
from mechsvd.figures.style import ATTEMPTED, CLEAN, DISTINCT, EDITED, empty_figure, line, scatter
from mechsvd.results import require_kind, require_same_model

ESTIMATES = {"linear": ATTEMPTED, "quadratic": EDITED, "integrated": "#a0a0a0"}


def hessian_spectrum(attribution: Attribution) -> go.Figure:
    """Eigenvalues in the order of the table, with residuals as error bars.

    Pairs that did not converge are hollow.
    """
    require_kind(attribution, Attribution)
    figure = empty_figure(
        "Eigenvalues of the Hessian",
        "direction",
        f"eigenvalue (of the {label(attribution.objective)})",
    )
    hover = (
        "direction %{x}<br>λ = %{y:.4g}<br>residual %{customdata[0]:.1e}"
        "<br>u·w = %{customdata[1]:.3g}<extra></extra>"
    )
    figure.add_trace(
        scatter(len(attribution))(
            y=attribution.eigenvalues.numpy(),
            error_y={"array": attribution.residuals.numpy(), "thickness": 1, "width": 0},
            mode="markers",
            marker={
                "color": EDITED,
                "size": 6,
                "symbol": [
                    "circle" if c else "circle-open" for c in attribution.converged.tolist()
                ],
            },
            customdata=torch.stack([attribution.residuals, attribution.projections], dim=1).numpy(),
            hovertemplate=hover,
        )
    )
    return figure.add_hline(y=0, line={"color": CLEAN, "width": 1})


def estimate_errors(attribution: Attribution) -> go.Figure:
    """Relative error of each estimate against the size of the measured score.

    Scores within the noise floor are left out. The dashed line is at 10 %.
    The larger the step, the less an estimate at w says about it.
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
    return figure.update_layout(showlegend=True)


def accumulated_scores(bases: Mapping[str, Attribution]) -> go.Figure:
    """Cumulative sum of the measured scores, largest first, for several bases of the same w.

    The unit is a share of f(w) − f(0). A basis with few strong directions rises fast.
    A complete basis of directions that do not interact ends at 1. The line at 1 is drawn if a
    curve comes near it. Above 1, directions do the same work, and removing either one costs all
    of it.

    Raises:
        ValueError: there are no attributions, or they are of different functions or models.
    """
    require_kind(bases, Mapping)
    if not bases:
        raise ValueError(
            "There are no attributions to compare; give at least one, by the name of its basis."
        )
    first = next(iter(bases.values()))
    axes = ("directions, by falling measured score", "sum of the scores (share of f(w) − f(0))")
    figure = empty_figure("How fast the scores accumulate", *axes)
    for colour, (name, attribution) in zip(cycle(DISTINCT), bases.items(), strict=False):
        require_kind(attribution, Attribution)
        require_same_model(first.source, attribution.source, "The attributions")
        if _function(attribution) != _function(first):
            functions = "; ".join(f"{a.objective} over {a.over[:60]}" for a in (first, attribution))
            raise ValueError(
                f"The attributions are of different functions: {functions}; or of different texts."
            )
        sums = attribution.share.sort(descending=True).values.cumsum(0)
        hover = f"{label(name)}<br>first %{{x}} directions<br>%{{y:.3f}} of f(w) − f(0)"
        places = range(1, len(attribution) + 1)
        figure.add_trace(line(places, sums, label(name), colour, hover=hover))
    if max(max(trace.y) for trace in figure.data) > 1 / 3:
        figure.add_hline(y=1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return figure.update_layout(showlegend=True)


def _function(attribution: Attribution) -> tuple[object, ...]:
    source = attribution.source
    return attribution.objective, attribution.over, attribution.parts, source and source.tokens
