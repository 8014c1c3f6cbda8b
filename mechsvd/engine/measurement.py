"""Measuring edits: many in one forward pass, compared with the clean run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import warn, with_options
from mechsvd.edits.bases import GateStack
from mechsvd.edits.hooks import bind
from mechsvd.edits.maps import Edit, EditList, Stack, chain, gates_of
from mechsvd.engine.batches import rows_per_pass, run_batches
from mechsvd.engine.metrics import (
    READY,
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
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.sites import Model, Site, Where
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, result

_BY_EDIT = ("log_probs", "is_greedy", "orig_deltas", "kept_deltas")


@result
class Measurement(Result):
    """What is left of a task under each edit of a stack.

    Attributes:
        log_probs: natural-log probability of each continuation token, in nats.
        is_greedy: whether each continuation token is the most probable one; if all are, greedy
            text would be the same.
        orig_deltas, kept_deltas: root-mean-square L2 norm over positions of the attempted write
            and of the kept write (what the edit let through), at each site, in the units of the
            residual stream.
        clean: the same for the model without an edit; None in the clean measurement itself.
        noise_floor: how much the clean metric changes by rounding noise, in its unit; None if not
            measured. It says what is reproducible, not what is significant.
        kl_divergences: of clean ‖ edited at each scored position, in nats; None in files of
            older versions.
        scores: the metric of each edit; None where it is a column that is there anyway.
        metric, unit: the metric's name and its unit.
        better: whether "more" or "less" of the metric is better.
    """

    log_probs: Float[Tensor, "edit scored"]
    is_greedy: Bool[Tensor, "edit scored"]
    orig_deltas: Float[Tensor, "edit site"]
    kept_deltas: Float[Tensor, "edit site"]
    sites: tuple[Site, ...]
    clean: "Measurement | None" = None
    source: Provenance | None = None
    noise_floor: float | None = None
    kl_divergences: Float[Tensor, "edit scored"] | None = None
    scores: Float[Tensor, " edit"] | None = None
    metric: str = log_prob.name
    unit: str = log_prob.unit
    better: str = log_prob.better

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.orig_deltas.shape[1], "site of `orig_deltas`")
        if self.clean is not None and self.clean.log_probs.shape != (1, self.log_probs.shape[1]):
            raise ValueError(
                f"`clean` must have one edit and the {self.log_probs.shape[1]} scored tokens "
                f"of the others, but its `log_probs` have shape {list(self.clean.log_probs.shape)}."
            )

    def _require_values(self) -> None:
        if self.better not in ("more", "less"):
            raise ValueError(f"`better` is {self.better!r:.40}, but must be 'more' or 'less'.")
        if self.scores is None and self.metric not in READY:
            raise ValueError(f"`scores` are missing for the metric {self.metric!r:.40}.")
        # NaN where an edit made the model overflow
        require_between(self, ["log_probs"], -float("inf"), 0)
        require_between(self, ["orig_deltas", "kept_deltas", "noise_floor"], 0)

    def __getitem__(self, edits: slice | Tensor) -> "Measurement":
        """Some of the edits, in the order of `edits`, with the same clean run."""
        columns: dict[str, Any] = {name: getattr(self, name)[edits] for name in self._columns}
        return replace(self, **columns)

    @property
    def _columns(self) -> tuple[str, ...]:
        optional = ("kl_divergences", "scores")
        return (*_BY_EDIT, *(name for name in optional if getattr(self, name) is not None))

    def __len__(self) -> int:
        """Number of edits."""
        return len(self.log_probs)

    @property
    def clean_run(self) -> "Measurement":
        """The clean run that the edits are compared with.

        Raises:
            ValueError: the measurement has none.
        """
        if self.clean is None:
            raise ValueError(
                "This measurement holds no clean run, so there is nothing to compare with; "
                "make it by `measure`."
            )
        return self.clean

    @property
    def log_prob(self) -> Float[Tensor, " edit"]:
        """Natural-log probability of the whole continuation, in nats."""
        # a float32 sum rounds by more than most effects
        return self.log_probs.sum(dim=-1, dtype=torch.float64)

    @property
    def kl_divergence(self) -> Float[Tensor, " edit"]:
        """Mean over the scored positions of the KL divergence of clean ‖ edited, in nats per token.

        NaN where the measurement does not know it, as in files of older versions.
        """
        if self.kl_divergences is None:
            return torch.full((len(self),), torch.nan, dtype=torch.float64)
        return self.kl_divergences.mean(dim=-1, dtype=torch.float64)

    @property
    def absolute_change(self) -> Float[Tensor, " edit"]:
        """Sum over tokens of the size of the change of their log-probability, in nats.

        Unlike the change of `log_prob`, it does not cancel between tokens.
        """
        clean = self if self.clean is None else self.clean
        return (self.log_probs - clean.log_probs).abs().sum(dim=-1, dtype=torch.float64)

    @property
    def cross_entropy(self) -> Float[Tensor, " edit"]:
        """Mean surprise of the continuation's tokens, in nats per token."""
        return -self.log_prob / self.log_probs.shape[1]

    @property
    def greedy_share(self) -> Float[Tensor, " edit"]:
        """Share of the continuation's tokens that are the most probable ones."""
        return self.is_greedy.double().mean(dim=-1)

    @property
    def value(self) -> Float[Tensor, " edit"]:
        """The metric of each edit, in its unit; the log-probability by default."""
        if self.scores is not None:
            return self.scores.double()
        values: Tensor = getattr(self, READY[self.metric].column or "")
        return values

    @property
    def effect(self) -> Float[Tensor, " edit"]:
        """How much each edit costs in the metric, in its unit; damage is positive.

        It is clean − edited where more of the metric is better, and edited − clean where less is.
        A divergence is 0 in the clean run, so its effect is its value.
        """
        sign = 1 if self.better == "more" else -1
        return sign * (self.clean_run.value - self.value)

    @property
    def orig_delta(self) -> Float[Tensor, " edit"]:
        """Root-mean-square norm of an attempted write over sites and positions."""
        return self.orig_deltas.square().mean(dim=-1).sqrt()

    @property
    def kept_delta(self) -> Float[Tensor, " edit"]:
        """Root-mean-square norm of a kept write over sites and positions."""
        return self.kept_deltas.square().mean(dim=-1).sqrt()

    def to_pandas(self) -> Any:
        """One row per edit: log_prob, probability, surprise, orig_delta, kept_delta, …

        The last columns are `kl_divergence` (nats per token), `absolute_change` (nats), and the
        metric under its own name if it is another one.
        """
        import pandas as pd

        columns = {
            "log_prob": self.log_prob,
            "probability": self.log_prob.exp(),
            "surprise": -self.log_prob,
            "orig_delta": self.orig_delta,
            "kept_delta": self.kept_delta,
            "kl_divergence": self.kl_divergence,
            "absolute_change": self.absolute_change,
            self.metric: self.value,
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def sites_to_pandas(self) -> Any:
        """One row per edit and site: layer, component, orig_delta, kept_delta."""
        import pandas as pd

        edits = len(self)
        return pd.DataFrame(
            {
                "edit": [i for i in range(edits) for _ in self.sites],
                "layer": [s.layer for s in self.sites] * edits,
                "component": [s.component for s in self.sites] * edits,
                "orig_delta": self.orig_deltas.flatten().numpy(),
                "kept_delta": self.kept_deltas.flatten().numpy(),
            }
        )

    def __repr__(self) -> str:
        low, high = float(self.value.min()), float(self.value.max())
        clean = f"{float(self.clean.value):.4f} {self.unit} clean, " if self.clean else ""
        what = "log-probability" if self.metric == log_prob.name else f"`{self.metric}`"
        return (
            f"Measurement of {len(self)} edits at {len(self.sites)} sites\n"
            f"  {what} of {self.log_probs.shape[1]} tokens: "
            f"{clean}{low:.4f} to {high:.4f} edited\n"
            f"  on {self._origin()}"
        )


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


def concatenate(parts: Sequence[Measurement]) -> Measurement:
    """Join measurements of one task at the same sites, in order; the first gives the clean run."""
    columns: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._columns
    }
    return replace(parts[0], **columns)


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
