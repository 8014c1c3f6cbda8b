"""Plotly figures of an attribution's directions at work: in pairs, and shrunken or clipped."""

from itertools import cycle

import plotly.graph_objects as go
import torch
from torch import Tensor

from mechsvd.attribution.curvature_ridge import CurvatureRidge
from mechsvd.attribution.interacting import Amount, Interactions
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
    with_clean,
)
from mechsvd.results import require_kind


@multiples
def interactions(found: Interactions, of: Amount = "interaction", task: int = 0) -> go.Figure:
    """The share of pairs with an interaction of at most x, per basis, next to random bases.

    A line to the left of its thin ones is of a basis whose directions work more independently than
    random ones of the same span. The legend has the median and its p-value. Interactions of 0 have
    no place on the logarithmic axis of sizes.

    Args:
        found: one, or several by name, which are drawn side by side on one scale.
        of: "interaction" draws sizes in units of f, with a line at twice the noise floor;
            "relative" is without unit, from 0 to 1.
        task: number of the text.

    Raises:
        ValueError: `of` is none of these, or there is no such text.

    Example:
        >>> ms.figures.interactions(pairs).layout.yaxis.title.text
        'share of the pairs with at most this'
    """
    require_kind(found, Interactions)
    _require_text(task, found.values)
    table = found.summary(of)
    table = table[table.task == task] if "task" in table else table
    sized = of == "interaction"
    figure = empty_figure(
        "Interactions of pairs of directions",
        f"|interaction| ({label(found.objective)})"
        if sized
        else "|interaction| ÷ sum of the costs",
        "share of the pairs with at most this",
        log_x=sized,
    )
    amounts = (found.interaction.abs() if sized else found.relative)[task]
    for number, colour, row in zip(
        range(len(found.names)), cycle(DISTINCT), table.itertuples(), strict=False
    ):
        name, chosen = label(found.names[number]), amounts[:, found.basis == number]
        for draw in range(1, len(chosen)):
            random = _curve(chosen[draw], f"random bases of {name}", colour, 0.7, name)
            figure.add_trace(random.update(showlegend=draw == 1, opacity=0.4))
        shown = f"{name}:<br>median {row.median:.3g}, p = {row.p_value:.2g}"
        figure.add_trace(_curve(chosen[0], shown, colour, 2.2, f"{name} itself"))
    if sized and found.noise_floor[task] > 0:
        noise = 2 * float(found.noise_floor[task])
        figure.add_vline(x=noise, line={"color": CLEAN, "dash": "dot", "width": 1.2})
    return finish(figure)


@multiples
def curvature_ridge(found: CurvatureRidge, task: int = 0) -> go.Figure:
    """f against the number of directions, for ridge by curvature and for clipping.

    For ridge it is the effective number Σ |λ|/(|λ| + α), or the number of directions whose gain is
    above 0.1 (dotted), which can be far larger.

    Args:
        found: one, or several by name, which are drawn side by side on one scale.
        task: number of the text.

    Raises:
        ValueError: there is no such text.

    Example:
        >>> ms.figures.curvature_ridge(shrunk).layout.yaxis.title.text
        'probability without the rest'
    """
    require_kind(found, CurvatureRidge)
    _require_text(task, found.values)
    name = label(found.objective)
    figure = empty_figure(
        "Clipping and ridge by curvature",
        "kept directions, or their effective number Σ |λ|/(|λ| + α)",
        f"{name} without the rest" if found.rest == 0 else name,
    )
    kept, values = range(found.clip_values.shape[1]), found.ridge_values[task]
    hover = f"the first %{{x}} directions<br>{name} %{{y:.4g}}"
    figure.add_trace(line(kept, found.clip_values[task], "clipped", EDITED, hover=hover))
    hover = f"α = %{{customdata:.3g}}<br>%{{x:.1f}} directions<br>{name} %{{y:.4g}}"
    shrunk = line(found.effective_directions, values, "ridge", ATTEMPTED, hover=hover)
    left = line(found.directions_left, values, "ridge, gains above 0.1", ATTEMPTED, hover=hover)
    for trace in (shrunk, left.update(line={"dash": "dot"})):
        figure.add_trace(trace.update(customdata=found.alphas.numpy()))
    return finish(with_clean(figure, found.values[task]))


def _require_text(task: int, values: Tensor) -> None:
    if not 0 <= task < len(values):
        raise ValueError(f"`task` is {task}, but there are {len(values)} texts.")


def _curve(values: Tensor, name: str, colour: str, width: float, group: str) -> go.Scatter:
    """The cumulative distribution of some values as a step line."""
    defined = values[~values.isnan()].sort().values
    shares = torch.arange(1, len(defined) + 1) / max(1, len(defined))
    return scatter(len(defined))(
        x=defined.numpy(),
        y=shares.numpy(),
        name=name,
        legendgroup=group,
        mode="lines",
        line={"color": colour, "width": width, "shape": "hv"},
        hovertemplate=f"{name}<br>%{{x:.3g}}<br>%{{y:.0%}} of the pairs<extra></extra>",
    )
