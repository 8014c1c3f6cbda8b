"""Plotly figures of rank sweeps, searches and ridge sweeps."""

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from mechsvd.checks import with_plain_arguments
from mechsvd.engine.measurement import Measurement
from mechsvd.experiments.order_comparison import OrderComparison
from mechsvd.experiments.ridge import RidgeSweep, RidgeSweeps
from mechsvd.experiments.search import CriticalRank, CriticalRanks
from mechsvd.experiments.sweeps import RankSweep, RankSweeps
from mechsvd.figures.display import label
from mechsvd.figures.heldout import orders_on_texts
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import (
    ATTEMPTED,
    CLEAN,
    DISTINCT,
    UNITS,
    by_name,
    colours_of,
    empty_figure,
    finish,
    heat_map,
    line,
    with_clean,
    with_clean_of,
)
from mechsvd.results import require_kind, require_same_model

FLOOR = 1e-7  # values below it are rounding, and left out of logarithmic axes
_AXES = {
    "surprise": "−log-probability of the continuation (nats)",
    "kl_divergence": "KL(clean ‖ edited) (nats per token)",
    "absolute_change": "Σ|Δ log p| over the tokens (nats)",
}


def probability(sweep: RankSweep | RankSweeps | Mapping[str, RankSweep]) -> go.Figure:
    """Probability of the continuation against the number of kept directions.

    Args:
        sweep: one, or several by name: of directions of other texts, or of other prompts, models or
            layers, each with its own clean value.

    Raises:
        TypeError, ValueError: no sweep.

    Example:
        >>> ms.figures.probability(sweep).layout.yaxis.title.text
        'probability of the continuation'
    """
    figure = empty_figure(
        "Generation probability", "kept directions", "probability of the continuation"
    )
    return _curves(figure, sweep, lambda measured: measured.log_prob.exp(), "p = %{y:.4g}")


def surprise(sweep: RankSweep | RankSweeps | Mapping[str, RankSweep]) -> go.Figure:
    """Surprise (−log-probability) of the continuation against the number of kept directions.

    Args:
        sweep: see `probability`.

    Raises:
        TypeError, ValueError: no sweep.

    Example:
        >>> ms.figures.surprise({"this text": sweep}).layout.yaxis.title.text
        '−log-probability of the continuation (nats)'
    """
    figure = empty_figure(
        "Surprise", "kept directions", "−log-probability of the continuation (nats)", log_y=True
    )
    return _curves(figure, sweep, lambda measured: -measured.log_prob, "%{y:.4g} nats")


def _curves(
    figure: go.Figure,
    sweep: RankSweep | RankSweeps | Mapping[str, RankSweep],
    values: Callable[[Measurement], Tensor],
    hover: str,
) -> go.Figure:
    """Draw a value of each sweep, and its clean value."""
    sweeps = by_name(sweep, RankSweep, "clipped")
    for colour, (name, one) in colours_of(sweeps):
        which = f"{label(name)}<br>" if len(sweeps) > 1 else ""
        figure.add_trace(
            line(
                one.ranks,
                values(one.measurement),
                label(name),
                colour,
                hover=f"{which}k = %{{x}}<br>{hover}",
            )
        )
    cleans = {name: values(one.measurement.clean_run) for name, one in sweeps.items()}
    return finish(with_clean_of(figure, cleans))


def deltas(sweep: RankSweep | RankSweeps | Mapping[str, RankSweep]) -> go.Figure:
    """Sizes of attempted (orig_delta) and kept (kept_delta) writes by number of kept directions.

    Args:
        sweep: see `probability`; of several sweeps, attempted writes are dotted.

    Example:
        >>> [line.name for line in ms.figures.deltas(sweep).data]
        ['orig_delta', 'kept_delta']
    """
    sweeps = by_name(sweep, RankSweep, "")
    figure = empty_figure("Attempted and kept writes", "kept directions", f"RMS write ({UNITS})")
    for colour, (name, one) in colours_of(sweeps):
        which, measured = f"{label(name)}: " if name else "", one.measurement
        attempted = line(
            one.ranks,
            measured.orig_delta,
            f"{which}orig_delta",
            colour if name else ATTEMPTED,
            hover=f"{which}k = %{{x}}<br>attempted %{{y:.4g}}",
        )
        figure.add_trace(attempted.update(line={"dash": "dot"} if name else {}))
        figure.add_trace(
            line(
                one.ranks,
                measured.kept_delta,
                f"{which}kept_delta",
                colour,
                hover=f"{which}k = %{{x}}<br>kept %{{y:.4g}}",
            )
        )
    cleans = {name: one.measurement.clean_run.orig_delta for name, one in sweeps.items()}
    return finish(with_clean_of(figure, cleans))


@multiples
@with_plain_arguments
def delta_map(sweep: RankSweep, *, kept: bool = True) -> go.Figure:
    """Sizes of every site's writes by number of kept directions, relative to the clean run.

    Args:
        sweep: one, or several by name, which are drawn side by side on one scale.

    Example:
        >>> ms.figures.delta_map(sweep, kept=True).data[0].z.shape
        (12, 129)
    """
    require_kind(sweep, RankSweep)
    measured, clean = sweep.measurement, sweep.measurement.clean_run
    edited = measured.kept_deltas if kept else measured.orig_deltas
    word = "Kept" if kept else "Attempted"
    hover = "site %{y}<br>k = %{x}<br>%{z:.3f} of clean<extra></extra>"
    relative, ranks = (edited / clean.orig_deltas).T, sweep.ranks.tolist()
    return heat_map(
        f"{word} writes by site",
        "kept directions",
        relative,
        ranks,
        measured.sites,
        "of clean",
        hover,
    )


def metric(sweep: RankSweep | RankSweeps | Mapping[str, RankSweep]) -> go.Figure:
    """The metric that was measured against the number of kept directions.

    Args:
        sweep: see `probability`.

    Raises:
        TypeError, ValueError: no sweep, or sweeps of different metrics.

    Example:
        >>> ms.figures.metric(sweep).layout.yaxis.title.text
        'log_prob (nats)'
    """
    sweeps = [*by_name(sweep, RankSweep, "clipped").values()]
    if len(metrics := {one.measurement.metric for one in sweeps}) > 1:
        raise ValueError(f"The sweeps measure different metrics: {sorted(metrics)}.")
    name, unit = label(sweeps[0].measurement.metric), label(sweeps[0].measurement.unit)
    figure = empty_figure(
        name.replace("_", " ").capitalize(), "kept directions", f"{name} ({unit})" if unit else name
    )
    return _curves(figure, sweep, lambda measured: measured.value, f"%{{y:.4g}} {unit}")


def race_of_orders(
    sweeps: Mapping[str, RankSweep] | OrderComparison, by: str = "surprise"
) -> go.Figure:
    """Surprise against the number of kept directions, for several orders of the directions.

    Of a comparison of orders, it is the KL divergence, on the texts that the directions are fitted
    on and on others, with means over the texts and intervals.

    Args:
        sweeps: by the name of their order, or of anything else that tells them apart; or what
            `compare_orders` gives.
        by: "surprise", or "kl_divergence", "absolute_change" or another property of a measurement,
            which need not be larger for every worse text: tokens cancel in the surprise.

    Raises:
        ValueError: there are no sweeps, they are of different models, or `by` is not known.

    Example:
        >>> [line.name for line in ms.figures.race_of_orders({"singular value": sweep}).data]
        ['singular value']
    """
    if isinstance(sweeps, OrderComparison):
        return orders_on_texts(sweeps)
    require_kind(sweeps, Mapping)
    if not sweeps:
        raise ValueError(
            "There are no sweeps to race; give at least one, by the name of its order."
        )
    if by not in _AXES:
        raise ValueError(f"`by` is {by!r:.40}, but must be one of {list(_AXES)}.")
    first = next(iter(sweeps.values()))
    unit = _AXES[by].rpartition("(")[2].rstrip(")")
    figure = empty_figure("Race of the orders", "kept directions", _AXES[by], log_y=True)
    for colour, (name, sweep) in zip(cycle(DISTINCT), sweeps.items(), strict=False):
        require_same_model(first.source, sweep.source, "The sweeps")
        hover = f"{label(name)}<br>k = %{{x}}<br>%{{y:.4g}} {unit}"
        values = _values(sweep, by)
        # 0 has no logarithm, and rounding is no news
        values = values.where(values > FLOOR, torch.nan) if by != "surprise" else values
        figure.add_trace(line(sweep.ranks, values, label(name), colour, hover=hover))
    if by == "surprise":
        with_clean(figure, -first.measurement.clean_run.log_prob)
    return finish(figure)


def _values(sweep: RankSweep, by: str) -> Tensor:
    measured = sweep.measurement
    values: Tensor = -measured.log_prob if by == "surprise" else getattr(measured, by)
    return values


def margins(critical_rank: CriticalRank | CriticalRanks | Mapping[str, CriticalRank]) -> go.Figure:
    """Margin of each tried rank above or below the threshold, near the crossings.

    A vertical line marks the critical rank; the legend has it, and the lasting one.

    Args:
        critical_rank: one, or several by name, of one unit.

    Raises:
        TypeError, ValueError: no search, or searches whose margins have different units.

    Example:
        >>> ms.figures.margins(ms.critical_rank_of(sweep)).layout.yaxis.title.text
        'above the threshold (nats)'
    """
    searches = by_name(critical_rank, CriticalRank, "margin")
    if len(units := {one.unit for one in searches.values()}) > 1:
        raise ValueError(f"The margins have different units: {sorted(units)}.")
    unit = f" ({label(units.pop())})" if any(units) else ""
    figure = empty_figure("Critical rank", "kept directions", f"above the threshold{unit}")
    for colour, (name, one) in colours_of(searches):
        which = f"{label(name)}<br>" if len(searches) > 1 else ""
        hover = f"{which}k = %{{x}}<br>%{{y:.4g}}{unit} above the threshold"
        trace = line(one.sweep.ranks, one.margins, label(name), colour, hover=hover)
        figure.add_trace(trace.update(mode="lines+markers", marker={"size": 4}))
        if one.rank is not None:
            own = ATTEMPTED if len(searches) == 1 else colour
            figure.add_vline(
                x=one.rank, line={"color": own, "width": 1.5}, name=_rank(one), showlegend=True
            )
    figure.add_hline(y=0, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    high = max(1.0, *(float(one.margins.max()) for one in searches.values()))
    # far below the threshold the curve falls by hundreds of nats
    figure.update_yaxes(range=[-3 * high, 1.3 * high])
    starts = [one.rank - one.sweep.full_rank // 4 for one in searches.values() if one.rank]
    if starts:
        full = max(one.sweep.full_rank for one in searches.values())
        figure.update_xaxes(range=[max(0, min(starts)), full + 1])
    if len(criteria := {label(one.criterion) for one in searches.values()}) == 1:
        figure.update_layout(title_text=f"Critical rank for {criteria.pop()}")
    return finish(figure)


def _rank(found: CriticalRank) -> str:
    lasting = "none" if found.lasting_rank is None else found.lasting_rank
    return (
        f"k = {found.rank}; lasting {lasting}<br>{len(found.crossings)} crossing(s), "
        f"{int(found.is_tie.sum())} tie(s)"
    )


def clip_and_ridge(
    clip: RankSweep | RankSweeps | Mapping[str, RankSweep],
    ridge: RidgeSweep | RidgeSweeps | Mapping[str, RidgeSweep],
) -> go.Figure:
    """Surprise against the number of directions, for clipping and for ridge.

    For ridge it is the effective number of directions.

    Args:
        clip, ridge: one of each, or several by the same names; then ridge is dotted.

    Raises:
        ValueError: the sweeps are of different models or texts, or have different names.

    Example:
        >>> [line.name for line in ms.figures.clip_and_ridge(sweep, ridge).data]
        ['clipped', 'ridge']
    """
    clips, ridges = by_name(clip, RankSweep, ""), by_name(ridge, RidgeSweep, "")
    if clips.keys() != ridges.keys():
        raise ValueError(
            f"The sweeps of clipping are named {[*clips]!s:.60} and those of ridge "
            f"{[*ridges]!s:.60}; give both by the same names."
        )
    axes = (
        "kept directions, or their effective number Σ s²/(s² + α)",
        "−log-probability of the continuation (nats)",
    )
    figure = empty_figure("Clipping and ridge", *axes, log_y=True)
    for colour, (name, one) in colours_of(clips):
        figure.add_traces(_both(one, ridges[name], label(name), colour))
    cleans = {name: -one.measurement.clean_run.log_prob for name, one in clips.items()}
    return finish(with_clean_of(figure, cleans))


def _both(clip: RankSweep, ridge: RidgeSweep, name: str, colour: str) -> list[Any]:
    """The lines of clipping and of ridge of one text."""
    require_same_model(clip.source, ridge.source, "The sweeps")
    if clip.source and ridge.source and clip.source.tokens != ridge.source.tokens:
        raise ValueError(
            "The sweeps are of different texts, so their probabilities cannot be compared; "
            "make both sweeps of one task."
        )
    which = f"{name}: " if name else ""
    hover = f"{which}clipped to k = %{{x}}<br>%{{y:.4g}} nats"
    surprise = -clip.measurement.log_prob
    clipped = line(clip.ranks, surprise, f"{which}clipped", colour, hover=hover)
    hover = f"{which}ridge, α = %{{customdata:.3g}}<br>%{{x:.1f}} effective directions"
    shrunk = line(
        ridge.effective_directions,
        -ridge.measurement.log_prob,
        f"{which}ridge",
        colour if name else ATTEMPTED,
        hover=f"{hover}<br>%{{y:.4g}} nats",
    )
    shrunk.update(customdata=ridge.alphas.numpy(), line={"dash": "dot"} if name else {})
    return [clipped, shrunk]
