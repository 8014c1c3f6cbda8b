"""How fast the engine is, against the loops anyone would write and against what the machine can do; prints two tables.

    python -m tests.benchmarks.speed [stories260k directory]

The rank sweep keeps the first k directions, for every k; its loop is one `run_with_hooks` a rank with a dense d × d projector at
every site. The ranking removes each direction alone; its loop is one `run_with_hooks` a direction with x − (x·v)v at every site.
The machine's rate is that of a 2048³ float32 product, measured before and after each run. FLOPs are those of the forward passes
of all edits: the model's matrix products, attention, the unembedding of the scored positions, and the edits themselves
(4·d·min(k, d − k) a write in a sweep, 4·d in a ranking). "At most" is how many times as fast an engine would be that ran the
model alone, without edits, at the machine's full rate.
"""

import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import mechsvd as ms

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else STORIES
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, mechsvd {ms.__version__}, float32\n"
    )
    print(
        "| what | model | tokens | edits | loop | engine | times as fast | at most | share of the matrix-multiply rate |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    if directory.is_dir():
        model = ms.load_model(directory, device="cpu")
        rows(
            "stories260k (d_model 64, 5 layers)",
            model,
            ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20),
        )
    tokens = torch.cat(
        [
            torch.tensor([1]),
            torch.randint(3, 1000, (63,), generator=torch.Generator().manual_seed(0)),
        ]
    )
    rows(
        "random Llama (d_model 512, 8 layers)",
        random_llama(),
        ms.Task(tokens=tokens, prompt_length=44),
        repeats=3,
    )
    print("\n| start | seconds |\n| --- | --- |")
    print(f"| `import torch` | {import_seconds('torch'):.2f} |")
    print(f"| `import mechsvd` | {import_seconds('mechsvd'):.2f} |")


def rows(name, model, task, repeats=9):
    """Measure one model: the sweep and the ranking, each by the loop and by the engine in turn."""
    svd = ms.decompose(ms.collect_writes(model, task))
    d, v = svd.d_model, svd.directions
    kept = sum(min(k, d - k) for k in range(svd.rank + 1))
    row(
        "rank sweep",
        name,
        model,
        task,
        sweep,
        [dense(v[:, :k]) for k in range(svd.rank + 1)],
        svd,
        4 * d * kept,
        repeats,
    )
    row(
        "ranking",
        name,
        model,
        task,
        ranking,
        [rank_one(v[:, j]) for j in range(svd.rank)],
        svd,
        4 * d * svd.rank,
        repeats,
    )


def sweep(model, task, svd):
    """The engine's rank sweep."""
    return ms.sweep_rank(model, task, svd, progress=False).measurement.log_prob


def ranking(model, task, svd):
    """The engine's ranking, with its noise floor."""
    return ms.rank_directions(model, task, svd, progress=False).measurement.log_prob


def dense(basis):
    """Keep a subspace, by a d × d projector that is made when it is needed."""
    return lambda: lambda x, hook, p=basis @ basis.T: x @ p


def rank_one(v):
    """Remove one direction."""
    return lambda: lambda x, hook: x - (x @ v)[..., None] * v


def row(what, name, model, task, engine, edits, svd, flops_a_write, repeats):
    """Run loop and engine in turn, and print the row."""
    engine(model, task, svd)
    loops, engines, rates, worst = [], [], [], 0.0
    for _ in range(repeats):
        loop_seconds, expected = timed(lambda: loop(model, task, edits))
        before = multiply_rate()
        seconds, found = timed(lambda: engine(model, task, svd))
        rates.append(statistics.mean([before, multiply_rate()]))
        loops.append(loop_seconds)
        engines.append(seconds)
        worst = max(worst, float((found - expected).abs().max()))
    alone = flops(model, task) * len(edits)
    together = alone + 2 * model.cfg.n_layers * len(task.tokens) * flops_a_write
    ratio = statistics.median(a / b for a, b in zip(loops, engines, strict=True))
    share, model_share = (
        statistics.median(f / s / r for s, r in zip(engines, rates, strict=True))
        for f in (together, alone)
    )
    limit = statistics.median(s * r / alone for s, r in zip(loops, rates, strict=True))
    rate = statistics.median(rates) / 1e9
    print(
        f"| {what} | {name} | {len(task.tokens)} | {len(edits)} | {statistics.median(loops):.2f} s "
        f"| {statistics.median(engines):.3f} s | {ratio:.1f} | {limit:.1f} | {share:.0%} ({model_share:.0%} without the edits) of {rate:.0f} GFLOP/s |"
    )
    print(
        f"<!-- {what}, {name}: largest difference between loop and engine {worst:.1e} nats -->",
        file=sys.stderr,
    )


@torch.no_grad()
def loop(model, task, edits):
    """The plain loop: one run an edit, log-probabilities from full logits."""
    names = [site.hook_name for site in ms.find_sites(model)]
    tokens, found = task.tokens[None], []
    for make in edits:
        edit = make()
        logits = model.run_with_hooks(tokens, fwd_hooks=[(n, edit) for n in names])
        log_probs = logits[0, task.scored].log_softmax(-1)
        found.append(log_probs.gather(-1, task.continuation[:, None]).sum())
    return torch.stack(found)


def flops(model, task):
    """Forward FLOPs of the model on a task, once."""
    cfg, length, scored = model.cfg, len(task.tokens), len(task.continuation)
    heads_share = (cfg.n_key_value_heads or cfg.n_heads) / cfg.n_heads
    weights = cfg.n_layers * (2 * (1 + heads_share) * cfg.d_model**2 + 3 * cfg.d_model * cfg.d_mlp)
    return (
        2 * weights * length
        + cfg.n_layers * 4 * length**2 * cfg.d_model
        + 2 * cfg.d_model * cfg.d_vocab * scored
    )


def multiply_rate(size=2048, seconds=1.0):
    """FLOP/s of a float32 product, over about a second, since a burst is faster than what lasts."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def random_llama():
    """A random Llama-shaped model of 26 million parameters."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        AutoTokenizer.from_pretrained(
            Path(ms.__file__).parent / "demo" / "weights"
        ).save_pretrained(directory)
        return ms.load_model(directory, device="cpu")


def timed(run):
    """Seconds and result of a call."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def import_seconds(module):
    """Median seconds that a fresh interpreter takes to import a module."""
    command = f'{sys.executable} -c "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"'
    return statistics.median(float(os.popen(command).read()) for _ in range(5))


def cpu_name():
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
