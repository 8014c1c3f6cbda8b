"""One pass over the texts that tells what sites, heads and neurons write of some directions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.engine.session import Session
from mechsvd.engine.writes import run_by_length
from mechsvd.linalg.subspace import widest
from mechsvd.model.sites import Site, stream_names
from mechsvd.model.splits import Split, splits_of
from mechsvd.model.tasks import Task

PLACES = 4  # of each direction: the writes that are split at single positions
LARGEST = 5  # parts of such a write that are listed
NEURONS = 12  # of each direction, whose shares are listed


class Part(NamedTuple):
    """A part of a write: its kind, its number, and its coefficient or share."""

    kind: str
    number: int
    value: float


class PlaceOf(NamedTuple):
    """A write with a large coefficient, and its parts."""

    size: float
    direction: int
    site: int
    text: int
    position: int
    parts: list[Part]


class WriterPass:
    """Runs the texts once and sums up what is written of some directions while the model runs.

    Attributes:
        coefficients: of each text, "site pos direction", at the positions of the session.
        streams: of each text, the final residual stream at the scored positions.
        splits: by the site's name.
        energies: Σ coefficient² of each site, "site direction".
        shares: by the site's number: Σ part × coefficient, "part direction".
        constants: the same for the constants of each site, "site direction".
        places: of each direction the writes with the largest coefficients.
        triggers: by the site's number: the largest input of each neuron with its sign, and the
            token that came next, where one did; see `Trigger`.
    """

    def __init__(self, session: Session, basis: Float[Tensor, "d_model direction"]):
        """Run the session's texts.

        Args:
            basis: the directions, orthonormal or not.

        Raises:
            ValueError: a write holds NaN or inf.
        """
        self.sites, self.tasks, self._basis = session.sites, session.tasks, basis
        self.splits = splits_of(session.model, self.sites)
        self.kept = [
            torch.tensor([*(session.positions(task) or range(len(task.tokens)))])
            for task in self.tasks
        ]
        sites, directions = len(self.sites), basis.shape[1]
        self.coefficients = [
            torch.zeros(sites, len(kept), directions, dtype=torch.float64) for kept in self.kept
        ]
        self.streams: list[Tensor] = [torch.empty(0)] * len(self.tasks)
        self.energies = torch.zeros(sites, directions, dtype=torch.float64)
        self.constants = torch.zeros(sites, directions, dtype=torch.float64)
        self.shares: dict[int, Tensor] = {}
        self.places: list[list[PlaceOf]] = [[] for _ in range(directions)]
        self.triggers: dict[int, Trigger] = {}
        self._along: dict[int, Tensor] = {}
        self._inputs: dict[tuple[str, int], Tensor] = {}  # until the write that they make is there
        self._run(session)

    def _run(self, session: Session) -> None:
        points = [split.point for split in self.splits.values()]
        last = len(stream_names(session.model)) - 1
        name = stream_names(session.model)[-1][1]
        stream = Site(last, name.removeprefix(f"blocks.{last}."), name)
        every = [*self.sites, *points, stream]

        def take(index: int, texts: Sequence[int], values: Tensor) -> None:
            for text, value in zip(texts, values, strict=True):
                if index < len(self.sites):
                    self._take_write(index, text, value)
                elif every[index] is stream:
                    self.streams[text] = value[self.tasks[text].scored].clone()
                else:  # its module may change it in place
                    self._inputs[every[index].name, text] = value.flatten(1).clone()

        tasks = self.tasks
        run_by_length(
            session,
            [task.tokens for task in tasks],
            take,
            lambda texts: (session.rows_per_pass(tasks[texts[0]]), session.halve(tasks[texts[0]])),
            session.progress or False,
            every,
        )

    def _take_write(self, index: int, text: int, write: Float[Tensor, "pos d_model"]) -> None:
        wide = widest(write.device)
        kept = self.kept[text].to(write.device)
        written = write[kept].to(wide) @ self._basis.to(write.device, wide)
        if not written.isfinite().all():
            position = int(kept[(~written.isfinite()).any(dim=1).nonzero()[0]])
            raise ValueError(
                f"The writes hold NaN or inf, first at {self.sites[index].place}, position "
                f"{position} of prompt {text} ({write.dtype}), so they have no coefficients."
            )
        self.coefficients[text][index] = written.cpu()
        self.energies[index] += written.square().sum(dim=0).cpu()
        split = self.splits.get(self.sites[index].name)
        inputs = None
        if split is not None:
            inputs = self._inputs.pop((split.point.name, text)).to(write.device, wide)
            if index not in self._along:
                basis = self._basis.to(write.device, wide)
                self._along[index] = split.vectors.to(write.device, wide) @ basis
            products = (inputs[kept].mT @ written) * self._along[index]
            shares = split.by_part(products).cpu()
            self.shares[index] = self.shares.get(index, 0.0) + shares
            self.constants[index] += (self._constant(split).to(written) * written.sum(dim=0)).cpu()
            if split.kind == "neuron":
                trigger = self.triggers.setdefault(index, Trigger.none(split.n_parts))
                self.triggers[index] = trigger.with_text(inputs, kept, self.tasks[text])
        self._take_places(index, text, written, inputs)

    def _constant(self, split: Split) -> Float[Tensor, " direction"]:
        wide = widest(split.constant.device)
        return split.constant.to(wide) @ self._basis.to(split.constant.device, wide)

    def _take_places(
        self, index: int, text: int, written: Float[Tensor, "pos direction"], inputs: Tensor | None
    ) -> None:
        """Keep the largest coefficients of each direction so far, with their parts."""
        sizes, where = written.abs().topk(min(PLACES, len(written)), dim=0)
        for direction, best in enumerate(self.places):
            for size, position in zip(
                sizes[:, direction].tolist(), where[:, direction].tolist(), strict=True
            ):
                if len(best) == PLACES and size <= best[-1].size:
                    break
                coefficient = float(written[position, direction])
                row = None if inputs is None else inputs[int(self.kept[text][position])]
                parts = self._parts(index, direction, coefficient, row)
                best.append(PlaceOf(size, direction, index, text, position, parts))
                best.sort(key=lambda place: -place.size)
                del best[PLACES:]

    def _parts(
        self,
        index: int,
        direction: int,
        coefficient: float,
        inputs: Float[Tensor, " column"] | None,
    ) -> list[Part]:
        """The largest parts of one write and the others together; they add up to it."""
        if inputs is None:
            return [Part("not split", -1, coefficient)]
        split = self.splits[self.sites[index].name]
        values = split.by_part(inputs * self._along[index][:, direction])
        top = values.abs().topk(min(LARGEST, len(values))).indices
        constant = float(self._constant(split)[direction])
        parts = [Part(split.kind, i, float(values[i])) for i in top.tolist()]
        others = float(values.sum() - values[top].sum())
        rest = coefficient - sum(part.value for part in parts) - others - constant
        return [
            *parts,
            Part(f"other {split.kind}s", -1, others),
            Part("constant", -1, constant),
            Part("remainder", -1, rest),
        ]

    def listed_shares(self, direction: int) -> list[tuple[int, Part]]:
        """The shares of a direction's parts, with the number of their site; they add up to 1."""
        total = float(self.energies[:, direction].sum()) or 1.0
        neurons = [
            (float(value), index, number)
            for index, shares in self.shares.items()
            if self._kind(index) == "neuron"
            for value, number in _largest(shares[:, direction], NEURONS)
        ]
        chosen = sorted(neurons, key=lambda neuron: -abs(neuron[0]))[:NEURONS]
        listed: list[tuple[int, Part]] = []
        for index in range(len(self.sites)):
            energy = float(self.energies[index, direction])
            if index not in self.shares:
                listed.append((index, Part("not split", -1, energy / total)))
                continue
            own, kind = self.shares[index][:, direction], self._kind(index)
            numbers = [n for _, i, n in chosen if i == index]
            numbers = [*range(len(own))] if kind == "head" else numbers
            parts = [Part(kind, n, float(own[n])) for n in numbers]
            others = float(own.sum()) - sum(part.value for part in parts)
            constant = float(self.constants[index, direction])
            parts += [Part("other neurons", -1, others)] if kind == "neuron" else []
            parts += [Part("constant", -1, constant)]
            rest = energy - sum(part.value for part in parts)
            parts += [Part("remainder", -1, rest)]
            listed += [(index, part._replace(value=part.value / total)) for part in parts]
        return listed

    def _kind(self, index: int) -> str:
        return self.splits[self.sites[index].name].kind


class Trigger(NamedTuple):
    """Where each neuron of a layer was largest in size, before a token that is known.

    Attributes:
        inputs: of its output weight, with sign; 0 if there was none.
        next_tokens: what came next.
    """

    inputs: Float[Tensor, " neuron"]
    next_tokens: Int[Tensor, " neuron"]

    @classmethod
    def none(cls, neurons: int) -> "Trigger":
        """Before any text."""
        return cls(torch.zeros(neurons, dtype=torch.float64), torch.full((neurons,), -1))

    def with_text(
        self, inputs: Float[Tensor, "pos neuron"], kept: Int[Tensor, " kept"], task: Task
    ) -> "Trigger":
        """The same after one more text."""
        tokens = task.tokens.cpu()
        places = kept[kept < len(tokens) - 1]
        if not len(places):
            return self
        own = inputs[places]
        where = own.abs().argmax(dim=0)
        largest = own.gather(0, where[None])[0].cpu().double()
        is_new = largest.abs() > self.inputs.abs()
        following = tokens[places.cpu() + 1][where.cpu()]
        return Trigger(
            torch.where(is_new, largest, self.inputs),
            torch.where(is_new, following, self.next_tokens),
        )


def _largest(values: Float[Tensor, " part"], count: int) -> list[tuple[float, int]]:
    sizes = values.abs().topk(min(count, len(values))).indices.tolist()
    return [(float(values[i]), i) for i in sizes]
