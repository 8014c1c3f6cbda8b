"""Running edits: many in one forward pass, next to the clean run, measured by a metric."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import once, warn
from mechsvd.edits.hooks import bind
from mechsvd.edits.maps import Edit, EditList, Stack, chain, gates_of
from mechsvd.edits.stacks import GateStack
from mechsvd.engine.batches import bytes_per_row, rows_per_pass, run_batches
from mechsvd.engine.measurement import Measurement, Measurements, concatenate
from mechsvd.engine.metrics import (
    AnyMetric,
    Logits,
    Metric,
    divergences,
    evaluate,
    log_prob,
    metric_for,
    own_positions,
    predict,
    protected,
    score,
    scored_by,
)
from mechsvd.engine.noise import spread_by_rounding
from mechsvd.engine.processes import gather, own_share
from mechsvd.engine.progress import row_name
from mechsvd.engine.resuming import describe_value, runs_model
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.beginnings import Beginning, read_beginning
from mechsvd.model.finite import not_finite, overflow_advice, require_finite_logits
from mechsvd.model.sites import Model, Site, Where, require_model
from mechsvd.model.tasks import Task, as_tasks

WORTH_SHARING = 0.1  # of a text's positions, from which rows go on from a beginning
CLEAN_ENTRIES = 50_000_000  # logits of the clean runs that are kept, of all texts that share passes


@overload
def measure(
    model: Model,
    task: Task,
    edits: Edit | GateStack | Sequence[Edit],
    *,
    metric: AnyMetric | None = None,
    noise_floor: bool = False,
    **options: Unpack[RunOptions],
) -> Measurement: ...
@overload
def measure(
    model: Model,
    task: Sequence[Task],
    edits: Edit | GateStack | Sequence[Edit],
    *,
    metric: AnyMetric | None = None,
    noise_floor: bool = False,
    **options: Unpack[RunOptions],
) -> Measurements: ...
@runs_model(RunOptions)
def measure(
    model: Model,
    task: Task | Sequence[Task],
    edits: Edit | GateStack | Sequence[Edit],
    *,
    metric: AnyMetric | None = None,
    noise_floor: bool = False,
    **options: Unpack[RunOptions],
) -> Measurement | Measurements:
    """Run a task, or several, under many edits, and once without any.

    Several edits share a forward pass, as rows of its batch; edits of similar cost run together.
    Texts of equal length share passes too. In a pass of one text, everything before the first
    edited site is computed once. Only the scored positions are unembedded. When memory runs out the
    batch is halved. Several processes each run a share of the edits, and all get all results.

    Args:
        task: one text, or a list of texts.
        edits: one edit; a stack of gates over one basis (fastest); or a list of any edits, each
            applied to its own row.
        metric: what `value` and `effect` are; see `Metric`. By default the log-probability of the
            continuation.
        noise_floor: measure it too, by one more pass. It is the spread of the clean metric over
            two batch sizes and over random changes of the entries of the writes, by up to eight
            times the precision of the model's dtype.
        options: see `RunOptions` (layers, components, positions, batch_size, …). Deltas are over
            the edited positions.

    Returns:
        A `Measurement`; of a list of texts `Measurements`, one per text in the order given.

    Raises:
        TypeError: not a task, or not edits.
        ValueError: a task that does not fit the model, a basis of another `d_model` or model, an
            edit that changes shapes, a metric that returns anything but one finite number per edit.
        MemoryError: one edit alone does not fit.

    Example:
        >>> edits = [ms.keep(mine), ms.ablate(mine), ms.shift(torch.ones(128))]
        >>> measured = ms.measure(model, task, edits, layers=[0, 1])
        >>> measured.effect.shape
        torch.Size([3])
    """
    require_model(model)
    tasks = as_tasks(task)
    found: dict[int, Measurement] = {}
    edits = once(edits)
    with open_session(model, tasks, **options) as session:
        for one in tasks:
            _warn_too_late(session, one)
        for chosen in _groups(session):
            group = [tasks[i] for i in chosen]
            stacks = session.stacks(edits, group)
            metrics = tuple(metric_for(metric, model, one) for one in group)
            setup = _Setup(session, tuple(group), metrics)
            rows = _run_all(setup, stacks, session.progress)
            floors = setup.noise_floors(rows) if noise_floor else [None] * len(group)
            for i, one, stack, part, floor in zip(chosen, group, stacks, rows, floors, strict=True):
                source = session.provenance(
                    session.sites, *_baseline_notes(stack, one), tasks=[one]
                )
                clean = replace(part[:1], source=source)
                found[i] = replace(part[1:], clean=clean, source=source, noise_floor=floor)
    parts = tuple(found[i] for i in range(len(tasks)))
    _warn_not_finite(parts)
    return parts[0] if isinstance(task, Task) else Measurements(parts)


def _warn_too_late(session: Session, task: Task) -> None:
    """Warn of positions after all scored predictions, where no edit can have an effect."""
    positions = session.positions(task)
    if positions and min(positions) >= task.scored.stop:
        warn(
            f"The edited positions {[*positions]!s:.40} come after the last scored prediction, at "
            f'{task.scored.stop - 1}, so no edit has an effect; "last" is that prediction.'
        )


def estimate_seconds(model: Model, task: Task, edits: int) -> float:
    """Estimate the run time for `edits` edits from two short runs.

    Example:
        >>> ms.estimate_seconds(model, task, 100) > 0
        True
    """
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
    setup = _Setup(replace(session, where=Where(missing="skip")), (task,), (metric,))
    with torch.no_grad():
        (floor,) = setup.noise_floors(setup.run([_CleanFirst(None)], [torch.zeros(1).long()]))
    return floor


def _groups(session: Session) -> Iterator[list[int]]:
    """Texts of one length, edited at the same positions, that share forward passes.

    They are as many as their clean logits leave room for.
    """
    tasks = session.tasks
    alike: dict[tuple[int, Any], list[int]] = {}
    for i, task in enumerate(tasks):
        alike.setdefault((len(task.tokens), session.positions(task)), []).append(i)
    for _, same in sorted(alike.items(), key=lambda item: item[0][0]):
        longest = max(len(tasks[i].continuation) for i in same)
        size = max(1, CLEAN_ENTRIES // (longest * session.model.cfg.d_vocab))
        yield from (same[i : i + size] for i in range(0, len(same), size))


@dataclass(frozen=True)
class _Setup:
    """What the forward passes over some texts of one length have in common.

    Row 0 of each text is its clean run, which comes first; its logits are kept for the others. A
    process whose share of the rows begins later in a text runs it, too.
    """

    session: Session
    tasks: tuple[Task, ...]
    metrics: tuple[Metric, ...]
    _clean: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _before: dict[int, Callable[[], Any]] = field(default_factory=dict)

    @cached_property
    def positions(self) -> tuple[int, ...] | None:
        """The positions that are edited; None for all."""
        return self.session.positions(self.tasks[0])

    @cached_property
    def start(self) -> int:
        """Where the rows begin: what is before every edited and scored position, they share."""
        goes_on = self.session.check.goes_on and self.positions is not None
        start = min(*self.positions, scored_by(self.tasks).start) if goes_on else 0  # type: ignore[misc]
        return start if start >= WORTH_SHARING * len(self.tasks[0].tokens) else 0

    @cached_property
    def beginning(self) -> Beginning:
        """The keys and values before `start`, of all texts."""
        tokens = torch.stack([task.tokens[: self.start] for task in self.tasks])
        model = self.session.model
        return read_beginning(model, tokens.to(next(model.parameters()).device))

    def run(
        self,
        stacks: Sequence["_CleanFirst"],
        orders: Sequence[Int[Tensor, " row"]],
        progress: bool | None = False,
    ) -> list[Measurement]:
        """Run some rows of each text's stack, as many per forward pass as fit.

        Returns:
            One measurement per text, its rows in the order given.
        """
        width = 1 + max(int(order.max()) for order in orders)
        every = torch.cat([text * width + order for text, order in enumerate(orders)])
        shares = gather(
            lambda: self._described(stacks, every),
            lambda: self._run_own(stacks, own_share(every), width, progress),
        )
        return [
            concatenate([share[text] for share in shares if text in share])
            for text in range(len(stacks))
        ]

    def _run_own(
        self,
        stacks: Sequence["_CleanFirst"],
        rows: Int[Tensor, " row"],
        width: int,
        progress: bool | None,
    ) -> dict[int, Measurement]:
        """Run the rows of this process; returns the measurement of each of their texts."""
        longest = max(self.tasks, key=lambda task: len(task.continuation))
        size = self.session.rows_per_pass(longest, self.start)
        halve = self.session.halve(longest, self.start)
        rows, added = self._with_clean(rows, width)
        parts = run_batches(
            lambda rows: self.forward(stacks, rows // width, rows % width),
            rows,
            size,
            halve,
            progress,
            row_name(),
            restored=lambda chunks: self._remember(stacks, chunks, width),
            row_bytes=bytes_per_row(self.session.model, longest, self.start),
        )
        own: dict[int, list[Measurement]] = {}
        for text, part in (pair for pairs in parts for pair in pairs):
            own.setdefault(text, []).append(part)
        return {text: concatenate(run)[int(text in added) :] for text, run in own.items()}

    def _with_clean(self, rows: Int[Tensor, " row"], width: int) -> tuple[Tensor, set[int]]:
        """Some rows after the clean runs that they need, and the texts to which one was added."""
        numbers, counts = (rows // width).unique_consecutive(return_counts=True)
        known, added, parts = {*self._clean, *self._before}, set(), [rows[:0]]
        for text, own in zip(numbers.tolist(), rows.split(counts.tolist()), strict=True):
            if own[0] % width and text not in known:
                added.add(text)
                parts.append(torch.tensor([text * width]))
            parts.append(own)
        return torch.cat(parts), added

    def _described(
        self, stacks: Sequence["_CleanFirst"], rows: Int[Tensor, " row"]
    ) -> tuple[Any, ...]:
        """What the processes that share some rows must agree on; of the edits, what is cheap."""
        gates = gates_of(stacks[0].edits)[:8]
        # rounding may differ between machines, but not where the first directions point
        tops = [gate.basis[:, :4].abs().argmax(dim=0).tolist() for gate in gates]
        return (
            [task.tokens.tolist() for task in self.tasks],
            [metric.name for metric in self.metrics],
            [site.name for site in self.session.sites],
            describe_value(rows),
            [(list(gate.gains.shape), top) for gate, top in zip(gates, tops, strict=True)],
        )

    def forward(
        self, stacks: Sequence["_CleanFirst"], texts: Int[Tensor, " row"], rows: Int[Tensor, " row"]
    ) -> list[tuple[int, Measurement]]:
        """Run one forward pass, each row a text with an edit of its stack; texts in order."""
        numbers, lengths = texts.unique_consecutive(return_counts=True)
        chosen, counts = numbers.tolist(), lengths.tolist()
        edit = _SideBySide(
            tuple(stacks[text][own] for text, own in zip(chosen, rows.split(counts), strict=True)),
            tuple(counts),
        )
        seen, sites = _Sizes(len(rows)), self.session.sites
        hooks = [
            (site.hook_name, bind(edit, site, self.positions, seen, len(rows), start=self.start))
            for site in sites
        ]
        tasks = [self.tasks[text] for text in chosen]
        before = (self.start, self.beginning.of(texts)) if self.start else (0, None)
        logits = predict(self.session.model, tasks, self.session.check, hooks, counts, before)
        deltas = [_table(sizes).split(counts) for sizes in (seen.orig, seen.kept)]
        first = scored_by(tasks).start
        return [
            (text, self._measured(text, part[:, own_positions(self.tasks[text], first)], *sizes))
            for text, part, *sizes in zip(chosen, logits.split(counts), *deltas, strict=True)
        ]

    def _measured(self, text: int, logits: Logits, orig: Tensor, kept: Tensor) -> Measurement:
        task, metric = self.tasks[text], self.metrics[text]
        predictions = logits.log_softmax(dim=-1)
        if text in self._before:  # the same pass again, for the very same clean logits
            self._before.pop(text)()
        if text not in self._clean:  # clones, since a view would keep the whole batch
            self._require_finite(task, logits[:1], predictions[:1], orig[0])
            self._clean[text] = (logits[0].clone(), predictions[0].clone())
        clean_logits, clean = self._clean[text]
        scored, is_greedy = score(predictions, task)
        scores = None
        if metric.column is None:
            scores = evaluate(metric, logits, clean_logits, task).detach().cpu()
        profile = metric.profile and metric.profile(*protected(metric.profile, predictions, clean))
        return Measurement(
            scored.cpu(),
            is_greedy.cpu(),
            orig,
            kept,
            self.session.sites,
            kl_divergences=divergences(predictions, clean).cpu(),
            scores=scores,
            metric=metric.name,
            unit=metric.unit,
            better=metric.better,
            profiles=None if profile is None else profile.cpu(),
        )

    def _require_finite(
        self, task: Task, logits: Logits, predictions: Logits, sizes: Float[Tensor, " site"]
    ) -> None:
        """Refuse a clean run whose logits, writes or scored log-probabilities are not finite."""
        model, tokens = self.session.model, task.tokens[None]
        number = next((i for i, one in enumerate(self.session.tasks) if one is task), 0)
        require_finite_logits(model, tokens, logits, task.scored, prompt=number)
        is_write = torch.tensor([site.is_write for site in self.session.sites])
        if not sizes[is_write].isfinite().all():
            raise ValueError(not_finite(model, tokens, "the writes", prompt=number))
        wrong = (~score(predictions, task)[0][0].isfinite()).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise ValueError(
                f"The scored token {int(task.continuation[place])} at position "
                f"{task.scored.start + place + 1} has probability 0 in the clean run, since its "
                "logit is −inf (masked), but must have one; score another continuation."
            )

    def _remember(
        self, stacks: Sequence["_CleanFirst"], chunks: Sequence[Int[Tensor, " _"]], width: int
    ) -> None:
        """Note the passes of an earlier run that had clean runs, which others need."""
        for rows in chunks:
            for text in (rows[rows % width == 0] // width).tolist():
                self._before[text] = partial(self.forward, stacks, rows // width, rows % width)

    def noise_floors(self, clean: Sequence[Measurement]) -> list[float]:
        """How much each text's clean metric changes by rounding noise; see `measure`.

        Args:
            clean: of each text; its first row is the clean run.
        """
        dtype = next(self.session.model.parameters()).dtype
        spreads = spread_by_rounding(partial(self._values_under, clean), dtype)
        if not spreads.isfinite().all():
            raise ValueError(
                "Changes of the writes by rounding noise make the clean run overflow, so no effect "
                f"can be told from noise.{overflow_advice(dtype)}"
            )
        return [float(spread) for spread in spreads]

    def _values_under(self, clean: Sequence[Measurement], perturbed: Stack) -> Tensor:
        every = [1 + torch.arange(len(perturbed))] * len(self.tasks)
        parts = self.run([_CleanFirst(perturbed)] * len(self.tasks), every)
        pairs = zip(clean, parts, strict=True)
        return torch.stack([concatenate([one[:1], part]).value for one, part in pairs])


class _Sizes:
    """Observes the sizes of attempted and kept writes, one number per row, site after site."""

    def __init__(self, rows: int):
        self.orig: list[Tensor] = []
        self.kept: list[Tensor] = []
        self._rows = rows

    def __call__(self, site: Site, attempted: Tensor, kept: Tensor) -> None:
        self.orig.append(_rms_norm(attempted).expand(self._rows))
        self.kept.append(_rms_norm(kept))


@dataclass(frozen=True)
class _CleanFirst:
    """A stack of edits with the clean run as its first row."""

    edits: Stack | None

    def __len__(self) -> int:
        return 1 + (0 if self.edits is None else len(self.edits))

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Edit:
        if self.edits is None:
            return chain()
        if rows[0] != 0:
            return self.edits[rows - 1]
        return _AfterClean(self.edits[rows[1:] - 1]) if len(rows) > 1 else chain()


@dataclass(frozen=True)
class _AfterClean:
    """A stack of edits after an unedited first row: the clean run, in the same pass."""

    edits: Edit

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        return torch.cat([x[:1], self.edits(x if len(x) == 1 else x[1:], hook=hook).to(x)])


@dataclass(frozen=True)
class _SideBySide:
    """The edits of several texts, each on the rows of its text."""

    edits: tuple[Edit, ...]
    counts: tuple[int, ...]

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        if len(self.edits) == 1:
            return self.edits[0](x, hook=hook)
        parts = x.split(list(self.counts))
        return torch.cat(
            [edit(part, hook=hook).to(x) for edit, part in zip(self.edits, parts, strict=True)]
        )


def _run_all(
    setup: _Setup, stacks: Sequence[GateStack | EditList], progress: bool | None
) -> list[Measurement]:
    """Run all edits of all texts, those of similar cost together; results in the order given.

    Row 0 is the clean run. An edit that changes nothing gets a copy of it.
    """
    edits = stacks[0]
    order = torch.arange(len(edits))
    if isinstance(edits, GateStack):
        order = edits.order_by_cost().cpu()
        order = order[~edits.changes_nothing.cpu()[order]]
    with_clean = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
    parts = setup.run(
        [_CleanFirst(stack) for stack in stacks], [with_clean] * len(stacks), progress
    )
    row = torch.zeros(1 + len(edits), dtype=torch.long)
    row[1 + order] = torch.arange(1, 1 + len(order))
    return [part[row] for part in parts]


def _table(sizes: Sequence[Float[Tensor, " row"]]) -> Float[Tensor, "row site"]:
    """The sizes at all sites, which may be on several devices."""
    device = sizes[0].device
    return torch.stack([size.to(device) for size in sizes], dim=1).cpu()


def _rms_norm(writes: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
    return (
        torch.linalg.vector_norm(writes, dim=(-2, -1), dtype=at_least_single(writes.dtype))
        / writes.shape[1] ** 0.5
    )


def _baseline_notes(stack: GateStack | EditList, task: Task) -> tuple[str, ...]:
    baselines = (gate.baseline for gate in gates_of(stack))
    return tuple(sorted({baseline.note(task) for baseline in baselines if baseline is not None}))


def _warn_not_finite(parts: Sequence[Measurement]) -> None:
    for number, edited in enumerate(parts):
        wrong = (~edited.log_probs.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            where = f" of text {number}" if len(parts) > 1 else ""
            warn(
                f"Edits {wrong[:10]}{where} gave log-probabilities that are not finite; "
                "the results keep these values."
            )
