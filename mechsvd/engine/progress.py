"""Progress bars: one per long call, or one over the named steps of a longer run."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from mechsvd.engine.processes import this_process

ROWS = "edited runs"  # of `measure`, whose edits are anything
# the bar shows no count: rows of different steps cost differently
LOOK = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_STEPS: ContextVar["Steps | None"] = ContextVar("steps", default=None)
_NAME = ContextVar("name", default=ROWS)


class Step(NamedTuple):
    """A step of a long run.

    Attributes:
        cost: in forward passes of one edit.
        rows: of all its loops, as far as that is known; by default as many as it costs.
    """

    cost: float
    rows: float | None = None


@contextmanager
def rows_called(name: str) -> Iterator[None]:
    """Name what the rows of the block's loops are, for their bars: ranks, directions, doses."""
    token = _NAME.set(name)
    try:
        yield
    finally:
        _NAME.reset(token)


def row_name() -> str:
    """What the rows of a loop are; see `rows_called`."""
    return _NAME.get()


def progress_bar(total: int | None, what: str, progress: bool | None) -> Any:
    """A progress bar with an estimate; by default only in a terminal or a notebook.

    Of several processes only the first shows it. Among `steps` it is part of their bar.
    """
    opened = _STEPS.get()
    if opened is not None and progress is not False:  # one that is off is counted by a caller's
        return _Part(opened)
    is_shown = _is_seen() if progress is None else progress
    return tqdm(total=total, desc=what, disable=not is_shown or this_process()[0] > 0)


@contextmanager
def steps(what: str, costs: Mapping[str, Step], progress: bool | None = None) -> Iterator[None]:
    """Show one bar over several steps, each of which `begin_step` begins.

    The bars of calls inside become part of it.

    Args:
        what: stands before the name of the step, such as "launch, prompt 2 of 4".
        costs: of each step, by its name.
    """
    if _STEPS.get() is not None:
        yield
        return
    is_shown = (_is_seen() if progress is None else progress) and this_process()[0] == 0
    total = max(1, round(sum(step.cost for step in costs.values())))
    with tqdm(total=total, desc=what, disable=not is_shown, bar_format=LOOK) as bar:
        opened = Steps(bar, what, dict(costs))
        token = _STEPS.set(opened)
        try:
            yield
            opened.end()
        finally:
            _STEPS.reset(token)


def begin_step(name: str) -> None:
    """Go on to the next step of the bar of `steps`, if there is one."""
    if (opened := _STEPS.get()) is not None:
        opened.begin(name)


class Steps:
    """The one bar of a run of several steps; see `steps`."""

    def __init__(self, bar: Any, what: str, costs: dict[str, Step]) -> None:
        self._bar, self._what, self._costs = bar, what, costs
        self._done = self._within = self._per_row = 0.0
        self._now = Step(0.0)

    def begin(self, name: str) -> None:
        """End the step before, and name the next one, unless it is left out and costs nothing."""
        self._done += self._now.cost
        self._now, self._within = self._costs.get(name, Step(0.0)), 0.0
        rows = self._now.cost if self._now.rows is None else self._now.rows
        self._per_row = self._now.cost / rows if rows else 0.0
        if self._now.cost or name not in self._costs:
            self._bar.set_description_str(f"{self._what}: {name}")
        self._show()

    def advance(self, rows: int) -> None:
        """Some rows of the current step are done; at most the whole step."""
        self._within = min(self._now.cost, self._within + rows * self._per_row)
        self._show()

    def end(self) -> None:
        """All steps are done."""
        self._bar.set_description_str(self._what)
        self._bar.update(self._bar.total - self._bar.n)

    def _show(self) -> None:
        place = min(round(self._done + self._within), self._bar.total or 0)
        if place > self._bar.n:
            self._bar.update(place - self._bar.n)


@dataclass
class _Part:
    """What a loop takes for its bar while the bar of `steps` shows it; it tells no cost."""

    steps: Steps
    n: int = 0
    disable: bool = True

    def update(self, rows: int = 1) -> None:
        self.n += rows
        self.steps.advance(rows)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _is_seen() -> bool:
    in_notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty()
