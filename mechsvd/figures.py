"""Results → plotly figures, one function each; nothing is shown, nothing global is set, no model is touched."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from os import PathLike

import plotly.graph_objects as go
import torch

from mechsvd.attribution_figures import accumulated_scores, clip_and_ridge, estimate_errors, hessian_spectrum
from mechsvd.comparison import Overlap, Pool
from mechsvd.decomposition import Decomposition
from mechsvd.display import label
from mechsvd.drawing import ATTEMPTED, CLEAN, DISTINCT, EDITED, UNITS, empty_figure, heat_map, line, scatter, shades, with_clean
from mechsvd.ranking import Ranking
from mechsvd.results import require_kind, require_same_model
from mechsvd.search import CriticalRank
from mechsvd.sweeps import RankSweep
from mechsvd.writes import Writes

__all__ = [  # noqa: RUF022 (in the order of the experiment)
    "singular_values", "cumulative_singular_values", "layer_spectra", "writer_map",
    "probability", "surprise", "deltas", "delta_map", "direction_effects", "race_of_orders", "margins", "clip_and_ridge",
    "hessian_spectrum", "estimate_errors", "accumulated_scores", "overlap_map", "pooled_spectrum", "save_image",
]  # fmt: skip


def singular_values(svd: Decomposition, *, log: bool = False) -> go.Figure:
    """Singular values, descending; `log` for a logarithmic axis."""
    require_kind(svd, Decomposition)
    figure = empty_figure("Singular values of all writes", "direction", f"singular value ({UNITS})", log_y=log)
    figure.add_trace(line(range(svd.rank), svd.singular_values, "σ", EDITED, hover="direction %{x}<br>σ = %{y:.4g}"))
    return figure


def cumulative_singular_values(svd: Decomposition) -> go.Figure:
    """Cumulative sum of the singular values against a logarithmic axis of directions."""
    require_kind(svd, Decomposition)
    sums = svd.singular_values.cpu().double().cumsum(0)
    figure = empty_figure(
        "Cumulative sum of singular values", "directions (log axis)", f"sum of singular values ({UNITS})", log_x=True
    )
    trace = line(range(1, svd.rank + 1), sums, "Σσ", EDITED, hover="first %{x} directions<br>Σσ = %{y:.4g} (%{customdata:.1%})")
    figure.add_trace(trace.update(customdata=(sums / sums[-1]).numpy() if len(sums) else None))
    return figure


def layer_spectra(layers: Sequence[Decomposition]) -> go.Figure:
    """Singular values of every layer's writes on a logarithmic axis, early layers dark and late ones bright."""
    figure = empty_figure("Singular values, layer by layer", "direction", f"singular value ({UNITS})", log_y=True)
    for colour, svd in zip(shades(len(layers)), layers, strict=True):
        hover = f"layer {svd.layer}<br>direction %{{x}}<br>σ = %{{y:.4g}}"
        figure.add_trace(line(range(svd.rank), svd.singular_values, f"layer {svd.layer}", colour, hover=hover))
    return figure.update_layout(showlegend=True)


def writer_map(svd: Decomposition, writes: Writes, direction: int = 0) -> go.Figure:
    """Who writes a direction: each site's and token's share of it (squared left singular vector)."""
    require_kind(svd, Decomposition)
    if svd.left.shape[:2] != writes.values.shape[:2]:
        raise ValueError(
            f"The decomposition is of {list(svd.left.shape[:2])} sites and positions, but these writes have "
            f"{list(writes.values.shape[:2])}; pass the writes that it was made from."
        )
    require_same_model(svd.source, writes.source, "The decomposition and the writes")
    labels = [f"{at}: {label(piece)}" for at, piece in zip(writes.positions.tolist(), _pieces(writes), strict=True)]
    shares = 100 * svd.writer_map(direction)
    title = f"Who writes direction {direction} (σ = {float(svd.singular_values[direction]):.3g})"
    hover = "%{y}<br>%{customdata}<br>%{z:.2f} %<extra></extra>"
    return heat_map(title, "position", shares, _columns(writes), writes.sites, "share (%)", hover, labels)


def probability(sweep: RankSweep) -> go.Figure:
    """Probability of the continuation against the number of kept directions, with the clean value as a line."""
    require_kind(sweep, RankSweep)
    figure = empty_figure("Generation probability", "kept directions", "probability of the continuation")
    figure.add_trace(line(sweep.ranks, sweep.measurement.log_prob.exp(), "clipped", EDITED, hover="k = %{x}<br>p = %{y:.4g}"))
    return with_clean(figure, sweep.measurement.against.log_prob.exp())


def surprise(sweep: RankSweep) -> go.Figure:
    """Surprise (−log-probability) of the continuation against the number of kept directions, with the clean value."""
    require_kind(sweep, RankSweep)
    figure = empty_figure("Surprise", "kept directions", "−log-probability of the continuation (nats)", log_y=True)
    figure.add_trace(line(sweep.ranks, -sweep.measurement.log_prob, "clipped", EDITED, hover="k = %{x}<br>%{y:.4g} nats"))
    return with_clean(figure, -sweep.measurement.against.log_prob)


def deltas(sweep: RankSweep) -> go.Figure:
    """Sizes of the attempted (orig_delta) and kept (kept_delta) writes against the number of kept directions."""
    require_kind(sweep, RankSweep)
    figure = empty_figure("Attempted and kept writes", "kept directions", f"root-mean-square write ({UNITS})")
    measured = sweep.measurement
    figure.add_trace(line(sweep.ranks, measured.orig_delta, "orig_delta", ATTEMPTED, hover="k = %{x}<br>attempted %{y:.4g}"))
    figure.add_trace(line(sweep.ranks, measured.kept_delta, "kept_delta", EDITED, hover="k = %{x}<br>kept %{y:.4g}"))
    return with_clean(figure, measured.against.orig_delta).update_layout(showlegend=True)


def delta_map(sweep: RankSweep, *, kept: bool = True) -> go.Figure:
    """Sizes of the writes of every site against the number of kept directions, relative to the clean run."""
    require_kind(sweep, RankSweep)
    measured, clean = sweep.measurement, sweep.measurement.against
    edited = measured.kept_deltas if kept else measured.orig_deltas
    word = "Kept" if kept else "Attempted"
    hover = "%{y}<br>k = %{x}<br>%{z:.3f} of clean<extra></extra>"
    relative, ranks = (edited / clean.orig_deltas).T, sweep.ranks.tolist()
    return heat_map(f"{word} writes by site", "kept directions", relative, ranks, measured.sites, "of clean", hover)


def direction_effects(ranking: Ranking) -> go.Figure:
    """Effect of removing each direction against its singular value, on logarithmic axes; negative effects by their size.

    Effects within the noise floor, which is drawn as a line, are grey. The title has Spearman's rank correlation.
    """
    require_kind(ranking, Ranking)
    effect, sizes = ranking.effect.double().numpy(), ranking.singular_values.double().numpy()
    correlation = f"<br>rank correlation {ranking.rank_correlation:.2f}" if len(sizes) > 2 else ""
    axes = (f"singular value ({UNITS})", "|effect| on the log-probability (nats)")
    figure = empty_figure(f"What each direction is worth{correlation}", *axes, log_x=True, log_y=True)
    noise = ranking.is_noise.numpy()
    groups = [("damage", EDITED, (effect > 0) & ~noise), ("gain", ATTEMPTED, (effect <= 0) & ~noise), ("noise", "#bbb", noise)]
    for name, colour, chosen in groups:
        figure.add_trace(
            scatter(len(sizes))(
                x=sizes[chosen],
                y=abs(effect[chosen]),
                customdata=chosen.nonzero()[0],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6},
                hovertemplate=f"direction %{{customdata}}: {name}<br>σ = %{{x:.4g}}<br>%{{y:.4g}} nats<extra></extra>",
            )
        )
    if ranking.noise_floor > 0:
        figure.add_hline(y=ranking.noise_floor, line={"color": CLEAN, "dash": "dot", "width": 1.2})
    return figure.update_layout(showlegend=True)


def race_of_orders(sweeps: Mapping[str, RankSweep]) -> go.Figure:
    """Surprise against the number of kept directions, for several orders of the same directions on one axis.

    Raises:
        ValueError: no sweeps, or sweeps of different models.
    """
    require_kind(sweeps, Mapping)
    if not sweeps:
        raise ValueError("There are no sweeps to race; give at least one, by the name of its order.")
    first = next(iter(sweeps.values()))
    figure = empty_figure("Race of the orders", "kept directions", "−log-probability of the continuation (nats)", log_y=True)
    for colour, (name, sweep) in zip(cycle(DISTINCT), sweeps.items(), strict=False):
        require_same_model(first.source, sweep.source, "The sweeps")
        hover = f"{label(name)}<br>k = %{{x}}<br>%{{y:.4g}} nats"
        figure.add_trace(line(sweep.ranks, -sweep.measurement.log_prob, label(name), colour, hover=hover))
    return with_clean(figure, -first.measurement.against.log_prob).update_layout(showlegend=True)


def margins(found: CriticalRank) -> go.Figure:
    """How far each rank that was tried is above or below the bar, around the crossings; the critical rank is marked."""
    require_kind(found, CriticalRank)
    figure = empty_figure("Critical rank", "kept directions", "above the bar" + (" (nats)" if "nats" in found.criterion else ""))
    ranks, tie = found.sweep.ranks, found.is_tie
    hover = "k = %{x}<br>%{y:.4g} above the bar"
    figure.add_trace(line(ranks, found.margins, "margin", EDITED, hover=hover).update(mode="lines+markers", marker={"size": 4}))
    figure.add_hline(y=0, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    high = max(1.0, float(found.margins.max()))
    figure.update_yaxes(range=[-3 * high, 1.3 * high])  # far below the bar the curve falls by hundreds of nats
    if found.rank is None:
        return figure
    figure.update_xaxes(range=[max(0, found.rank - len(found.sweep.order) // 4), len(found.sweep.order) + 1])
    figure.add_vline(x=found.rank, line={"color": ATTEMPTED, "width": 1.5})
    text = f"k = {found.rank} for {label(found.criterion)}; {len(found.crossings)} crossing(s), {int(tie.sum())} tie(s)"
    return figure.add_annotation(x=found.rank, y=1, yref="paper", text=text, showarrow=False, yanchor="bottom")


def overlap_map(found: Overlap, names: Sequence[str] | None = None) -> go.Figure:
    """Overlap of each pair of subspaces relative to random ones of the same ranks, and how many dimensions they share.

    Raises:
        ValueError: another number of names than of subspaces.
    """
    require_kind(found, Overlap)
    ranks = [round(rank) for rank in found.values.diagonal().tolist()]
    given = [f"subspace {i}" for i in range(len(ranks))] if names is None else names
    if len(given) != len(ranks):
        raise ValueError(f"`names` has {len(given)} entries for {len(ranks)} subspaces; give one for each.")
    labels = [f"{label(name)}<br>(rank {rank})" for name, rank in zip(given, ranks, strict=True)]
    ratio = found.ratio.masked_fill(torch.eye(len(ranks), dtype=torch.bool), torch.nan)
    figure = heat_map("Overlap relative to random subspaces", "", ratio, labels, labels, "× random", "")
    widest = max(0.05, float((ratio - 1).abs().nan_to_num().max()))
    pairs = [[(i, j) for j in range(len(ranks))] for i in range(len(ranks))]
    text = [["" if i == j else f"{ratio[i, j]:.3f}<br>{found.values[i, j]:.1f} shared" for i, j in row] for row in pairs]
    shared = "%{y} and %{x}<br>%{customdata:.2f} dimensions shared<br>%{z:.4f} × random<extra></extra>"
    figure.update_traces(text=text, texttemplate="%{text}", customdata=found.values.numpy(), hovertemplate=shared)
    figure.update_traces(colorscale="RdBu", reversescale=True, zmin=1 - widest, zmax=1 + widest)
    return figure.update_yaxes(title=None, autorange="reversed").update_xaxes(title=None, type="category")


def pooled_spectrum(found: Pool) -> go.Figure:
    """Singular values of the bases side by side, and the band that random subspaces of the same ranks give."""
    require_kind(found, Pool)
    figure = empty_figure("Singular values of all bases side by side", "direction", "singular value")
    places = list(range(len(found.singular_values)))
    band = [*found.random_high.tolist(), *found.random_low.flip(0).tolist()]
    figure.add_trace(
        go.Scatter(
            x=places + places[::-1],
            y=band,
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor="#cfcfcf",
            name="random band",
            hoverinfo="skip",
        )
    )
    figure.add_trace(line(places, found.random_mean, "random mean", CLEAN, hover="direction %{x}<br>random %{y:.4f}"))
    figure.add_trace(line(places, found.singular_values, "these bases", EDITED, hover="direction %{x}<br>σ = %{y:.4f}"))
    return figure.update_layout(showlegend=True)


def save_image(figure: go.Figure, path: str | PathLike[str]) -> None:
    """Save a figure as a static image (.png, .svg, .pdf), which needs kaleido and a Chrome beside it.

    Raises:
        RuntimeError: either is missing; with the line that installs it.
    """
    try:
        figure.write_image(path)
    except Exception as error:
        if not any(word in str(error).lower() for word in ("kaleido", "chrome")):
            raise
        raise RuntimeError(
            "Static images need kaleido and a Chrome: run `pip install 'mechsvd[images]'`, and `plotly_get_chrome` where no Chrome "
            "is installed; `figure.write_html(…)` needs neither."
        ) from error


def _pieces(writes: Writes) -> Sequence[str]:
    return writes.pieces or [f"[{token}]" for token in writes.tokens.tolist()]


def _columns(writes: Writes) -> list[int]:
    several = int(writes.task_index.max()) > 0  # positions repeat from text to text
    return list(range(len(writes.positions))) if several else writes.positions.tolist()
