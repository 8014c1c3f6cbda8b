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


def hessian_spectrum(found: Attribution) -> go.Figure:
    """Eigenvalues in the order of the table, with their residuals as error bars; pairs that did not converge are hollow."""
    require_kind(found, Attribution)
    figure = empty_figure(
        "Eigenvalues of the Hessian", "component", f"eigenvalue (of the {label(found.objective)})"
    )
    hover = "component %{x}<br>λ = %{y:.4g}<br>residual %{customdata[0]:.1e}<br>u·w = %{customdata[1]:.3g}<extra></extra>"
    figure.add_trace(
        scatter(len(found))(
            y=found.eigenvalues.numpy(),
            error_y={"array": found.residuals.numpy(), "thickness": 1, "width": 0},
            mode="markers",
            marker={
                "color": EDITED,
                "size": 6,
                "symbol": ["circle" if c else "circle-open" for c in found.converged.tolist()],
            },
            customdata=torch.stack([found.residuals, found.projections], dim=1).numpy(),
            hovertemplate=hover,
        )
    )
    return figure.add_hline(y=0, line={"color": CLEAN, "width": 1})


def estimate_errors(found: Attribution) -> go.Figure:
    """By how much each estimate misses the measured score, against its size; scores within the noise are left out.

    The dashed line is at 10 %. The further a step goes, the less an estimate at w knows of it.
    """
    require_kind(found, Attribution)
    loud = ~found.is_noise
    x = f"|measured score| (of the {label(found.objective)})"
    figure = empty_figure(
        "Estimates against what is measured",
        x,
        "relative error of the estimate",
        log_x=True,
        log_y=True,
    )
    for name, colour in ESTIMATES.items():
        figure.add_trace(
            scatter(len(found))(
                x=found.measured[loud].abs().numpy(),
                y=found.error(name)[loud].numpy(),
                customdata=loud.nonzero()[:, 0].numpy(),
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6, "opacity": 0.8},
                hovertemplate=f"component %{{customdata}}<br>measured %{{x:.4g}}<br>{name}: off by %{{y:.2%}}<extra></extra>",
            )
        )
    figure.add_hline(y=0.1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return figure.update_layout(showlegend=True)


def accumulated_scores(bases: Mapping[str, Attribution]) -> go.Figure:
    """Measured scores, largest first, summed up as a share of f(w) − f(0), for several bases of the same w.

    A basis with few strong components rises fast. Over a complete basis whose components do not interact the curve ends at 1,
    which is drawn where it is in reach; above it, components do the same work, and removing either shows all of it.

    Raises:
        ValueError: no attributions, or of different functions or models.
    """
    require_kind(bases, Mapping)
    if not bases:
        raise ValueError(
            "There are no attributions to compare; give at least one, by the name of its basis."
        )
    first = next(iter(bases.values()))
    axes = ("components, by falling measured score", "sum of the scores (share of f(w) − f(0))")
    figure = empty_figure("How fast the scores accumulate", *axes)
    for colour, (name, found) in zip(cycle(DISTINCT), bases.items(), strict=False):
        require_kind(found, Attribution)
        require_same_model(first.source, found.source, "The attributions")
        if _function(found) != _function(first):
            mine, theirs = (f"{each.objective} over {each.over[:60]}" for each in (first, found))
            raise ValueError(
                f"The attributions are of different functions: {mine}; {theirs}; or of different texts."
            )
        sums = found.share.sort(descending=True).values.cumsum(0)
        hover = f"{label(name)}<br>first %{{x}} components<br>%{{y:.3f}} of f(w) − f(0)"
        figure.add_trace(line(range(1, len(found) + 1), sums, label(name), colour, hover=hover))
    if max(max(trace.y) for trace in figure.data) > 1 / 3:
        figure.add_hline(y=1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return figure.update_layout(showlegend=True)


def _function(found: Attribution) -> tuple[object, ...]:
    return found.objective, found.over, found.parts, found.source and found.source.tokens
