"""Gates over a basis per site or layer, and the stacks of gates that the engine runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.edits.gates import Gate, takes_tuples


@dataclass(frozen=True, eq=False)
class SiteGates:
    """Gates over a basis per site (or per layer), or a stack of them side by side.

    Attributes:
        gates: one per basis.
        index: the number of each site's gate, by the site's name.
    """

    gates: tuple[Gate, ...]
    index: dict[str, int]

    @takes_tuples
    def __call__(
        self, x: Float[Tensor, "... d_model"], hook: Any = None
    ) -> Float[Tensor, "... d_model"]:
        """Edit the writes `x` of one site by its gate.

        Raises:
            KeyError: no basis is of this site.
        """
        name = getattr(hook, "name", None)
        if name not in self.index:
            raise KeyError(
                f"No basis is of the site {name or 'that was not named'}; bind the edit by "
                f"`mechsvd.fwd_hooks` at the sites of the bases, such as {next(iter(self.index))}."
            )
        return self.gates[self.index[name]](x, hook=hook)

    def __getitem__(self, rows: Any) -> "SiteGates":
        """Some edits of a stack, in the order of `rows`."""
        return self._each(lambda gate: gate[rows])

    def __len__(self) -> int:
        """Number of edits in the stack."""
        return len(self.gates[0])

    def __repr__(self) -> str:
        kind = f"stack of {len(self)} edits" if self.is_stack else "edit"
        ranks = sorted({gate.basis.shape[1] for gate in self.gates})
        return (
            f"A {kind} over {len(self.gates)} bases, of {ranks[0]} to {ranks[-1]} directions\n"
            f"  at {len(self.index)} sites, in {self.gates[0].d_model} dimensions"
        )

    @property
    def is_stack(self) -> bool:
        """Whether the gates are stacks."""
        return self.gates[0].is_stack

    @property
    def changes_nothing(self) -> Bool[Tensor, " edit"]:
        """Which edits are the identity at every site."""
        return torch.stack([gate.changes_nothing for gate in self.gates]).all(dim=0)

    def order_by_cost(self) -> Int[Tensor, " edit"]:
        """An order that puts edits of similar cost next to each other."""
        return sum(gate.costs.amin(dim=0) for gate in self.gates).argsort(stable=True)  # type: ignore[union-attr]

    def to(self, device: torch.device) -> "SiteGates":
        """The gates on another device."""
        return self._each(lambda gate: gate.to(device))

    def _each(self, change: Callable[[Gate], Gate]) -> "SiteGates":
        return SiteGates(tuple(change(gate) for gate in self.gates), self.index)


@dataclass(frozen=True, eq=False)
class SiteRemovals:
    """The stack that removes each direction of each basis alone, at its own sites.

    Rows are in the order of the bases, and of the directions in each. Gains are made for the rows
    that share a pass, since those of all rows would take much memory.
    """

    edits: SiteGates  # that change nothing

    def __len__(self) -> int:
        """Number of directions of all bases."""
        return sum(gate.basis.shape[1] for gate in self.edits.gates)

    def __getitem__(self, rows: Int[Tensor, " row"]) -> SiteGates:
        """Some edits of the stack, in the order of `rows`."""
        gates, first = [], 0
        for gate in self.edits.gates:
            places = torch.arange(first, first + gate.basis.shape[1])
            removed = rows.cpu()[:, None] == places
            gates.append(replace(gate, gains=1 - removed.to(gate.basis)))
            first += len(places)
        return SiteGates(tuple(gates), self.edits.index)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates of the bases."""
        return self.edits.gates

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack: always."""
        return True

    @property
    def changes_nothing(self) -> Bool[Tensor, " edit"]:
        """Which edits are the identity: none."""
        return torch.zeros(len(self), dtype=torch.bool)

    def order_by_cost(self) -> Int[Tensor, " edit"]:
        """The order given: all cost the same."""
        return torch.arange(len(self))

    def to(self, device: torch.device) -> "SiteRemovals":
        """The gates on another device."""
        return SiteRemovals(self.edits.to(device))


GateStack = Gate | SiteGates | SiteRemovals
