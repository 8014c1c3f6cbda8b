"""Notes and errors of the library, in the words of the command line."""

import argparse
import re

from mechsvd.commands.options import FLAGS, OPTIONS

TYPED = {"model", "prompt", "prompts", "continuation", "out", "svd"}  # named by other messages too
# options of calls that a command makes with their defaults
PHRASES = {  # advice that has no flag of its own
    "(`mechsvd.load_model()`)": "(name no model)",
    'attribute the logarithm by `objective="log_prob"`': "leave it out by --skip attribution",
}
PYTHON = (
    *("path_steps", "max_products", "pairs", "objective", "basis", "batched_hooks", "exhaustive"),
    *("noise_floor", "at", "heads", "per", "by", "scale", "tasks"),
)


def in_flags(message: str, options: argparse.Namespace) -> str:
    """A message in which the options of Python are the flags of the command.

    Of an option that the command lacks, it says that it is one of Python.

    Args:
        options: of the command.
    """
    for words, typed in PHRASES.items():
        message = message.replace(words, typed)
    lacking: list[str] = []

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name in OPTIONS and name not in TYPED and hasattr(options, name):
            typed = FLAGS.get(name, f"--{name.replace('_', '-')}")
            return typed if value in (None, "True", "False") else f"{typed} {value}"
        if name in PYTHON or (name in OPTIONS and name not in TYPED):
            lacking.append(name)
        return match[0]

    said = re.sub(r"`(?P<name>[a-z_]+)(?:=[\"']?(?P<value>[\w.]+)[\"']?)?`", flag, message)
    said = re.sub(r"\b(?P<name>dtype)=torch\.(?P<value>\w+)", flag, said)
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(lacking))
    return f"{said} ({names}: in Python.)" if names else said
