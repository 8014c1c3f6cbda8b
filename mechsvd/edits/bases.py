"""Edits over a basis, or over one basis per site: gates, and what is built from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.checks import is_whole
from mechsvd.edits.baselines import Baseline
from mechsvd.edits.gates import Basis, Gate, directions_of, gate_of, ridge_gains
from mechsvd.linalg.decomposition import Decomposition
from mechsvd.linalg.subspace import Subspace
from mechsvd.results import Provenance

Bases = Basis | Sequence[Basis]


@dataclass(frozen=True, eq=False)
class SiteGates:
    """Gates over a basis per site (or per layer), or a stack of them side by side.

    Attributes:
        gates: one per basis.
        index: the number of each site's gate, by the site's name.
    """

    gates: tuple[Gate, ...]
    index: dict[str, int]

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


def gate(
    basis: Bases,
    gains: Any,
    rest: float | int | Float[Tensor, "*rest"] = 0.0,
    *,
    baseline: Baseline | None = None,
) -> Any:
    """Give each direction its gain, and everything outside the basis the gain `rest`.

    `rest` is 0 by default, so `gate(basis, ones)` keeps the subspace. With `rest=1`, gains of 1
    change nothing.

    Args:
        basis: orthonormal directions as columns, a subspace, or the directions of a decomposition;
            or a list of them, one per site or layer, as `decompose(writes, per="site")` gives.
        gains: one per direction; with a leading axis, a stack of edits. For several bases, a list
            of gains for each.
        rest: gain of what the basis does not span; a tensor gives one per edit.
        baseline: the point m about which the gate acts, so that gain 0 gives m; 0 by default (zero
            ablation). See `mean_baseline`, `resample_baseline`, `donor_baseline`.

    Returns:
        A `Gate`; for several bases, `SiteGates`.

    Raises:
        TypeError: not a basis, or not a baseline.
        ValueError: a basis that is not orthonormal, gains of another length, NaN or inf; several
            bases that do not say to which sites they belong.

    Example:
        >>> gate(torch.eye(2), torch.tensor([1.0, 0.5]))(torch.tensor([[4.0, 4.0]]))
        tensor([[4., 2.]])
    """
    if not is_several(basis):
        return gate_of(basis, gains, rest, baseline)  # type: ignore[arg-type]
    bases: Sequence[Basis] = basis  # type: ignore[assignment]
    if not isinstance(gains, Sequence) or len(gains) != len(bases):
        count = len(gains) if hasattr(gains, "__len__") else "no"
        raise ValueError(
            f"There are {len(bases)} bases, but {count} gains; give a list of gains for each basis."
        )
    return site_gates(
        bases, [gate_of(b, g, rest, baseline) for b, g in zip(bases, gains, strict=True)]
    )


def keep(subspace: Bases, rank: int | None = None, *, baseline: Baseline | None = None) -> Any:
    """Keep what lies in the subspace and drop the rest: the projection x → VVᵀx.

    Args:
        subspace: a basis, or one per site (`decompose(writes, per="site")`).
        rank: keep the first directions only; of each basis, if there are several. A basis with
            fewer keeps all that it has.
        baseline: what the rest is replaced by, 0 by default; see `gate`.
    """
    if is_several(subspace):
        bases = first_of(subspace, rank)
        return site_gates(bases, [keep(basis, baseline=baseline) for basis in bases])
    basis = first_of(subspace, rank)
    directions, _ = directions_of(basis)
    return gate_of(basis, directions.new_ones(directions.shape[1]), 0.0, baseline)


def ablate(subspace: Bases, rank: int | None = None, *, baseline: Baseline | None = None) -> Any:
    """Replace what lies in the subspace by the baseline (zero ablation), and keep the rest.

    Args:
        subspace: a basis, or one per site (`decompose(writes, per="site")`).
        rank: ablate the first directions only; of each basis, if there are several.
        baseline: see `gate`; 0 by default, x → x − VVᵀx.
    """
    if is_several(subspace):
        bases = first_of(subspace, rank)
        return site_gates(bases, [ablate(basis, baseline=baseline) for basis in bases])
    basis = first_of(subspace, rank)
    directions, _ = directions_of(basis)
    return gate_of(basis, directions.new_zeros(directions.shape[1]), 1.0, baseline)


def shrink(
    svd: Decomposition | Sequence[Decomposition],
    alpha: float,
    *,
    baseline: Baseline | None = None,
) -> Any:
    """Shrink each direction by s²/(s² + alpha), as ridge regression does, instead of clipping.

    Args:
        svd: the directions and their singular values; or one per site.
        alpha: strength in squared units of the residual stream. 0 keeps every direction of the
            decomposition unchanged, and drops what it did not see.
        baseline: the point that it shrinks towards, 0 by default; see `gate`.

    Raises:
        ValueError: `alpha` is negative or not finite.

    Reference: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 2nd ed.,
        eq. 3.47.
    """
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"`alpha` is {alpha}, but must be finite and at least 0.")
    if is_several(svd):
        return site_gates(svd, [shrink(one, alpha, baseline=baseline) for one in svd])  # type: ignore[union-attr,arg-type]
    return gate_of(svd, ridge_gains(svd.singular_values, torch.tensor(alpha)), 0.0, baseline)  # type: ignore[union-attr,arg-type]


def is_several(basis: Any) -> bool:
    """Whether this is a list of bases, rather than one."""
    return isinstance(basis, list | tuple)


def site_gates(bases: Sequence[Basis], gates: Sequence[Gate]) -> SiteGates:
    """Gates over several bases, each at the sites that its basis belongs to.

    Raises:
        ValueError: no bases; one does not say to which sites it belongs; two are of one site; or
            they lie in different dimensions.
    """
    return SiteGates(tuple(gates), site_index(bases))


def site_index(bases: Sequence[Any]) -> dict[str, int]:
    """The number of each site's basis, by the site's name; see `site_gates`."""
    if not bases:
        raise ValueError("There are no bases: the list is empty; give one per site or layer.")
    index: dict[str, int] = {}
    widths = set()
    for number, basis in enumerate(bases):
        directions, source = directions_of(basis)
        widths.add(len(directions))
        if source is None or not source.hooks:
            raise ValueError(
                f"Basis {number} does not say to which sites it belongs; several bases come from "
                "`decompose(writes, per='site')` or `per='layer'`."
            )
        for name in source.hooks:
            if name in index:
                raise ValueError(
                    f"Bases {index[name]} and {number} are both of {name}; give one per site."
                )
            index[name] = number
    if len(widths) > 1:
        raise ValueError(f"The bases lie in different dimensions: {sorted(widths)}.")
    return index


def first_of(basis: Bases, rank: int | None) -> Any:
    """The first directions of a basis, or of each of several; all of them if `rank` is None.

    Raises:
        ValueError: `rank` is below 0, or above the number of directions (of the largest basis).
    """
    if rank is None:
        return basis
    bases: Any = basis if is_several(basis) else [basis]
    parts = [directions_of(one) for one in bases]
    most = max((directions.shape[1] for directions, _ in parts), default=0)
    if not is_whole(rank, 0, most):
        raise ValueError(
            f"`rank` is {rank!r:.40}, but there are {most} directions; choose 0 to {most}."
        )
    firsts = [Subspace(directions[:, : int(rank)], source) for directions, source in parts]
    return firsts if is_several(basis) else firsts[0]


def source_of(basis: Any) -> Provenance | None:
    """The model that a basis comes from; of several bases, that of the first."""
    return directions_of(basis[0] if is_several(basis) else basis)[1]
