"""Plotly figures of single directions: their effects, doses, and rankings under baselines."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import torch

from mechsvd.experiments.dose import DoseResponse
from mechsvd.experiments.optimal import BaselineComparison
from mechsvd.experiments.ranking import Ranking, Rankings, damage_by
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import (
    ATTEMPTED,
    CLEAN,
    EDITED,
    UNITS,
    by_name,
    colours_of,
    empty_figure,
    finish,
    heat_map,
    level,
    line,
    scatter,
    shades,
)
from mechsvd.results import require_kind

_TITLES = {
    "kl_divergence": ("KL divergence without each direction", "KL divergence (nats per token)"),
    "absolute_change": ("Change of the tokens without each direction", "Σ|Δ log p| (nats)"),
}
SYMBOLS = {"damage": "circle", "gain": "circle-open", "noise": "x-thin-open", "": "circle"}


def direction_effects(
    ranking: Ranking | Rankings | Mapping[str, Ranking], by: str = "effect"
) -> go.Figure:
    """Damage of removing each direction against its singular value, on logarithmic axes.

    The title has Spearman's rank correlation of what is drawn; of several, the legend.

    Args:
        ranking: one, or several by name, of one metric.
        by: "effect" draws the size of the signed effect: gains in another colour (of several
            rankings: hollow), effects within the noise floor grey (crosses), and a line at the
            floor. "kl_divergence" and "absolute_change" do not cancel over tokens.

    Raises:
        TypeError, ValueError: no ranking, or rankings of different metrics.

    Example:
        >>> ms.figures.direction_effects(ranking, by="kl_divergence").layout.xaxis.title.text
        'singular value (residual-stream units)'
    """
    rankings = by_name(ranking, Ranking, "")
    if len({(one.measurement.metric, one.measurement.unit) for one in rankings.values()}) > 1:
        metrics = sorted({one.measurement.metric for one in rankings.values()})
        raise ValueError(f"The rankings measure different metrics: {metrics}.")
    signed = by == "effect"
    figure, floors = _empty(next(iter(rankings.values())), by), []
    for colour, (name, one) in colours_of(rankings):
        several = len(rankings) > 1
        draw = scatter(sum(len(r.singular_values) for r in rankings.values()))
        _add_effects(figure, draw, one, by, label(name), colour if several else "")
        if signed and one.noise_floor > 0:
            floors.append(level(one.noise_floor, colour if several else CLEAN, "dot"))
    return finish(figure.update_layout(shapes=floors), legend=signed or len(rankings) > 1)


def _empty(ranking: Ranking, by: str) -> go.Figure:
    signed, measured = by == "effect", ranking.measurement
    metric = label(measured.metric).replace("log_prob", "log-probability")
    title, axis = _TITLES.get(
        by, ("Effect of removing each direction", f"|effect| on the {metric}")
    )
    axis = f"{axis} ({label(measured.unit)})" if signed and measured.unit else axis
    return empty_figure(title, f"singular value ({UNITS})", axis, log_x=True, log_y=True)


def _add_effects(
    figure: go.Figure, draw: Any, ranking: Ranking, by: str, name: str, colour: str
) -> None:
    """Add the directions of a ranking: in one colour if one is given, else one per sign."""
    signed, damage = by == "effect", damage_by(ranking, by).double()
    noise = ranking.is_noise if signed else torch.zeros(len(damage), dtype=torch.bool)
    groups = [("", EDITED, ~noise)]
    if signed:
        groups = [
            ("damage", EDITED, (damage > 0) & ~noise),
            ("gain", ATTEMPTED, (damage <= 0) & ~noise),
            ("noise", "#bbb", noise),
        ]
    known = len(damage) > 2
    value = ranking.correlation("size" if signed else by) if known else 0.0
    if known and not colour:
        drawn = "|effect| and σ" if signed else "it and σ"
        figure.layout.title.text += f"<br>rank correlation of {drawn} {value:.2f}"
    which = f"{name}<br>" if colour else ""
    unit = label(ranking.measurement.unit) if signed else _TITLES[by][1].rpartition("(")[2][:-1]
    for number, (kind, own, chosen) in enumerate(groups):
        places = chosen.nonzero().flatten().tolist()
        figure.add_trace(
            draw(
                x=ranking.singular_values.double().numpy()[chosen.numpy()],
                y=damage.abs()[chosen].numpy(),
                customdata=[label(ranking.names[j]) for j in places],
                name=f"{name} (ρ = {value:.2f})"
                if colour and known
                else name or kind or "direction",
                legendgroup=name,
                showlegend=number == 0 or not colour,
                mode="markers",
                marker={
                    "color": colour or own,
                    "size": 6,
                    "symbol": SYMBOLS[kind] if colour else "circle",
                },
                hovertemplate=f"{which}direction %{{customdata}}{kind and ': ' + kind}"
                f"<br>σ = %{{x:.4g}}<br>%{{y:.4g}} {unit}<extra></extra>",
            )
        )


@multiples
def dose_response(response: DoseResponse) -> go.Figure:
    """Effect against the gain of each direction, in the mean over the texts.

    Random directions with changes of equal energy are dotted.

    Args:
        response: one, or several by name, which are drawn side by side on one scale.

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
    for colour, number, size, own, random in zip(
        shades(len(response.directions)),
        response.directions.tolist(),
        response.singular_values.tolist(),
        response.effects.mean(dim=0),
        response.random_effects.mean(dim=0),
        strict=True,
    ):
        hover = f"direction {number}<br>σ = {size:.4g}<br>gain %{{x:.3g}}<br>%{{y:.4g}} {unit}"
        figure.add_trace(line(gains, own, f"direction {number}", colour, hover=hover))
        dotted = line(gains, random, f"random for {number}", colour, hover=f"random for {hover}")
        figure.add_trace(
            dotted.update(line={"dash": "dot", "width": 1}, mode="lines", showlegend=False)
        )
    figure.add_vline(x=1, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    return figure.update_layout(showlegend=len(response.directions) <= 12)


@multiples
def baseline_correlations(comparison: BaselineComparison) -> go.Figure:
    """Spearman's correlation between the rankings of directions under several baselines.

    Args:
        comparison: one, or several by name, which are drawn side by side on one scale.

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
