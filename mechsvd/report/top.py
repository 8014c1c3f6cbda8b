"""The top of the report: what was found, in five sentences, and what could not be told."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch

from mechsvd.experiments.contrast_results import Contrast
from mechsvd.experiments.heldout import OTHERS, OWN, RANDOM, HeldOut
from mechsvd.experiments.intervals import interval_columns
from mechsvd.experiments.random_texts import (
    ALPHA,
    BY_SITE,
    OVERLAP,
    TRANSFER,
    TREND,
    RandomTextComparison,
)
from mechsvd.experiments.random_texts import OWN as NEEDED
from mechsvd.experiments.statistics import sign_flip, smallest_p
from mechsvd.report.findings import NEAR, directions_for, lasting_rank
from mechsvd.report.findings_together import CONFIDENCE, FEWEST, TOO_FEW
from mechsvd.report.study import Comparison, Study
from mechsvd.report.wording import CANNOT, or_none

# of each question: what is asked, and what is said where texts have less or more than random tokens
QUESTIONS = {
    NEEDED: (
        "whether texts and random tokens differ in how many of their own directions they need",
        "Texts need fewer of their own directions than random tokens do",
        "Texts need more of their own directions than random tokens do",
    ),
    BY_SITE: (
        "whether texts and random tokens differ in what a basis per site saves",
        "A basis per site saves texts fewer directions than random tokens",
        "A basis per site saves texts more directions than random tokens",
    ),
    TRANSFER: (
        "whether texts and random tokens differ in how well another text’s directions serve them",
        "Another text’s directions serve texts better than they serve random tokens",
        "Another text’s directions serve texts worse than they serve random tokens",
    ),
    OVERLAP: (
        "whether texts and random tokens differ in how many first directions two of them share",
        "Two texts share fewer of their first directions than two texts of random tokens do",
        "Two texts share more of their first directions than two texts of random tokens do",
    ),
    TREND: (
        "whether texts and random tokens differ in how closely damage follows the singular value",
        "Damage follows the singular value less closely in texts than in random tokens",
        "Damage follows the singular value more closely in texts than in random tokens",
    ),
}
HELD_OUT = "whether directions of other texts serve better than random ones"
SPECIAL = "whether texts of one kind need directions that texts of others do not"
ONE_TEXT = (
    "how many directions another text needs, and so any interval",
    "what is fitted: the directions come from the text that they are measured on",
    "whether texts of random tokens need as many directions",
    "whether texts share directions more than random tokens do",
    SPECIAL,
)


class Finding(NamedTuple):
    """A sentence with its numbers, and whether its test tells an effect from chance."""

    question: str
    sentence: str
    is_told: bool


class Top(NamedTuple):
    """The sentences at the top of the page.

    Attributes:
        found: five, one per question; fewer where the report leaves out what they are about.
        untold: what could not be told, as clauses.
        how: how many texts there are, and what so many can tell.
    """

    found: list[Finding]
    untold: list[str]
    how: str


def top_of(
    studies: Sequence[Study], comparison: Comparison | None, contrast: Contrast | None
) -> Top:
    """The five sentences of a study, and what it could not tell."""
    if comparison is None:
        return Top(
            one_text(studies[0]),
            [*ONE_TEXT],
            "These numbers describe one text. Their nulls are within it; several texts "
            "(--prompt, --prompts) give intervals and tests.",
        )
    random, held = comparison.random_texts, comparison.held_out
    assert random is not None  # this part of the report has it
    asked = against_random(random)
    others = [] if held is None else [_held_out(held, studies[0].pooled.d_model)]
    last = asked[TREND] if contrast is None else _special(contrast)
    found = [asked[NEEDED], *others, asked[BY_SITE], asked[OVERLAP], last]
    untold = [f"{one.question} ({i})" for i, one in enumerate(found, 1) if not one.is_told]
    more = [one for one in asked.values() if one not in found and not one.is_told]
    return Top(found, untold + [one.sentence for one in more], _how(random))


def _how(random: RandomTextComparison) -> str:
    """How the test is made, and what this number of texts can show."""
    least, count = random.smallest_p, len(random.effects)
    few = "" if least <= random.alpha else f", but {count} texts can show {least:.2g} at best"
    brackets = "Intervals are 95 % over texts" if count >= FEWEST else TOO_FEW.capitalize()
    return (
        f"Each of {count} texts is compared with a text of random tokens of the same length in the "
        f"same model; the test exchanges the two. {brackets}. p-values hold for "
        f"all questions of a test together; at most {random.alpha:g} counts as told{few}. "
        "Everything below describes the prompts that were measured."
    )


def against_random(random: RandomTextComparison) -> dict[str, Finding]:
    """A sentence per question of a comparison with random tokens."""
    rows = random.to_pandas().to_dict("records")
    return {row["question"]: _difference(row) for row in rows}


def _difference(row: dict[str, Any]) -> Finding:
    question, less, more = QUESTIONS[row["question"]]
    told = row["verdict"] in ("less", "more")
    lead = {"less": less, "more": more}.get(row["verdict"], _untold(question))
    unit = row["unit"] and f" {row['unit']}"
    numbers = (
        f"{row['texts']:.3g}{unit} against {row['random_texts']:.3g}, a difference of "
        f"{_interval(row['difference'], row['low'], row['high'])}, p = {row['p_family']:.2g}"
    )
    return Finding(question, f"{lead}: {_minus(numbers)}.", told)


def _held_out(found: HeldOut, d_model: int) -> Finding:
    """Directions of other texts, next to random ones and to a text's own."""
    ranks = {
        fitted: found.fit(fitted, order=order).lasting_ranks(NEAR).double()
        for fitted, order in (
            (OWN, "singular value"),
            (OTHERS, "singular value"),
            (RANDOM, _order_of(found, RANDOM)),
        )
    }
    return _of_others(ranks, d_model)


def _of_others(ranks: dict[str, torch.Tensor], d_model: int) -> Finding:
    """The sentence from the lasting ranks of the same texts with each kind of directions."""
    saved, fitted = ranks[RANDOM] - ranks[OTHERS], ranks[OTHERS] - ranks[OWN]
    effects = torch.stack([saved, fitted], dim=1)
    columns = interval_columns(torch.cat([effects, ranks[OTHERS][:, None]], dim=1), 0.95)
    fewer, more, needed = (
        _interval(*(float(columns[name][i]) for name in ("mean", "low", "high"))) for i in range(3)
    )
    p = float(sign_flip(effects).p_family[0])
    told = p <= ALPHA
    words = ("fewer", "better") if float(saved.mean()) > 0 else ("more", "worse")
    lead = (
        f"Directions of other texts serve {words[1]} than random ones"
        if told
        else _untold(HELD_OUT)
    )
    least = smallest_p(len(saved))
    few = "" if least <= ALPHA else f" ({len(saved)} texts can show {least:.2g} at best)"
    numbers = (
        f"{needed} of {d_model} keep a text’s predictions within {NEAR:g} nat of KL divergence, "
        f"against {float(ranks[RANDOM].mean()):.3g} random ones, {fewer} saved, p = {p:.2g}{few}; "
        f"that is {more} more than of its own"
    )
    return Finding(HELD_OUT, f"{lead}: {_minus(numbers)}.", told)


def _order_of(found: HeldOut, fitted: str) -> str:
    return next(fit.order for fit in found.fits if fit.fitted == fitted)


def _special(contrast: Contrast) -> Finding:
    """What directions special to a kind cost its texts and others; nothing is told of need."""
    table = contrast.summary(CONFIDENCE).set_index(["method", "group"])

    def ratio(method: str) -> str:
        row = table.loc[(method, "all")]
        return f"{row['ratio']:.3g} times ({row['low']:.3g} to {row['high']:.3g})"

    numbers = (
        f"removing {contrast.k} that are special to a kind costs its held-out texts "
        f"{ratio('special')} what it costs the others, {CONFIDENCE:.0%} interval, and removing "
        f"random ones {ratio('random')}"
    )
    return Finding(SPECIAL, f"{_untold(SPECIAL)}, nor from energy: {numbers}.", False)


def one_text(study: Study) -> list[Finding]:
    """Five sentences of one text. Their nulls are in it, so nothing is told of another one."""
    sentences = [_order(study), _site(study), _spread(study), _trend(study), _crossing(study)]
    return [Finding("", sentence, False) for sentence in sentences if sentence]


def _order(study: Study) -> str:
    if "random" not in study.sweeps:
        return ""
    d_model, random = study.pooled.rank, lasting_rank(study.sweeps["random"])
    return (
        f"This text needs {or_none(lasting_rank(study.sweep))} of {d_model} of its own directions, "
        f"the largest first, to stay within {NEAR:g} nat of KL divergence, against "
        f"{or_none(random)} of the same directions in random order."
    )


def _site(study: Study) -> str:
    if study.by_site is None:
        return ""
    return (
        f"With a basis per site it needs {or_none(lasting_rank(study.by_site))} per site, against "
        f"{or_none(lasting_rank(study.sweep))} with one basis for all sites."
    )


def _spread(study: Study) -> str:
    first = float(study.pooled.singular_values[0].square() / _energy(study))
    even = 1 / study.pooled.rank
    return (
        f"Direction 0 carries {first:.0%} of the squared size of its writes, and "
        f"{directions_for(study, 0.9)} directions carry 90 %, against {even:.1%} and "
        f"{directions_for_even(study)} if all directions were equal."
    )


def _energy(study: Study) -> torch.Tensor:
    return study.pooled.singular_values.double().square().sum()


def directions_for_even(study: Study) -> int:
    """How many equal directions carry 90 %."""
    return -(-9 * study.pooled.rank // 10)


def _trend(study: Study) -> str:
    """The rank correlation, with Fisher's interval, and what independent orders give."""
    if study.ranking is None:
        return ""
    count, value = study.pooled.rank, study.ranking.correlation("kl_divergence")
    if count < 4 or abs(value) == 1 or value != value:
        return f"The rank correlation of KL divergence and singular value is {value:.2f}."
    centre = torch.atanh(torch.tensor(value, dtype=torch.float64))
    half = 1.96 * 1.03 / sqrt(count - 3)  # Fieller, Hartley and Pearson (1957), for Spearman's
    low, high = (float(torch.tanh(centre + side * half)) for side in (-1, 1))
    chance = 1.96 / sqrt(count - 1)
    return _minus(
        f"Over its {count} directions, the rank correlation of the KL divergence of removing each "
        f"and its singular value is {value:.2f} ({low:.2f} to {high:.2f}), against ±{chance:.2f} in "
        "95 % of random orders."
    )


def _crossing(study: Study) -> str:
    critical = study.critical
    floor = "" if study.ranking is None else f"{study.ranking.noise_floor:.1e} nats"
    if critical.rank is None:
        noise = floor and f", within rounding noise of {floor}"
        return f"No number of directions gives it its clean probability{noise}."
    return (
        f"Its critical rank is {critical.rank} of {study.pooled.rank}, with {len(critical.crossings)} "
        f"crossings, and the rank from which its probability lasts is {or_none(critical.lasting_rank)}"
        f"{floor and f', with a noise floor of {floor}'}."
    )


def _untold(question: str) -> str:
    return f"{question[0].upper()}{question[1:]} {CANNOT}"


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def _minus(numbers: str) -> str:
    return numbers.replace(" -", " −").replace("(-", "(−")
