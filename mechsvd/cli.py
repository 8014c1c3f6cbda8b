"""The command line.

`mechsvd reproduce` runs the shortform's experiment, `mechsvd literature` compares with what others
found, `mechsvd doctor` checks a model.
"""

import argparse
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mechsvd.experiments.literature import CLAIMS, compare_with_literature
from mechsvd.model.identity import provenance_of
from mechsvd.model.loading import EMBEDDED, load_model
from mechsvd.model.selfcheck import self_check
from mechsvd.model.sites import COMPONENTS
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.model.texts import Text, read_texts, task_of
from mechsvd.model.tokenization import prompt_tokens
from mechsvd.version import __version__

EACH_KIND = 4  # texts of each kind that the literature is compared on
KIND_TEXTS, KIND_TOKENS = 8, 28  # of each kind of the embedded model's language
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is printed in one line.
    """
    options = _parser().parse_args(arguments)
    formatwarning, warnings.formatwarning = (
        warnings.formatwarning,
        lambda message, *_, **__: f"mechsvd: note: {message}\n",
    )
    try:
        options.run(options)
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
        ImportError,
        MemoryError,
        RuntimeError,
    ) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"mechsvd: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nmechsvd: stopped. What is done is kept; the same command goes on.", file=sys.stderr
        )
        return 130
    finally:
        warnings.formatwarning = formatwarning
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mechsvd", description="What a transformer writes to its residual stream."
    )
    parser.add_argument("--version", action="version", version=f"mechsvd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "reproduce", help="run the shortform's experiment and write report.html"
    )
    run.set_defaults(run=_reproduce)
    _prompt_options(run)
    run.add_argument(
        "--components",
        nargs="+",
        choices=COMPONENTS,
        default=list(COMPONENTS),
        help="`attn` alone gives the shortform's first diagrams",
    )
    run.add_argument(
        "--out",
        type=_path,
        default=Path("."),
        metavar="DIR",
        help="folder of report.html (default: the current one)",
    )
    run.add_argument(
        "--quick", action="store_true", help="few ranks per sweep; the page states the error"
    )
    run.add_argument(
        "--cdn", action="store_true", help="load plotly from the network; the page is 5 MB smaller"
    )
    _model_options(run)

    literature = commands.add_parser(
        "literature", help="what others found, next to this model's numbers and a null"
    )
    literature.set_defaults(run=_literature)
    literature.add_argument("claim", nargs="*", help=f"some of {', '.join(CLAIMS)} (default: all)")
    _prompt_options(literature)
    literature.add_argument("--out", type=_path, metavar="FILE", help="write the table as CSV too")
    _model_options(literature)

    doctor = commands.add_parser(
        "doctor", help="print versions, device and the self-check of a model"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument(
        "model",
        nargs="?",
        default=EMBEDDED,
        help="a directory or a hub name (default: the embedded model)",
    )
    _model_options(doctor)
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _prompt_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--model", default=EMBEDDED, help="a directory or a hub name (default: the embedded model)"
    )
    run.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt instead of the shortform's four; may be repeated",
    )
    run.add_argument(
        "--prompts",
        type=_path,
        metavar="FILE",
        help="a file of prompts: one per line, JSON lines or JSON (see `tasks_from`)",
    )
    run.add_argument(
        "--continuation",
        action="append",
        metavar="TEXT",
        help="one for each --prompt (default: greedy text)",
    )
    run.add_argument(
        "--max-new-tokens",
        type=int,
        default=40,
        metavar="N",
        help="length of a greedy continuation (default: 40)",
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best available)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)"
    )


def _load(options: argparse.Namespace) -> Any:
    return load_model(options.model, device=options.device, dtype=DTYPES[options.dtype])


def _reproduce(options: argparse.Namespace) -> None:
    from mechsvd.report.build import reproduce  # plotly and pandas are needed only here
    from mechsvd.report.folders import require_writable

    texts = _texts(options)
    require_writable(options.out)
    model = _load(options)
    tasks = {
        name: partial(task_of, model, text, options.max_new_tokens) for name, text in texts.items()
    }
    groups: dict[str, list[Any]] = _kinds(texts)
    if not groups and options.model == EMBEDDED and not (options.prompt or options.prompts):
        groups = _embedded_kinds(model)
    reproduce(
        model,
        tasks,
        options.out,
        groups=groups,
        components=options.components,
        quick=options.quick,
        cdn=options.cdn,
        say=partial(print, flush=True),
    )


def _texts(options: argparse.Namespace) -> dict[str, Text]:
    if options.prompts:
        if options.prompt or options.continuation:
            raise ValueError(
                "`--prompts` stands alone: put the prompts and continuations of --prompt "
                "into the file."
            )
        return _named(options.prompts)
    if not options.prompt:
        if options.continuation:
            raise ValueError("`--continuation` needs a `--prompt` that it continues.")
        return {name: Text(name, name, prompt) for name, prompt in SHORTFORM_PROMPTS.items()}
    if not all([*options.prompt, *(options.continuation or [])]):
        raise ValueError("A --prompt or --continuation is empty; give some text.")
    continuations = options.continuation or [None] * len(options.prompt)
    if len(continuations) != len(options.prompt):
        raise ValueError(
            f"{len(options.prompt)} --prompt but {len(continuations)} --continuation; "
            "give one for each, or none."
        )
    return {
        f"prompt-{i}": Text(f"prompt-{i}", "", prompt, continuation)
        for i, (prompt, continuation) in enumerate(
            zip(options.prompt, continuations, strict=True), start=1
        )
    }


def _named(path: Path) -> dict[str, Text]:
    """The texts of a file by their names, each of which makes a folder."""
    texts: dict[str, Text] = {}
    for i, text in enumerate(read_texts(path), start=1):
        name = text.name or f"prompt-{i}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise ValueError(
                f"{text.place}: the name {name!r} must be letters, digits, - and _, "
                "beginning with a letter or digit, because it makes a folder."
            )
        if name in texts:
            raise ValueError(f"{text.place} is named {name!r}, as {texts[name].place} is.")
        texts[name] = text
    if not texts:
        raise ValueError(
            f'{path} holds no prompts: give one per line, or in JSON {{"name": "prompt", …}}.'
        )
    return texts


def _kinds(texts: dict[str, Text]) -> dict[str, list[str]]:
    """The names of the texts of each group, if the file gives groups."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        if text.group:
            groups.setdefault(text.group, []).append(name)
    return groups


def _embedded_kinds(model: Any) -> dict[str, list[Task]]:
    """Texts of the four shapes of the embedded model's language, cut to one length."""
    from mechsvd.demo.language import kinds

    found: dict[str, list[Task]] = {}
    for shape, texts in kinds(KIND_TEXTS).items():
        ids = [torch.tensor(prompt_tokens(model, text)) for text in texts]
        cut = {tuple(one[:KIND_TOKENS].tolist()) for one in ids if len(one) >= KIND_TOKENS}
        found[shape] = [Task(torch.tensor(one), KIND_TOKENS // 3) for one in sorted(cut)]
    return found


def _literature(options: argparse.Namespace) -> None:
    texts = _texts(options)
    model = _load(options)
    if options.model == EMBEDDED and not (options.prompt or options.prompts):
        kinds = [own[:EACH_KIND] for own in _embedded_kinds(model).values()]
        tasks = [task for same_place in zip(*kinds, strict=True) for task in same_place]
    else:
        tasks = [task_of(model, text, options.max_new_tokens) for text in texts.values()]
    table = compare_with_literature(model, tasks, options.claim or None).to_pandas()
    for row in table.itertuples():
        print(
            f"{row.name}: {row.what}\n"
            f"  theirs ({row.source}): {row.theirs}\n"
            f"  ours: {row.ours:.3g} ({row.low:.3g} to {row.high:.3g}, n = {row.n}); "
            f"{row.against}: {row.null:.3g} ({row.null_low:.3g} to {row.null_high:.3g})\n"
            f"  difference: {row.difference:.3g} "
            f"({row.difference_low:.3g} to {row.difference_high:.3g})"
        )
    if options.out:
        table.to_csv(options.out, index=False)


def _doctor(options: argparse.Namespace) -> None:
    model = _load(options)
    source = provenance_of(model)
    versions = {
        "mechsvd": __version__,
        "torch": torch.__version__,
        "transformer-lens": source.transformer_lens,
    }
    print(
        ", ".join(f"{name} {number}" for name, number in versions.items())
        + f", Python {platform.python_version()}"
    )
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"
    print(
        f"device {next(model.parameters()).device} ({cuda}, {torch.get_num_threads()} CPU threads)"
    )
    print(
        f"model {source.model}: {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, "
        f"{source.dtype}, {source.processing}"
    )
    print(f"weights {source.weights}")
    check = self_check(model)
    print(check)
    if check.failure:
        raise ValueError(f"this model cannot be used: {check.failure}.")


if __name__ == "__main__":
    sys.exit(main())
