"""Running edits: many in one forward pass, next to the clean run, measured by a metric."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import warn, with_options
from mechsvd.edits.hooks import bind
from mechsvd.edits.maps import Edit, EditList, Stack, chain, gates_of
from mechsvd.edits.stacks import GateStack
from mechsvd.engine.batches import rows_per_pass, run_batches
from mechsvd.engine.measurement import Measurement, concatenate
from mechsvd.engine.metrics import (
    AnyMetric,
    Metric,
    divergences,
    evaluate,
    log_prob,
    metric_for,
    predict,
    score,
)
from mechsvd.engine.noise import spread_by_rounding
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.sites import Model, Site, Where
from mechsvd.model.tasks import Task


@with_options(RunOptions)
def measure(
    model: Model,
    task: Task,
    edits: GateStack | Sequence[Edit],
    *,
    metric: AnyMetric | None = None,
    noise_floor: bool = False,
    **options: Unpack[RunOptions],
) -> Measurement:
    """Run a task under many edits, and once without any.

    Several edits share a forward pass, as rows of its batch; edits of similar cost run together.
    Everything before the first edited site is computed once for all of them. Only the scored
    positions are unembedded. When memory runs out the batch is halved.

    Args:
        edits: a stack of gates over one basis (fastest), or any edits, each applied to its own
            row.
        metric: what `value` and `effect` are; see `Metric`. By default the log-probability of the
            continuation.
        noise_floor: measure it too, by one more pass. It is the spread of the clean metric over
            two batch sizes and over random changes of the entries of the writes, by up to eight
            times the precision of the model's dtype.
        options: see `RunOptions` (layers, components, positions, batch_size, …). Deltas are over
            the edited positions.

    Raises:
        TypeError: not a task, or not edits.
        ValueError: a task that does not fit the model, a basis of another `d_model` or model, an
            edit that changes shapes, a metric that returns anything but one finite number per edit.
        MemoryError: one edit alone does not fit.
    """
    with open_session(model, [task], **options) as session:
        stack = session.stack(edits, task)
        setup = _Setup(session, task, metric_for(metric, model, task))
        rows = _run_all(setup, stack, session.progress)
        floor = setup.noise_floor(rows[:1]) if noise_floor else None
        source = session.provenance(session.sites, *_baseline_notes(stack, task))
    edited, clean = rows[1:], rows[:1]
    _warn_not_finite(edited)
    return replace(edited, clean=replace(clean, source=source), source=source, noise_floor=floor)


def estimate_seconds(model: Model, task: Task, edits: int) -> float:
    """Estimate the run time for `edits` edits from two short runs."""
    few = min(8, rows_per_pass(model, task))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        measure(model, task, [chain()] * count, check=False, progress=False)
        return time.perf_counter() - started

    seconds(1)  # the first run also pays for what is set up once
    seconds_one, seconds_few = seconds(1), seconds(few)
    per_edit = max(0.0, seconds_few - seconds_one) / max(1, few - 1)
    passes = -(-edits // rows_per_pass(model, task))
    return edits * per_edit + passes * max(0.0, seconds_one - per_edit)


def clean_noise(session: Session, task: Task, metric: Metric = log_prob) -> float:
    """How much the clean metric changes by rounding noise at all sites; see `measure`."""
    setup = _Setup(replace(session, where=Where(missing="skip")), task, metric)
    with torch.no_grad():
        return setup.noise_floor(setup.forward(chain(), 1))


@dataclass(frozen=True)
class _Setup:
    """What the forward passes of one measurement have in common.

    The first row of the first pass is the clean run; its logits are kept for the others.
    """

    session: Session
    task: Task
    metric: Metric
    _clean: list[Tensor] = field(default_factory=list)

    @cached_property
    def positions(self) -> tuple[int, ...] | None:
        """The positions that are edited; None for all."""
        return self.session.positions(len(self.task.tokens))

    def run(self, edits: Stack, order: Tensor, progress: bool | None = False) -> list[Measurement]:
        """Run some edits of a stack, as many per forward pass as fit."""
        size, halve = self.session.rows_per_pass(self.task), self.session.halve(self.task)
        return run_batches(
            lambda rows: self.forward(edits[rows], len(rows)), order, size, halve, progress
        )

    def forward(self, rows: Edit, count: int) -> Measurement:
        """Run one forward pass with an edit that makes `count` rows, each edited in its own way."""
        orig: list[Tensor] = []
        kept: list[Tensor] = []

        def observe(site: Site, attempted: Tensor, let_through: Tensor) -> None:
            orig.append(_rms_norm(attempted).expand(count))
            kept.append(_rms_norm(let_through))

        sites = self.session.sites
        hooks = [
            (site.hook_name, bind(rows, site, self.positions, observe, count)) for site in sites
        ]
        logits = predict(self.session.model, self.task, self.session.check, hooks, count)
        predictions = logits.log_softmax(dim=-1)
        if not self._clean:  # clones, since a view would keep the whole batch
            self._clean.extend([logits[0].clone(), predictions[0].clone()])
        clean_logits, clean = self._clean
        scored, is_greedy = score(predictions, self.task)
        metric = self.metric
        scores = None
        if metric.column is None:
            scores = evaluate(metric, logits, clean_logits, self.task).detach().cpu()
        orig_deltas, kept_deltas = (torch.stack(sizes, dim=1).cpu() for sizes in (orig, kept))
        return Measurement(
            scored.cpu(),
            is_greedy.cpu(),
            orig_deltas,
            kept_deltas,
            sites,
            kl_divergences=divergences(predictions, clean).cpu(),
            scores=scores,
            metric=metric.name,
            unit=metric.unit,
            better=metric.better,
        )

    def noise_floor(self, clean: Measurement) -> float:
        """How much the clean metric changes by rounding noise; see `measure`."""

        def values(perturbed: Stack) -> Tensor:
            parts = [clean, *self.run(perturbed, torch.arange(len(perturbed)))]
            return concatenate(parts).value

        return spread_by_rounding(values, next(self.session.model.parameters()).dtype)


@dataclass(frozen=True)
class _CleanFirst:
    """A stack of edits with the clean run as its first row."""

    edits: GateStack | EditList

    def __len__(self) -> int:
        return 1 + len(self.edits)

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Edit:
        if rows[0] != 0:
            return self.edits[rows - 1]
        return _AfterClean(self.edits[rows[1:] - 1]) if len(rows) > 1 else chain()


@dataclass(frozen=True)
class _AfterClean:
    """A stack of edits after an unedited first row: the clean run, in the same pass."""

    edits: Edit

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        return torch.cat([x[:1], self.edits(x if len(x) == 1 else x[1:], hook=hook).to(x)])


def _run_all(setup: _Setup, edits: GateStack | EditList, progress: bool | None) -> Measurement:
    """Run all edits, those of similar cost together; the results are in the order given.

    Row 0 is the clean run. An edit that changes nothing gets a copy of it.
    """
    order = torch.arange(len(edits))
    if isinstance(edits, GateStack):
        order = edits.order_by_cost().cpu()
        order = order[~edits.changes_nothing.cpu()[order]]
    parts = setup.run(
        _CleanFirst(edits), torch.cat([torch.zeros(1, dtype=torch.long), 1 + order]), progress
    )
    row = torch.zeros(1 + len(edits), dtype=torch.long)
    row[1 + order] = torch.arange(1, 1 + len(order))
    return concatenate(parts)[row]


def _rms_norm(writes: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
    return (
        torch.linalg.vector_norm(writes, dim=(-2, -1), dtype=at_least_single(writes.dtype))
        / writes.shape[1] ** 0.5
    )


def _baseline_notes(stack: GateStack | EditList, task: Task) -> tuple[str, ...]:
    baselines = (gate.baseline for gate in gates_of(stack))
    return tuple(sorted({baseline.note(task) for baseline in baselines if baseline is not None}))


def _warn_not_finite(edited: Measurement) -> None:
    wrong = (~edited.log_probs.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        warn(
            f"Edits {wrong[:10]} gave log-probabilities that are not finite; "
            "the results keep these values."
        )
