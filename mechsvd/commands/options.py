"""The options that commands share, each declared once under the name of a keyword argument."""

import argparse
from pathlib import Path
from typing import Any

import torch

from mechsvd.engine.metrics import READY, Metric, logit_difference
from mechsvd.model.loading import EMBEDDED, load_model
from mechsvd.model.sites import COMPONENTS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
METRICS = {**READY, "logit_difference": logit_difference()}
MODEL = ("model", "device", "dtype", "allow_pickle", "trust_remote_code")
TEXTS = ("prompt", "prompts", "continuation", "max_new_tokens", "truncate")
SITES = ("layers", "components", "missing")
RUN = (*SITES, "positions", "batch_size", "check", "same_model")


def path(text: str) -> Path:
    """A path as it is typed, where ~ is the home folder."""
    return Path(text).expanduser()


def positions(text: str) -> Any:
    """Positions as they are typed: last, 3, 1,4,5 or 2:9.

    Raises:
        ValueError: anything else.
    """
    if text == "last":
        return text
    if ":" in text:
        first, end = (int(part) if part else None for part in text.split(":"))
        return slice(first, end)
    return [int(part) for part in text.split(",")]


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "default": EMBEDDED,
        "help": "a directory or a hub name (default: the embedded model)",
    },
    "device": {"help": "cpu, cuda, mps (default: the best available)"},
    "dtype": {
        "choices": DTYPES,
        "default": "float32",
        "help": "dtype of the weights (default: float32)",
    },
    "allow_pickle": {"action": "store_true", "help": "accept weights that are not safetensors"},
    "trust_remote_code": {"action": "store_true", "help": "run code that comes with the model"},
    "prompt": {
        "action": "append",
        "metavar": "TEXT",
        "help": "a prompt instead of the shortform's four; may be repeated",
    },
    "prompts": {
        "type": path,
        "metavar": "FILE",
        "help": "a file of prompts: one per line, JSON lines or JSON (see `tasks_from`)",
    },
    "continuation": {
        "action": "append",
        "metavar": "TEXT",
        "help": "one for each --prompt (default: greedy text)",
    },
    "max_new_tokens": {
        "type": int,
        "default": 40,
        "metavar": "N",
        "help": "length of a greedy continuation (default: 40)",
    },
    "truncate": {
        "choices": ["left"],
        "help": "drop the oldest tokens of a prompt that is too long for the context",
    },
    "layers": {"nargs": "+", "type": int, "metavar": "N", "help": "some layers (default: all)"},
    "components": {
        "nargs": "+",
        "choices": COMPONENTS,
        "help": "attn or mlp (default: both); `attn` gives the shortform's first diagrams",
    },
    "missing": {
        "choices": ["error", "skip"],
        "help": "what to do with a layer that lacks a hook (default: error)",
    },
    "positions": {
        "type": positions,
        "metavar": "P",
        "help": "positions in the text: last, 3, 1,4,5 or 2:9 (default: all)",
    },
    "batch_size": {
        "type": int,
        "metavar": "N",
        "help": "rows per forward pass (default: as many as fit)",
    },
    "check": {
        "action": "store_const",
        "const": False,
        "help": "go on though the model fails its self-check; results record it",
    },
    "same_model": {
        "action": "store_const",
        "const": False,
        "help": "take directions of another model, such as the one it was fine-tuned from",
    },
    "ranks": {
        "nargs": "+",
        "type": int,
        "metavar": "K",
        "help": "numbers of kept directions to visit (default: every one)",
    },
    "step": {"type": int, "metavar": "N", "help": "visit every N-th rank, and full rank"},
    "metric": {"choices": METRICS, "help": "what is measured (default: log_prob)"},
    "seed": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "of everything random (default: 0)",
    },
    "svd": {
        "type": path,
        "metavar": "FILE",
        "help": "directions from a file, as `stream` writes (default: those of the prompts' writes)",
    },
    "replace": {"action": "store_true", "help": "overwrite what an earlier run wrote"},
    "out": {
        "type": path,
        "metavar": "PATH",
        "help": "a .csv, .html or .safetensors file, or a folder for all three",
    },
}
FLAGS = {"check": "--no-check", "same_model": "--no-same-model"}  # their only use is to say no


def add(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Add some of `OPTIONS` to a command.

    Args:
        changes: of one option, such as another help; only with one name.
    """
    for name in names:
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        parser.add_argument(flag, dest=name, **(OPTIONS[name] | changes))


def run_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run that were given (see `RunOptions`); the others keep their defaults."""
    given = {name: getattr(options, name, None) for name in RUN}
    return {name: value for name, value in given.items() if value is not None}


def metric_of(options: argparse.Namespace) -> Metric | None:
    """The metric that was asked for by its name."""
    return None if options.metric is None else METRICS[options.metric]


def load(options: argparse.Namespace) -> Any:
    """The model that was asked for."""
    trusted = {"trust_remote_code": True} if options.trust_remote_code else {}
    return load_model(
        options.model,
        device=options.device,
        dtype=DTYPES[options.dtype],
        allow_pickle=options.allow_pickle,
        **trusted,
    )
