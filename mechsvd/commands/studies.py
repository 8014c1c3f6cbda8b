"""`mechsvd reproduce` and `mechsvd literature`: whole studies of several prompts."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from mechsvd.commands.options import MODEL, RUN, TEXTS, add, load, metric_of, run_options
from mechsvd.commands.output import kept_beside, require_free
from mechsvd.commands.prompts import (
    embedded_kinds,
    has_own_texts,
    kinds_of,
    task,
    tasks_of,
    texts_of,
)
from mechsvd.engine.session import RunOptions
from mechsvd.experiments.literature import CLAIMS, compare_with_literature
from mechsvd.report.choices import PARTS, Choices, parts_without
from mechsvd.results import write_atomically

EACH_KIND = 4  # texts of each kind that the literature is compared on
SWEPT = "of all sweeps of the page"


def add_reproduce(commands: Any) -> None:
    """Add `mechsvd reproduce`."""
    run = commands.add_parser(
        "reproduce",
        help="run the shortform's experiment and write report.html",
        description="Run the shortform's experiment and write report.html. A folder that holds an "
        "earlier run's page is refused, unless --replace is given. A run that is stopped keeps "
        "what is done, and the same command goes on. Whatever parts are left out, the sweep by "
        "singular value runs, since the numbers at the top of the page are its.",
    )
    run.set_defaults(run=_reproduce)
    add(run, *TEXTS)
    add(run, "out", default=Path("."), metavar="DIR", help="folder of report.html (default: .)")
    add(run, "replace")
    run.add_argument(
        "--quick", action="store_true", help="few ranks per sweep; the page states the error"
    )
    add(run, "ranks", help=f"the ranks {SWEPT} (default: every one)")
    add(run, "step", help=f"every N-th rank and full rank, {SWEPT}")
    parts = f"parts of the report, of {', '.join(PARTS)}"
    run.add_argument("--skip", nargs="+", choices=PARTS, metavar="PART", help=f"leave out {parts}")
    run.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="only these parts")
    add(run, "metric", help="of a further sweep and ranking, next to the log-probability")
    add(run, "seed", *(name for name in RUN if name not in ("same_model", "positions")))
    run.add_argument(
        "--cdn", action="store_true", help="load plotly from the network; the page is 5 MB smaller"
    )
    add(run, *MODEL)


def _reproduce(options: argparse.Namespace) -> None:
    from mechsvd.report.build import reproduce  # plotly and pandas are needed only here
    from mechsvd.report.folders import require_free as require_no_page
    from mechsvd.report.folders import require_writable

    texts, choices = texts_of(options), _choices(options)
    require_writable(options.out)
    if not options.replace:
        require_no_page(options.out)
    model = load(options)
    groups: dict[str, list[Any]] = kinds_of(texts)
    if not groups and has_own_texts(options):
        groups = embedded_kinds(model)
    reproduce(
        model,
        {name: partial(task, model, text, options) for name, text in texts.items()},
        options.out,
        groups=groups,
        choices=choices,
        cdn=options.cdn,
        replace=options.replace,
        say=partial(print, flush=True),
    )


def _choices(options: argparse.Namespace) -> Choices:
    return Choices(
        parts_without(options.skip, options.only),
        options.quick,
        options.ranks and tuple(options.ranks),
        options.step,
        metric_of(options),
        options.seed,
        RunOptions(**run_options(options)),  # type: ignore[typeddict-item]
    )


def add_literature(commands: Any) -> None:
    """Add `mechsvd literature`."""
    run = commands.add_parser(
        "literature", help="what others found, next to this model's numbers and a null"
    )
    run.set_defaults(run=_literature)
    run.add_argument("claim", nargs="*", help=f"some of {', '.join(CLAIMS)} (default: all)")
    add(run, *TEXTS)
    add(run, "out", metavar="FILE", help="write the table as CSV too")
    add(run, "replace", "seed", "batch_size", "check", *MODEL)


def _literature(options: argparse.Namespace) -> None:
    from mechsvd.report.tables import as_csv

    require_free(options, endings=(".csv",))
    texts_of(options)  # a bad one is refused before the model is loaded
    model = load(options)
    if has_own_texts(options):
        kinds = [own[:EACH_KIND] for own in embedded_kinds(model).values()]
        tasks = [text for same_place in zip(*kinds, strict=True) for text in same_place]
    else:
        tasks = tasks_of(model, options)
    claims, seed = options.claim or None, options.seed
    with kept_beside(options.out) as kept:
        found = compare_with_literature(
            model, tasks, claims, seed=seed, checkpoint=kept, **run_options(options)
        )
        table = found.to_pandas()
        if options.out:
            write_atomically(options.out, as_csv(table))
    for row in table.itertuples():
        print(
            f"{row.name}: {row.what}\n"
            f"  theirs ({row.source}): {row.theirs}\n"
            f"  ours: {row.ours:.3g} ({row.low:.3g} to {row.high:.3g}, n = {row.n}); "
            f"{row.against}: {row.null:.3g} ({row.null_low:.3g} to {row.null_high:.3g})\n"
            f"  difference: {row.difference:.3g} "
            f"({row.difference_low:.3g} to {row.difference_high:.3g})"
        )
