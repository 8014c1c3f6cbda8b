"""Sentences of the report on several prompts together, computed from the results."""

from torch import Tensor

from mechsvd.experiments.contrast_results import NULL, Contrast
from mechsvd.experiments.heldout import ONE, OTHERS, OWN, RANDOM, Fit
from mechsvd.experiments.intervals import interval_columns
from mechsvd.report.findings import NEAR
from mechsvd.report.study import Comparison
from mechsvd.report.wording import span

CONFIDENCE = 0.99  # of the ratios of special directions
ENERGY = (
    "Random directions of equal energy are not among these, so it does not follow that texts of one "
    "kind need them."
)
FEWEST = 5  # texts of a 95 % interval
TOO_FEW = "brackets are a bootstrap of fewer than five texts, and no 95 % interval"


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
        f"({'with a 95 % interval' if count >= FEWEST else TOO_FEW}), is "
        f"{number(OWN)} with a prompt’s own directions, {number(OTHERS)} "
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
        f"Here two of them share {span(free['overlap'], '.1f')} dimensions, "
        f"{span(free['ratio'], '.3f')} times what random subspaces of the same ranks share"
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


def special(contrast: Contrast) -> str:
    """What removing a kind's special directions costs; their energy is not set apart."""
    table = contrast.summary(CONFIDENCE).set_index(["method", "group"])

    def ratio(method: str) -> str:
        row = table.loc[(method, "all")]
        return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"

    own, others = (table.loc[("special", "all"), side] for side in ("own", "others"))
    return (
        f"Here removing {contrast.k} directions of a kind costs held-out texts of this kind "
        f"{own:.3g} nats per token and texts of the others {others:.3g}: a ratio of "
        f"{ratio('special')}, with a {CONFIDENCE:.0%} interval over texts and splits. It is "
        f"{ratio('singular')} for as many top singular directions, {ratio('random')} for random "
        f"ones, and {ratio(NULL)} between halves of one kind. {ENERGY}"
    )


def smallest_angles(comparison: Comparison) -> dict[str, str]:
    """Smallest, median and largest principal angle of each pair of subspaces, in degrees."""
    return {" and ".join(pair): _degrees(angles) for pair, angles in comparison.angles.items()}


def _degrees(angles: Tensor) -> str:
    if len(angles) == 0:
        return "none: one of the two has no directions"
    low, middle, high = (float(angles.rad2deg().quantile(q)) for q in (0, 0.5, 1))
    return f"{low:.1f}°, {middle:.1f}°, {high:.1f}°"
