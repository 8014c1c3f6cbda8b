"""What a report is asked for: its parts, ranks, a further metric, and the options of its runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mechsvd.checks import require_whole, whole_numbers
from mechsvd.engine.metrics import Metric
from mechsvd.engine.session import RunOptions

# the parts of a report by their anchors on the page, in its order
PARTS = (
    "told", "spectrum", "clipping", "directions", "orders", "critical", "ridge", "attribution",
    "cards", "texts", "held-out", "prompts", "special",
)  # fmt: skip
RANKED = ("directions", "orders", "cards")  # take the ranking of directions


@dataclass(frozen=True)
class Choices:
    """What a report is asked for; see `reproduce`.

    The sweep by singular value and the critical rank belong to no part: they always run, because
    the numbers at the top of the page are theirs.

    Attributes:
        parts: of `PARTS`; the others are neither computed nor drawn.
        quick: few ranks per sweep, placed where the curve bends, and the largest eigenpairs only.
        ranks: that the sweeps visit; one above the number of directions keeps them all. None for
            every rank.
        step: between the ranks that the sweeps visit, instead of `ranks`; full rank is one of them.
        metric: of a further sweep and a further ranking; None for none.
        seed: of everything random.
        options: of all runs: layers, components, positions, batch_size, progress.
    """

    parts: tuple[str, ...] = PARTS
    quick: bool = False
    ranks: tuple[int, ...] | None = None
    step: int | None = None
    metric: Metric | None = None
    seed: int = 0
    options: RunOptions = field(default_factory=lambda: RunOptions())

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"The report has no part {unknown[0]!r:.40}: it has {[*PARTS]}.")
        if self.ranks is not None and self.step is not None:
            raise ValueError("`ranks` and `step` both say which ranks to visit; give one of them.")
        if self.ranks is not None and whole_numbers("ranks", list(self.ranks)).min() < 0:
            raise ValueError(f"`ranks` holds {min(self.ranks)}, but ranks begin with 0.")
        if self.step is not None:
            require_whole("step", self.step, 1)
        require_whole("seed", self.seed)

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    @property
    def takes_ranking(self) -> bool:
        """Whether any part needs every direction to be removed alone."""
        return any(part in self for part in RANKED)

    def visited(self, full: int) -> list[int] | None:
        """The ranks that a sweep up to `full` visits; None for all of them."""
        if self.step is not None:
            return sorted({*range(0, full, self.step), full})
        return None if self.ranks is None else sorted({min(rank, full) for rank in self.ranks})

    def count(self, full: int, quick: int) -> int:
        """How many ranks such a sweep visits.

        Args:
            quick: how many, where the sweep places them itself.
        """
        visited = self.visited(full)
        if visited is not None:
            return len(visited)
        return min(quick, full + 1) if self.quick else full + 1

    def __str__(self) -> str:
        """What differs from a whole report, in sentences; empty for a whole one."""
        left_out = [part for part in PARTS if part not in self]
        said = [f"Left out, neither computed nor drawn: {', '.join(left_out)}." if left_out else ""]
        if self.step is not None:
            said.append(f"The sweeps visit every rank that {self.step} divides, and full rank.")
        if self.ranks is not None:
            said.append(f"The sweeps visit the ranks {', '.join(map(str, sorted(self.ranks)))}.")
        if self.metric is not None:
            said.append(f"A further sweep and ranking measure {self.metric.name}.")
        if self.seed:
            said.append(f"The seed is {self.seed}.")
        return " ".join(filter(None, said))


def parts_without(skip: Sequence[str] | None, only: Sequence[str] | None) -> tuple[str, ...]:
    """The parts of a report when some are skipped, or only some are wanted.

    Raises:
        ValueError: both are given, or nothing is left.
    """
    if skip and only:
        raise ValueError("`--skip` and `--only` exclude each other; give one of them.")
    parts = tuple(p for p in PARTS if (p in only if only else p not in (skip or ())))
    if not parts:
        raise ValueError("`--skip` leaves no part of the report; skip fewer.")
    return parts
