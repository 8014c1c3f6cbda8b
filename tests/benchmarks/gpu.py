"""The sweep and the ranking on a GPU, at the size of Llama-3-8B: ours, the plain loop, and the machine's own rate.

    python -m tests.benchmarks.gpu                     # a random model of Llama-3-8B's shape, bfloat16, 71 tokens
    python -m tests.benchmarks.gpu --small --device cpu    # the same steps on a toy, to try the script

The weights are random, so the numbers say how long a sweep takes and how exact it is, and nothing about Llama. The loop is one
`run_with_hooks` per edit, with a dense projector (sweep) or x − (x·v)v (ranking) in the model's dtype at every site. FLOPs are
the model's matrix products for all edits; the rate is that of an 8192³ product in the model's dtype, before and after.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import torch

import mechsvd as ms

SIZES = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TOKENS, SCORED = 71, 40


def main():
    options = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = random_llama(SIZES | (SMALL if options.small else {}), device, dtype)
    tokens = torch.randint(
        3, model.cfg.d_vocab, (TOKENS,), generator=torch.Generator().manual_seed(0)
    )
    task = ms.Task(tokens=tokens, prompt_length=TOKENS - SCORED)
    print(
        f"{machine(device)}, torch {torch.__version__}, mechsvd {ms.__version__}, {options.dtype}"
    )
    seconds, svd = timed(device, lambda: ms.decompose(ms.collect_writes(model, task, check=False)))
    print(
        f"writes and their SVD: {seconds:.1f} s, {svd.rank} directions of {svd.d_model}", flush=True
    )
    table = [row(options, model, task, svd, *case) for case in cases(options, svd)]
    print_table(table)
    if options.profile:
        profile(
            device, lambda: ms.sweep_rank(model, task, svd, ranks=spread(svd.rank, 64), check=False)
        )
    if options.compare:
        compare(model, task, svd, options.compare)
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="a toy in place of Llama-3-8B's shape")
    parser.add_argument(
        "--edits", type=int, help="ranks and directions to run, evenly spread (default: all)"
    )
    parser.add_argument(
        "--loop", type=int, default=24, help="edits that the loop runs (default: 24)"
    )
    parser.add_argument(
        "--compare",
        type=int,
        default=0,
        help="ranks to compare with the model in float32 on the CPU",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print the kernels that take most of a sweep's time"
    )
    parser.add_argument("--json", help="also write the table here")
    return parser.parse_args()


def cases(options, svd):
    """What is timed: its name, how many edits a full run has, the edits, the engine's call, and an edit of the loop."""
    ranks = spread(svd.rank, options.edits or svd.rank + 1)
    directions = spread(svd.rank - 1, options.edits or svd.rank)
    v = svd.directions
    gains = 1 - torch.eye(svd.rank, dtype=v.dtype, device=v.device)

    def sweep(model, task):
        return ms.sweep_rank(model, task, svd, ranks=ranks, check=False, progress=False).measurement

    def ranking(model, task):
        stack = ms.gate(svd, gains[directions], rest=1.0)
        return ms.measure(model, task, stack, check=False, progress=False)

    def project(rank):
        projector = (v[:, :rank] @ v[:, :rank].T).to(options.torch_dtype)
        return lambda x, hook: x @ projector

    def remove(direction):
        column = v[:, direction].to(options.torch_dtype)
        return lambda x, hook: x - (x @ column)[..., None] * column

    options.torch_dtype = getattr(torch, options.dtype)
    return [
        ("rank sweep", svd.rank + 1, ranks, sweep, project),
        ("ranking", svd.rank, directions, ranking, remove),
    ]


def row(options, model, task, svd, what, full, edits, engine, edit):
    """Time the engine on the edits, and the loop on some of them."""
    device = next(model.parameters()).device
    few = edits[:: max(1, len(edits) // options.loop)]
    loop(model, task, [edit(e) for e in few[:2]])  # the first run pays for what is set up once
    engine(model, task)
    loop_seconds, expected = timed(device, lambda: loop(model, task, [edit(e) for e in few]))
    before = multiply_rate(device, options.torch_dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, measured = timed(device, lambda: engine(model, task))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    rate = (before + multiply_rate(device, options.torch_dtype)) / 2
    at = [edits.index(e) for e in few]
    return {
        "what": what,
        "edits": len(edits),
        "loop, ms per edit": 1e3 * loop_seconds / len(few),
        "engine, ms per edit": 1e3 * seconds / len(edits),
        "times as fast": loop_seconds / len(few) / (seconds / len(edits)),
        "full run, s": seconds / len(edits) * full,
        "share of the rate": flops(model, task) * len(edits) / seconds / rate,
        "rate, TFLOP/s": rate / 1e12,
        "peak, GiB": peak,
        "weights, GiB": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
        "largest difference to the loop, nats": float(
            (measured.log_prob[at] - expected).abs().max()
        ),
        "clean, nats": float(measured.clean.log_prob),
    }


@torch.no_grad()
def loop(model, task, edits):
    """The plain loop: one run per edit, log-probabilities from full logits."""
    names, found = [site.hook_name for site in ms.find_sites(model)], []
    tokens = task.tokens[None].to(next(model.parameters()).device)
    for edit in edits:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(n, edit) for n in names])
        log_probs = logits[0, task.scored].float().log_softmax(-1).cpu()
        found.append(log_probs.gather(-1, task.continuation[:, None]).double().sum())
    return torch.stack(found)


def compare(model, task, svd, count):
    """The same ranks on the same weights in float32 on the CPU, next to the noise floor of the half-precision run."""
    ranks = spread(svd.rank, count)
    half = ms.sweep_rank(model, task, svd, ranks=ranks, check=False, noise_floor=True)
    exact_model = boot(model.original_model.to("cpu", torch.float32))
    started = time.perf_counter()
    exact = ms.sweep_rank(exact_model, task, svd, ranks=ranks, check=False, batch_size=4)
    differences = (half.measurement.log_prob - exact.measurement.log_prob).tolist()
    print(f"\nfloat32 on the CPU ({time.perf_counter() - started:.0f} s for {len(ranks)} ranks), noise floor of the "
          f"half-precision run {half.measurement.noise_floor:.3g} nats, clean {float(exact.measurement.clean.log_prob):.4f}")  # fmt: skip
    for rank, value, difference in zip(
        ranks, exact.measurement.log_prob.tolist(), differences, strict=True
    ):
        print(f"  rank {rank}: {value:.4f} nats, half precision differs by {difference:+.4f}")


def flops(model, task):
    """Forward FLOPs of the model's matrix products on a task, once."""
    cfg, length = model.cfg, len(task.tokens)
    heads_share = (cfg.n_key_value_heads or cfg.n_heads) / cfg.n_heads
    weights = cfg.n_layers * (2 * (1 + heads_share) * cfg.d_model**2 + 3 * cfg.d_model * cfg.d_mlp)
    attention = cfg.n_layers * 4 * length**2 * cfg.d_model
    return 2 * weights * length + attention + 2 * cfg.d_model * cfg.d_vocab * len(task.continuation)


def multiply_rate(device, dtype):
    """FLOP/s of a large product of random numbers, over about half a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    count = 200 if device.type == "cuda" else 5
    seconds, _ = timed(device, lambda: [a @ b for _ in range(count)])
    return 2 * size**3 * count / seconds


def random_llama(sizes, device, dtype):
    """A random model, its weights drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))
    finally:
        torch.set_default_dtype(before)
    return boot(model.eval())


def boot(model):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model.config.architectures = [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(Path(ms.__file__).parent / "demo" / "weights")
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return TransformerBridge.boot_transformers(
        "random-llama", hf_model=model, tokenizer=tokenizer, device=str(device), dtype=dtype
    )


def profile(device, run):
    """The kernels of a run, by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with record(activities=activities) as profiler:
        run()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=24, max_name_column_width=70))


def spread(last, count):
    """Whole numbers from 0 to `last`, evenly spread."""
    return sorted({round(i * last / max(1, count - 1)) for i in range(count)} | {last})


def timed(device, run):
    """Seconds and result of a call, with what it started on the device ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def machine(device):
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def print_table(table):
    print("\n| " + " | ".join(table[0]) + " |\n|" + " --- |" * len(table[0]))
    for line in table:
        print(
            "| "
            + " | ".join(v if isinstance(v, str) else f"{v:.4g}" for v in line.values())
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
