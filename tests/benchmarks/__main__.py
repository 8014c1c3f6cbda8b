"""Every benchmark in one table: `python -m tests.benchmarks [--only WORD] [--json FILE]`.

Each row says what was timed, on which model, what mechsvd took, what the loop that anyone would
write takes (of long loops, some edits are timed and the rest is extrapolated), what the nearest
other tool takes, and the limit: the arithmetic of the model alone at the machine's rate of a 2048³
float32 product. Run it on an idle machine.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import mechsvd as ms
from tests.benchmarks.machine import cpu_name, multiply_rate, seconds_of, timed
from tests.benchmarks.models import STORIES, flops, random_model, random_task, save_random

SAMPLE = 6  # edits of a loop that are timed


@dataclass
class Row:
    """One line of the table; seconds, NaN where there is none."""

    work: str
    model: str
    ours: float
    loop: float = float("nan")
    peer: float = float("nan")
    limit: float = float("nan")
    note: str = ""

    def __str__(self):
        numbers = [self.ours, self.loop, self.peer, self.limit]
        ratios = [self.loop / self.ours, self.peer / self.ours, self.limit / self.ours]
        seconds = " | ".join("" if x != x else f"{x:.3g} s" for x in numbers)
        shares = " | ".join("" if x != x else f"{x:.2g}" for x in ratios)
        return f"| {self.work} | {self.model} | {seconds} | {shares} | {self.note} |"


HEAD = (
    "| work | model | mechsvd | loop | other tool | limit | loop ÷ ours | other ÷ ours "
    "| limit ÷ ours | note |\n" + "| --- " * 10 + "|"
)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--only", default="", help="run the works whose name has this word")
    parser.add_argument("--json", help="write the rows to this file too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    machine = {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mechsvd": ms.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(HEAD, flush=True)
    rows = []
    for name, work in WORKS.items():
        if options.only in name:
            for row in work():
                rows.append(row)
                print(row, flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rows": [asdict(row) for row in rows]}, file, indent=1)


def edits_of(shape, length, prompt_length, ranks=None):
    """The sweep and the ranking of one model, against the loop and the limit."""
    if shape == "stories260k":
        if not STORIES.is_dir():
            return
        model = ms.load_model(STORIES, device="cpu")
        prompt = "Once upon a time, there was"
        task = ms.Task.from_text(model, prompt, max_new_tokens=length - prompt_length)
    else:
        model = random_model(shape)
        task = random_task(length, prompt_length)
    svd = ms.decompose(ms.collect_writes(model, task))
    d, v = svd.d_model, svd.directions
    chosen = [*range(0, svd.rank + 1, ranks or 1)]
    directions = [*range(0, svd.rank, ranks or 1)]
    kept = sum(min(k, d - k) for k in chosen)
    gains = 1 - torch.eye(svd.rank)[directions]
    works = {
        "sweep": (
            lambda: ms.sweep_rank(model, task, svd, chosen, progress=False).measurement,
            [dense(v[:, :k]) for k in chosen[:: max(1, len(chosen) // SAMPLE)]],
            len(chosen),
            4 * d * kept,
        ),
        "ranking": (
            lambda: ms.measure(model, task, ms.gate(svd, gains, rest=1.0), progress=False),
            [rank_one(v[:, j]) for j in directions[:: max(1, len(directions) // SAMPLE)]],
            len(directions),
            4 * d * len(directions),
        ),
    }
    for work, (run, loop, count, per_write) in works.items():
        run()
        ours, loops, rates = [], [], []
        for _ in range(3):
            loops.append(timed(lambda loop=loop: plain(model, task, loop))[0] / len(loop) * count)
            before = multiply_rate(seconds=0.5)
            ours.append(timed(run)[0])
            rates.append((before + multiply_rate(seconds=0.5)) / 2)
        rate, seconds = statistics.median(rates), statistics.median(ours)
        alone = flops(model, task) * count
        together = alone + 2 * model.cfg.n_layers * len(task.tokens) * per_write
        note = (
            f"{len(task.tokens)} tokens, {count} edits; {together / seconds / rate:.0%} of the rate "
            f"of {rate / 1e9:.0f} GFLOP/s with the edits"
        )
        name = model.cfg.model_name if shape != "stories260k" else shape
        yield Row(work, name, seconds, statistics.median(loops), limit=alone / rate, note=note)


def dense(basis):
    """Keep a subspace, by a d × d projector that is made when it is needed."""
    return lambda: lambda x, hook, p=basis @ basis.T: x @ p


def rank_one(v):
    """Remove one direction."""
    return lambda: lambda x, hook: x - (x @ v)[..., None] * v


@torch.no_grad()
def plain(model, task, edits):
    """One `run_with_hooks` per edit."""
    names = [site.hook_name for site in ms.find_sites(model)]
    for make in edits:
        edit = make()
        logits = model.run_with_hooks(task.tokens[None], fwd_hooks=[(n, edit) for n in names])
        logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None]).sum()


def beginnings():
    """A sweep at the last positions of a text, whose rows share the keys and values before them."""
    model, task = random_model("llama"), random_task(256, 240)
    svd = ms.decompose(ms.collect_writes(model, task))

    def run(fast):
        options = {"positions": range(240, 256), "fast": fast, "progress": False}
        return ms.sweep_rank(model, task, svd, range(0, 512, 16), **options)

    times = []
    for fast in (True, False):
        run(fast)
        times.append(min(timed(lambda fast=fast: run(fast))[0] for _ in range(3)))
    note = "256 tokens, 16 positions edited, 32 ranks; the loop: the same call with `fast=False`"
    yield Row("sweep at positions", "random llama", *times, note=note)


def growth():
    """How the time of a sweep grows with tokens, edits and d_model: fitted exponents."""

    def seconds(length=64, count=64, d=256):
        heads = {"num_attention_heads": d // 64, "num_key_value_heads": d // 64}
        model = random_model("llama", hidden_size=d, intermediate_size=8 * d // 3, **heads)
        task = random_task(length, length - 8)
        svd = ms.decompose(torch.randn(1, 2 * d, d))
        ranks = [round(i * d / (count - 1)) for i in range(count)]

        def run():
            return ms.sweep_rank(model, task, svd, ranks, progress=False, check=False)

        run()
        return min(timed(run)[0] for _ in range(3))

    for name, values in {
        "length": (32, 64, 128, 256),
        "count": (32, 64, 128, 256),
        "d": (128, 256, 512),
    }.items():
        times = [seconds(**{name: value}) for value in values]
        logs = torch.tensor([values, times]).double().log()
        x, y = logs - logs.mean(dim=1, keepdim=True)
        exponent = float((x @ y) / (x @ x))
        label = {"length": "tokens", "count": "edits", "d": "d_model"}[name]
        shown = ", ".join(f"{t:.2g}" for t in times)
        yield Row(f"growth with {label}", "random llama", times[-1], note=(
            f"{label} {values[0]} to {values[-1]}: {shown} s, exponent {exponent:.2f}"
        ))  # fmt: skip


PEAK = """
import json, os, sys, time, warnings, logging
from pathlib import Path
shape, length, group = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if group:
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import mechsvd as ms
from mechsvd.engine.batches import bytes_per_row, rows_per_pass
from tests.benchmarks.models import random_model, random_task


def used(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


model, task = random_model(shape), random_task(length, length - 20)
svd = ms.decompose(ms.collect_writes(model, task))
ranks = range(0, svd.rank, 8)
ms.sweep_rank(model, task, svd, ranks[:2], progress=False)  # what is set up once
rows = rows_per_pass(model, task)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, started = used("VmRSS"), time.perf_counter()
ms.sweep_rank(model, task, svd, ranks, progress=False)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "peak": used("VmHWM") - before,
    "rows": rows,
    "predicted": min(rows, len(ranks) + 1) * bytes_per_row(model, task),
}))
"""
GROUPS = Path("/sys/fs/cgroup/memory")  # of version 1; where it is absent, of version 2
LIMIT = 1400 * 2**20  # little more than GPT-2 small and torch take


def memory():
    """Peak memory of a sweep, next to what `rows_per_pass` had predicted."""
    for shape, length in (("llama", 64), ("gpt2", 29), ("llama", 512)):
        yield peak_of(shape, length)
    yield under_a_limit()


def peak_of(shape, length, group="", note=""):
    """The peak in a process of its own, which joins a control group if one is given."""
    work, name = "peak memory of a sweep", f"random {shape}"
    command = [sys.executable, "-c", PEAK, shape, str(length), str(group)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        end = " ".join(done.stderr.strip().splitlines()[-1:])
        return Row(work, name, float("nan"), note=f"{note}exit status {done.returncode}: {end}")
    found = json.loads(done.stdout)
    peak, predicted = (found[key] / 2**20 for key in ("peak", "predicted"))
    note += f"{length} tokens, {found['rows']} rows a pass: "
    note += f"{peak:.0f} MiB, predicted {predicted:.0f} MiB"
    return Row(work, name, found["seconds"], note=note)


def under_a_limit():
    """The same in a control group with a memory limit, which `/proc/meminfo` does not show."""
    is_first = GROUPS.is_dir()
    group = (GROUPS if is_first else GROUPS.parent) / "mechsvd-benchmark"
    note = f"limit of {LIMIT / 2**20:.0f} MiB: "
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(LIMIT))
    except OSError as error:
        return Row("peak memory of a sweep", "", float("nan"), note=f"{note}{error}")
    try:
        return peak_of("gpt2", 29, group, note)
    finally:
        group.rmdir()


def moments():
    """The SVD of many writes by their moments, against torch's and scikit-learn's."""
    values = torch.randn(100_000, 512, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(0, -3, 512)
    from tests.benchmarks.stream import by_incremental_pca, by_moments

    ours = min(timed(lambda: by_moments(values))[0] for _ in range(3))
    loop = timed(lambda: torch.linalg.svd(values, full_matrices=False))[0]
    peer = float("nan")
    if find_spec("sklearn"):
        peer = timed(lambda: by_incremental_pca(values))[0]
    note = "the loop: torch.linalg.svd; the other tool: IncrementalPCA"
    yield Row("SVD of 100,000 × 512 writes", "", ours, loop, peer, note=note)


def start():
    """From nothing to a loaded model, step by step, in fresh interpreters."""
    steps = [
        "import torch",
        "import mechsvd as ms",
        "import transformer_lens.model_bridge",
        "model = ms.load_model(*sys.argv[1:])",
    ]
    for shape in ("embedded", "gpt2"):
        with tempfile.TemporaryDirectory() as directory:
            if shape != "embedded":
                save_random(shape, directory)
            given = [] if shape == "embedded" else [directory]
            seconds = seconds_of(steps, *given)
        told = ", ".join(f"{line} {t:.2f} s" for line, t in zip(steps, seconds, strict=True))
        yield Row("start, to a loaded model", shape, sum(seconds), note=told)


def hessian():
    """The whole Hessian over the gains, against one double backward per column."""
    model = ms.load_model(STORIES, device="cpu") if STORIES.is_dir() else random_model("llama")
    task = random_task(28, 8)
    svd = ms.decompose(ms.collect_writes(model, task))

    def run():
        return ms.hessian_attribution(model, task, svd, objective="log_prob", progress=False)

    run()
    name = "stories260k" if STORIES.is_dir() else "random llama"
    yield Row("Hessian attribution of all gains", name, min(timed(run)[0] for _ in range(3)))


WORKS = {
    "sweep and ranking, stories260k": lambda: edits_of("stories260k", 28, 8),
    "sweep and ranking, stories260k, long": lambda: edits_of("stories260k", 76, 8),
    "sweep and ranking, llama": lambda: edits_of("llama", 64, 44, ranks=4),
    "sweep and ranking, gpt2": lambda: edits_of("gpt2", 29, 9, ranks=8),
    "sweep and ranking, pythia": lambda: edits_of("pythia", 29, 9, ranks=8),
    "moments": moments,
    "hessian": hessian,
    "positions": beginnings,
    "growth": growth,
    "memory": memory,
    "start": start,
}

if __name__ == "__main__":
    main()
