"""Gradient descent along the Stiefel manifold, on the divergence that a projection costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from mechsvd.checks import require_numbers
from mechsvd.edits.bases import is_several, site_index
from mechsvd.edits.gates import Basis, Gate, directions_of
from mechsvd.edits.hooks import bind
from mechsvd.engine.batches import independent, run_batches
from mechsvd.engine.metrics import divergences, own_positions, predict, predict_clean, scored_by
from mechsvd.engine.progress import progress_bar
from mechsvd.engine.session import Session
from mechsvd.linalg.subspace import at_least_single, complete, widest
from mechsvd.model.places import width_of
from mechsvd.results import require_same_model

STEP = 0.01  # of Adam at the start, in radians per entry of the generator of a rotation


@dataclass(frozen=True)
class Texts:
    """Some texts, their clean log-probabilities, and the loss of any bases on them."""

    session: Session
    clean: tuple[Float[Tensor, "_ d_vocab"], ...]
    by_length: Int[Tensor, " text"]
    size: int

    @classmethod
    def of(cls, session: Session) -> "Texts":
        """The texts of a session, which each run once."""
        tasks = session.tasks
        with torch.no_grad():
            clean = tuple(
                predict_clean(session.model, task, session.check).log_softmax(dim=-1)
                for task in tasks
            )
        longest = max(tasks, key=lambda task: len(task.tokens))
        # a backward pass takes several times as much memory
        size = max(1, session.rows_per_pass(longest) // 4)
        lengths = torch.tensor([len(task.tokens) for task in tasks])
        return cls(session, clean, lengths.argsort(stable=True), size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the bases in a run."""
        return at_least_single(next(self.session.model.parameters()).dtype)

    def slopes(
        self, bases: Float[Tensor, "basis d_model rank"]
    ) -> tuple[Float[Tensor, " text"], Float[Tensor, "basis d_model rank"]]:
        """The divergence of each text, and the gradient of their mean."""

        def run(rows: Int[Tensor, " text"]) -> tuple[Tensor, Tensor]:
            own = bases.detach().to(self.dtype).requires_grad_()
            with torch.enable_grad():
                values = self._values(own, rows.tolist())
                slope = torch.autograd.grad(values.sum(), own, materialize_grads=True)[0]
            return values.detach(), slope

        session, order = self.session, self.by_length
        halve = session.halve(session.tasks[int(order[-1])])
        parts = run_batches(run, order, self.size, halve, False, restored=independent)
        values = torch.cat([part for part, _ in parts])[order.argsort()]
        return values, sum(slope for _, slope in parts) / len(order)  # type: ignore[return-value]

    def _values(
        self, bases: Float[Tensor, "basis d_model rank"], texts: Sequence[int]
    ) -> Float[Tensor, " text"]:
        """The divergence of each of some texts, those of one length and positions together."""
        session = self.session
        gates = [Gate(basis, basis.new_ones(basis.shape[1])) for basis in bases]
        found = []
        alike: dict[Any, list[int]] = {}
        for i in texts:
            task = session.tasks[i]
            alike.setdefault((len(task.tokens), session.positions(task)), []).append(i)
        for (_, positions), same in alike.items():
            tasks = [session.tasks[i] for i in same]
            hooks = [
                (site.hook_name, bind(gates[number % len(gates)], site, positions))
                for number, site in enumerate(session.sites)
            ]
            logits = predict(session.model, tasks, session.check, hooks, [1] * len(tasks))
            first = scored_by(tasks).start
            for i, task, row in zip(same, tasks, logits, strict=True):
                edited = row[own_positions(task, first)].log_softmax(dim=-1)
                found.append(divergences(edited[None], self.clean[i]).mean())
        return torch.stack(found)


def descend(
    texts: Texts, start: Float[Tensor, "basis d_model d_model"], rank: int, steps: int
) -> tuple[list[Tensor], Float[Tensor, " step"], Float[Tensor, " text"]]:
    """Follow the gradient; the best bases, the loss of each step, and each text's at the best."""
    rotation = nn.Module()
    rotation.weight = nn.Parameter(start)
    orthogonal(rotation, "weight", "cayley")
    optimiser = torch.optim.Adam(rotation.parameters(), lr=STEP)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    losses, best = [], (torch.inf, start[..., :rank], torch.empty(0))
    with progress_bar(steps, "steps", texts.session.progress) as bar:
        for step in range(steps + 1):
            bases = rotation.weight[..., :rank]
            values, slope = texts.slopes(bases)
            require_numbers("The divergences of texts", values, "a descent")
            loss = float(values.double().mean())
            losses.append(loss)
            if loss < best[0]:
                best = (loss, bases.detach().clone(), values)
            if step < steps:
                optimiser.zero_grad()
                bases.backward(slope.to(bases))
                optimiser.step()
                schedule.step()
                bar.update()
    # once more to the precision of float64, whatever rounding the steps left
    exact = torch.linalg.qr(best[1]).Q.to(texts.dtype)
    return [*exact], torch.tensor(losses, dtype=torch.float64), best[2].double().cpu()


def start_bases(
    session: Session, start: Any, per: str, rank: int, seed: int
) -> Float[Tensor, "basis d_model d_model"]:
    """Complete orthonormal bases whose first directions are those to start from."""
    count = len(session.sites) if per == "site" else 1
    d_model = width_of(session.model, session.sites)
    device = next(session.model.parameters()).device
    exact = widest(device)
    if isinstance(start, str):
        if start != "random":
            raise ValueError(f"`start` is {start!r:.40}, but must be 'random' or directions.")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(count, d_model, d_model, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q.to(device, exact)
    given = [*start] if is_several(start) else [start]
    if is_several(start) and per == "pool":
        raise ValueError(f"`start` holds {len(given)} bases, but one is learned for all sites.")
    numbers = [0] * count
    if is_several(start):
        index = site_index(given)
        if missing := [site.name for site in session.sites if site.name not in index]:
            raise ValueError(f"`start` has no basis of {missing[0]}; give one per site.")
        numbers = [index[site.name] for site in session.sites]
    full = [_completed(session, one, d_model, rank) for one in given]
    return torch.stack([full[number] for number in numbers]).to(device, exact)


def _completed(
    session: Session, basis: Basis, d_model: int, rank: int
) -> Float[Tensor, "d_model d_model"]:
    directions, source = directions_of(basis)
    require_same_model(source, session.required_source, "The start and the model")
    if len(directions) != d_model:
        raise ValueError(f"`start` has d_model {len(directions)}, but the model's is {d_model}.")
    return complete(torch.linalg.qr(directions[:, :rank].cpu().double()).Q)
