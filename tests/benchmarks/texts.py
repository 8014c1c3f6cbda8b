"""What many texts cost in one call, against one call each; and a ranking with intervals over texts. Prints two tables.

python -m tests.benchmarks.texts [stories260k directory]
"""

import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

import mechsvd as ms
from tests.benchmarks.machine import machine_line
from tests.benchmarks.models import STORIES, random_model


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else STORIES
    print(f"{machine_line()}\n")
    print("| sweeps of | tokens | edits of each | one call | single calls | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    if directory.is_dir():
        model = ms.load_model(directory, device="cpu")
        for length in (48, 16, 8):
            row("stories260k, 32 texts", model, texts(32, length, 500), None, 5)
    ranks = range(0, 513, 64)
    row("d_model 512, 8 layers, 32 texts", random_model("llama"), texts(32, 48, 1000), ranks, 1)
    model = ms.load_model()
    hundred = texts(100, 32, 1000)
    svd = ms.decompose(ms.collect_writes(model, hundred))
    started = time.perf_counter()
    ranking = ms.rank_directions(model, hundred, svd, progress=False)
    middle = time.perf_counter()
    ranking.summary()
    print("\n| 100 texts × 128 directions of the embedded model, 32 tokens | seconds |")
    print("| --- | --- |")
    print(f"| `rank_directions` | {middle - started:.1f} |")
    print(
        f"| `.summary()`: intervals, sign flips, max, Benjamini–Hochberg | {time.perf_counter() - middle:.1f} |"
    )


def texts(count, length, vocabulary):
    """Random texts of one length, whose second half is scored."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return [ms.Task(tokens=row, prompt_length=length // 2) for row in ids]


def row(name, model, tasks, ranks, repeats):
    """Time the two ways in turn."""
    svd = ms.decompose(ms.collect_writes(model, tasks))

    def together():
        return ms.sweep_rank(model, tasks, svd, ranks, progress=False)

    def alone():
        return [ms.sweep_rank(model, task, svd, ranks, progress=False) for task in tasks]

    ones, singles = [], []
    together()
    for _ in range(repeats):
        for call, seconds in ((together, ones), (alone, singles)):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    ratio = statistics.median(a / b for a, b in zip(ones, singles, strict=True))
    edits = svd.rank + 1 if ranks is None else len(ranks)
    print(
        f"| {name} | {len(tasks[0].tokens)} | {edits} | {statistics.median(ones):.2f} s "
        f"| {statistics.median(singles):.2f} s | {ratio:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
