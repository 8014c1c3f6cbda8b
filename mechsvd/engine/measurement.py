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
from mechsvd.edits.gates import Gate
from mechsvd.edits.hooks import bind
from mechsvd.edits.maps import Edit, EditList, Stack, chain
from mechsvd.engine.batches import rows_per_pass, run_batches
from mechsvd.engine.metrics import kl_divergence
from mechsvd.engine.noise import spread_by_rounding
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.runs import run_model
from mechsvd.model.selfcheck import SelfCheck
from mechsvd.model.sites import Hook, Model, Site, Where
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
        noise_floor: how much the clean log-probability changes by rounding noise, in nats; None
            if not measured.
        kl_divergences: of clean ‖ edited at each scored position, in nats; None in files of
            older versions.
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

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.orig_deltas.shape[1], "site of `orig_deltas`")
        if self.clean is not None and self.clean.log_probs.shape != (1, self.log_probs.shape[1]):
            raise ValueError(
                f"`clean` must have one edit and the {self.log_probs.shape[1]} scored tokens "
                f"of the others, but its `log_probs` have shape {list(self.clean.log_probs.shape)}."
            )

    def _require_values(self) -> None:
        # NaN where an edit made the model overflow
        require_between(self, ["log_probs"], -float("inf"), 0)
        require_between(self, ["orig_deltas", "kept_deltas", "noise_floor"], 0)

    def __getitem__(self, edits: slice | Tensor) -> "Measurement":
        """Some of the edits, in the order of `edits`, with the same clean run."""
        columns: dict[str, Any] = {name: getattr(self, name)[edits] for name in self._columns}
        return replace(self, **columns)

    @property
    def _columns(self) -> tuple[str, ...]:
        return _BY_EDIT if self.kl_divergences is None else (*_BY_EDIT, "kl_divergences")

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
    def orig_delta(self) -> Float[Tensor, " edit"]:
        """Root-mean-square norm of an attempted write over sites and positions."""
        return self.orig_deltas.square().mean(dim=-1).sqrt()

    @property
    def kept_delta(self) -> Float[Tensor, " edit"]:
        """Root-mean-square norm of a kept write over sites and positions."""
        return self.kept_deltas.square().mean(dim=-1).sqrt()

    def to_pandas(self) -> Any:
        """One row per edit: log_prob, probability, surprise, orig_delta, kept_delta, …

        The last columns are `kl_divergence` (nats per token) and `absolute_change` (nats).
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
        low, high = float(self.log_prob.min()), float(self.log_prob.max())
        clean = f"{float(self.clean.log_prob):.4f} nats clean, " if self.clean else ""
        return (
            f"Measurement of {len(self)} edits at {len(self.sites)} sites\n"
            f"  log-probability of {self.log_probs.shape[1]} tokens: "
            f"{clean}{low:.4f} to {high:.4f} edited\n"
            f"  on {self._origin()}"
        )


@with_options(RunOptions)
def measure(
    model: Model,
    task: Task,
    edits: Gate | Sequence[Edit],
    *,
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
        noise_floor: measure it too, by one more pass. It is the spread of the clean
            log-probability, in nats, over two batch sizes and over random changes of the entries
            of the writes, by up to eight times the precision of the model's dtype.
        options: see `RunOptions` (layers, components, positions, batch_size, …). Deltas are over
            the edited positions.

    Raises:
        TypeError: not a task, or not edits.
        ValueError: a task that does not fit the model, a basis of another `d_model` or model, an
            edit that changes shapes.
        MemoryError: one edit alone does not fit.
    """
    with open_session(model, [task], **options) as session:
        stack = session.stack(edits)
        setup = _Setup(session, task)
        rows = _run_all(setup, stack, session.progress)
        floor = setup.noise_floor(rows[:1]) if noise_floor else None
        source = session.provenance(session.sites)
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


def score(
    predictions: Float[Tensor, "edit scored d_vocab"], task: Task
) -> tuple[Float[Tensor, "edit scored"], Bool[Tensor, "edit scored"]]:
    """The log-probability of each continuation token, and whether it is the greedy one.

    Args:
        predictions: log-probabilities of all tokens; see `predict`.
    """
    target = task.continuation.to(predictions.device).expand(len(predictions), -1)
    log_probs = predictions.gather(-1, target[..., None])[..., 0]
    return log_probs, predictions.argmax(dim=-1) == target


def predict(
    model: Model, task: Task, check: SelfCheck, hooks: Sequence[Hook] = (), rows: int = 1
) -> Float[Tensor, "edit scored d_vocab"]:
    """Run a task once with hooks that make `rows` rows of it.

    Gradients flow through it where they are enabled; see `evaluation`.

    Returns:
        The natural-log probability of every token at the scored positions, in nats.
    """
    tokens = task.tokens.to(next(model.parameters()).device)
    batch = tokens.expand(1 if check.shares_prefix else rows, -1)
    logits = run_model(model, batch, hooks, task.scored, cut_early=check.scores_alone)
    return logits.to(at_least_single(logits.dtype)).log_softmax(dim=-1)


def clean_noise(session: Session, task: Task) -> float:
    """How much the clean log-probability changes by rounding noise at all sites, in nats.

    See `measure`.
    """
    setup = _Setup(replace(session, where=Where(missing="skip")), task)
    with torch.no_grad():
        return setup.noise_floor(setup.forward(chain(), 1))


@dataclass(frozen=True)
class _Setup:
    """What the forward passes of one measurement have in common.

    The first row of the first pass is the clean run; its predictions are kept for the others.
    """

    session: Session
    task: Task
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
        predictions = predict(self.session.model, self.task, self.session.check, hooks, count)
        if not self._clean:
            self._clean.append(predictions[0].clone())  # a view would keep the whole batch
        scored, is_greedy = score(predictions, self.task)
        divergences = kl_divergence(predictions, self._clean[0])
        orig_deltas, kept_deltas = (torch.stack(sizes, dim=1).cpu() for sizes in (orig, kept))
        return Measurement(
            scored.cpu(),
            is_greedy.cpu(),
            orig_deltas,
            kept_deltas,
            sites,
            kl_divergences=divergences.cpu(),
        )

    def noise_floor(self, clean: Measurement) -> float:
        """How much the clean log-probability changes by rounding noise; see `measure`."""

        def log_probs(perturbed: Stack) -> Tensor:
            parts = [clean, *self.run(perturbed, torch.arange(len(perturbed)))]
            return concatenate(parts).log_prob

        return spread_by_rounding(log_probs, next(self.session.model.parameters()).dtype)


@dataclass(frozen=True)
class _CleanFirst:
    """A stack of edits with the clean run as its first row."""

    edits: Gate | EditList

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


def _run_all(setup: _Setup, edits: Gate | EditList, progress: bool | None) -> Measurement:
    """Run all edits, those of similar cost together; the results are in the order given.

    Row 0 is the clean run. An edit that changes nothing gets a copy of it.
    """
    order = torch.arange(len(edits))
    if isinstance(edits, Gate):
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


def _warn_not_finite(edited: Measurement) -> None:
    wrong = (~edited.log_probs.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        warn(
            f"Edits {wrong[:10]} gave log-probabilities that are not finite; "
            "the results keep these values."
        )
