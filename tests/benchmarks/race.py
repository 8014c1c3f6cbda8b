"""Orders and bases of directions on own and held-out texts: `python -m tests.benchmarks.race`.

The table of the README: the embedded model, and stories260k where it is at hand. Each takes longer
than seven minutes on two cores.
"""

import logging
import sys
import warnings
from pathlib import Path

import torch

import mechsvd as ms
from mechsvd.demo.language import kinds
from mechsvd.model.tokenization import prompt_tokens
from tests.benchmarks.models import STORIES

LENGTH, PROMPT = 40, 12
ROWS = (
    ("singular value", "pooled"),
    ("effect", "pooled"),
    ("elimination", "pooled"),
    ("balanced", "pooled"),
    ("learned", "pooled"),
    ("singular value", "per site"),
    ("balanced", "per site"),
    ("learned", "per site"),
    ("random subspace", "pooled"),
)


def main(models):
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in models or ["embedded", "stories260k"]:
        if name == "stories260k" and not STORIES.is_dir():
            continue
        model, tasks, ranks = {"embedded": embedded, "stories260k": stories}[name]()
        found = ms.compare_orders(model, tasks, ranks, 3, steps=150, progress=False)
        table = found.summary().set_index(["order", "basis", "fitted", "rank"])
        print(f"{name}, {len(tasks)} texts, KL divergence in nats per token\n")
        heads = [f"{side}, k = {k}" for k in ranks for side in ("own", "held out")]
        print(f"| order, basis | {' | '.join(heads)} |\n{'| --- ' * (len(heads) + 1)}|")
        for order, basis in ROWS:
            sides = ("nothing",) * 2 if order == "random subspace" else ("own text", "other texts")
            cells = [shown(table.loc[order, basis, side, k]) for k in ranks for side in sides]
            print(f"| {order}, {basis} | {' | '.join(cells)} |", flush=True)
        print(flush=True)


def shown(row):
    return f"{row['mean']:.2g} ({row['low']:.2g}–{row['high']:.2g})"


def embedded():
    model = ms.load_model()
    texts = [
        text for same_place in zip(*kinds(4, seed=1).values(), strict=True) for text in same_place
    ]
    ids = [prompt_tokens(model, text)[:LENGTH] for text in texts]
    tasks = [ms.Task(torch.tensor(one), PROMPT) for one in ids if len(one) > PROMPT]
    return model, tasks[:12], [24, 64]


def stories():
    model = ms.load_model(STORIES, device="cpu")
    file = Path(__file__).parents[1] / "stories.jsonl"
    return model, ms.tasks_from(model, file, max_new_tokens=28), [16, 32]


if __name__ == "__main__":
    main(sys.argv[1:])
