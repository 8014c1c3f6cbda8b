"""Sentences and numbers of the report, computed from the results."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mechsvd.attribution.scores import Attribution
from mechsvd.experiments.criteria import same_greedy_text
from mechsvd.experiments.ridge import RidgeSweep
from mechsvd.experiments.search import critical_rank_of
from mechsvd.experiments.sweeps import RankSweep
from mechsvd.model.sites import Site
from mechsvd.report.study import Comparison, Study, Text

NEAR = 1.0  # nats that count as close to the clean log-probability


def main_numbers(study: Study) -> dict[str, str]:
    """The main numbers of a study, each as text."""
    svd, writes, clean = study.pooled, study.writes, study.sweep.measurement.clean_run
    first = svd.left[:, writes.positions == 0, :1].square().sum()
    return {
        "tokens": f"{study.task.prompt_length} of the prompt, "
        f"{len(study.task.continuation)} scored",
        "writes": f"{len(writes)} ({len(writes.sites)} sites × {len(writes.tokens)} positions), "
        f"{svd.d_model} dimensions",
        "directions (numerical rank)": f"{svd.rank}",
        "largest singular value": f"{float(svd.singular_values[0]):.4g}",
        "directions for 90 % and 99 % of the squared size": f"{directions_for(study, 0.9)} and "
        f"{directions_for(study, 0.99)}",
        "site that wrote most of these 90 %": "layer {}, {:.0%}".format(
            *owner(study, directions_for(study, 0.9))
        ),
        "share of the first position in direction 0": f"{float(first):.1%}",
        "clean probability": f"{float(clean.log_prob.exp()):.4g} "
        f"({float(clean.log_prob):.4f} nats)",
        "clean size of a write (root mean square)": f"{float(clean.orig_delta):.4g}",
        "smallest rank from which all larger ones stay within 1 nat of clean": _or_none(
            lasting_rank(study.sweep, NEAR)
        ),
        "the same for 0.1 nat": _or_none(lasting_rank(study.sweep, 0.1)),
        "critical rank": _or_none(study.critical.rank),
        "critical rank for the same greedy text": _same_text_rank(study),
        "noise floor": f"{study.ranking.noise_floor:.1e} nats",
    }


def _same_text_rank(study: Study) -> str:
    if not study.sweep.measurement.clean_run.is_greedy.all():
        return "the continuation is not greedy text"
    return _or_none(critical_rank_of(study.sweep, criterion=same_greedy_text).rank)


def directions_for(study: Study, share: float) -> int:
    """Number of directions that carry this share of the squared size of all writes."""
    squares = study.pooled.singular_values.cpu().double().square()
    return int((squares.cumsum(0) / squares.sum() < share).sum()) + 1


def lasting_rank(sweep: RankSweep, nats: float) -> int | None:
    """Smallest rank from which all larger ones stay this close to clean, in log-probability.

    None if there is none.
    """
    near = (sweep.measurement.clean_run.log_prob - sweep.measurement.log_prob).abs() <= nats
    lasting = near.flip(0).long().cumprod(0).flip(0).bool()
    return int(sweep.ranks[lasting][0]) if lasting.any() else None


def spectrum(studies: Sequence[Study]) -> str:
    """How few directions carry most of the writes, and which site wrote them."""
    squares = [s.pooled.singular_values.cpu().double().square() for s in studies]
    shares = [round(100 * float(values[0] / values.sum())) for values in squares]
    few = _span(directions_for(s, 0.9) for s in studies)
    owners = [
        f"layer {site} wrote {share:.0%}"
        for site, share in (owner(s, directions_for(s, 0.9)) for s in studies)
    ]
    return (
        f"Here {few} of {_sizes(studies)} directions carry 90 % of the squared size of the writes; "
        f"direction 0 alone carries {_span(shares)} %. Of what these directions carry, "
        f"{_listed(studies, owners)}, one site of {len(studies[0].writes.sites)}."
    )


def owner(study: Study, rank: int) -> tuple[Site, float]:
    """The site that wrote most of the first directions, and its share of their squared size."""
    parts = (
        study.pooled.left[..., :rank].cpu().double()
        * study.pooled.singular_values[:rank].cpu().double()
    )
    shares = parts.square().sum(dim=(1, 2))
    return study.writes.sites[int(shares.argmax())], float(shares.max() / shares.sum())


def clipping(studies: Sequence[Study]) -> str:
    """From which rank on the clean log-probability is restored."""
    ranks = [lasting_rank(s.sweep, NEAR) for s in studies]
    return (
        f"Here every rank from {_listed(studies, ranks)} on stays within {NEAR:g} nat of the clean "
        "log-probability."
    )


def directions(studies: Sequence[Study]) -> str:
    """How damage and singular value are related."""
    rankings = [s.ranking for s in studies]
    correlation = _span((r.rank_correlation for r in rankings), ".2f")
    gains = _span(int(((r.effect < 0) & ~r.is_noise).sum()) for r in rankings)
    silent = _span(int(r.is_noise.sum()) for r in rankings)
    worst = max(studies, key=lambda s: float(s.ranking.effect.max()))
    most = int(worst.ranking.effect.argmax())
    return (
        f"Here the rank correlation of damage and singular value is {correlation}. Removing any "
        f"one of {gains} directions makes the text more probable; {silent} change it by no more "
        f"than rounding noise. The most needed one is direction {most} ({worst.name}: "
        f"{float(worst.ranking.effect[most]):.3g} nats)."
    )


def orders(studies: Sequence[Study]) -> str:
    """Which order needs the fewest directions."""
    needed = {}
    for order in studies[0].sweeps:
        ranks = [lasting_rank(s.sweeps[order], NEAR) for s in studies]
        needed[order] = sum(
            s.pooled.rank if r is None else r for r, s in zip(ranks, studies, strict=True)
        ) / len(studies)
    listed = ", ".join(
        f"{needed[order]:.0f} ({order})"
        for order in sorted(needed, key=lambda order: needed[order])
    )
    return (
        f"Here, to come within {NEAR:g} nat of clean and stay there, the orders need {listed} "
        "directions in the mean over prompts. The order by effect uses signed effects on the whole "
        "text, in which tokens cancel. So its place here does not say how well effects tell which "
        "directions are needed."
    )


def ridge(studies: Sequence[Study]) -> str:
    """How many effective directions ridge needs, compared with clipping."""
    clipped = [lasting_rank(s.sweep, NEAR) for s in studies]
    shrunk = [lasting_number(s.ridge, NEAR) for s in studies]
    pairs = [
        (s.name, a, b)
        for s, a, b in zip(studies, clipped, shrunk, strict=True)
        if a is not None and b is not None
    ]
    if not pairs:
        return (
            f"Here neither clipping nor ridge comes within {NEAR:g} nat of the clean "
            "log-probability and stays there."
        )
    listed = ", ".join(f"{b:.0f} where clipping needs {a} ({name})" for name, a, b in pairs)
    fewer = sum(b < a for _, a, b in pairs)
    return (
        f"Here, to come within {NEAR:g} nat of clean and stay there, ridge needs an effective "
        f"number of {listed}: fewer for {fewer} of {len(pairs)} prompts."
    )


def lasting_number(sweep: RidgeSweep, nats: float) -> float | None:
    """Smallest effective number of directions from which all larger ones stay this close to clean.

    None if there is none.
    """
    near = (sweep.measurement.clean_run.log_prob - sweep.measurement.log_prob).abs() <= nats
    order = sweep.effective_directions.argsort(descending=True)
    lasting = near[order].long().cumprod(0).bool()
    return float(sweep.effective_directions[order][lasting][-1]) if lasting.any() else None


def attribution(studies: Sequence[Study]) -> str:
    """How often each estimate is right, and how far the directions of each basis interact."""
    attributions = [s.attribution for s in studies]
    linear, quadratic = (
        _span((100 * share_within(a, name) for a in attributions), ".0f")
        for name in ("linear", "quadratic")
    )
    sums = {
        name: _span((float(a.bases[name].share.sum()) for a in attributions), ".2g")
        for name in attributions[0].bases
    }
    listed = ", ".join(f"{total} ({name})" for name, total in sums.items()).replace("-", "−")
    which = "all" if all(len(a) == len(a.vectors) for a in attributions) else "the largest"
    return (
        f"Here, in the Hessian basis, the quadratic estimate is within 10 % of the measured score "
        f"for {quadratic} % of the directions and the linear one for {linear} %. The measured "
        f"scores of {which} directions sum to {listed} times f(w) − f(0); directions that do not "
        "interact would give 1."
    )


def share_within(attribution: Attribution, estimate: str, tolerance: float = 0.1) -> float:
    """Share of the directions above the noise where an estimate's relative error is this small."""
    loud = ~attribution.is_noise
    near = attribution.error(estimate)[loud] <= tolerance
    return float(near.double().mean()) if loud.any() else 0.0


def critical_ranks(studies: Sequence[Study]) -> str:
    """The critical ranks, and how often the curves cross the clean value."""
    ranks = [s.critical.rank for s in studies]
    crossings = [len(s.critical.crossings) for s in studies]
    shape = (
        "once each"
        if set(crossings) == {1}
        else f"{_span(crossings)} times, so a larger rank can be worse"
    )
    return (
        f"Here it is {_listed(studies, ranks)} of {_sizes(studies)} directions. Every rank was "
        f"tried; the curves cross the clean probability {shape}."
    )


def texts(studies: Sequence[Study]) -> str:
    """For how many prompts the text from inside the subspace is the clean one."""
    reached = [s.texts[0] for s in studies if s.critical.rank is not None]
    same = sum(is_clean(text, 1) for text in reached)
    fewest = sum(is_clean(s.texts[0], len(s.texts[0].ranks) - 1) for s in studies)
    without = (
        f" ({len(studies) - len(reached)} prompts have none and keep all directions)"
        if len(reached) < len(studies)
        else ""
    )
    return (
        f"Here, from its own prompt, the greedy text of the critical rank is the clean one for "
        f"{same} of {len(reached)} prompts{without}, and that of the smallest rank shown for "
        f"{fewest} of {len(studies)}."
    )


def is_clean(text: Text, index: int) -> bool:
    """Whether a text from inside a subspace equals the clean one in every token."""
    return torch.equal(text.tasks[index].tokens, text.tasks[0].tokens)


def several(comparison: Comparison) -> str:
    """How much the subspaces of different prompts overlap, compared with random ones.

    It draws no conclusion from the overlap.
    """
    pairs = comparison.overlap.to_pandas()
    free = pairs.dropna(subset="z_score")
    if free.empty:
        return (
            "Here this test cannot tell: in each pair, one subspace is the whole space or has no "
            "directions, so it overlaps with the other as a random one does."
        )
    restriction = (
        ""
        if len(free) == len(pairs)
        else f" in the {len(free)} of {len(pairs)} pairs where neither is all or nothing"
    )
    return (
        f"Here two of them share {_span(free['overlap'], '.1f')} dimensions, "
        f"{_span(free['ratio'], '.3f')} times what random subspaces of the same ranks share"
        f"{restriction}. More than chance is no sign of shared content: writes of random tokens, "
        "and of untrained models, share more too."
    )


def smallest_angles(comparison: Comparison) -> dict[str, str]:
    """Smallest, median and largest principal angle of each pair of subspaces, in degrees."""
    return {" and ".join(pair): _degrees(angles) for pair, angles in comparison.angles.items()}


def _degrees(angles: Tensor) -> str:
    if len(angles) == 0:
        return "none: one of the two has no directions"
    low, middle, high = (float(angles.rad2deg().quantile(q)) for q in (0, 0.5, 1))
    return f"{low:.1f}°, {middle:.1f}°, {high:.1f}°"


def _sizes(studies: Sequence[Study]) -> str:
    return _span(s.pooled.rank for s in studies)


def _listed(studies: Sequence[Study], values: Sequence[int | str | None]) -> str:
    items = [f"{_or_none(value)} ({s.name})" for s, value in zip(studies, values, strict=True)]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _span(values: Iterable[int | float], form: str = "g") -> str:
    low, *_, high = sorted([*values] * 2)
    return (
        f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"
    )


def _or_none(value: int | str | None) -> str:
    return "none" if value is None else str(value)
