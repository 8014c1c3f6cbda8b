"""What a reproduction will cost, before it starts: rows, passes, memory and seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechsvd.attribution.curvature import takes_whole
from mechsvd.attribution.hessian import PAIRS
from mechsvd.engine.batches import bytes_per_row, rows_per_pass
from mechsvd.engine.passes import estimate_seconds
from mechsvd.engine.progress import Step
from mechsvd.experiments.directions import GAINS
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task
from mechsvd.report.choices import Choices
from mechsvd.report.study import DESCRIBED, FEWEST, PRODUCTS, QUICK, TWINNED, WHOLE

# measured: what a row costs in forward passes of one edit
PRODUCT, PATH = 3.0, 2.5  # a product with the Hessian, and a point of the path integral
LANCZOS, STEPS, RIDGE = 160, 32, 64  # products for the largest pairs, points, strengths
STARTS, TEXTS = 3, 5  # of generated texts, and texts per start
ORDERS = 5  # besides that by singular value
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
    model: Model,
    made: Mapping[str, Task],
    kinds: Mapping[str, Sequence[Task]],
    choices: Choices = WHOLE,
) -> Plan:
    """Estimate the cost of a reproduction from two short runs of its longest prompt."""
    tasks = list(made.values())
    longest = max(tasks, key=lambda task: len(task.tokens))
    per_row = estimate_seconds(model, longest, 256) / 256 / len(longest.tokens)
    pairs = [(study_rows(model, task, choices), len(task.tokens)) for task in tasks]
    if len(tasks) > 1:
        together = together_rows(model, tasks, kinds, choices).values()
        pairs += [pair for own in together for pair in own]
    seconds = sum(count * length * per_row for count, length in pairs)
    total = sum(count for count, _ in pairs)
    size = rows_per_pass(model, longest)
    steps = STARTS * sum(len(task.continuation) for task in tasks) if "texts" in choices else 0
    seconds += steps * estimate_seconds(model, longest, 1) + PAGE + DRAWN * len(tasks)
    return Plan(
        len(tasks), total, -(-total // size) + steps, size * bytes_per_row(model, longest), seconds
    )


def study_rows(model: Model, task: Task, choices: Choices = WHOLE) -> int:
    """Rows of the study of one prompt, but for the texts that it writes."""
    steps = study_steps(model, task, choices)
    return round(sum(step.cost for name, step in steps.items() if name != "texts"))


def study_steps(model: Model, task: Task, choices: Choices = WHOLE) -> dict[str, Step]:
    """The cost of each step of the study of one prompt, in its order."""
    directions = _directions(model, task)
    sweep = choices.count(directions, QUICK + 16)
    few = choices.quick or directions > PRODUCTS
    pairs = min(PAIRS, directions) if few else directions
    products = directions if takes_whole(directions, pairs) else LANCZOS
    rows = products + STEPS + 4 * pairs
    attribution = PRODUCT * products + PATH * STEPS + 4 * pairs
    cards = min(DESCRIBED, directions) * (1 + 2 * len(GAINS))
    in_metric = sweep * ("clipping" in choices) + directions * ("directions" in choices)
    return {
        "ranking": Step(directions * choices.takes_ranking),
        "ranks": Step(sweep),
        "other orders": Step(ORDERS * sweep * ("orders" in choices)),
        "a basis per site": Step(sweep * ("clipping" in choices)),
        "ridge": Step(RIDGE * ("ridge" in choices)),
        "texts": Step(STARTS * len(task.continuation) * ("texts" in choices), STARTS * TEXTS),
        "attribution": Step(attribution * ("attribution" in choices), rows),
        "cards": Step(cards * ("cards" in choices)),
        "metric": Step(in_metric * (choices.metric is not None)),
    }


def together_rows(
    model: Model,
    tasks: Sequence[Task],
    kinds: Mapping[str, Sequence[Task]],
    choices: Choices = WHOLE,
) -> dict[str, list[tuple[int, int]]]:
    """Rows and their tokens, of each step of the comparison of several prompts and of kinds."""
    held_out, d_model = [], model.cfg.d_model
    for task in tasks:
        most = d_model if choices.visited(1) else _directions(model, task)
        held_out.append((7 * choices.count(most, QUICK + 1), len(task.tokens)))
    every = [task for own in kinds.values() for task in own]
    texts = every[:FEWEST] if len(tasks) < FEWEST <= len(every) else tasks[:TWINNED]
    random = [(2 * (_directions(model, t) + 4 * QUICK), len(t.tokens)) for t in texts]
    special = [(3 * (3 * len(kinds) + 2) // 2, len(task.tokens)) for task in every]
    found = {"held-out texts": held_out, "texts of random tokens": random, "special": special}
    parts = zip(("held-out", "told", "special"), found.items(), strict=True)
    return {name: pairs for part, (name, pairs) in parts if part in choices}


def together_steps(
    model: Model,
    tasks: Sequence[Task],
    kinds: Mapping[str, Sequence[Task]],
    choices: Choices = WHOLE,
) -> dict[str, Step]:
    """The cost of each step of the comparison of several prompts, in rows times tokens."""
    found = together_rows(model, tasks, kinds, choices)
    found.pop("special", None)  # has a bar of its own
    return {
        name: Step(sum(count * length for count, length in pairs), sum(count for count, _ in pairs))
        for name, pairs in found.items()
    }


def _directions(model: Model, task: Task) -> int:
    return min(model.cfg.d_model, len(task.tokens) * 2 * model.cfg.n_layers)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
