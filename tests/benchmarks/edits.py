"""What metrics, baselines, bases per site, optimal constants and doses cost; prints a table.

    python -m tests.benchmarks.edits [stories260k directory]

Each row times two calls in turn, and gives the median of the ratios of neighbouring runs. "Log-probability alone" is the sweep
without the KL divergence that every measurement carries, by putting zeros in its place.
"""

import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

import mechsvd as ms
from mechsvd.engine import passes
from tests.benchmarks.machine import machine_line
from tests.benchmarks.models import STORIES, random_model

REPEATS = 7


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else STORIES
    print(f"{machine_line()}\n")
    print("| what | compared with | model | seconds | seconds of the other | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    if directory.is_dir():
        model = ms.load_model(directory, device="cpu")
        task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
        rows("stories260k", model, task)
    tokens = torch.randint(3, 1000, (64,), generator=torch.Generator().manual_seed(0))
    rows(
        "d_model 512, 8 layers", random_model("llama"), ms.Task(tokens=tokens, prompt_length=44), 3
    )


def rows(name, model, task, repeats=REPEATS):
    """All rows of one model."""
    quiet = {"progress": False}
    writes = ms.collect_writes(model, task)
    svd, bases, mean = (
        ms.decompose(writes),
        ms.decompose(writes, per="site"),
        ms.mean_baseline(writes),
    )
    right, wrong = int(task.continuation[0]), 5
    choice = ms.logit_difference(right, wrong)

    def sweep(**options):
        return lambda: ms.sweep_rank(model, task, svd, **options, **quiet)

    def alone():
        divergences = passes.divergences
        passes.divergences = lambda edited, clean: edited.new_zeros(edited.shape[:-1])
        try:
            sweep()()
        finally:
            passes.divergences = divergences

    def ranking(**options):
        return lambda: ms.rank_directions(model, task, svd, **options, **quiet)

    def pair(what, other, call, other_call, times=repeats):
        seconds, others = timed(call, other_call, times)
        ratio = statistics.median(a / b for a, b in zip(seconds, others, strict=True))
        print(
            f"| {what} | {other} | {name} | {statistics.median(seconds):.3f} "
            f"| {statistics.median(others):.3f} | {ratio:.2f} |",
            flush=True,
        )

    pair(
        "sweep with the KL divergence",
        "log-probability alone",
        sweep(metric=ms.kl_divergence),
        alone,
    )
    pair("sweep, logit difference", "log-probability alone", sweep(metric=choice), alone)
    pair("sweep about the mean", "about zero", sweep(baseline=mean), sweep())
    ranks = torch.linspace(0, max(one.rank for one in bases), svd.rank + 1).long()
    pair(
        f"{len(ranks)} ranks, a basis per site",
        "one basis for all",
        lambda: ms.sweep_rank(model, task, bases, ranks, **quiet),
        sweep(),
    )
    pair("ranking about the mean", "about zero", ranking(baseline=mean), ranking())
    pair(
        "optimal baseline",
        "a ranking",
        lambda: ms.optimal_baseline(model, task, svd, **quiet),
        ranking(),
    )
    count = 64 if name == "stories260k" else 8
    gains = [i / 4 for i in range(9)]
    pair(
        f"the loop, {count} directions × 9 gains and as many random ones",
        "dose_response",
        lambda: loop(model, task, svd, count, gains),
        lambda: ms.dose_response(model, task, svd, range(count), gains, **quiet),
        1 if name != "stories260k" else 3,
    )


@torch.no_grad()
def loop(model, task, svd, count, gains):
    """One `run_with_hooks` per direction and gain, as anyone would write it."""
    names = [site.hook_name for site in ms.find_sites(model)]
    random = ms.random_subspace(svd.d_model, count).basis.to(svd.directions)
    for basis in (svd.directions[:, :count], random):
        for v in basis.T:
            for gain in gains:
                edit = lambda x, hook, v=v, gain=gain: x + (gain - 1) * (x @ v)[..., None] * v
                logits = model.run_with_hooks(
                    task.tokens[None], fwd_hooks=[(name, edit) for name in names]
                )
                logits[0, task.scored].log_softmax(-1).gather(1, task.continuation[:, None]).sum()


def timed(call, other, repeats):
    """Seconds of two calls in turn, after one run of each."""
    call(), other()
    seconds: tuple[list, list] = ([], [])
    for _ in range(repeats):
        for function, times in zip((call, other), seconds, strict=True):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
