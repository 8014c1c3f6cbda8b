"""Plotly figures of single directions: their effects, doses, and rankings under baselines."""

import plotly.graph_objects as go
import torch

from mechsvd.experiments.dose import DoseResponse
from mechsvd.experiments.optimal import BaselineComparison
from mechsvd.experiments.ranking import Ranking, damage_by
from mechsvd.figures.display import label
from mechsvd.figures.style import (
    ATTEMPTED,
    CLEAN,
    EDITED,
    UNITS,
    empty_figure,
    heat_map,
    line,
    scatter,
    shades,
)
from mechsvd.results import require_kind

_TITLES = {
    "kl_divergence": ("KL divergence without each direction", "KL divergence (nats per token)"),
    "absolute_change": ("Change of the tokens without each direction", "Σ|Δ log p| (nats)"),
}


def direction_effects(ranking: Ranking, by: str = "effect") -> go.Figure:
    """Damage of removing each direction against its singular value, on logarithmic axes.

    The title has Spearman's rank correlation of what is drawn.

    Args:
        by: "effect" draws the size of the signed effect: gains in another colour, effects within
            the noise floor grey, and a line at the floor. "kl_divergence" and "absolute_change" do
            not cancel over tokens.

    Example:
        >>> ms.figures.direction_effects(ranking, by="kl_divergence").layout.xaxis.title.text
        'singular value (residual-stream units)'
    """
    require_kind(ranking, Ranking)
    signed, unit = by == "effect", ranking.measurement.unit
    damage = damage_by(ranking, by).double()
    metric = ranking.measurement.metric.replace("log_prob", "log-probability")
    title, axis = _TITLES.get(
        by, ("Effect of removing each direction", f"|effect| on the {metric}")
    )
    sizes = ranking.singular_values.double().numpy()
    correlation = ranking.correlation("size" if signed else by)
    drawn = "|effect| and σ" if signed else "it and σ"
    figure = empty_figure(
        f"{title}<br>rank correlation of {drawn} {correlation:.2f}" if len(sizes) > 2 else title,
        f"singular value ({UNITS})",
        f"{axis} ({unit})" if signed else axis,
        log_x=True,
        log_y=True,
    )
    noise = ranking.is_noise if signed else torch.zeros(len(sizes), dtype=torch.bool)
    groups = (
        [
            ("damage", EDITED, (damage > 0) & ~noise),
            ("gain", ATTEMPTED, (damage <= 0) & ~noise),
            ("noise", "#bbb", noise),
        ]
        if signed
        else [("direction", EDITED, ~noise)]
    )
    for name, colour, chosen in groups:
        figure.add_trace(
            scatter(len(sizes))(
                x=sizes[chosen.numpy()],
                y=damage.abs()[chosen].numpy(),
                customdata=[label(ranking.names[j]) for j in chosen.nonzero().flatten().tolist()],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6},
                hovertemplate=f"direction %{{customdata}}: {name}<br>σ = %{{x:.4g}}"
                f"<br>%{{y:.4g}} {label(unit)}<extra></extra>",
            )
        )
    if signed and ranking.noise_floor > 0:
        figure.add_hline(y=ranking.noise_floor, line={"color": CLEAN, "dash": "dot", "width": 1.2})
    return figure.update_layout(showlegend=signed)


def dose_response(response: DoseResponse) -> go.Figure:
    """Effect against the gain of each direction, in the mean over the texts.

    Random directions with changes of equal energy are dotted.

    Example:
        >>> ms.figures.dose_response(response).layout.xaxis.title.text
        'gain of the direction'
    """
    require_kind(response, DoseResponse)
    metric, unit = (
        label(response.metric).replace("log_prob", "log-probability"),
        label(response.unit),
    )
    figure = empty_figure(
        "Dose and response", "gain of the direction", f"effect on the {metric} ({unit})"
    )
    gains = response.gains
    for colour, number, own, random in zip(
        shades(len(response.directions)),
        response.directions.tolist(),
        response.effects.mean(dim=0),
        response.random_effects.mean(dim=0),
        strict=True,
    ):
        hover = f"direction {number}<br>gain %{{x:.3g}}<br>%{{y:.4g}} {unit}"
        figure.add_trace(line(gains, own, f"direction {number}", colour, hover=hover))
        dotted = line(gains, random, f"random for {number}", colour, hover=f"random for {hover}")
        figure.add_trace(
            dotted.update(line={"dash": "dot", "width": 1}, mode="lines", showlegend=False)
        )
    figure.add_vline(x=1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return figure.update_layout(showlegend=len(response.directions) <= 12)


def baseline_correlations(comparison: BaselineComparison) -> go.Figure:
    """Spearman's correlation between the rankings of directions under several baselines.

    Example:
        >>> ms.figures.baseline_correlations(baselines).data[0].z.shape
        (2, 2)
    """
    require_kind(comparison, BaselineComparison)
    names = [label(name) for name in comparison.names]
    hover = "%{y} and %{x}<br>%{z:.3f}<extra></extra>"
    figure = heat_map(
        "Rankings under several baselines",
        "baseline",
        comparison.correlation,
        names,
        names,
        "rank correlation",
        hover,
    )
    return figure.update_traces(texttemplate="%{z:.3f}").update_yaxes(title={"text": "baseline"})
