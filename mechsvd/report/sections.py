"""Sections of the report in the shortform's order: its results, this model's, and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mechsvd import figures
from mechsvd.experiments.contrast_results import Contrast
from mechsvd.experiments.heldout import OTHERS
from mechsvd.experiments.sweeps import RankSweep
from mechsvd.figures.cards import all_cards
from mechsvd.figures.display import escape, file_name
from mechsvd.figures.strips import strip
from mechsvd.figures.style import ATTEMPTED, EDITED
from mechsvd.report import findings, findings_together
from mechsvd.report.html import grid, heading, plot, table
from mechsvd.report.study import Comparison, Study
from mechsvd.report.top import top_of

MANY = 6  # with more prompts, each has a page of its own


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        what: what the section is about.
        original: what the shortform saw.
        measured: says what this model shows.
        figures: the figures of one prompt, by name.
        together: figures of all prompts, on one scale; where there are many, in place of theirs.
    """

    name: str
    title: str
    what: str
    original: str
    measured: Callable[[Sequence[Study]], str]
    figures: Callable[[Study], dict[str, Any]]
    together: Callable[[Sequence[Study]], dict[str, Any]] = lambda studies: {}


SECTIONS = (
    Section(
        "spectrum",
        "The spectrum of the writes",
        "Every vector that an attention or MLP layer adds to the residual stream is a write. The "
        "singular value decomposition of all writes gives directions, the largest first.",
        "The shortform drew this for Llama-3-8B, first for attention alone: 71 tokens × 32 layers, "
        "2272 writes of 4096 dimensions.",
        findings.spectrum,
        lambda s: {
            "singular_values": figures.singular_values(s.pooled),
            "singular_values_log": figures.singular_values(s.pooled, log=True),
            "cumulative_singular_values": figures.cumulative_singular_values(s.pooled),
            "layer_spectra": figures.layer_spectra(s.layers),
            "writers_of_direction_0": figures.writer_map(s.pooled, s.writes),
        },
        lambda studies: {
            "singular_values": _quiet(
                figures.singular_values({s.name: s.pooled for s in studies}, log=True), studies
            ),
            "writers_of_direction_0": figures.side_by_side(
                {s.name: figures.writer_map(s.pooled, s.writes) for s in studies}
            ),
        },
    ),
    Section(
        "clipping",
        "Clipping every write to the first k directions",
        "While the model runs, every write keeps only its part in the first <i>k</i> directions. "
        "This is done for every <i>k</i>, with the directions of all writes together, and with "
        "those of each site’s own writes.",
        "The shortform drew the probability of the text and the sizes of the attempted and kept "
        "writes against <i>k</i>, with one forward pass per point and no error bars.",
        findings.clipping,
        lambda s: {
            "probability": figures.probability(s.fits if s.elsewhere else s.sweep),
            "surprise": figures.surprise(s.fits if s.elsewhere else s.sweep),
            "bases": figures.race_of_orders(
                {"one basis for all sites": s.sweep, "a basis per site": s.by_site, **s.elsewhere},
                by="kl_divergence",
            ).update_layout(title_text="What the directions are fitted on"),
            "deltas": figures.deltas(s.sweep),
            "kept_deltas_by_site": figures.delta_map(s.sweep),
            "orig_deltas_by_site": figures.delta_map(s.sweep, kept=False),
            **({"metric": figures.metric(s.metric_sweep)} if s.metric_sweep else {}),
        },
        lambda studies: {
            "surprise": _quiet(figures.surprise({s.name: s.sweep for s in studies}), studies),
            "divergences": _lines({s.name: s.sweep for s in studies}, "One basis for all sites"),
            "divergences_by_site": _lines({s.name: s.by_site for s in studies}, "A basis per site"),
            **_delta_maps(studies),
        },
    ),
    Section(
        "directions",
        "One direction at a time",
        "Each direction alone is removed from every write. The shortform’s effect is the "
        "log-probability that the text loses: signed, and summed over tokens, which may cancel. The "
        "KL divergence of the predictions does not cancel.",
        "The shortform compared the damage of each direction of Llama-3-8B with its singular "
        "value.",
        findings.directions,
        lambda s: {
            "direction_divergences": figures.direction_effects(s.ranking, by="kl_divergence"),
            "direction_effects": figures.direction_effects(s.ranking),
            **(
                {"metric_effects": figures.direction_effects(s.metric_ranking)}
                if s.metric_ranking
                else {}
            ),
        },
        lambda studies: {
            f"direction_{name}": _quiet(
                figures.direction_effects({s.name: s.ranking for s in studies}, by), studies
            )
            for name, by in (("divergences", "kl_divergence"), ("effects", "effect"))
        },
    ),
    Section(
        "orders",
        "Other orders",
        "The sweep is repeated with the directions in other orders: by the KL divergence that "
        "removing them causes, by a compromise of this and the singular value (the mean of the two "
        "places), by the signed effect, at random, and the smallest first.",
        "The shortform repeated the sweep in other orders of the directions.",
        findings.orders,
        lambda s: {
            "race_of_orders_by_divergence": figures.race_of_orders(_race(s), by="kl_divergence"),
            "race_of_orders": figures.race_of_orders(_race(s)),
        },
        lambda studies: {
            "lasting_ranks_of_orders": strip(
                findings.needed_by_order(studies),
                [s.name for s in studies],
                "Directions that each order needs",
                f"lasting rank for {findings.NEAR:g} nat of KL divergence",
            )
        },
    ),
    Section(
        "critical",
        "The critical rank",
        "The critical rank is the smallest number of directions with which the text is at least as "
        "probable as in the clean model. Tokens may cancel there: a lucky crossing. A lasting rank "
        "is one from which every larger rank stays within a bar.",
        "In Llama-3-8B the shortform found "
        "1886, 3329, 2696 and 2518 of 4096 directions for its four prompts.",
        findings.critical_ranks,
        lambda s: {"critical_rank": figures.margins(s.critical)},
        lambda studies: {
            "critical_ranks": _quiet(
                figures.margins({s.name: s.critical for s in studies}), studies
            )
        },
    ),
    Section(
        "ridge",
        "Ridge instead of clipping",
        "Instead of keeping or dropping a direction, this shrinks every write by s²/(s² + α) "
        "along it, as in ridge regression. The axis is Σ s²/(s² + α), the effective number of "
        "directions.",
        "The shortform wished for “something akin to L2 regularization when projecting away "
        "components”.",
        findings.ridge,
        lambda s: {"clip_and_ridge": figures.clip_and_ridge(s.sweep, s.ridge)},
        lambda studies: {
            "clip_and_ridge": _quiet(
                figures.clip_and_ridge(
                    {s.name: s.sweep for s in studies}, {s.name: s.ridge for s in studies}
                ),
                studies,
            )
        },
    ),
    Section(
        "attribution",
        "Attribution in a Hessian eigenbasis",
        "Let <i>f</i> be the probability of the text, as a function of the gains <i>w</i> of all "
        "directions (1: the model as it is; 0: no writes). For each eigenvector <i>u</i> of the "
        "Hessian, the part of <i>w</i> along <i>u</i> is removed. The cost, f(w) − f(w − u uᵀw), "
        "is compared with the linear estimate (u·w)(u·∇f) and the quadratic one, linear − "
        "½λ(u·w)². Three other bases are scored in the same way: the singular directions "
        "themselves, the eigenvectors of the gradients’ second moment over all prompts and tokens, "
        "and random directions.",
        "The shortform wished to explain an output in a basis whose parts are as independent as "
        "possible. It expected the linear estimate to fail for large steps and the measured one to "
        "be right.",
        findings.attribution,
        lambda s: {
            "hessian_spectrum": figures.hessian_spectrum(s.attribution),
            "estimate_errors": figures.estimate_errors(s.attribution),
            "accumulated_scores": figures.accumulated_scores(s.attribution.bases),
        },
        lambda studies: {
            "sums_of_scores": strip(
                findings.sums_of_scores(studies),
                [s.name for s in studies],
                "What the scores of each basis sum to",
                "sum of the scores (share of f(w) − f(0))",
                reference=1.0,
            )
        },
    ),
)


def prompt_text(study: Study) -> str:
    """A prompt and its continuation, as HTML."""
    prompt, continuation = study.task.text()
    return (
        f'<p class="text" id="{file_name(study.name)}"><bdi class="name">{escape(study.name)}</bdi>'
        f"{escape(prompt)}<b>{escape(continuation)}</b></p>"
    )


def section(part: Section, studies: Sequence[Study]) -> str:
    """One of `SECTIONS` as HTML: figures of all prompts together, and those of the chosen one."""
    plots = []
    if len(studies) > 1:
        together = part.together(studies)
        plots = [
            plot(f"all-{name}", "", figure, wide=figure.layout.coloraxis.cmin is not None)
            for name, figure in together.items()
        ]
    if len(studies) <= MANY:
        plots += [
            plot(name, s.name, figure) for s in studies for name, figure in part.figures(s).items()
        ]
    return heading(part.name, part.title, part.what, part.original, part.measured(studies)) + grid(
        plots
    )


def one_prompt(study: Study) -> str:
    """All figures and texts of one prompt, for a page of its own."""
    parts = [section(part, [study]) for part in SECTIONS if part.name in study.choices]
    written = texts([study]) if "texts" in study.choices else ""
    return f"{prompt_text(study)}{''.join(parts)}{described([study])}{written}"


def told(studies: Sequence[Study], comparison: Comparison | None, contrast: Contrast | None) -> str:
    """The first section: what was found, and what could not be told."""
    top = top_of(studies, comparison, contrast)
    found = "".join(
        f"<li{'' if one.is_told else ' class=untold'}>{escape(one.sentence)}</li>"
        for one in top.found
    )
    untold = "".join(f"<li>{escape(clause)}</li>" for clause in top.untold)
    return (
        f'<h2 id="told">What was found</h2><ol class="told">{found}</ol>'
        f"<h3>What could not be told</h3>{f'<ul>{untold}</ul>' if untold else '<p>Every test told.</p>'}"
        f'<p class="original">{escape(top.how)}</p>{_tests(comparison)}'
    )


def _tests(comparison: Comparison | None) -> str:
    """All questions that were tested against random tokens, as a table."""
    if comparison is None or comparison.random_texts is None:
        return ""
    rows = comparison.random_texts.to_pandas()
    columns = ["texts", "random_texts", "difference", "low", "high", "p_family"]
    cells = {
        row["question"]: [*(f"{row[name]:.3g}" for name in columns), row["verdict"]]
        for row in rows.to_dict("records")
    }
    head = ["", "texts", "random tokens", "difference", "from", "to", "p", "texts have"]
    whole = table(cells, head)
    return (
        f"<details><summary>All {len(cells)} tests against random tokens</summary>{whole}</details>"
    )


def special(contrast: Contrast) -> str:
    """Which directions are special to a kind of text: the question that the shortform asked."""
    top = heading(
        "special",
        "Directions special to a kind of text",
        "What do directions special to a kind of text cost its texts, and those of other kinds? They "
        "come from some of its texts, by the eigenvectors of its writes’ "
        "second moment relative to that of the other kinds. They are removed from texts that they "
        "had not seen.",
        "The shortform looked for dimensions general to all texts and special to each in the "
        "singular vectors of all bases side by side, and saw none.",
        findings_together.special(contrast),
    )
    maps = {
        f"{method} directions": figures.contrast_map(contrast, method)
        for method in ("special", "singular")
    }
    joined = figures.side_by_side(maps).update_layout(height=420)
    joined.update_layout(title_text=f"Removing {contrast.k} directions of a group")
    return top + grid([plot("contrast_special", "", joined, wide=True)])


def _race(study: Study) -> dict[str, RankSweep]:
    """The orders of a prompt's own directions, and the directions of other prompts."""
    return study.sweeps | {
        f"{name}, by singular value": sweep
        for name, sweep in study.elsewhere.items()
        if name == OTHERS
    }


def _quiet(figure: Any, studies: Sequence[Any]) -> Any:
    """A figure of many lines: thin, in one colour, without clean values; hovering names them."""
    if len(studies) <= MANY:
        return figure
    for trace in figure.data:
        trace.opacity = 0.4
        if trace.mode == "markers":
            trace.marker.update(color=EDITED, size=3)
        else:
            trace.mode = "lines"
            trace.line.update(color=ATTEMPTED if trace.line.dash == "dot" else EDITED, width=1)
    figure.layout.shapes = ()
    return figure.update_layout(showlegend=False)


def _delta_maps(studies: Sequence[Study]) -> dict[str, Any]:
    """The sizes of writes by site, of all texts on one scale."""
    sweeps = {s.name: s.sweep for s in studies}
    return {
        f"{name}_deltas_by_site": figures.delta_map(sweeps, kept=name == "kept")
        for name in ("kept", "orig")
    }


def _lines(sweeps: dict[str, RankSweep], title: str) -> Any:
    figure = figures.race_of_orders(sweeps, by="kl_divergence")
    return _quiet(figure.update_layout(title_text=title), [*sweeps])


def described(studies: Sequence[Study]) -> str:
    """Cards of directions; nothing where there are none."""
    cards = [s for s in studies if s.cards is not None]
    if not cards:
        return ""
    top = heading(
        "cards",
        "What single directions are",
        "A card for the directions with the largest singular values, and for those that cost most "
        "KL divergence when they are removed: the tokens that they support, read off the weights, "
        "by the derivative at the text and measured; the sites, heads and neurons that write them; "
        "and where.",
        "The shortform ranked directions by what they cost, and did not ask what they say.",
        findings.described(cards),
    )
    if len(studies) > MANY:
        return top
    return top + "".join(
        f'<div data-prompt="{file_name(study.name)}"><h3>{escape(study.name)}</h3>'
        f"{all_cards(study.cards)}</div>"
        for study in cards
        if study.cards
    )


def texts(studies: Sequence[Study]) -> str:
    """The texts from inside the subspaces, next to the clean texts."""
    top = heading(
        "texts",
        "Text from inside the subspace",
        "Greedy text while every write is clipped to the critical rank or to fewer directions. It "
        "starts from the same prompt, from another one and from no prompt, and is at most as long "
        "as the continuation. Green text equals the clean model's text in every token.",
        "The shortform let Llama-3-8B write from inside these subspaces.",
        findings.texts(studies),
    )
    if len(studies) > MANY:
        return top
    return top + "\n".join(_written(s) for s in studies)


def _written(study: Study) -> str:
    heads = "".join(f"<th>{escape(text.start)}</th>" for text in study.texts)
    prompts = "".join(
        f'<td class="start">{escape(text.tasks[0].text()[0])}</td>' for text in study.texts
    )
    rows = [f"<tr><th>{escape(study.name)}</th>{heads}</tr><tr><th>prompt</th>{prompts}</tr>"]
    for i, rank in enumerate(study.texts[0].ranks):
        cells = "".join(
            f"<td{' class=same' if i and findings.is_clean(text, i) else ''}>"
            f"<div>{escape(text.tasks[i].text()[1])}</div></td>"
            for text in study.texts
        )
        label = (
            "clean"
            if rank is None
            else f"k = {rank}{' (critical)' if rank == study.critical.rank else ''}"
        )
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    return f'<table class="written">{"".join(rows)}</table>'


def held_out(comparison: Comparison) -> str:
    """Directions that a text had no part in, next to its own."""
    top = heading(
        "held-out",
        "Held-out texts",
        "Where nothing else is said, the figures above use directions of the very text that they "
        "measure. Here the directions also come from other prompts, from one other prompt, or at "
        "random. Lines are means over the prompts, bands 95 % intervals of the means, from "
        "five prompts on.",
        "The shortform measured each prompt with its own directions.",
        findings_together.held_out(comparison),
    )
    found = comparison.held_out
    summary = found.summary()
    columns = {name: [_cell(value) for value in summary[name]] for name in summary.columns}
    return top + grid([plot("held_out", "", figures.held_out(found))]) + table(columns)


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def several(comparison: Comparison) -> str:
    """The subspaces of several prompts, compared with each other and with random ones."""
    top = heading(
        "prompts",
        "The subspaces of several prompts",
        "The subspaces of the critical ranks: how many dimensions each pair shares (‖AᵀB‖²), "
        "compared with random subspaces of the same ranks, and the spectrum of all bases side by "
        "side. If the ranks of two subspaces sum to more than the dimension, they must share "
        "directions, even if they are random.",
        "The shortform found that the subspaces of its four prompts overlap as random ones do, to "
        "about 1 %.",
        findings_together.several(comparison),
    )
    plots = {
        "overlap_anchors": figures.overlap_anchors(comparison.anchors),
        "overlap_map": figures.overlap_map(comparison.overlap, comparison.names),
        "pooled_spectrum": figures.pooled_spectrum(comparison.pool),
    }
    if len(comparison.names) > MANY:
        return top + grid([plot(name, "", figure) for name, figure in plots.items()])
    angles = {"principal angles": ["smallest, median, largest"]}
    angles |= {
        pair: [numbers] for pair, numbers in findings_together.smallest_angles(comparison).items()
    }
    return top + grid([plot(name, "", figure) for name, figure in plots.items()]) + table(angles)
