"""Reading: how strongly the predictions depend on each write, as gradients of random outputs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import require_whole
from mechsvd.edits.hooks import bind
from mechsvd.engine.batches import independent, run_batches
from mechsvd.engine.metrics import predict, predict_clean
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.finite import overflow_advice
from mechsvd.model.places import width_of
from mechsvd.model.sites import Hook, Model, Site
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

DRAWS = 16  # random outputs per text


@result
class Reads(Result):
    """Gradients of random outputs with respect to the writes: what later layers read of them.

    The sum of their outer products at a site, divided by `draws`, is the Fisher information of the
    predictions about the writes there, in the mean over draws. Half of its product with a small
    change of one write is the KL divergence that the change costs, in nats over the whole text.

    Attributes:
        values: in nats per unit of the residual stream.
        sites: the first axis.
        task_index, positions, draw: the second axis: number of the text, absolute position of the
            write, and number of the random output.
        draws: random outputs per text.
        seed: of the random outputs.

    Example:
        >>> reads.to_pandas().columns.tolist()
        ['layer', 'component', 'rms_norm']
    """

    values: Float[Tensor, "site read d_model"]
    sites: tuple[Site, ...]
    task_index: Int[Tensor, " read"]
    positions: Int[Tensor, " read"]
    draw: Int[Tensor, " read"]
    draws: int
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.values.shape[0], "site of `values`")

    def _require_values(self) -> None:
        require_finite(self, "values")
        require_between(self, ["task_index", "positions", "draw"], 0)
        require_between(self, ["draws"], 1)

    def at(self, kept: Bool[Tensor, " read"]) -> "Reads":
        """Some of the gradients; texts keep their numbers."""
        names = ("task_index", "positions", "draw")
        rest = {name: getattr(self, name)[kept] for name in names}
        return replace(self, values=self.values[:, kept], **rest)

    def to_pandas(self) -> Any:
        """One row per site: layer, component, and the root mean square norm of its gradients."""
        import pandas as pd

        sizes = self.values.double().square().sum(dim=-1).mean(dim=-1).sqrt()
        return pd.DataFrame(
            {
                "layer": [site.layer for site in self.sites],
                "component": [site.component for site in self.sites],
                "rms_norm": sizes.cpu().numpy(),
            }
        )

    def __repr__(self) -> str:
        return (
            f"Reads at {len(self.sites)} sites: gradients of {self.draws} random outputs for each of "
            f"{int(self.task_index.max()) + 1} task(s)\n"
            f"  {self.values.shape[1]} of {self.values.shape[2]} entries per site\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def collect_reads(
    model: Model,
    tasks: Task | Sequence[Task],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Reads:
    """Collect gradients that say along which directions the predictions depend on each write.

    Each draw takes, at every scored position, a token from the model's own predictions and a random
    sign. The output is the signed sum of the log-probabilities of these tokens. Its gradient has
    the Fisher information of all predictions as its second moment, since the signs remove the
    products between positions in the mean. One backward pass gives the gradients of all writes.

    Args:
        draws: random outputs per text.
        seed: of the tokens and signs.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Returns:
        The gradients, text by text, then draw by draw, then position by position.

    Raises:
        TypeError, KeyError, ValueError: as `collect_writes`.

    Reference: Otto, Padovan and Rowley, Model reduction for nonlinear systems by balanced
        truncation of state and gradient covariance, 2023, arXiv:2207.14387, who take gradients of
        random outputs of a trajectory.

    Example:
        >>> reads = ms.collect_reads(model, task, draws=2, layers=[0])
        >>> reads.values.shape
        torch.Size([2, 42, 128])
    """
    chosen = as_tasks(tasks)
    draws, seed = require_whole("draws", draws, 1), require_whole("seed", seed)
    with open_session(model, chosen, gradients=True, **options) as session:
        session_sites = session.sites
        parts = [_reads_of(session, task, draws, seed + i) for i, task in enumerate(chosen)]
        source = session.provenance(session_sites)
    shapes = [part.shape[1:3] for part in parts]  # draw pos
    places = [session.positions(task) or range(len(task.tokens)) for task in chosen]
    index = [torch.full((d * p,), i) for i, (d, p) in enumerate(shapes)]
    return Reads(
        torch.cat([part.flatten(1, 2) for part in parts], dim=1).cpu(),
        session_sites,
        torch.cat(index),
        torch.cat([torch.tensor([*own]).repeat(draws) for own in places]),
        torch.cat([torch.arange(d).repeat_interleave(p) for d, p in shapes]),
        draws,
        seed,
        source,
    )


def _reads_of(
    session: Session, task: Task, draws: int, seed: int
) -> Float[Tensor, "site draw pos d_model"]:
    """The gradients of one text at the edited positions."""
    model, check = session.model, session.check
    with torch.no_grad():
        clean = predict_clean(model, task, check).log_softmax(dim=-1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(clean.exp().cpu(), draws, replacement=True, generator=generator).T
    signs = 2.0 * torch.randint(0, 2, drawn.shape, generator=generator) - 1
    dtype = at_least_single(next(model.parameters()).dtype)
    width = width_of(model, session.sites)

    def slopes(rows: Int[Tensor, " draw"]) -> Float[Tensor, "draw site pos d_model"]:
        size = (len(rows), len(task.tokens), width)
        shifts = [
            torch.zeros(size, device=clean.device, dtype=dtype, requires_grad=True)
            for _ in session.sites
        ]
        hooks = [_added(site, shift) for site, shift in zip(session.sites, shifts, strict=True)]
        logits = predict(model, [task], check, hooks, [len(rows)])
        tokens, own = drawn[rows].to(logits.device), signs[rows].to(logits)
        outputs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        found = torch.autograd.grad((own * outputs).sum(), shifts, materialize_grads=True)
        return torch.stack(found, dim=1)

    size = max(1, session.rows_per_pass(task) // 4)  # a backward pass takes several times as much
    order = torch.arange(draws)
    halve = session.halve(task)
    with torch.enable_grad():
        parts = run_batches(slopes, order, size, halve, False, restored=independent)
    every = torch.cat(parts).transpose(0, 1)
    if not every.isfinite().all():
        raise ValueError(
            "The gradients of the predictions hold NaN or inf, though the logits do not."
            f"{overflow_advice(next(model.parameters()).dtype)}"
        )
    positions = session.positions(task)
    return every if positions is None else every[:, :, list(positions)]


def _added(site: Site, shift: Float[Tensor, "row pos d_model"]) -> Hook:
    edit = lambda x, hook=None: x + shift.to(x)  # noqa: E731 (compiled once, unlike a def)
    return site.hook_name, bind(edit, site, rows=len(shift))
