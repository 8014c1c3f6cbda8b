"""Sentences and numbers of the report on single prompts, computed from the results."""

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from mechsvd.attribution.scores import Attribution
from mechsvd.engine.measurement import Measurement
from mechsvd.experiments.criteria import (
    Criterion,
    change_at_most,
    kl_at_most,
    same_greedy_text,
)
from mechsvd.experiments.ridge import RidgeSweep
from mechsvd.experiments.search import critical_rank_of, ranks_without_each_token
from mechsvd.experiments.sweeps import RankSweep
from mechsvd.experiments.token_columns import PAIRS
from mechsvd.model.sites import Site
from mechsvd.report.study import Study, Text
from mechsvd.report.wording import LISTED, listed, or_none, sizes, span

NEAR = 1.0  # nats of KL divergence, summed over the text, that count as close to clean

READ_MEASURED = PAIRS.index(("read", "measured"))


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
        "directions for 90 % without this site": f"{without_owner(study)}",
        "share of the first position in direction 0": f"{float(first):.1%}",
        "clean probability": f"{float(clean.log_prob.exp()):.4g} "
        f"({float(clean.log_prob):.4f} nats)",
        "clean size of a write (root mean square)": f"{float(clean.orig_delta):.4g}",
        "lasting rank for 1 nat of KL divergence": or_none(lasting_rank(study.sweep)),
        **_of_parts(study),
        "lasting rank for 1 nat of absolute change": or_none(
            critical_rank_of(study.sweep, criterion=change_at_most(NEAR)).lasting_rank
        ),
        "critical rank (the shortform’s)": or_none(study.critical.rank),
        "critical rank without any one token": _without_one_token(study),
        "absolute change at the critical rank": or_none(_change_there(study), " nats"),
        "critical rank for the same greedy text": _same_text_rank(study),
    }


def _of_parts(study: Study) -> dict[str, str]:
    """The main numbers that belong to parts which can be left out."""
    found = {}
    if study.by_site is not None:
        found["the same with a basis per site"] = or_none(lasting_rank(study.by_site))
    if study.ranking is not None:
        found["noise floor"] = f"{study.ranking.noise_floor:.1e} nats"
    return found


def _same_text_rank(study: Study) -> str:
    if not study.sweep.measurement.clean_run.is_greedy.all():
        return "the continuation is not greedy text"
    return or_none(critical_rank_of(study.sweep, criterion=same_greedy_text).rank)


def directions_for(study: Study, share: float) -> int:
    """Number of directions that carry this share of the squared size of all writes."""
    return _count_for(study.pooled.singular_values.cpu().double().square(), share)


def _count_for(squares: Tensor, share: float) -> int:
    return int((squares.cumsum(0) / squares.sum() < share).sum()) + 1


def _without_one_token(study: Study) -> str:
    if len(study.task.continuation) < 2:
        return "one token"
    ranks = ranks_without_each_token(study.sweep)["critical"].dropna()
    return span(ranks.tolist()) if len(ranks) else "none"


def _change_there(study: Study) -> float | None:
    """The absolute change at the critical rank, in nats."""
    critical = study.critical
    if critical.rank is None:
        return None
    there = critical.sweep.measurement.absolute_change[critical.sweep.ranks == critical.rank]
    return float(there[0])


def lasting_rank(sweep: RankSweep) -> int | None:
    """Smallest rank from which all larger ones stay within `NEAR` nats of KL divergence.

    The divergence is summed over the text. None if there is none.
    """
    return critical_rank_of(sweep, criterion=_near(sweep.measurement)).lasting_rank


def _near(measured: Measurement) -> Criterion:
    return kl_at_most(NEAR / measured.log_probs.shape[1])


def spectrum(studies: Sequence[Study]) -> str:
    """How few directions carry most of the writes, and which site wrote them."""
    squares = [s.pooled.singular_values.cpu().double().square() for s in studies]
    shares = [round(100 * float(values[0] / values.sum())) for values in squares]
    few = span(directions_for(s, 0.9) for s in studies)
    owners = [
        str(site) if len(studies) > LISTED else f"{share:.0%}, {site} at {where}"
        for site, share, where in (_owner_of_first(s) for s in studies)
    ]
    without = span(without_owner(s) for s in studies)
    return (
        f"Here {few} of {sizes(studies)} directions carry 90 % of the squared size of the writes; "
        f"direction 0 alone carries {span(shares)} %. This is mostly one site of "
        f"{len(studies[0].writes.sites)}: without the site that wrote most, the rest need "
        f"{without} directions for 90 %. The site that wrote most of directions 0–2"
        f"{'' if len(studies) > LISTED else ', its share, and the token that wrote most there'}: "
        f"{listed(studies, owners)}."
    )


def without_owner(study: Study) -> int:
    """Directions for 90 % of the squared size of the writes of all sites but the largest writer."""
    site, _ = owner(study, directions_for(study, 0.9))
    others = [i for i, other in enumerate(study.writes.sites) if other != site]
    if not others:
        return 0
    values = study.writes.values[others].flatten(0, 1).cpu().double()
    return _count_for(torch.linalg.svdvals(values).square(), 0.9)


def _owner_of_first(study: Study) -> tuple[Site, float, str]:
    """The site that wrote most of directions 0–2, its share, and its token that wrote most."""
    count = min(3, study.pooled.rank)
    site, share = owner(study, count)
    left, sizes = study.pooled.left[..., :count], study.pooled.singular_values[:count]
    parts = (left.cpu().double() * sizes.cpu().double()).square().sum(dim=-1)
    position = int(parts[study.writes.sites.index(site)].argmax())
    pieces = study.writes.pieces
    return site, share, repr(pieces[position]) if pieces else f"position {position}"


def owner(study: Study, rank: int) -> tuple[Site, float]:
    """The site that wrote most of the first directions, and its share of their squared size."""
    parts = (
        study.pooled.left[..., :rank].cpu().double()
        * study.pooled.singular_values[:rank].cpu().double()
    )
    shares = parts.square().sum(dim=(1, 2))
    return study.writes.sites[int(shares.argmax())], float(shares.max() / shares.sum())


def clipping(studies: Sequence[Study]) -> str:
    """From which rank on the clean predictions are restored, with one basis and one per site."""
    pooled = [lasting_rank(s.sweep) for s in studies]
    by_site = [lasting_rank(s.by_site) for s in studies]
    return (
        f"Here every rank from {listed(studies, pooled)} on keeps the predictions within "
        f"{NEAR:g} nat of KL divergence, summed over the text; with a basis per site, from "
        f"{listed(studies, by_site)}. The directions are fitted on the text that they are measured "
        f"on{'' if len(studies) > 1 else '; with one text nothing says what another one needs'}."
        f"{_few_ranks(studies)}"
    )


def _few_ranks(studies: Sequence[Study]) -> str:
    """Of a quick study: how many ranks were tried, and how far the curve between them is off."""
    errors = [error for s in studies for error in s.errors]
    if not errors:
        return ""
    tried = span(len(s.sweep.ranks) for s in studies)
    return (
        f" Only {tried} of {span(s.pooled.rank + 1 for s in studies)} ranks were tried. At "
        f"{len(errors)} random ranks between them the curves were off by a factor of "
        f"{median(errors):.2g} in the middle and {max(errors):.2g} at most."
    )


def directions(studies: Sequence[Study]) -> str:
    """How damage and singular value are related."""
    rankings = [s.ranking for s in studies]
    by_kl, by_size, signed = (
        span((r.correlation(by) for r in rankings), ".2f")
        for by in ("kl_divergence", "size", "effect")
    )
    gains = span(int(((r.effect < 0) & ~r.is_noise).sum()) for r in rankings)
    silent = span(int(r.is_noise.sum()) for r in rankings)
    worst = max(studies, key=lambda s: float(s.ranking.measurement.kl_divergence.max()))
    damage = worst.ranking.measurement.kl_divergence
    most = int(damage.argmax())
    return (
        f"Here the rank correlation of KL divergence and singular value is {by_kl}; that of the "
        f"size of the effect is {by_size}, and of the signed effect, in which tokens cancel, "
        f"{signed}. Removing any one of {gains} directions makes the text more probable; the effect "
        f"of {silent} is no larger than rounding noise. The most needed one is direction {most} "
        f"({worst.name}: {float(damage[most]):.3g} nats per token)."
    )


def described(studies: Sequence[Study]) -> str:
    """Whether directions read as what they do, for studies with cards."""
    tables = [s.cards.tokens.summary() for s in studies if s.cards is not None]
    own, other, p = (
        [float(table[name][READ_MEASURED]) for table in tables]
        for name in ("spearman", "other", "p")
    )
    told = sum(value <= 0.05 for value in p)
    count = span(len(s.cards) for s in studies if s.cards is not None)
    return (
        f"Here the tokens of {count} directions as they are read off the weights agree with what "
        f"removing each does to these tokens by a mean rank correlation of {listed(studies, own)}; "
        f"with what removing another one does, by {listed(studies, other)}. For {told} of "
        f"{len(studies)} prompts, directions agree with themselves more than in 95 % of random "
        "pairings."
    )


def orders(studies: Sequence[Study]) -> str:
    """Which order needs the fewest directions."""
    needed = {order: sum(ranks) / len(ranks) for order, ranks in needed_by_order(studies).items()}
    named = ", ".join(
        f"{needed[order]:.0f} ({order})"
        for order in sorted(needed, key=lambda order: needed[order])
    )
    return (
        f"Here, to come within {NEAR:g} nat of KL divergence and stay there, the orders need "
        f"{named} directions in the mean over prompts. In the signed effect tokens cancel, so its "
        "place does not say how well effects tell which directions are needed."
    )


def needed_by_order(studies: Sequence[Study]) -> dict[str, list[int]]:
    """The lasting rank of each text in each order; all directions where there is none."""
    needed: dict[str, list[int]] = {}
    for order in studies[0].sweeps:
        ranks = [lasting_rank(s.sweeps[order]) for s in studies]
        needed[order] = [
            s.pooled.rank if rank is None else rank for rank, s in zip(ranks, studies, strict=True)
        ]
    return needed


def ridge(studies: Sequence[Study]) -> str:
    """How many effective directions ridge needs, compared with clipping."""
    clipped = [lasting_rank(s.sweep) for s in studies]
    shrunk = [lasting_number(s.ridge) for s in studies]
    pairs = [
        (s.name, a, b)
        for s, a, b in zip(studies, clipped, shrunk, strict=True)
        if a is not None and b is not None
    ]
    if not pairs:
        return (
            f"Here neither clipping nor ridge comes within {NEAR:g} nat of KL divergence and stays "
            "there."
        )
    named = ", ".join(
        f"{b:.0f} where clipping needs {a} ({name})" for name, a, b in pairs[:LISTED]
    ) + (", …" if len(pairs) > LISTED else "")
    fewer = sum(b < a for _, a, b in pairs)
    return (
        f"Here, to come within {NEAR:g} nat of KL divergence and stay there, ridge needs an "
        f"effective number of {named}: fewer for {fewer} of {len(pairs)} prompts.{_left(studies)}"
    )


def _left(studies: Sequence[Study]) -> str:
    """How many directions the effective number stands for, where that is known."""
    counts = [n for s in studies if (n := _left_at_lasting(s.ridge)) is not None]
    if not counts:
        return ""
    return f" That is a sum of gains: {span(counts)} directions still have a gain above 0.1 there."


def _left_at_lasting(sweep: RidgeSweep) -> int | None:
    """How many directions have a gain above 0.1 at the smallest lasting effective number."""
    number = lasting_number(sweep)
    if number is None or sweep.directions_left is None:
        return None
    return int(sweep.directions_left[sweep.effective_directions == number][0])


def lasting_number(sweep: RidgeSweep) -> float | None:
    """Smallest effective number of directions from which all larger ones stay as close as `NEAR`.

    None if there is none.
    """
    near = _near(sweep.measurement)(sweep.measurement) >= 0
    order = sweep.effective_directions.argsort(descending=True)
    lasting = near[order].long().cumprod(0).bool()
    return float(sweep.effective_directions[order][lasting][-1]) if lasting.any() else None


def attribution(studies: Sequence[Study]) -> str:
    """How often each estimate is right, and how far the directions of each basis interact."""
    attributions = [s.attribution for s in studies]
    linear, quadratic = (
        span((100 * share_within(a, name) for a in attributions), ".0f")
        for name in ("linear", "quadratic")
    )
    sums = {name: span(values, ".2g") for name, values in sums_of_scores(studies).items()}
    named = ", ".join(f"{total} ({name})" for name, total in sums.items()).replace("-", "−")
    which = "all" if all(len(a) == len(a.vectors) for a in attributions) else "the largest"
    return (
        f"Here, in the Hessian basis, the quadratic estimate is within 10 % of the measured score "
        f"for {quadratic} % of the directions and the linear one for {linear} %. The measured "
        f"scores of {which} directions sum to {named} times f(w) − f(0); directions that do not "
        "interact would give 1."
    )


def sums_of_scores(studies: Sequence[Study]) -> dict[str, list[float]]:
    """What the measured scores of each basis sum to, as a share of f(w) − f(0), in each text."""
    return {
        name: [float(s.attribution.bases[name].share.sum()) for s in studies]
        for name in studies[0].attribution.bases
    }


def share_within(attribution: Attribution, estimate: str, tolerance: float = 0.1) -> float:
    """Share of the directions above the noise where an estimate's relative error is this small."""
    loud = ~attribution.is_noise
    near = attribution.error(estimate)[loud] <= tolerance
    return float(near.double().mean()) if loud.any() else 0.0


def critical_ranks(studies: Sequence[Study]) -> str:
    """The critical ranks, how often the curves cross the clean value, and the lasting ranks."""
    ranks = [s.critical.rank for s in studies]
    crossings = [len(s.critical.crossings) for s in studies]
    shape = (
        "once each"
        if set(crossings) == {1}
        else f"{span(crossings)} times, so a larger rank can be worse"
    )
    every = all(len(s.sweep.ranks) == s.sweep.full_rank + 1 for s in studies)
    tried = "Every rank was tried" if every else "Only some ranks were tried"
    changes = [_change_there(s) for s in studies]
    lasting = [lasting_rank(s.sweep) for s in studies]
    return (
        f"Here it is {listed(studies, ranks)} of {sizes(studies)} directions. {tried}; "
        f"the curves cross the clean probability {shape}. At the critical rank the tokens' "
        f"log-probabilities still change by {listed(studies, changes, ' nats')} in total, with either sign. "
        f"The lasting rank for {NEAR:g} nat of KL divergence is {listed(studies, lasting)}."
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
