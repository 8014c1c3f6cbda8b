"""Sentences and numbers of the report, computed from the results."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mechsvd.attribution.scores import Attribution
from mechsvd.engine.measurement import Measurement
from mechsvd.experiments.contrast_results import NULL, Contrast
from mechsvd.experiments.criteria import (
    Criterion,
    change_at_most,
    kl_at_most,
    same_greedy_text,
)
from mechsvd.experiments.heldout import ONE, OTHERS, OWN, RANDOM, Fit
from mechsvd.experiments.intervals import interval_columns
from mechsvd.experiments.random_texts import RandomTextComparison
from mechsvd.experiments.ridge import RidgeSweep
from mechsvd.experiments.search import critical_rank_of, ranks_without_each_token
from mechsvd.experiments.sweeps import RankSweep
from mechsvd.experiments.token_columns import PAIRS
from mechsvd.model.sites import Site
from mechsvd.report.study import Comparison, Study, Text

NEAR = 1.0  # nats of KL divergence, summed over the text, that count as close to clean

READ_MEASURED = PAIRS.index(("read", "measured"))
LISTED = 6  # with more prompts, a sentence gives their spread
CONFIDENCE = 0.99  # of the interval that must exclude 1 before directions are called special
CANNOT = "cannot be told from chance"


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
        "lasting rank for 1 nat of KL divergence": _or_none(lasting_rank(study.sweep)),
        **_of_parts(study),
        "lasting rank for 1 nat of absolute change": _or_none(
            critical_rank_of(study.sweep, criterion=change_at_most(NEAR)).lasting_rank
        ),
        "critical rank (the shortform’s)": _or_none(study.critical.rank),
        "critical rank without any one token": _without_one_token(study),
        "absolute change at the critical rank": _or_none(_change_there(study), " nats"),
        "critical rank for the same greedy text": _same_text_rank(study),
    }


def _of_parts(study: Study) -> dict[str, str]:
    """The main numbers that belong to parts which can be left out."""
    found = {}
    if study.by_site is not None:
        found["the same with a basis per site"] = _or_none(lasting_rank(study.by_site))
    if study.ranking is not None:
        found["noise floor"] = f"{study.ranking.noise_floor:.1e} nats"
    return found


def _same_text_rank(study: Study) -> str:
    if not study.sweep.measurement.clean_run.is_greedy.all():
        return "the continuation is not greedy text"
    return _or_none(critical_rank_of(study.sweep, criterion=same_greedy_text).rank)


def directions_for(study: Study, share: float) -> int:
    """Number of directions that carry this share of the squared size of all writes."""
    return _count_for(study.pooled.singular_values.cpu().double().square(), share)


def _count_for(squares: Tensor, share: float) -> int:
    return int((squares.cumsum(0) / squares.sum() < share).sum()) + 1


def _without_one_token(study: Study) -> str:
    if len(study.task.continuation) < 2:
        return "one token"
    ranks = ranks_without_each_token(study.sweep)["critical"].dropna()
    return _span(ranks.tolist()) if len(ranks) else "none"


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
    few = _span(directions_for(s, 0.9) for s in studies)
    owners = [
        str(site) if len(studies) > LISTED else f"{share:.0%}, {site} at {where}"
        for site, share, where in (_owner_of_first(s) for s in studies)
    ]
    without = _span(without_owner(s) for s in studies)
    return (
        f"Here {few} of {_sizes(studies)} directions carry 90 % of the squared size of the writes; "
        f"direction 0 alone carries {_span(shares)} %. This is mostly one site of "
        f"{len(studies[0].writes.sites)}: without the site that wrote most, the rest need "
        f"{without} directions for 90 %. The site that wrote most of directions 0–2"
        f"{'' if len(studies) > LISTED else ', its share, and the token that wrote most there'}: "
        f"{_listed(studies, owners)}."
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
        f"Here every rank from {_listed(studies, pooled)} on keeps the predictions within "
        f"{NEAR:g} nat of KL divergence, summed over the text; with a basis per site, from "
        f"{_listed(studies, by_site)}. The directions are fitted on the text that they are measured "
        f"on{'' if len(studies) > 1 else '; with one text nothing says what another one needs'}."
        f"{_few_ranks(studies)}"
    )


def _few_ranks(studies: Sequence[Study]) -> str:
    """Of a quick study: how many ranks were tried, and how far the curve between them is off."""
    errors = [error for s in studies for error in s.errors]
    if not errors:
        return ""
    tried = _span(len(s.sweep.ranks) for s in studies)
    return (
        f" Only {tried} of {_span(s.pooled.rank + 1 for s in studies)} ranks were tried. At "
        f"{len(errors)} random ranks between them the curves were off by a factor of "
        f"{median(errors):.2g} in the middle and {max(errors):.2g} at most."
    )


def directions(studies: Sequence[Study]) -> str:
    """How damage and singular value are related."""
    rankings = [s.ranking for s in studies]
    by_kl, by_size, signed = (
        _span((r.correlation(by) for r in rankings), ".2f")
        for by in ("kl_divergence", "size", "effect")
    )
    gains = _span(int(((r.effect < 0) & ~r.is_noise).sum()) for r in rankings)
    silent = _span(int(r.is_noise.sum()) for r in rankings)
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
    count = _span(len(s.cards) for s in studies if s.cards is not None)
    return (
        f"Here the tokens of {count} directions as they are read off the weights agree with what "
        f"removing each does to these tokens by a mean rank correlation of {_listed(studies, own)}; "
        f"with what removing another one does, by {_listed(studies, other)}. For {told} of "
        f"{len(studies)} prompts, directions agree with themselves more than in 95 % of random "
        "pairings."
    )


def orders(studies: Sequence[Study]) -> str:
    """Which order needs the fewest directions."""
    needed = {}
    for order in studies[0].sweeps:
        ranks = [lasting_rank(s.sweeps[order]) for s in studies]
        needed[order] = sum(
            s.pooled.rank if r is None else r for r, s in zip(ranks, studies, strict=True)
        ) / len(studies)
    listed = ", ".join(
        f"{needed[order]:.0f} ({order})"
        for order in sorted(needed, key=lambda order: needed[order])
    )
    return (
        f"Here, to come within {NEAR:g} nat of KL divergence and stay there, the orders need "
        f"{listed} directions in the mean over prompts. In the signed effect tokens cancel, so its "
        "place does not say how well effects tell which directions are needed."
    )


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
    listed = ", ".join(
        f"{b:.0f} where clipping needs {a} ({name})" for name, a, b in pairs[:LISTED]
    ) + (", …" if len(pairs) > LISTED else "")
    fewer = sum(b < a for _, a, b in pairs)
    return (
        f"Here, to come within {NEAR:g} nat of KL divergence and stay there, ridge needs an "
        f"effective number of {listed}: fewer for {fewer} of {len(pairs)} prompts.{_left(studies)}"
    )


def _left(studies: Sequence[Study]) -> str:
    """How many directions the effective number stands for, where that is known."""
    counts = [n for s in studies if (n := _left_at_lasting(s.ridge)) is not None]
    if not counts:
        return ""
    return f" That is a sum of gains: {_span(counts)} directions still have a gain above 0.1 there."


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
    """The critical ranks, how often the curves cross the clean value, and the lasting ranks."""
    ranks = [s.critical.rank for s in studies]
    crossings = [len(s.critical.crossings) for s in studies]
    shape = (
        "once each"
        if set(crossings) == {1}
        else f"{_span(crossings)} times, so a larger rank can be worse"
    )
    every = all(len(s.sweep.ranks) == s.sweep.full_rank + 1 for s in studies)
    tried = "Every rank was tried" if every else "Only some ranks were tried"
    changes = [_change_there(s) for s in studies]
    lasting = [lasting_rank(s.sweep) for s in studies]
    return (
        f"Here it is {_listed(studies, ranks)} of {_sizes(studies)} directions. {tried}; "
        f"the curves cross the clean probability {shape}. At the critical rank the tokens' "
        f"log-probabilities still change by {_listed(studies, changes, ' nats')} in total, with either sign. "
        f"The lasting rank for {NEAR:g} nat of KL divergence is {_listed(studies, lasting)}."
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


def held_out(comparison: Comparison) -> str:
    """How many directions a text needs when they are not its own, with intervals over texts."""
    found = comparison.held_out
    table = found.summary(NEAR).set_index(["fitted", "basis"])
    count = len(found.fold)

    def number(fitted: str, basis: str = "pooled") -> str:
        row = table.loc[(fitted, basis)]
        return f"{row['mean']:.0f} ({row['low']:.0f} to {row['high']:.0f})"

    def fewer(first: Fit, second: Fit) -> str:
        difference = (second.lasting_ranks(NEAR) - first.lasting_ranks(NEAR)).double()
        columns = interval_columns(difference[:, None], 0.95)
        mean, low, high = (float(columns[name][0]) for name in ("mean", "low", "high"))
        return f"{mean:.0f} ({low:.0f} to {high:.0f})"

    return (
        f"Here the lasting rank for {NEAR:g} nat of KL divergence, in the mean over {count} prompts "
        f"with a 95 % interval, is {number(OWN)} with a prompt’s own directions, {number(OTHERS)} "
        f"with those of other prompts, {number(ONE)} with those of one other, and "
        f"{table.loc[(RANDOM, 'pooled')]['mean']:.0f} at random. With a basis per site it is "
        f"{number(OWN, 'per site')} and {number(OTHERS, 'per site')}. "
        "Directions fitted on the text that they are measured on save "
        f"{fewer(found.fit(OWN), found.fit(OTHERS))} of these directions with one basis, and "
        f"{fewer(found.fit(OWN, 'per site'), found.fit(OTHERS, 'per site'))} with a basis per site: "
        "the part of the curves above that is fitted."
    )


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
        f"{restriction}. {_anchored(comparison)}"
    )


def _anchored(comparison: Comparison) -> str:
    """The overlap of the texts next to those of random tokens and of a model without training."""
    table = comparison.anchors.to_pandas().set_index(["kind", "rank"])
    rank = int(comparison.anchors.ranks[len(comparison.anchors.ranks) // 2])

    def number(kind: str) -> str:
        row = table.loc[(kind, rank)]
        interval = "" if row.isna()["low"] else f" ({row['low']:.2f} to {row['high']:.2f})"
        return f"{row['chance_corrected']:.2f}{interval}"

    return (
        f"Of the first {rank} directions, on a scale from 0 (random subspaces) to 1 (the same), two "
        f"prompts share {number('texts')}; random tokens {number('random tokens')}, and the prompts "
        f"in a model with redrawn weights {number('reinitialised')}."
    )


def told(found: RandomTextComparison | None) -> list[str]:
    """What texts show that texts of random tokens do not, and what cannot be told.

    One sentence per question, the certain ones first; then how certain they are.
    """
    if found is None:
        return [
            "With one text, nothing can be told from chance, and the directions are fitted on the "
            "text that they are measured on. Every number below describes this text only."
        ]
    said = sorted(map(_difference, found.to_pandas().to_dict("records")), key=lambda s: CANNOT in s)
    least = found.smallest_p
    few = "" if least <= found.alpha else f", and {len(found.effects)} texts can show {least:.2g}"
    return [
        *said,
        f"The p-values hold for the {len(said)} questions together. At most {found.alpha:g} counts "
        f"as told{few}.",
    ]


def _difference(row: dict[str, Any]) -> str:
    question, unit = row["question"], row["unit"] and f" {row['unit']}"
    verdict = row["verdict"]
    outcome = f"{verdict} than in random tokens" if verdict in ("more", "less") else CANNOT
    numbers = (
        f"{row['texts']:.3g}{unit} in {row['n']} texts, {row['random_texts']:.3g} in random tokens; "
        f"difference {row['difference']:.2g} ({row['low']:.2g} to {row['high']:.2g})"
    ).replace("-", "−")
    return f"{question[0].upper()}{question[1:]}: {numbers}, p = {row['p_family']:.2g}: {outcome}."


def special(contrast: Contrast) -> str:
    """Whether there are directions special to groups of texts, and what is shared by all."""
    table = contrast.summary(CONFIDENCE).set_index(["method", "group"])

    def ratio(method: str) -> str:
        row = table.loc[(method, "all")]
        return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"

    own, others = (table.loc[("special", "all"), side] for side in ("own", "others"))
    if table.loc[("special", "all"), "low"] > 1:
        verdict = "So there are directions that texts of one kind need and texts of others do not."
    else:
        verdict = f"Directions special to a kind of text {CANNOT}."
    return (
        f"Here removing {contrast.k} directions of a kind costs held-out texts of this kind "
        f"{own:.3g} nats per token and texts of the others {others:.3g}: a ratio of "
        f"{ratio('special')}, with a {CONFIDENCE:.0%} interval over texts and splits. It is "
        f"{ratio('singular')} for as many top singular directions, {ratio('random')} for random "
        f"ones, and {ratio(NULL)} between halves of one kind. {verdict}"
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


def _listed(
    studies: Sequence[Study], values: Sequence[int | float | str | None], unit: str = ""
) -> str:
    """Each value with its prompt's name; of many prompts, how they are spread."""
    numbers = sorted(value for value in values if isinstance(value, int | float))
    if len(studies) > LISTED and len(numbers) == len(values):
        low, *_, high = numbers
        return (
            f"{low:.4g} to {high:.4g}{unit} (median {median(numbers):.4g}, {len(values)} prompts)"
        )
    texts = [_or_none(value, unit) for value in values]
    if len(studies) > LISTED:
        common, times = Counter(texts).most_common(1)[0]
        return f"{common} for {times} of {len(values)} prompts"
    items = [f"{text} ({s.name})" for s, text in zip(studies, texts, strict=True)]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _span(values: Iterable[int | float], form: str = "g") -> str:
    low, *_, high = sorted([*values] * 2)
    return (
        f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"
    )


def _or_none(value: int | float | str | None, unit: str = "") -> str:
    if value is None:
        return "none"
    return f"{value:.3g}{unit}" if isinstance(value, float) else f"{value}{unit}"
