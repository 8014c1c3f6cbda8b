"""What the experiment shows, in sentences and numbers: each sentence of the report is computed here."""

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

NEAR = 1.0  # nats: what counts as close to the clean log-probability


def main_numbers(found: Study) -> dict[str, str]:
    """The numbers that a reader looks for first, each as text."""
    svd, writes, clean = found.pooled, found.writes, found.sweep.measurement.clean_run
    first = svd.left[:, writes.positions == 0, :1].square().sum()
    return {
        "tokens": f"{found.task.prompt_length} of the prompt, {len(found.task.continuation)} scored",
        "writes": f"{len(writes)} ({len(writes.sites)} sites × {len(writes.tokens)} positions), {svd.d_model} dimensions",
        "directions (numerical rank)": f"{svd.rank}",
        "largest singular value": f"{float(svd.singular_values[0]):.4g}",
        "directions for 90 % and 99 % of the squared size": f"{directions_for(found, 0.9)} and {directions_for(found, 0.99)}",
        "site that wrote most of the first of these": "layer {}, {:.0%}".format(
            *owner(found, directions_for(found, 0.9))
        ),
        "share of the first position in direction 0": f"{float(first):.1%}",
        "clean probability": f"{float(clean.log_prob.exp()):.4g} ({float(clean.log_prob):.4f} nats)",
        "clean size of a write (root mean square)": f"{float(clean.orig_delta):.4g}",
        "fewest directions from which all ranks stay within 1 nat of clean": _or_none(
            lasting_rank(found.sweep, NEAR)
        ),
        "the same for 0.1 nat": _or_none(lasting_rank(found.sweep, 0.1)),
        "critical rank": _or_none(found.critical.rank),
        "critical rank for the same greedy text": _same_text_rank(found),
        "noise floor": f"{found.ranking.noise_floor:.1e} nats",
    }


def _same_text_rank(found: Study) -> str:
    if not found.sweep.measurement.clean_run.is_greedy.all():
        return "the continuation is not greedy text"
    return _or_none(critical_rank_of(found.sweep, criterion=same_greedy_text).rank)


def directions_for(found: Study, share: float) -> int:
    """How many directions carry this share of the squared size of all writes."""
    squares = found.pooled.singular_values.cpu().double().square()
    return int((squares.cumsum(0) / squares.sum() < share).sum()) + 1


def lasting_rank(sweep: RankSweep, nats: float) -> int | None:
    """The smallest rank from which all larger ones stay this near to the clean log-probability; None where none does."""
    near = (sweep.measurement.clean_run.log_prob - sweep.measurement.log_prob).abs() <= nats
    lasting = near.flip(0).long().cumprod(0).flip(0).bool()
    return int(sweep.ranks[lasting][0]) if lasting.any() else None


def spectrum(studies: Sequence[Study]) -> str:
    """How few directions hold most of the writes, and whose writes those are."""
    squares = [s.pooled.singular_values.cpu().double().square() for s in studies]
    few = _span(directions_for(s, 0.9) for s in studies)
    owners = [
        f"layer {site} wrote {share:.0%}"
        for site, share in (owner(s, directions_for(s, 0.9)) for s in studies)
    ]
    return (
        f"Here {few} of {_sizes(studies)} directions carry 90 % of the squared size of the writes; direction 0 alone carries "
        f"{_span(round(100 * float(each[0] / each.sum())) for each in squares)} %. Of what these directions carry, "
        f"{_listed(studies, owners)}, so that they say more of this one site of {len(studies[0].writes.sites)} than of all."
    )


def owner(found: Study, rank: int) -> tuple[Site, float]:
    """The site that wrote most of what the first directions carry, and its share of their squared size."""
    parts = (
        found.pooled.left[..., :rank].cpu().double()
        * found.pooled.singular_values[:rank].cpu().double()
    )
    shares = parts.square().sum(dim=(1, 2))
    return found.writes.sites[int(shares.argmax())], float(shares.max() / shares.sum())


def clipping(studies: Sequence[Study]) -> str:
    """From where on the text is back."""
    ranks = [lasting_rank(s.sweep, NEAR) for s in studies]
    return f"Here every rank from {_listed(studies, ranks)} on stays within {NEAR:g} nat of the clean log-probability."


def directions(studies: Sequence[Study]) -> str:
    """How damage and singular value go together."""
    rankings = [s.ranking for s in studies]
    correlation = _span((r.rank_correlation for r in rankings), ".2f")
    gains = _span(int(((r.effect < 0) & ~r.is_noise).sum()) for r in rankings)
    silent = _span(int(r.is_noise.sum()) for r in rankings)
    worst = max(studies, key=lambda s: float(s.ranking.effect.max()))
    most = int(worst.ranking.effect.argmax())
    return (
        f"Here the rank correlation of the two is {correlation}; removing any one of {gains} directions makes the text more "
        f"probable, {silent} change it by no more than rounding does, and the most needed one is direction {most} ({worst.name}: "
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
        f"Here, to come within {NEAR:g} nat of clean and stay there, it takes {listed} directions in the mean over prompts. The "
        "order by effect is by signed effects on the whole text, in which tokens cancel, so its place here does not say how well "
        "effects tell which directions are needed."
    )


def ridge(studies: Sequence[Study]) -> str:
    """How many effective directions ridge needs where clipping needs so many."""
    clipped = [lasting_rank(s.sweep, NEAR) for s in studies]
    shrunk = [lasting_number(s.ridge, NEAR) for s in studies]
    pairs = [
        (s.name, a, b)
        for s, a, b in zip(studies, clipped, shrunk, strict=True)
        if a is not None and b is not None
    ]
    if not pairs:
        return f"Here neither clipping nor ridge comes within {NEAR:g} nat of the clean log-probability and stays there."
    listed = ", ".join(f"{b:.0f} where clipping takes {a} ({name})" for name, a, b in pairs)
    fewer = sum(b < a for _, a, b in pairs)
    return (
        f"Here, to come within {NEAR:g} nat of clean and stay there, ridge takes an effective number of {listed}: fewer for "
        f"{fewer} of {len(pairs)} prompts."
    )


def lasting_number(sweep: RidgeSweep, nats: float) -> float | None:
    """The smallest effective number of directions from which all larger ones stay this near to clean; None where none does."""
    near = (sweep.measurement.clean_run.log_prob - sweep.measurement.log_prob).abs() <= nats
    order = sweep.effective_directions.argsort(descending=True)
    lasting = near[order].long().cumprod(0).bool()
    return float(sweep.effective_directions[order][lasting][-1]) if lasting.any() else None


def attribution(studies: Sequence[Study]) -> str:
    """Which estimate is right how often, and how far the components of each basis do each other's work."""
    found = [s.attribution for s in studies]
    linear, quadratic = (
        _span((100 * share_within(each, name) for each in found), ".0f")
        for name in ("linear", "quadratic")
    )
    sums = {
        name: _span((float(each.bases[name].share.sum()) for each in found), ".2g")
        for name in found[0].bases
    }
    listed = ", ".join(f"{total} ({name})" for name, total in sums.items()).replace("-", "−")
    which = "all" if all(len(each) == len(each.vectors) for each in found) else "the largest"
    return (
        f"Here, in the Hessian basis, the quadratic estimate is within 10 % of the measured score for {quadratic} % of the "
        f"components and the linear one for {linear} %. The measured scores of {which} components sum to {listed} times "
        "f(w) − f(0), where components that do not interact would give 1."
    )


def share_within(found: Attribution, estimate: str, tolerance: float = 0.1) -> float:
    """For which share of the components above the noise an estimate is this near to the measured score, relatively."""
    loud = ~found.is_noise
    return float((found.error(estimate)[loud] <= tolerance).double().mean()) if loud.any() else 0.0


def critical_ranks(studies: Sequence[Study]) -> str:
    """The critical ranks, and how often the curves cross the clean value."""
    ranks, crossings = (
        [s.critical.rank for s in studies],
        [len(s.critical.crossings) for s in studies],
    )
    shape = (
        "once each"
        if set(crossings) == {1}
        else f"{_span(crossings)} times, so that a larger rank can be worse"
    )
    return (
        f"Here it is {_listed(studies, ranks)} of {_sizes(studies)} directions; every rank was tried, and the curves cross the "
        f"clean probability {shape}."
    )


def texts(studies: Sequence[Study]) -> str:
    """How much of the clean text comes from inside the subspaces."""
    reached = [s.texts[0] for s in studies if s.critical.rank is not None]
    same = sum(is_clean(text, 1) for text in reached)
    fewest = sum(is_clean(s.texts[0], len(s.texts[0].ranks) - 1) for s in studies)
    without = (
        f" ({len(studies) - len(reached)} prompts have none, and all directions stand for it)"
        if len(reached) < len(studies)
        else ""
    )
    return (
        f"Here the critical rank's greedy text from its own prompt is the clean one for {same} of {len(reached)} prompts{without}, "
        f"and that of the smallest rank shown for {fewest} of {len(studies)}."
    )


def is_clean(text: Text, index: int) -> bool:
    """Whether a text from inside a subspace is, token for token, the clean one."""
    return torch.equal(text.tasks[index].tokens, text.tasks[0].tokens)


def several(comparison: Comparison) -> str:
    """How far subspaces of different prompts overlap, beside random ones; what follows from it is not said."""
    pairs = comparison.overlap.to_pandas()
    free = pairs.dropna(subset="z_score")
    if free.empty:
        return (
            "Here nothing can be said: of each pair, one subspace is the whole space or has no "
            "directions, so it overlaps with the other as a random one does."
        )
    some = (
        ""
        if len(free) == len(pairs)
        else f" in the {len(free)} of {len(pairs)} pairs where neither is all or nothing"
    )
    return (
        f"Here two of them share {_span(free['overlap'], '.1f')} dimensions, {_span(free['ratio'], '.3f')} times what random "
        f"subspaces of the same ranks share{some}. More than chance is no sign of shared content: writes of random tokens, and of "
        "untrained models, share more too."
    )


def smallest_angles(comparison: Comparison) -> dict[str, str]:
    """Of each pair of subspaces, the smallest, median and largest principal angle, in degrees."""
    return {" and ".join(pair): _degrees(angles) for pair, angles in comparison.angles.items()}


def _degrees(angles: Tensor) -> str:
    if len(angles) == 0:
        return "none: one of the two has no directions"
    low, middle, high = (float(angles.rad2deg().quantile(q)) for q in (0, 0.5, 1))
    return f"{low:.1f}°, {middle:.1f}°, {high:.1f}°"


def _sizes(studies: Sequence[Study]) -> str:
    return _span(s.pooled.rank for s in studies)


def _listed(studies: Sequence[Study], values: Sequence[int | str | None]) -> str:
    each = [f"{_or_none(value)} ({s.name})" for s, value in zip(studies, values, strict=True)]
    return each[0] if len(each) == 1 else f"{', '.join(each[:-1])} and {each[-1]}"


def _span(values: Iterable[int | float], form: str = "g") -> str:
    low, *_, high = sorted([*values] * 2)
    return (
        f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"
    )


def _or_none(value: int | str | None) -> str:
    return "none" if value is None else str(value)
