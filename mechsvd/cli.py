"""The command line.

`mechsvd reproduce` runs the shortform's experiment. `mechsvd doctor` checks a model.
"""

import argparse
import json
import platform
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mechsvd.model.identity import provenance_of
from mechsvd.model.loading import EMBEDDED, load_model
from mechsvd.model.selfcheck import self_check
from mechsvd.model.sites import COMPONENTS
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.version import __version__

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
        type=Path,
        metavar="FILE",
        help="a file of prompts: one per line, or JSON (see the README)",
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
    run.add_argument(
        "--components",
        nargs="+",
        choices=COMPONENTS,
        default=list(COMPONENTS),
        help="`attn` alone gives the shortform's first diagrams",
    )
    run.add_argument(
        "--out",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="folder of report.html (default: the current one)",
    )
    run.add_argument(
        "--cdn", action="store_true", help="load plotly from the network; the page is 5 MB smaller"
    )
    _model_options(run)

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
    make = partial(Task.from_text, model, max_new_tokens=options.max_new_tokens)
    tasks: dict[str, Callable[[], Task]] = {
        name: partial(make, prompt, continuation) for name, (prompt, continuation) in texts.items()
    }
    reproduce(
        model,
        tasks,
        options.out,
        components=options.components,
        cdn=options.cdn,
        say=partial(print, flush=True),
    )


def _texts(options: argparse.Namespace) -> dict[str, tuple[str, str | None]]:
    if options.prompts:
        if options.prompt or options.continuation:
            raise ValueError(
                "`--prompts` stands alone: put the prompts and continuations of --prompt "
                "into the file."
            )
        return _texts_in(options.prompts)
    if not options.prompt:
        if options.continuation:
            raise ValueError("`--continuation` needs a `--prompt` that it continues.")
        return {name: (prompt, None) for name, prompt in SHORTFORM_PROMPTS.items()}
    if not all([*options.prompt, *(options.continuation or [])]):
        raise ValueError("A --prompt or --continuation is empty; give some text.")
    continuations = options.continuation or [None] * len(options.prompt)
    if len(continuations) != len(options.prompt):
        raise ValueError(
            f"{len(options.prompt)} --prompt but {len(continuations)} --continuation; "
            "give one for each, or none."
        )
    return {
        f"prompt-{i}": pair
        for i, pair in enumerate(zip(options.prompt, continuations, strict=True), start=1)
    }


def _texts_in(path: Path) -> dict[str, tuple[str, str | None]]:
    """Read prompts from a file.

    JSON is {"name": "prompt", …} or a list; ["prompt", "continuation"] may replace a prompt.
    Any other file has one prompt per line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts {path}.")
    content = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".json":
        prompts: Any = [line for line in content.splitlines() if line.strip()]
    else:
        try:
            prompts = json.loads(content, object_pairs_hook=_without_repetition)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
    if isinstance(prompts, list):
        prompts = {f"prompt-{i}": entry for i, entry in enumerate(prompts, start=1)}
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(
            f'{path} must hold prompts: one per line, or in JSON {{"name": "prompt", …}}, '
            "but holds none."
        )
    return {name: _pair(path, name, entry) for name, entry in prompts.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"The file of prompts names {sorted(repeated)} more than once; "
            "each name makes a folder."
        )
    return dict(pairs)


def _pair(path: Path, name: str, entry: Any) -> tuple[str, str | None]:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):  # the name becomes a folder
        raise ValueError(
            f"{path}: the name {name!r} must be letters, digits, - and _, "
            "beginning with a letter or digit."
        )
    texts = [entry] if isinstance(entry, str) else entry
    if (
        not isinstance(texts, list)
        or len(texts) not in (1, 2)
        or not all(isinstance(t, str) and t for t in texts)
    ):
        raise ValueError(
            f'{path}: {name!r} must be a prompt or ["prompt", "continuation"], neither empty, '
            f"but is {entry!r:.60}."
        )
    return texts[0], texts[1] if len(texts) == 2 else None


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
