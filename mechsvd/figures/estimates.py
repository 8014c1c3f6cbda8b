"""Figures of estimated effects next to those that were run."""

import plotly.graph_objects as go

from mechsvd.attribution.estimate_results import RankingEstimate
from mechsvd.figures.display import label
from mechsvd.figures.multiples import multiples
from mechsvd.figures.style import ATTEMPTED, CLEAN, EDITED, empty_figure, finish, scatter
from mechsvd.results import require_kind


@multiples
def estimated_effects(estimate: RankingEstimate) -> go.Figure:
    """Exact effect of each removal against its estimate; on the line, both are equal.

    The random sample is blue, what was run besides is orange. Directions that were not run lie on
    the line, hollow. The title has the rank correlation in the sample, with its interval.

    Args:
        estimate: one, or several by name, which are drawn side by side.

    Example:
        >>> ms.figures.estimated_effects(estimate).layout.xaxis.title.text
        'estimate on the log-probability (nats)'
    """
    require_kind(estimate, RankingEstimate)
    row = estimate.agreement(1).iloc[0]
    metric = label(estimate.metric).replace("log_prob", "log-probability")
    unit = f" ({label(estimate.unit)})" if estimate.unit else ""
    figure = empty_figure(
        f"Estimated effect of each removal, order {label(estimate.order)}<br>rank correlation "
        f"{row.spearman:.2f} ({row.spearman_low:.2f} to {row.spearman_high:.2f}) in a sample of "
        f"{row.sampled:.0f}",
        f"estimate on the {metric}{unit}",
        f"effect{unit}",
    )
    names = estimate.names
    guess, effect = estimate.estimate.numpy(), estimate.effect.numpy()
    groups = (
        ("not run", CLEAN, "circle-open", ~estimate.is_exact),
        ("run besides", ATTEMPTED, "circle", estimate.is_exact & ~estimate.is_sampled),
        ("random sample", EDITED, "circle", estimate.is_sampled),
    )
    for name, colour, symbol, chosen in groups:
        figure.add_trace(
            scatter(len(estimate))(
                x=guess[chosen.numpy()],
                y=effect[chosen.numpy()],
                customdata=[
                    f"{label(names[j])}<br>σ = {float(estimate.singular_values[j]):.4g}"
                    for j in chosen.nonzero().flatten().tolist()
                ],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6, "symbol": symbol},
                hovertemplate=f"{name}<br>direction %{{customdata}}<br>estimate %{{x:.4g}}"
                "<br>effect %{y:.4g}<extra></extra>",
            )
        )
    low, high = float(guess.min()), float(guess.max())
    line = {"color": CLEAN, "dash": "dot", "width": 1.2}
    figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line)
    return finish(figure)
