"""The logits of a task as a function of a vector w: gains, writes or weights."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mechsvd.checks import warn
from mechsvd.edits.baselines import Baseline
from mechsvd.edits.bases import removals
from mechsvd.edits.gates import Gate
from mechsvd.edits.hooks import bind, require_fitting_edit
from mechsvd.edits.maps import for_task, gates_of
from mechsvd.edits.stacks import SiteGates, SiteRemovals
from mechsvd.engine.memory import is_out_of_memory
from mechsvd.engine.metrics import Metric, evaluate, predict, score
from mechsvd.engine.session import Session, warn_other_sites
from mechsvd.linalg.decomposition import (
    Decomposition,
    require_decomposition,
    require_decompositions,
)
from mechsvd.linalg.subspace import at_least_single, widest
from mechsvd.model.finite import require_finite_logits
from mechsvd.model.selfcheck import SelfCheck
from mechsvd.model.sites import Hook, Model, Site, Where, find_sites, find_weights
from mechsvd.model.tasks import Task

Over = Decomposition | Site | str | Sequence[Site] | Sequence[str]
Part = tuple[str, tuple[int, ...]]  # a piece of w: its name and its shape


@dataclass(frozen=True)
class Objective:
    """The logits of a task as a function of w, and the w of the unchanged model.

    Attributes:
        logits: maps rows of w to the logits at the scored positions; differentiable in the rows.
        point: w of the unchanged model.
        over: one line that says what w is. It is equal exactly for the same w, also in another
            task or checkpoint.
        parts: name and shape of each piece of w, in order.
        hooks: names of the hook points where w acts.
        model: runs the task.
    """

    logits: Callable[[Float[Tensor, "row entry"]], Float[Tensor, "row scored d_vocab"]]
    task: Task
    point: Float[Tensor, " entry"]
    over: str
    parts: tuple[Part, ...]
    hooks: tuple[str, ...] = ()
    model: Any = None

    def clean_logits(self) -> Float[Tensor, "scored d_vocab"]:
        """The logits of the unchanged model.

        Raises:
            ValueError: they hold NaN or inf; see `require_finite_logits`.
        """
        with torch.no_grad():
            logits = self.logits(self.point[None])
        require_finite_logits(self.model, self.task.tokens[None], logits, self.task.scored)
        return logits[0]

    def log_probs(self, rows: Float[Tensor, "row entry"]) -> Float[Tensor, "row scored"]:
        """Natural-log probability of each continuation token, in nats."""
        return score(self.logits(rows).log_softmax(dim=-1), self.task)[0]

    def metric(self, metric: Metric) -> Callable[[Float[Tensor, "row entry"]], Tensor]:
        """A metric as a function of rows of w, one number per row."""
        clean = self.clean_logits()

        def values(rows: Float[Tensor, "row entry"]) -> Float[Tensor, " row"]:
            row_values = evaluate(metric, self.logits(rows), clean, self.task)
            return row_values.to(widest(row_values.device))

        return values

    def log_prob(self, rows: Float[Tensor, "row entry"]) -> Float[Tensor, " row"]:
        """Log-probability of the whole continuation, one per row."""
        log_probs = self.log_probs(rows)
        return log_probs.to(widest(log_probs.device)).sum(dim=-1)


def require_parts(parts: Sequence[Part], entries: int) -> None:
    """Refuse pieces whose sizes do not sum to the entries of w."""
    sizes = [math.prod(shape) for _, shape in parts]
    if sum(sizes) != entries or any(size < 0 for _, shape in parts for size in shape):
        raise ValueError(
            f"`parts` must make up the {entries} entries of w, but have {sum(sizes)}: "
            f"{parts!r:.80}."
        )


def objective_over(session: Session, task: Task, over: Over) -> Objective:
    """Make the function of w: gains of directions, writes at some sites, or named weights.

    Raises:
        TypeError: `over` is none of these.
        KeyError: a pattern matches no weight, or the model has no such site.
        ValueError: the decomposition does not fit the model.
    """
    choice = [over] if isinstance(over, Site | str) else over
    if isinstance(choice, Decomposition):
        return _over_gains(session, task, choice)
    if isinstance(choice, Sequence) and choice and all(isinstance(x, str) for x in choice):
        _require_unset(session.where, "weights", "layers", "components", "positions")
        return _over_weights(session, task, [str(pattern) for pattern in choice])
    if isinstance(choice, Sequence) and choice and all(isinstance(x, Site) for x in choice):
        _require_unset(session.where, "sites", "layers", "components")
        return _over_writes(session, task, [site for site in choice if isinstance(site, Site)])
    has_decomposition = isinstance(choice, Sequence) and any(
        isinstance(x, Decomposition) for x in choice
    )
    advice = ": pass one decomposition, not a list" if has_decomposition else ""
    raise TypeError(
        "`over` must be a decomposition (its gains), sites of the model (`mechsvd.find_sites`, "
        f"their writes), or patterns of weights ('blocks.2.mlp.*'), but is {type(over).__name__}"
        f"{advice}."
    )


def batched(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function of rows from a function of one vector.

    It uses `vmap` if that works, and otherwise runs the rows in a loop.
    """
    can_vmap = True

    def run(rows: Tensor) -> Tensor:
        nonlocal can_vmap
        if len(rows) > 1 and can_vmap:
            try:
                return vmap(function)(rows)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                can_vmap = False  # Bloom's activation, an `.item()`, an `if`
        return torch.stack([function(row) for row in rows])

    return run


def _require_unset(where: Where, what: str, *names: str) -> None:
    """Refuse options that would be silently ignored."""
    if wrong := [name for name in names if getattr(where, name) != getattr(Where(), name)]:
        raise ValueError(
            f"`{wrong[0]}` says where gains act, but `over` names {what}, where it has no meaning; "
            "leave it out."
        )


def _over_gains(session: Session, task: Task, svd: Decomposition) -> Objective:
    """One gain per direction, and one for the rest that the directions do not span.

    w = 1 is the model as it is; w = 0 removes all writes.
    """
    require_decomposition(svd)
    model = session.model
    device, dtype = _like(model)
    # a clone, because tensors from inference mode cannot carry gradients
    basis = svd.directions.to(device, dtype).clone()
    sites, positions = session.sites, session.positions(task)
    identity = Gate(basis, basis.new_ones(svd.rank), source=svd.source)
    require_fitting_edit(model, identity, session.required_source, sites)
    has_rest = svd.rank < svd.d_model
    warn_other_sites(svd, sites)

    def gate(rows: Tensor) -> Gate:
        return Gate(basis, rows[:, : svd.rank], rows[:, -1] if has_rest else 0.0)

    parts: tuple[Part, ...] = (
        ("gain", (svd.rank,)),
        *([("gain of the rest", (1,))] if has_rest else []),
    )
    point = torch.ones(svd.rank + has_rest, device=device, dtype=dtype)
    hooks = tuple(site.name for site in sites)
    over = f"gains of {svd.rank} directions ({_digest([svd])}) at {_at(hooks, positions)}"
    return Objective(_logits_under(session, task, gate), task, point, over, parts, hooks, model)


def objective_of_removals(
    session: Session,
    task: Task,
    svd: Decomposition | Sequence[Decomposition],
    baseline: Baseline | None = None,
) -> Objective:
    """One gain per direction, each at the sites of its basis; what no direction spans is kept.

    w = 1 is the model as it is; w_j = 0 removes direction j, as the stack of `removals` does.

    Raises:
        TypeError, KeyError, ValueError: the directions or the baseline do not fit model or task.
    """
    bases = require_decompositions(svd)
    stack = for_task(session.stack(removals(svd, baseline)), task)
    device, dtype = _like(session.model)
    # clones, because tensors from inference mode cannot carry gradients
    gates = [replace(g, basis=g.basis.to(device, dtype).clone()) for g in gates_of(stack)]
    ranks = [one.rank for one in bases]
    index = stack.edits.index if isinstance(stack, SiteRemovals) else None

    def edit(rows: Tensor) -> Gate | SiteGates:
        parts = rows.split(ranks, dim=1)
        gained = [replace(g, gains=own.to(g.basis)) for g, own in zip(gates, parts, strict=True)]
        return gained[0] if index is None else SiteGates(tuple(gained), index)

    hooks = tuple(site.name for site in session.sites)
    at = _at(hooks, session.positions(task))
    over = f"gains of {sum(ranks)} directions ({_digest(bases)}) at {at}"
    point = torch.ones(sum(ranks), device=device, dtype=dtype)
    logits = _logits_under(session, task, edit)
    return Objective(logits, task, point, over, (("gain", (sum(ranks),)),), hooks, session.model)


def _logits_under(
    session: Session, task: Task, edit: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    """The logits of a task under the edit that rows of w make, with gradients."""
    model, check, sites = session.model, session.check, session.sites
    positions = session.positions(task)

    def logits(rows: Tensor) -> Tensor:
        made = edit(rows)
        hooks = [(site.hook_name, bind(made, site, positions, rows=len(rows))) for site in sites]
        return predict(model, [task], check, hooks, [len(rows)])

    return logits


def _digest(bases: Sequence[Decomposition]) -> str:
    """Eight letters that differ where the directions do."""
    digest = hashlib.sha256()
    for one in bases:
        content = one.directions.cpu().contiguous().view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:8]


def _over_writes(session: Session, task: Task, chosen: Sequence[Site]) -> Objective:
    """The writes themselves: w minus the clean writes is added to every write.

    So w = 0 subtracts the clean writes.
    """
    model, check = session.model, session.check
    known = find_sites(model, missing="skip")
    if wrong := [site.hook_name for site in chosen if site not in known]:
        raise KeyError(
            f"This model does not write at {wrong[:3]}; choose from `mechsvd.find_sites(model)`."
        )
    sites = [site for site in known if site in chosen]
    device, dtype = _like(model)
    positions = list(session.positions(task) or range(len(task.tokens)))
    stored: list[Tensor] = []
    with torch.no_grad():
        predict(
            model,
            [task],
            check,
            [(site.hook_name, lambda x, hook=None: stored.append(x[0].clone())) for site in sites],
        )
    clean = torch.stack(stored)[:, positions].to(device, dtype)

    def logits(rows: Tensor) -> Tensor:
        shifts = rows.new_zeros(len(rows), len(sites), len(task.tokens), clean.shape[-1])
        shifts = shifts.index_copy(
            2, torch.tensor(positions, device=device), rows.view(-1, *clean.shape) - clean
        )
        hooks = [_added(site, shifts[:, i]) for i, site in enumerate(sites)]
        return predict(model, [task], check, hooks, [len(rows)])

    parts = tuple((site.hook_name, tuple(clean.shape[1:])) for site in sites)
    hooks = tuple(site.name for site in sites)
    over = f"writes at {_at(hooks, positions)}"
    return Objective(logits, task, clean.flatten(), over, parts, hooks, model)


def _added(site: Site, shifts: Float[Tensor, "row pos d_model"]) -> Hook:
    edit = lambda x, hook=None: x + shifts.to(x.dtype)  # noqa: E731 (compiled once, unlike a def)
    return site.hook_name, bind(edit, site, rows=len(shifts))


def _over_weights(session: Session, task: Task, patterns: Sequence[str]) -> Objective:
    """The named weights, concatenated; each row of w is one set of weights.

    `vmap` runs many rows at once if it can.
    """
    weights = find_weights(session.model, patterns)
    _, dtype = _like(session.model)
    run = _Run(session.model, task, session.check)
    sizes = [weight.numel() for _, weight in weights.values()]

    def logits(w: Tensor) -> Tensor:
        pieces = zip(weights.values(), w.split(sizes), strict=True)
        replaced = {
            f"model.{name}": piece.view_as(weight).to(weight.dtype)
            for (names, weight), piece in pieces
            for name in names
        }
        # A bridge reaches a module by several paths. With `tie_weights`, torch would take the new
        # weights for the old ones.
        return functional_call(run, replaced, (), tie_weights=False)

    point = torch.cat([weight.detach().flatten() for _, weight in weights.values()]).to(dtype)
    _require_used(session.model, weights, run)
    parts = tuple((name, tuple(weight.shape)) for name, (_, weight) in weights.items())
    over = f"weights {', '.join(weights)}"
    return Objective(batched(logits), task, point, over, parts, model=session.model)


def _require_used(model: Any, weights: dict[str, tuple[list[str], Tensor]], run: nn.Module) -> None:
    """Warn of named weights on which f does not depend.

    Refuse them if the model computes with copies of its weights.
    """
    pieces = {
        name: weight.detach().clone().requires_grad_() for name, (_, weight) in weights.items()
    }
    replaced = {
        f"model.{path}": pieces[name] for name, (paths, _) in weights.items() for path in paths
    }
    # of the log-probabilities, since logits alone do not show a shift that softmax takes out
    total = functional_call(run, replaced, (), tie_weights=False).log_softmax(dim=-1).sum()
    slopes = (
        torch.autograd.grad(total, list(pieces.values()), allow_unused=True)
        if total.requires_grad
        else [None] * len(pieces)
    )
    unused = [name for name, slope in zip(pieces, slopes, strict=True) if slope is None]
    if unused and getattr(model, "compatibility_mode", False):
        raise ValueError(
            f"In compatibility mode this model computes with copies of {len(unused)} of the "
            f"weights, {unused[0]} and others, so changing them has no effect; use the model "
            "without compatibility mode."
        )
    if unused:
        names = ", ".join(unused[:4])
        warn(f"f does not depend on {len(unused)} of {len(pieces)} weights: {names}.")


class _Run(nn.Module):
    """A module that runs a task; `functional_call` can replace its weights."""

    def __init__(self, model: Any, task: Task, check: SelfCheck):
        super().__init__()
        self.model, self.task, self.check = model, task, check

    def forward(self) -> Float[Tensor, "scored d_vocab"]:
        return predict(self.model, [self.task], self.check)[0]


def _at(hooks: Sequence[str], positions: Sequence[int] | None) -> str:
    where = "all positions" if positions is None else f"positions {list(positions)}"
    return f"{', '.join(hooks)}, {where}"


def _like(model: Model) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters())
    return weight.device, at_least_single(weight.dtype)
