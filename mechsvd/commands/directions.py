"""`mechsvd sweep`, `describe`, `fold` and `stream`: one public call each, on directions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mechsvd.commands.options import MODEL, RUN, SITES, TEXTS, add, load, metric_of, run_options
from mechsvd.commands.output import kept_beside, require_free, write
from mechsvd.commands.prompts import tasks_of, texts_of
from mechsvd.edits.bases import ablate, keep
from mechsvd.engine.stream import stream_writes
from mechsvd.engine.writes import collect_writes
from mechsvd.experiments.directions import describe
from mechsvd.experiments.exports import fold
from mechsvd.experiments.sweeps import sweep_rank
from mechsvd.linalg.decomposition import Decomposition, decompose
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task

SHOWN = 9  # ranks of a sweep that are printed


def add_sweep(commands: Any) -> None:
    """Add `mechsvd sweep`."""
    run = commands.add_parser(
        "sweep",
        help="keep the first k directions of every write, for each k",
        description="Keep the first k directions of every write, for each k (`sweep_rank`). The "
        "directions are those of the prompts' own writes, of all together, unless --svd is given. "
        "With --out, a run that is stopped keeps what is done, and the same command goes on.",
    )
    run.set_defaults(run=_sweep)
    add(run, *TEXTS, "svd", "ranks", "step", "metric", *RUN, "out", "replace", *MODEL)


def _sweep(options: argparse.Namespace) -> None:
    model, tasks, svd = _open(options, "sweep")
    ranks = options.ranks
    if options.step is not None:
        if ranks or options.step < 1:
            raise ValueError("`step` must be at least 1, and stands without `ranks`.")
        ranks = sorted({*range(0, svd.rank, options.step), svd.rank})
    with kept_beside(options.out) as kept:
        found = sweep_rank(
            model,
            _one_or_all(tasks),
            svd,
            ranks,
            metric=metric_of(options),
            checkpoint=kept,
            **run_options(options),
        )
        print(found)
        table = found.to_pandas() if len(tasks) == 1 else found.summary()
        shown = torch.linspace(0, len(table) - 1, min(SHOWN, len(table))).round().long().tolist()
        print(table.iloc[shown].to_string(index=False, float_format=lambda x: f"{x:.4g}"))
        write(options.out, "sweep", found, lambda: _page(_curves(found, [*texts_of(options)])))


def _curves(found: Any, names: Sequence[str]) -> Any:
    """The curve of a sweep; of several texts, one each under its name."""
    from mechsvd.figures.sweeps import metric

    parts = getattr(found, "parts", None)
    return metric(found if parts is None else dict(zip(names, parts, strict=True)))


def add_describe(commands: Any) -> None:
    """Add `mechsvd describe`."""
    run = commands.add_parser(
        "describe",
        help="what directions do to tokens, who writes them, and where",
        description="Make a card of each direction (`describe`). With --out FILE.html, the cards "
        "are a page without scripts.",
    )
    run.set_defaults(run=_describe)
    run.add_argument(
        "directions", nargs="*", type=int, help="their numbers (default: the first 16)"
    )
    add(run, *TEXTS, "svd", "metric", "seed", *RUN, "out", "replace", *MODEL)


def _describe(options: argparse.Namespace) -> None:
    model, tasks, svd = _open(options, "cards")
    with kept_beside(options.out) as kept:
        cards = describe(
            model,
            svd,
            options.directions or None,
            tasks,
            metric=metric_of(options),
            seed=options.seed,
            checkpoint=kept,
            **run_options(options),
        )
        print(cards)
        for row in cards.to_pandas().itertuples():
            print(
                f"direction {row.direction}: σ {row.singular_value:.4g}, removing it costs "
                f"{row.effect:.3g} {cards.unit} and {row.kl_divergence:.3g} nats per token of KL "
                f"divergence; {row.share:.0%} written by {row.writer}\n"
                f"  read off the weights {row.read!r}, at these texts {row.local!r}, "
                f"measured {row.measured!r}"
            )
        write(options.out, "cards", cards, cards.to_html)


def add_fold(commands: Any) -> None:
    """Add `mechsvd fold`."""
    run = commands.add_parser(
        "fold",
        help="write a Hugging Face checkpoint that keeps or lacks directions",
        description="Write a Hugging Face checkpoint whose weights contain an edit, and compare it "
        "with the hooks on the prompts (`fold`).",
    )
    run.set_defaults(run=_fold)
    edit = run.add_mutually_exclusive_group(required=True)
    edit.add_argument("--keep", type=int, metavar="K", help="keep the first K directions")
    edit.add_argument(
        "--ablate", type=int, nargs="+", metavar="J", help="remove these directions (zero ablation)"
    )
    add(run, "out", required=True, metavar="DIR", help="a folder that is new, empty or a fold's")
    add(run, *TEXTS, "svd", *SITES, "check", "same_model", *MODEL)


def _fold(options: argparse.Namespace) -> None:
    model, tasks, svd = _open(options)
    k = options.keep
    edit = ablate(svd.subspace(options.ablate)) if k is None else keep(svd, k)
    print(fold(model, edit, options.out, tasks, **run_options(options)))
    print(options.out)


def add_stream(commands: Any) -> None:
    """Add `mechsvd stream`."""
    run = commands.add_parser(
        "stream",
        help="decompose the writes over a corpus of any length",
        description="Collect the moments of the writes over a corpus and decompose them "
        "(`stream_writes`). A run that is stopped keeps what is done, and the same command goes on.",
    )
    run.set_defaults(run=_stream)
    run.add_argument(
        "texts", help="a file with one document per line, or of JSON lines with prompt or text"
    )
    run.add_argument("--context", type=int, metavar="N", help="longest row (default: the model's)")
    run.add_argument(
        "--packing", action="store_true", help="join the documents and cut rows from them"
    )
    run.add_argument("--skip-bos", action="store_true", help="leave out the BOS token")
    add(run, "out", required=True)
    add(run, "replace", *(name for name in RUN if name != "same_model"), *MODEL)


def _stream(options: argparse.Namespace) -> None:
    require_free(options, "svd")
    model = load(options)
    with kept_beside(options.out, goes_on=True) as kept:
        stream = stream_writes(
            model,
            options.texts,
            context=options.context,
            packing=options.packing,
            skip_bos=options.skip_bos,
            checkpoint=kept,
            **run_options(options),
        )
        print(stream)
        svd = stream.decompose()
        print(svd)
        write(options.out, "svd", svd, lambda: _page(_spectrum(svd)))


def _spectrum(svd: Decomposition) -> Any:
    from mechsvd.figures.spectra import singular_values

    return singular_values(svd, log=True)


def _page(figure: Any) -> str:
    """A figure as a page of its own, which needs no network."""
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _open(options: argparse.Namespace, name: str = "") -> tuple[Model, list[Task], Decomposition]:
    """The model, the tasks, and the directions of a file or of the tasks' writes.

    Args:
        name: of the files that are written; "" where the call itself checks its `out`.
    """
    if name:
        require_free(options, name)
    texts_of(options)  # a bad one is refused before the model is loaded
    svd = None if options.svd is None else _saved(options.svd)
    model = load(options)
    tasks = tasks_of(model, options)
    if svd is None:
        given = run_options(options)
        given.pop("same_model", None)
        svd = decompose(collect_writes(model, tasks, **given))
    return model, tasks, svd


def _saved(path: Path) -> Decomposition:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} of directions; `stream` writes one.")
    return Decomposition.load(path)


def _one_or_all(tasks: Sequence[Task]) -> Any:
    return tasks[0] if len(tasks) == 1 else tasks
