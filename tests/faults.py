"""Bad input and faults, what happens, and the tests that show it: `python -m tests.faults` prints the table.

A test names the rows that it shows by `@pytest.mark.fault(7)`.
"""

import ast
from collections import defaultdict
from pathlib import Path

FAULTS = {
    1: "NaN or inf in the writes: an error with layer, component, position and dtype",
    2: "half-precision writes: decomposed in float32 or float64",
    3: "an SVD that does not converge: another driver in float64, then an error",
    4: "fewer writes than directions, one write, zero writes: a smaller rank and a warning, never NaN",
    5: "nothing left after `positions`, `layers`, `components` or `skip_bos`: an error",
    6: "an empty prompt, no prompts, a prompt that is no text: an error before the model runs",
    7: "a text longer than the context: an error with both lengths; cut on request, with a warning",
    8: "nothing to score: an error",
    9: "tokens that merge across the boundary of prompt and continuation: the prompt's stay, and a warning",
    10: "two BOS tokens or none: a warning",
    11: "token ids out of range, of another type or shape: an error before the model runs",
    12: "texts of several lengths: grouped by length, never padded in silence",
    13: "an unknown layer, component or hook name: an error with the closest names or the valid range",
    14: "a layer without the hook: an error; skipped on request, and recorded",
    15: "a hook that never fires: an error after the run",
    16: "hooks that are not the whole write: an error with the block and the measured error; recorded if let through",
    17: "a basis that is not orthonormal, has NaN, zero or dependent vectors: an error; `span` makes a good one",
    18: "a basis of another d_model, another model or processing state, or transposed: an error with both",
    19: "ranks, gains and directions that do not exist, bools for numbers: an error",
    20: "positions while decoding with a cache: absolute",
    21: "an edit that returns another shape, dtype or device: an error for the shape, the others are put right",
    22: "an exception or Ctrl-C in a run: our hooks are gone, the user's kept, every mode restored",
    23: "hooks of the user on the model: kept, with a warning that results include them",
    24: "train mode and dropout: set aside for the call, with a warning, and restored",
    25: "results of different models or processing states together: an error",
    26: "memory runs out: the batch is halved; for one row an error with the bytes that it needs",
    27: "Ctrl-C or kill −9 in a run with a checkpoint: the same call goes on, to the same table",
    28: "a checkpoint of another call or model: an error with the difference",
    29: "two processes writing one checkpoint: an error from the second",
    30: "a full disk, a read-only or missing folder: an error, early where it can be known; the old file stays",
    31: "a truncated, damaged or foreign result file: an error that names it, and nothing is loaded",
    32: "a pickle: refused, of results always, of weights unless the user says otherwise",
    33: "a result of a newer or an older version: read, or an error with the version that wrote it",
    34: "second derivatives under fused attention: eager attention for the call",
    35: "eigenpairs that do not converge: their residual, a warning and a mark in the table",
    36: "probabilities of 0 or 1: logarithms everywhere, and undefined ratios are null",
    37: "effects smaller than the numerical noise: the noise is measured and shown, and ties are marked",
    38: "a gated or unknown hub model, no network: an error with the ways out",
    39: "a folder that is no model, missing or misshapen weights: an error that names the file",
    40: "TransformerLens missing or unsupported, no Chrome: an error with the exact pip line",
    41: "a user's hook that acts on one row, in a batched run: each edit runs alone, as in the plain loop",
    42: "a text read in chunks with a cache, hooks used for a second text: the offset is the model's own",
    43: "an edit that returns another number of rows: an error, also beside one that makes up for it",
    44: "hooks of plain torch, adapters, patched forwards: a warning, and recorded",
    45: "iterables that can be read once: read once, at the door",
    46: "memory that runs out for a moment: the batch grows again; a container's limit counts",
    47: "a result file with a right checksum and wrong content: an error that names file and field",
    48: "a checkpoint that names pickles or code of its own: refused, and nothing runs",
    49: "a report or a folded model killed while it is written: the old one whole, or the new one",
    50: "markup, control characters, formulas in prompts and names: text, never code",
    51: "a dependency that drops, shifts or renames its KV cache: found on the user's model; the plain loop, with one warning that names the versions",
    52: "logits of TransformerLens that differ from those of the wrapped model: an error with the difference and the text's length",
    53: "what depends on the text's length (rotary factors, windows), with shared prefixes or a cache: as in whole runs, or not shared",
    54: "a clean run, a logit or a write that is not finite: an error with where, and which dtype works",
    55: "end, forced or suppressed tokens in the model's own generation settings: as Hugging Face's `generate`, or an error that names the field",
    56: "data frames, dicts of columns, tables in files, padded batches, −100 labels: read rightly, or an error",
    57: "a file in another encoding, compressed, or that the tokenizer refuses: an error with file and line, or skipped",
    58: "edits in place, global modes of torch, threads and processes on one model: no number changes, or an error; no hook is left",
    59: "NumPy and 0-d numbers, arrays for tensors, tuples in torch hooks, consoles of other code pages: they work",
}
UNTESTED: dict[int, str] = {}  # rows without a test, and why


def by_fault() -> dict[int, list[str]]:
    """The tests of each row, as `file::name`, read from their marks."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for mark in filter(_is_fault, node.decorator_list):
                    for number in map(ast.literal_eval, mark.args):
                        found[number].append(f"{path.name}::{node.name}")
    return found


def _is_fault(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault"


if __name__ == "__main__":
    tests = by_fault()
    for number, sentence in FAULTS.items():
        print(f"{number:2} {sentence}")
        print("\n".join(f"     {test}" for test in tests[number]) or f"     {UNTESTED[number]}")
