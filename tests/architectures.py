"""Every text decoder of transformers against plain transformers in float64: `python -m tests.architectures [NAME …]`.

Each row is a tiny random model (see `tests.configurations`) in a process of its own, loaded by `load_model` from a
directory as a user's would be. It is right, refused (with the sentence), wrong, or a raw error; or there is nothing to compare with.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.configurations import class_name, configuration, names
from tests.plain import Plain

LENGTH, PROMPT, HALF, SHORT = (
    24,
    15,
    13,
    17,
)  # of the text; the short one is one longer than the context
PROMPTS, GREEDY = (slice(10), slice(5, 15), slice(11, 20)), 14  # of the text
COLUMNS = ("clean", "sweep", "ablation", "last", "half", "cached", "uncached")
END = 1  # the token
TOLERANCE = 2e-4  # nats, of a model in float32
SECONDS = 90  # per model


def tokens(length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(10, 1000, (LENGTH,), generator=generator)
    return torch.cat([torch.tensor([0]), drawn])[:length]


def random_model(config: Any) -> Any:
    """A model with every parameter perturbed, norms and biases too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    kept = model.state_dict().keys()
    buffers = [(n, b) for n, b in model.named_buffers() if n in kept and b.is_floating_point()]
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *buffers]:
            size = 0.45 if "embed" in name else 0.15
            p.copy_(torch.randn_like(p) * size if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
    return model


def write_checkpoint(name: str, folder: str) -> str:
    """Write a tiny model as a checkpoint; returns why not, if transformers cannot build it."""
    from transformers import AutoConfig, AutoTokenizer

    from mechsvd.demo import WEIGHTS

    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    try:
        random_model(configuration(name)).save_pretrained(folder)
    except Exception as error:
        kind = name.partition("+")[0]
        try:
            config = AutoConfig.for_model(kind)
            config.architectures = [class_name(kind)]
            config.save_pretrained(folder)
        except Exception:
            written = {"model_type": kind, "architectures": [class_name(kind)]}
            Path(folder, "config.json").write_text(json.dumps(written))
        from safetensors.torch import save_file

        save_file(
            {"a": torch.zeros(1)}, Path(folder, "model.safetensors"), metadata={"format": "pt"}
        )
        return one_line(error)
    return ""


def expected(folder: str) -> dict[str, Any]:
    """Every number of a row by plain transformers."""
    text, short = tokens(), tokens(SHORT)
    plain = Plain(folder, text)
    row: dict[str, Any] = {"clean": plain.log_prob(text, PROMPT)}
    row["texts"] = [plain.text(text[where], GREEDY, END) for where in PROMPTS]
    if not plain.writes or any(len(writes) != 2 for writes in plain.writes):
        return row
    _, values, directions = torch.linalg.svd(plain.written(text), full_matrices=False)
    ranks, apart = separated(values)
    kept = [directions[:rank].T @ directions[:rank] for rank in ranks]
    row |= {"ranks": ranks, "apart": apart}
    row["sweep"] = [plain.log_prob(text, PROMPT, lambda x, p=p: x @ p) for p in kept]

    def without(x: torch.Tensor, where: slice = slice(None)) -> torch.Tensor:
        v = directions[apart]
        x = x.clone()
        x[where] -= (x[where] @ v)[:, None] * v
        return x

    row["ablation"] = [plain.log_prob(text, PROMPT, without)]
    at_last, at_half = slice(SHORT - 2, SHORT - 1), slice(HALF, LENGTH)
    row["last"] = [plain.log_prob(short, SHORT - 2, lambda x: without(x, at_last))]
    row["half"] = [plain.log_prob(text, PROMPT, lambda x: without(x, at_half))]
    row["texts"] += [plain.text(text[p], GREEDY, END, lambda x: x @ kept[-1]) for p in PROMPTS]
    return row


def separated(values: torch.Tensor) -> tuple[list[int], int]:
    """Three ranks and one direction that rounding cannot mix with others."""
    ratios = values[:-1] / values[1:]
    thirds = torch.arange(len(ratios)).chunk(3)
    ranks = [int(third[ratios[third].argmax()]) + 1 for third in thirds]
    both = torch.minimum(ratios[1:], ratios[:-1])
    return ranks, 0 if ratios[0] > 1.1 else int(both.argmax()) + 1


def measured(folder: str, row: dict[str, Any]) -> dict[str, Any]:
    """The same numbers by mechsvd."""
    import mechsvd as ms

    text, short = tokens(), tokens(SHORT)
    model = ms.load_model(folder, device="cpu")
    task, last = ms.Task(text, PROMPT), ms.Task(short, SHORT - 2)
    svd = ms.decompose(ms.collect_writes(model, task))
    ranks = row.get("ranks", [1])
    sweep = ms.sweep_rank(model, task, svd, ranks=ranks).measurement
    direction = ms.ablate(svd.directions[:, [row.get("apart", 0)]])
    found: dict[str, Any] = {"clean": float(sweep.clean_run.log_prob)}
    found["sweep"] = sweep.log_prob.tolist()
    found["ablation"] = ms.measure(model, task, [direction]).log_prob.tolist()
    found["last"] = ms.measure(model, last, [direction], positions="last").log_prob.tolist()
    half = range(HALF, LENGTH)
    found["half"] = ms.measure(model, task, [direction], positions=half).log_prob.tolist()
    for column, cached in (("cached", True), ("uncached", False)):
        by_prompt = [
            ms.generate_tasks(
                model,
                text[where],
                [None, ms.keep(svd, ranks[-1])],
                max_new_tokens=GREEDY,
                use_kv_cache=cached,
            )
            for where in PROMPTS
        ]
        found[column] = [t.tokens.tolist() for edit in zip(*by_prompt, strict=True) for t in edit]
    return found


def compare(row: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """By column, the largest difference in nats, or the number of wrong texts."""
    differences = {"clean": abs(row["clean"] - found["clean"])}
    for column in ("sweep", "ablation", "last", "half"):
        if column in row:
            pairs = zip(row[column], found[column], strict=True)
            differences[column] = max(abs(a - b) for a, b in pairs)
    for column in ("cached", "uncached"):
        pairs = zip(row["texts"], found[column], strict=False)  # the edited ones may be missing
        differences[column] = float(sum(a != b for a, b in pairs))
    return {k: v if v == v else float("inf") for k, v in differences.items()}


def install_nothing(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: TransformerLens runs `pip install torchvision` for models that read images."""
    if event == "subprocess.Popen" and "install" in map(str, arguments[1]):
        raise PermissionError(f"The table installs nothing, but something ran {arguments[1]}.")


def judge(name: str) -> dict[str, Any]:
    """One row: its outcome, differences, and the sentence of a refusal or an error."""
    sys.addaudithook(install_nothing)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unbuilt, row = write_checkpoint(name, folder), None
        if not unbuilt:
            try:
                row = expected(folder)
            except Exception as error:
                unbuilt = one_line(error)
        try:
            found = measured(folder, row or {})
        except Exception as error:
            outcome = "refused" if ours(error) else "raw error"
            return {"outcome": outcome, "sentence": one_line(error), "plain": unbuilt}
    if row is None:
        return {"outcome": "no reference", "sentence": unbuilt}
    differences = compare(row, found)
    wrong = [c for c, d in differences.items() if not d <= TOLERANCE]
    if not wrong and "sweep" not in row:
        sentence = "plain transformers has no two writes per layer, so edits cannot be compared"
        return {"outcome": "no reference", "columns": differences, "sentence": sentence}
    return {"outcome": "wrong" if wrong else "right", "columns": differences}


def ours(error: Exception) -> bool:
    """Whether the package itself raised it, with a reason of its own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "/mechsvd/" in last.filename and "damaged?" not in str(error)


def one_line(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if ours(error) else f" ({Path(last.filename).name}:{last.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{place}"


def rows(chosen: list[str]) -> Any:
    """Each name with its row, from a process of its own."""
    context = multiprocessing.get_context("fork")
    for name in chosen:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=lambda s=sender, n=name: s.send(judge(n)))
        process.start()
        sender.close()
        try:
            row = (
                receiver.recv()
                if receiver.poll(SECONDS)
                else {"outcome": "raw error", "sentence": "no end"}
            )
        except EOFError:
            row = {"outcome": "raw error", "sentence": "the process died"}
        process.kill()
        process.join()
        yield name, row


def main(chosen: list[str]) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    import transformer_lens.model_bridge  # noqa: F401 (once, for all the processes)
    import transformers

    import mechsvd  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if unknown := [name for name in chosen if name.partition("+")[0] not in names()]:
        raise SystemExit(f"transformers {transformers.__version__} has no decoders {unknown}.")
    started, counts = time.monotonic(), dict[str, int]()
    print(f"{'model':74}{'outcome':14}" + "".join(f"{c:>10}" for c in COLUMNS))
    for name, row in rows(chosen or names()):
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        shown = row.get("columns", {})
        cells = "".join(f"{shown[c]:10.1e}" if c in shown else f"{'':10}" for c in COLUMNS)
        print(f"{name:74}{row['outcome']:14}{cells}  {row.get('sentence', '')}", flush=True)
    print(f"{counts}, {time.monotonic() - started:.0f} s")
    return int(bool(counts.keys() - {"right", "refused"}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
