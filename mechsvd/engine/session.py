"""Opening a model for some tasks: what every call that runs one checks and sets up."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from typing_extensions import Unpack

from mechsvd.ambient import plain_torch
from mechsvd.checks import require_whole, warn
from mechsvd.edits.bases import is_several
from mechsvd.edits.hooks import as_stack
from mechsvd.edits.maps import EditList, for_task, gates_of
from mechsvd.edits.stacks import GateStack
from mechsvd.engine.batches import halving, rows_per_pass
from mechsvd.engine.processes import warn_lonely
from mechsvd.linalg.decomposition import Decomposition
from mechsvd.model.evaluation import OtherHooks, alone, evaluation
from mechsvd.model.identity import provenance_of, weights_read_once
from mechsvd.model.places import sites_of, warn_norm_inputs
from mechsvd.model.positions import is_mask, positions_in
from mechsvd.model.selfcheck import SelfCheck, require_sound
from mechsvd.model.sites import (
    Model,
    Site,
    SiteOptions,
    Where,
    dictionaries,
    forgets_conversions,
    require_model,
    where_of,
)
from mechsvd.model.tasks import APART, Task, require_fitting
from mechsvd.results import Provenance


class RunOptions(SiteOptions, total=False):
    """The options of every call that runs a model, in addition to those of `SiteOptions`.

    Attributes:
        check: refuse a model whose hooks are not its writes (see `self_check`), and directions
            of another model.
        same_model: refuse directions of another model. `same_model=False` takes those of a
            fine-tune, or of the same model in another dtype, and the result records it.
        batch_size: rows in one forward pass; by default from free memory and model size.
        batched_hooks: your own hooks on the model act on every row of a batch. By default they
            may act on a single row, so each row runs alone while there are any.
        fast: run attention, norms and activations on fused kernels where the self-check found the
            same writes and logits, to rounding. The plain kernels run when there are hooks of
            yours, gradients, or values at other hook points than writes. Rows then also share the
            keys and values of the positions before the first of `positions`.
        progress: a bar with an estimate; by default only in a terminal or a notebook.
        checkpoint: a file that keeps what is done. After a stop of any kind, the same call goes on
            from there, and its result is the same bit for bit on a CPU. Of several processes,
            each has its own file, such as `PATH.0-of-2`.

    Example:
        >>> quiet: ms.RunOptions = {"layers": [1, 2], "components": ["mlp"], "batch_size": 8}
        >>> ms.measure(model, task, ms.keep(mine), **quiet).sites[0].place
        'layer 1 mlp'
    """

    check: bool
    batch_size: int | None
    batched_hooks: bool
    fast: bool
    same_model: bool
    progress: bool | None
    checkpoint: Any


class MeasureOptions(RunOptions, total=False):
    """The options of `measure`, and of the calls that use it.

    Attributes:
        metric: what is measured; see `Metric`.
        noise_floor: measure it too; see `measure`.

    Example:
        >>> options: ms.MeasureOptions = {"metric": ms.kl_divergence, "noise_floor": True}
        >>> ms.measure(model, task, ms.keep(mine), **options).metric
        'kl_divergence'
    """

    metric: Any
    noise_floor: bool


@dataclass(frozen=True)
class Session:
    """A model opened for some tasks.

    Attributes:
        where: the layers, components and positions.
        check: the self-check of the model, less what this session does not allow.
        other_hooks: the user's own hooks on the model.
        notes: further notes for the provenance of results.
        options: the options that the user gave.
    """

    model: Model
    tasks: tuple[Task, ...]
    where: Where
    check: SelfCheck
    other_hooks: OtherHooks
    notes: tuple[str, ...]
    options: RunOptions

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites where edits act or writes are collected."""
        return sites_of(self.model, self.where)

    @property
    def progress(self) -> bool | None:
        """Whether to show a bar; None for only in a terminal or a notebook."""
        return self.options.get("progress")

    def positions(self, task: Task) -> tuple[int, ...] | None:
        """The chosen positions in one of the texts; None for all."""
        number = next((i for i, one in enumerate(self.tasks) if one is task), 0)
        last = task.scored.stop - 1
        return positions_in(
            self.where.positions, len(task.tokens), last, number, max(1, len(self.tasks))
        )

    def rows_per_pass(self, task: Task, start: int = 0) -> int:
        """How many rows of this task share a forward pass, from a position on."""
        if self.other_hooks.one_row:
            return 1
        batch_size = self.options.get("batch_size")
        if batch_size is not None:
            return int(batch_size)
        return rows_per_pass(self.model, task, start)

    def halve(self, task: Task, start: int = 0) -> Callable[[int], int]:
        """The function that halves the rows of a pass when memory runs out."""
        return halving(self.model, task, start)

    def provenance(
        self, sites: Sequence[Site] = (), *notes: str, tasks: Sequence[Task] | None = None
    ) -> Provenance:
        """The model, its state, the tokens of the tasks, and which user hooks took part."""
        chosen = self.tasks if tasks is None else tasks
        if any(task.targets is not None for task in chosen):
            notes = (*notes, APART)
        tokens = tuple(tuple(task.tokens.tolist()) for task in chosen)
        return provenance_of(
            self.model, tokens, tuple(sites), (*self.notes, *self.other_hooks.notes, *notes)
        )

    @property
    def required_source(self) -> Provenance | None:
        """The model that directions must come from; None where that is not checked."""
        is_checked = self.options.get("check", True) and self.options.get("same_model", True)
        return self.provenance() if is_checked else None

    def stack(self, edits: Any) -> GateStack | EditList:
        """Edits as a stack that fits the model, on its device; see `as_stack`."""
        return as_stack(self.model, edits, self.required_source, self.sites)

    def stacks(self, edits: Any, tasks: Sequence[Task]) -> list[GateStack | EditList]:
        """The stack for each task, with the baselines of its text; one stack where all share it."""
        stack = self.stack(edits)
        if all(gate.baseline is None for gate in gates_of(stack)):
            return [stack] * len(tasks)
        return [for_task(stack, task) for task in tasks]


@contextmanager
def open_session(
    model: Model,
    tasks: Sequence[Task] = (),
    *,
    gradients: bool = False,
    **options: Unpack[RunOptions],
) -> Iterator[Session]:
    """Open a model for some tasks: check everything, and evaluate without dropout.

    The weights are read at most once until it closes. A session inside another one of the same
    model does not read them again, and does not repeat warnings. Other threads wait meanwhile.

    Args:
        gradients: allow them; see `evaluation`.

    Raises:
        TypeError, KeyError, ValueError: a task or a site that does not fit the model, or a model
            that fails its self-check.
    """
    require_model(model)
    with alone(model), plain_torch(), _open(model, tasks, gradients, options) as session:
        yield session


@contextmanager
def _open(
    model: Model, tasks: Sequence[Task], gradients: bool, options: RunOptions
) -> Iterator[Session]:
    where = where_of(options)
    warn_lonely()
    for task in tasks:
        require_fitting(model, task)
    if options.get("batch_size") is not None:
        require_whole("batch_size", options.get("batch_size"), 1)
    if not gradients or where.at:  # weights need none; wrong ones are refused before all else
        sites = sites_of(model, where)
    must_pass = options.get("check", True) and where.at is None  # hooks elsewhere are no writes
    longest = max((len(task.tokens) for task in tasks), default=None)
    check, notes = require_sound(model, must_pass, where.missing, longest)
    if where.at is not None:
        check, notes = _elsewhere(check, where, sites)
        warn_norm_inputs(model, sites)
    if spliced := dictionaries(model):
        notes = (*notes, f"dictionaries spliced in: {', '.join(spliced)}")
    if not options.get("same_model", True):
        notes = (*notes, "directions of another model were let through (same_model=False)")
    batched = options.get("batched_hooks", False)
    with (
        evaluation(model, gradients=gradients, batched_hooks=batched) as other_hooks,
        weights_read_once(model),
        forgets_conversions(model),
    ):
        if gradients or where.at is not None or other_hooks.places or not options.get("fast", True):
            # the plain kernels, on whole texts
            check = replace(check, fused_error=float("inf"), beginning_error=float("inf"))
        yield Session(model, tuple(tasks), where, check, other_hooks, notes, options)


def require_same_positions(options: RunOptions) -> None:
    """Refuse a mask with a row per text in a call that regroups its texts.

    Raises:
        ValueError: saying so.
    """
    positions = options.get("positions")
    if is_mask(positions) and positions.ndim == 2:  # type: ignore[union-attr]
        raise ValueError(
            "`positions` has a row per text, but this call runs texts in other groups; give one "
            "form for all, such as a list or 'last'."
        )


def _elsewhere(
    check: SelfCheck, where: Where, sites: Sequence[Site]
) -> tuple[SelfCheck, tuple[str, ...]]:
    """What the self-check allows at hook points that are no writes, and a note on them.

    Attention may reshape to the batch that it started with, so rows do not share what comes before.
    After the blocks, all positions must be there.
    """
    inside = all(site.layer is not None for site in sites)
    scored_error = check.scored_error if inside else float("inf")
    check = replace(check, sharing_error=float("inf"), scored_error=scored_error)
    return check, (f"values at {where.at}, which are no writes",)


def warn_other_sites(svd: Decomposition | Sequence[Decomposition], sites: Sequence[Site]) -> None:
    """Warn when the edited sites are not those whose writes were decomposed."""
    bases = svd if is_several(svd) else [svd]
    hooks = {name for one in bases if one.source for name in one.source.hooks}  # type: ignore[union-attr]
    if hooks and {site.name for site in sites} != hooks:
        warn(
            f"{len(sites)} sites are edited, but the directions were computed from "
            f"{len(hooks)} sites; pass the same `layers` and `components` as to "
            "`collect_writes`, unless you mean it."
        )
