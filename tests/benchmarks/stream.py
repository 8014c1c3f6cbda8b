"""What streaming costs: time and accuracy beside other ways, memory, shards, and kills. Prints four tables.

python -m tests.benchmarks.stream [speed] [memory] [shards] [kills]

scikit-learn is timed where it is installed.
"""

import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import mechsvd as ms
from mechsvd.demo.language import SHAPES, write
from mechsvd.engine import stream
from mechsvd.linalg.moments import BLOCK, Accumulator, decompose_moments, no_moments
from tests.benchmarks.machine import machine_line

KILLS = 20
KILL_WINDOW = 16_384  # tokens between two states, so that a run of a minute has many


def main(parts):
    print(f"{machine_line()}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n")
    for part in parts or ["speed", "memory", "shards", "kills"]:
        with tempfile.TemporaryDirectory() as folder:
            {"speed": speed, "memory": memory, "shards": shards, "kills": kills}[part](Path(folder))
        print(flush=True)


def speed(folder, n=100_000, d_model=512):
    """The SVD of vectors of condition 1e6, by moments and by others, against float64."""
    torch.manual_seed(0)
    sizes = torch.logspace(0, -6, d_model, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(n, d_model, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(d_model, d_model, dtype=torch.float64))[0]
    vectors = ((left * sizes) @ right).float()
    exact = torch.linalg.svdvals(vectors.double())
    ways = {
        "mechsvd's moments, of float32": by_moments,
        "the same vectors in bfloat16": lambda x: by_moments(x.bfloat16()),
        "the limit: one product Xᵀ X in float64": gram_alone,
        "`torch.linalg.svd`, float64": lambda x: torch.linalg.svd(x.double(), full_matrices=False)[
            1
        ],
        "`torch.linalg.svd`, float32": lambda x: torch.linalg.svd(x, full_matrices=False)[1],
        "scikit-learn's IncrementalPCA (it centres)": by_incremental_pca,
    }
    columns = ["seconds", "times as long", "error above 1e-2 σ₁", "above 1e-4 σ₁"]
    print(f"| singular values of {n:,} × {d_model} | {' | '.join(columns)} |")
    print("| --- | --- | --- | --- | --- |")
    first = None
    for name, way in ways.items():
        way(vectors[:3000])  # what is set up once
        started = time.perf_counter()
        found = way(vectors)
        seconds = time.perf_counter() - started
        if found is None:
            print(f"| {name} | not installed | | | |")
            continue
        first = first or seconds
        reference = exact
        if "bfloat16" in name:
            reference = torch.linalg.svdvals(vectors.bfloat16().double())
        if "centres" in name:
            reference = torch.linalg.svdvals((vectors - vectors.mean(dim=0)).double())
        errors = [error_above(share, found.double(), reference) for share in (1e-2, 1e-4)]
        print(
            f"| {name} | {seconds:.2f} | {seconds / first:.1f} | {' | '.join(errors)} |", flush=True
        )


def error_above(share, found, reference):
    clear = int((reference > share * reference[0]).sum())
    if clear > len(found):
        return f"{clear - len(found)} of {clear} left out"
    return f"{(found[:clear] / reference[:clear] - 1).abs().max():.1e}"


def by_moments(vectors):
    """As the writes of one site come: block by block."""
    site = ms.Site(0, "mlp", "blocks.0.hook_mlp_out")
    accumulator = Accumulator(no_moments(1, vectors.shape[1], vectors.dtype), vectors.device)
    for block in vectors.split(BLOCK):
        accumulator.add(0, block)
    return decompose_moments(accumulator.moments(), [site]).singular_values


def gram_alone(vectors):
    """The arithmetic that moments cannot do without, and nothing else."""
    exact = vectors.double()
    return torch.linalg.eigvalsh(exact.T @ exact).flip(0).clamp(min=0).sqrt()


def by_incremental_pca(vectors):
    try:
        from sklearn.decomposition import IncrementalPCA
    except ImportError:
        return None
    fitted = IncrementalPCA(vectors.shape[1]).fit(vectors.numpy())
    return torch.from_numpy(fitted.singular_values_)


def write_corpus(path, tokens):
    """Write texts of the embedded model's language, one per line, of about so many tokens."""
    tokenizer, rng, count = ms.load_model().tokenizer, random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while count < tokens:
            text = write(rng.choice(SHAPES), rng)[0].replace("\n", " ")
            count += 1 + len(tokenizer.encode(text, add_special_tokens=False))
            file.write(text + "\n")


def memory(folder):
    """Peak memory of a process that streams few tokens, and of one that streams many."""
    print("| tokens streamed | peak memory | seconds | tokens a second |")
    print("| --- | --- | --- | --- |")
    for tokens in (10_000, 1_000_000):
        write_corpus(folder / "corpus.txt", tokens)
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.stream",
            "--measure",
            str(folder / "corpus.txt"),
        ]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="")


def measure(path):
    model = ms.load_model()
    started = time.perf_counter()
    found = ms.stream_writes(model, path, progress=False)
    seconds = time.perf_counter() - started
    found.decompose()
    print(
        f"| {found.tokens:,} | {peak_memory():.0f} MiB | {seconds:.0f} | {found.tokens / seconds:,.0f} |"
    )


def peak_memory():
    """The most memory that this process has held, in MiB; `ru_maxrss` would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10


def shards(folder, tokens=200_000):
    """Four shards of a file against one run."""
    write_corpus(folder / "corpus.txt", tokens)
    model = ms.load_model()
    whole = ms.stream_writes(model, folder / "corpus.txt", progress=False)
    parts = [
        ms.stream_writes(model, folder / "corpus.txt", shard=(i, 4), progress=False)
        for i in range(4)
    ]
    merged = ms.merge(parts)
    print(f"| four shards of {whole.tokens:,} tokens, against one run | largest difference |")
    print("| --- | --- |")
    print(f"| counts | {int((merged.moments.count - whole.moments.count).abs().max())} |")
    for per in ("pool", "site"):
        pairs = [(merged.decompose(per=per), whole.decompose(per=per))]
        pairs = pairs if per == "pool" else list(zip(*pairs[0], strict=True))
        error = max(
            float((one.singular_values / other.singular_values - 1).abs().max())
            for one, other in pairs
        )
        print(f"| singular values, per {per}, relative | {error:.1e} |")


def kills(folder, tokens=600_000):
    """A run that is killed at random moments of its streaming, against one that is not."""
    write_corpus(folder / "corpus.txt", tokens)
    rng, reached, killed = random.Random(), [], 0
    finish(begin(folder, "whole"))
    while killed < KILLS:
        process = begin(folder, "killed")
        time.sleep(rng.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        state = ms.Checkpoint.load(folder / "killed") if (folder / "killed").exists() else None
        reached.append(state.state.tokens if state else 0)
        if state and state.is_finished:
            break
    finish(begin(folder, "killed"))
    whole, resumed = (ms.Checkpoint.load(folder / name).state for name in ("whole", "killed"))
    same = all(
        torch.equal(getattr(whole.moments, name), getattr(resumed.moments, name))
        for name in ("count", "mean", "scatter")
    )
    print("| kills | tokens in the state after each | the same bits as without |")
    print("| --- | --- | --- |")
    print(f"| {killed} of {whole.tokens:,} tokens | {', '.join(map(str, reached))} | {same} |")


def begin(folder, name):
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.stream",
        "--run",
        str(folder / "corpus.txt"),
        str(folder / name),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "streaming\n"
    return process


def finish(process):
    assert process.wait() == 0


def run(corpus, checkpoint):
    stream.WINDOW = KILL_WINDOW
    model = ms.load_model()
    ms.self_check(model)
    print("streaming", flush=True)
    ms.stream_writes(model, corpus, checkpoint=checkpoint, progress=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    child = {"--measure": measure, "--run": run}.get(sys.argv[1] if sys.argv[1:] else "")
    if child:
        child(*sys.argv[2:])
    else:
        main(sys.argv[1:])
