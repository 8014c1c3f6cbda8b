"""Results → plotly figures, one function each; nothing is shown, nothing global is set, no model is touched."""

from collections.abc import Mapping, Sequence
from html import escape
from math import log10
from os import PathLike
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

from mechsvd.decomposition import Decomposition
from mechsvd.ranking import Ranking
from mechsvd.results import require_same_model
from mechsvd.sweeps import RankSweep
from mechsvd.writes import Writes

MANY_POINTS = 5000  # above this, draw with WebGL
UNITS = "residual-stream units"
EDITED, ATTEMPTED, CLEAN = "#1f5fa8", "#d1662a", "#5a5a5a"


def singular_values(svd: Decomposition, *, log: bool = False) -> go.Figure:
    """Singular values, descending; `log` for a logarithmic axis."""
    figure = _figure("Singular values of all writes", "direction", f"singular value ({UNITS})", log_y=log)
    figure.add_trace(_line(_count_from_one(svd), svd.singular_values, "σ", EDITED, hover="direction %{x}<br>σ = %{y:.4g}"))
    return figure


def cumulative_singular_values(svd: Decomposition) -> go.Figure:
    """Cumulative sum of the singular values against a logarithmic axis of directions."""
    sums = svd.singular_values.cpu().double().cumsum(0)
    figure = _figure("Cumulative sum of singular values", "directions (log axis)", f"sum of singular values ({UNITS})", log_x=True)
    trace = _line(_count_from_one(svd), sums, "Σσ", EDITED, hover="first %{x} directions<br>Σσ = %{y:.4g} (%{customdata:.1%})")
    figure.add_trace(trace.update(customdata=(sums / sums[-1]).numpy() if len(sums) else None))
    return figure


def layer_spectra(layers: Sequence[Decomposition]) -> go.Figure:
    """Singular values of every layer's writes on a logarithmic axis, early layers dark and late ones bright."""
    figure = _figure("Singular values, layer by layer", "direction", f"singular value ({UNITS})", log_y=True)
    for colour, svd in zip(_shades(len(layers)), layers, strict=True):
        hover = f"layer {svd.layer}<br>direction %{{x}}<br>σ = %{{y:.4g}}"
        figure.add_trace(_line(_count_from_one(svd), svd.singular_values, f"layer {svd.layer}", colour, hover=hover))
    return figure.update_layout(showlegend=True)


def writer_map(svd: Decomposition, writes: Writes, direction: int = 0) -> go.Figure:
    """Who writes a direction: each site's and token's share of it (squared left singular vector)."""
    if svd.left.shape[:2] != writes.values.shape[:2]:
        raise ValueError(
            f"The decomposition is of {list(svd.left.shape[:2])} sites and positions, but these writes have "
            f"{list(writes.values.shape[:2])}; pass the writes that it was made from."
        )
    require_same_model(svd.source, writes.source, "The decomposition and the writes")
    labels = [f"{at}: {escape(piece)}" for at, piece in zip(writes.positions.tolist(), _pieces(writes), strict=True)]
    shares = 100 * svd.writer_map(direction)
    title = f"Who writes direction {direction + 1} (σ = {float(svd.singular_values[direction]):.3g})"
    hover = "%{y}<br>%{customdata}<br>%{z:.2f} %<extra></extra>"
    return _heat_map(title, "position", shares, _columns(writes), writes.sites, "share (%)", hover, labels)


def probability(sweep: RankSweep) -> go.Figure:
    """Probability of the continuation against the number of kept directions, with the clean value as a line."""
    figure = _figure("Generation probability", "kept directions", "probability of the continuation")
    figure.add_trace(_line(sweep.ranks, sweep.measurement.log_prob.exp(), "clipped", EDITED, hover="k = %{x}<br>p = %{y:.4g}"))
    return _with_clean(figure, _clean(sweep).log_prob.exp())


def surprise(sweep: RankSweep) -> go.Figure:
    """Surprise (−log-probability) of the continuation against the number of kept directions, with the clean value."""
    figure = _figure("Surprise", "kept directions", "−log-probability of the continuation (nats)", log_y=True)
    figure.add_trace(_line(sweep.ranks, -sweep.measurement.log_prob, "clipped", EDITED, hover="k = %{x}<br>%{y:.4g} nats"))
    return _with_clean(figure, -_clean(sweep).log_prob)


def deltas(sweep: RankSweep) -> go.Figure:
    """Sizes of the attempted (orig_delta) and kept (kept_delta) writes against the number of kept directions."""
    figure = _figure("Attempted and kept writes", "kept directions", f"root-mean-square write ({UNITS})")
    measured = sweep.measurement
    figure.add_trace(_line(sweep.ranks, measured.orig_delta, "orig_delta", ATTEMPTED, hover="k = %{x}<br>attempted %{y:.4g}"))
    figure.add_trace(_line(sweep.ranks, measured.kept_delta, "kept_delta", EDITED, hover="k = %{x}<br>kept %{y:.4g}"))
    return _with_clean(figure, _clean(sweep).orig_delta).update_layout(showlegend=True)


def delta_map(sweep: RankSweep, *, kept: bool = True) -> go.Figure:
    """Sizes of the writes of every site against the number of kept directions, relative to the clean run."""
    measured, clean = sweep.measurement, _clean(sweep)
    edited = measured.kept_deltas if kept else measured.orig_deltas
    word = "Kept" if kept else "Attempted"
    hover = "%{y}<br>k = %{x}<br>%{z:.3f} of clean<extra></extra>"
    relative, ranks = (edited / clean.orig_deltas).T, sweep.ranks.tolist()
    return _heat_map(f"{word} writes by site", "kept directions", relative, ranks, measured.sites, "of clean", hover)


def direction_effects(ranking: Ranking) -> go.Figure:
    """Effect of removing each direction against its singular value, on logarithmic axes; negative effects by their size.

    Effects within the noise floor, which is drawn as a line, are grey. The title has Spearman's rank correlation.
    """
    from scipy.stats import spearmanr

    effect, sizes = ranking.effect.double().numpy(), ranking.singular_values.double().numpy()
    correlation = f", rank correlation {spearmanr(sizes, effect).statistic:.2f}" if len(sizes) > 2 else ""
    axes = (f"singular value ({UNITS})", "|effect| on the log-probability (nats)")
    figure = _figure(f"What each direction is worth{correlation}", *axes, log_x=True, log_y=True)
    noise = ranking.is_noise.numpy()
    groups = [("damage", EDITED, (effect > 0) & ~noise), ("gain", ATTEMPTED, (effect <= 0) & ~noise), ("noise", "#bbb", noise)]
    for name, colour, chosen in groups:
        figure.add_trace(
            (go.Scattergl if len(sizes) > MANY_POINTS else go.Scatter)(
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
    if not sweeps:
        raise ValueError("There are no sweeps to race; give at least one, by the name of its order.")
    first = next(iter(sweeps.values()))
    figure = _figure("Race of the orders", "kept directions", "−log-probability of the continuation (nats)", log_y=True)
    for colour, (name, sweep) in zip(_shades(len(sweeps)), sweeps.items(), strict=True):
        require_same_model(first.source, sweep.source, "The sweeps")
        hover = f"{name}<br>k = %{{x}}<br>%{{y:.4g}} nats"
        figure.add_trace(_line(sweep.ranks, -sweep.measurement.log_prob, name, colour, hover=hover))
    return _with_clean(figure, -_clean(first).log_prob).update_layout(showlegend=True)


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


def _figure(title: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> go.Figure:
    axes = {"showline": True, "linecolor": "#999", "gridcolor": "#eee", "zeroline": False, "exponentformat": "power"}
    return go.Figure(
        layout={
            "template": "plotly_white",
            "title": {"text": title, "font": {"size": 16}},
            "xaxis": {"title": {"text": x}, "type": "log" if log_x else "linear", **axes},
            "yaxis": {"title": {"text": y}, "type": "log" if log_y else "linear", **axes},
            "margin": {"l": 70, "r": 30, "t": 50, "b": 55},
            "showlegend": False,
        }
    )


def _line(x: Any, y: Tensor, name: str, colour: str, *, hover: str) -> Any:
    draw = go.Scattergl if len(y) > MANY_POINTS else go.Scatter
    marker = {"size": 4} if len(y) <= 40 else None
    mode = "lines+markers" if marker else "lines"
    values = y.cpu().double().numpy()
    line = {"color": colour, "width": 1.8}
    return draw(x=_numbers(x), y=values, name=name, mode=mode, marker=marker, line=line, hovertemplate=hover + "<extra></extra>")


def _heat_map(title: str, x: str, z: Tensor, columns: Any, sites: Any, unit: str, hover: str, labels: Any = None) -> go.Figure:
    figure = _figure(title, x, "site").update_yaxes(type="category")
    figure.add_trace(
        go.Heatmap(
            x=columns,
            y=[str(site) for site in sites],
            z=z.cpu().double().numpy(),
            customdata=None if labels is None else [labels] * len(sites),
            colorscale="Viridis",
            colorbar={"title": {"text": unit}},
            hovertemplate=hover,
        )
    )
    return figure


def _with_clean(figure: go.Figure, value: Tensor) -> go.Figure:
    clean = float(value)
    figure.add_hline(y=clean, line={"color": CLEAN, "dash": "dash", "width": 1.2})
    # a shape has no legend entry and no hover, so the number stands beside it
    return figure.add_annotation(
        x=1, xref="paper", y=_on_axis(figure, clean), text=f"clean {clean:.4g}", showarrow=False, xanchor="right", yanchor="bottom"
    )


def _on_axis(figure: go.Figure, value: float) -> float:
    # plotly wants the logarithm for annotations on logarithmic axes, but not for shapes
    return log10(value) if figure.layout.yaxis.type == "log" and value > 0 else value


def _clean(sweep: RankSweep) -> Any:
    if sweep.measurement.clean is None:
        raise ValueError("This sweep holds no clean run, so there is nothing to compare with; make it by `sweep_rank`.")
    return sweep.measurement.clean


def _count_from_one(svd: Decomposition) -> range:
    return range(1, svd.rank + 1)


def _numbers(x: Any) -> list[int]:
    return x.tolist() if isinstance(x, Tensor) else list(x)


def _pieces(writes: Writes) -> Sequence[str]:
    return writes.pieces or [f"[{token}]" for token in writes.tokens.tolist()]


def _columns(writes: Writes) -> list[int]:
    several = int(writes.task_index.max()) > 0  # positions repeat from text to text
    return list(range(len(writes.positions))) if several else writes.positions.tolist()


def _shades(count: int) -> list[str]:
    return sample_colorscale("Viridis", [i / max(1, count - 1) * 0.9 for i in range(count)])
