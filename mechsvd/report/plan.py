"""What a reproduction will cost, before it starts: rows, passes, memory and seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechsvd.attribution.curvature import takes_whole
from mechsvd.attribution.hessian import PAIRS
from mechsvd.engine.batches import bytes_per_row, rows_per_pass
from mechsvd.engine.passes import estimate_seconds
from mechsvd.experiments.directions import GAINS
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task
from mechsvd.report.study import DESCRIBED, FEWEST, PRODUCTS, QUICK, SWEEPS, TWINNED

# measured: what a row costs in forward passes of one edit
PRODUCT, PATH = 3.0, 2.5  # a product with the Hessian, and a point of the path integral
LANCZOS, STEPS, RIDGE = 160, 32, 64  # products for the largest pairs, points, strengths
STARTS = 3  # of generated texts
PAGE = 2.5  # seconds to draw the page and write the tables, and
DRAWN = 0.6  # for each prompt


@dataclass(frozen=True)
class Plan:
    """The cost of a reproduction.

    Attributes:
        texts: number of prompts.
        rows: in forward passes of one edit, summed over all steps.
        passes: forward passes.
        memory: bytes of one pass.
        seconds: from two short runs.
    """

    texts: int
    rows: int
    passes: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.texts} prompt{'s' if self.texts > 1 else ''}: {self.rows:,} rows in about "
            f"{self.passes:,} forward passes of {self.memory / 2**20:,.0f} MiB, "
            f"about {_duration(self.seconds)}"
        )


def plan_report(
    model: Model, made: Mapping[str, Task], kinds: Mapping[str, Sequence[Task]], quick: bool
) -> Plan:
    """Estimate the cost of a reproduction from two short runs of its longest prompt."""
    tasks = list(made.values())
    longest = max(tasks, key=lambda task: len(task.tokens))
    per_row = estimate_seconds(model, longest, 256) / 256 / len(longest.tokens)
    rows = {name: study_rows(model, task, quick) for name, task in made.items()}
    pairs = [(rows[name], len(task.tokens)) for name, task in made.items()]
    if len(tasks) > 1:
        pairs += together_rows(model, tasks, kinds, quick)
    seconds = sum(count * length * per_row for count, length in pairs)
    total = sum(count for count, _ in pairs)
    size = rows_per_pass(model, longest)
    steps = STARTS * sum(len(task.continuation) for task in tasks)
    seconds += steps * estimate_seconds(model, longest, 1) + PAGE + DRAWN * len(tasks)
    return Plan(
        len(tasks), total, -(-total // size) + steps, size * bytes_per_row(model, longest), seconds
    )


def study_rows(model: Model, task: Task, quick: bool) -> int:
    """Rows of the study of one prompt."""
    directions = _directions(model, task)
    sweep = min(QUICK + 16, directions + 1) if quick else directions + 1
    pairs = min(PAIRS, directions) if quick or directions > PRODUCTS else directions
    products = directions if takes_whole(directions, pairs) else LANCZOS
    attribution = PRODUCT * products + PATH * STEPS + 4 * pairs
    cards = min(DESCRIBED, directions) * (1 + 2 * len(GAINS))
    return round(SWEEPS * sweep + directions + RIDGE + attribution + cards)


def together_rows(
    model: Model, tasks: Sequence[Task], kinds: Mapping[str, Sequence[Task]], quick: bool
) -> list[tuple[int, int]]:
    """Rows of the comparison of several prompts, and of kinds of text, with their tokens."""
    found = []
    for task in tasks:
        directions = _directions(model, task)
        sweep = QUICK + 1 if quick else directions + 1
        found.append((7 * sweep, len(task.tokens)))
    every = [task for own in kinds.values() for task in own]
    texts = every[:FEWEST] if len(tasks) < FEWEST <= len(every) else tasks[:TWINNED]
    found += [(2 * (_directions(model, t) + 4 * QUICK), len(t.tokens)) for t in texts]
    found += [(3 * (3 * len(kinds) + 2) // 2, len(task.tokens)) for task in every]
    return found


def _directions(model: Model, task: Task) -> int:
    return min(model.cfg.d_model, len(task.tokens) * 2 * model.cfg.n_layers)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
