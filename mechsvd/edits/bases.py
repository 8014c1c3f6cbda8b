"""Edits over a basis, or over one basis per site: gates, and what is built from them."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.checks import is_number, is_whole, with_plain_arguments
from mechsvd.edits.baselines import Baseline
from mechsvd.edits.gates import Basis, Gate, directions_of, gate_of
from mechsvd.edits.stacks import SiteGates, SiteRemovals
from mechsvd.linalg.decomposition import Decomposition
from mechsvd.linalg.shrinkage import ridge_gains
from mechsvd.linalg.subspace import Subspace

Bases = Basis | Sequence[Basis]


Rest = float | int | Float[Tensor, "*rest"] | np.ndarray | np.generic


@overload
def gate(
    basis: Basis, gains: Any, rest: Rest = 0.0, *, baseline: Baseline | None = None
) -> Gate: ...
@overload
def gate(
    basis: Sequence[Basis], gains: Any, rest: Rest = 0.0, *, baseline: Baseline | None = None
) -> SiteGates: ...
@plain
def gate(
    basis: Bases, gains: Any, rest: Rest = 0.0, *, baseline: Baseline | None = None
) -> Gate | SiteGates:
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
        >>> ms.gate(torch.eye(2), torch.tensor([1.0, 0.5]))(torch.tensor([[4.0, 4.0]]))
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


@overload
def keep(subspace: Basis, rank: int | None = None, *, baseline: Baseline | None = None) -> Gate: ...
@overload
def keep(
    subspace: Sequence[Basis], rank: int | None = None, *, baseline: Baseline | None = None
) -> SiteGates: ...
@with_plain_arguments
def keep(
    subspace: Bases, rank: int | None = None, *, baseline: Baseline | None = None
) -> Gate | SiteGates:
    """Keep what lies in the subspace and drop the rest: the projection x → VVᵀx.

    Args:
        subspace: a basis, or one per site (`decompose(writes, per="site")`).
        rank: keep the first directions only; of each basis, if there are several. A basis with
            fewer keeps all that it has.
        baseline: what the rest is replaced by, 0 by default; see `gate`.

    Example:
        >>> ms.keep(torch.eye(3), 2)(torch.tensor([[4.0, 5.0, 6.0]]))
        tensor([[4., 5., 0.]])
    """
    if is_several(subspace):
        bases = first_of(subspace, rank)
        return site_gates(bases, [keep(basis, baseline=baseline) for basis in bases])
    basis = first_of(subspace, rank)
    directions, _ = directions_of(basis)
    return gate_of(basis, directions.new_ones(directions.shape[1]), 0.0, baseline)


@overload
def ablate(
    subspace: Basis, rank: int | None = None, *, baseline: Baseline | None = None
) -> Gate: ...
@overload
def ablate(
    subspace: Sequence[Basis], rank: int | None = None, *, baseline: Baseline | None = None
) -> SiteGates: ...
@with_plain_arguments
def ablate(
    subspace: Bases, rank: int | None = None, *, baseline: Baseline | None = None
) -> Gate | SiteGates:
    """Replace what lies in the subspace by the baseline (zero ablation), and keep the rest.

    Args:
        subspace: a basis, or one per site (`decompose(writes, per="site")`).
        rank: ablate the first directions only; of each basis, if there are several.
        baseline: see `gate`; 0 by default, x → x − VVᵀx.

    Example:
        >>> ms.ablate(torch.eye(3), 2)(torch.tensor([[4.0, 5.0, 6.0]]))
        tensor([[0., 0., 6.]])
    """
    if is_several(subspace):
        bases = first_of(subspace, rank)
        return site_gates(bases, [ablate(basis, baseline=baseline) for basis in bases])
    basis = first_of(subspace, rank)
    directions, _ = directions_of(basis)
    return gate_of(basis, directions.new_zeros(directions.shape[1]), 1.0, baseline)


@overload
def shrink(svd: Decomposition, alpha: float, *, baseline: Baseline | None = None) -> Gate: ...
@overload
def shrink(
    svd: Sequence[Decomposition], alpha: float, *, baseline: Baseline | None = None
) -> SiteGates: ...
@plain
def shrink(
    svd: Decomposition | Sequence[Decomposition],
    alpha: float,
    *,
    baseline: Baseline | None = None,
) -> Gate | SiteGates:
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

    Example:
        >>> plane = ms.decompose(torch.diag(torch.tensor([2.0, 1.0]))[None])
        >>> ms.shrink(plane, alpha=1.0)(torch.tensor([[5.0, 5.0]])).round(decimals=4)
        tensor([[4.0000, 2.5000]])
    """
    if not is_number(alpha, 0):
        raise ValueError(f"`alpha` is {alpha!r:.40}, but must be finite and at least 0.")
    alpha = float(alpha)
    if is_several(svd):
        return site_gates(svd, [shrink(one, alpha, baseline=baseline) for one in svd])  # type: ignore[union-attr,arg-type]
    return gate_of(svd, ridge_gains(svd.singular_values, torch.tensor(alpha)), 0.0, baseline)  # type: ignore[union-attr,arg-type]


def removals(
    svd: Decomposition | Sequence[Decomposition],
    baseline: Baseline | None = None,
    after: Sequence[int] = (),
) -> Gate | SiteRemovals:
    """The stack that removes each direction alone; of several bases, each at its own sites.

    Args:
        after: directions that every edit removes as well.
    """
    if is_several(svd):
        unchanged = [
            Gate(one.directions, one.directions.new_ones(one.rank), 1.0, one.source, baseline)
            for one in svd  # type: ignore[union-attr]
        ]
        return SiteRemovals(site_gates(svd, unchanged))  # type: ignore[arg-type]
    gains = 1 - torch.eye(svd.rank)  # type: ignore[union-attr]
    gains[:, list(after)] = 0
    directions: Tensor = svd.directions  # type: ignore[union-attr]
    return Gate(directions, gains.to(directions), 1.0, svd.source, baseline)  # type: ignore[union-attr]


def names_of(svd: Decomposition | Sequence[Decomposition]) -> tuple[tuple[str, ...], Any]:
    """The names of several bases and their ranks; both empty for a single one."""
    if not is_several(svd):
        return (), ()
    bases: Sequence[Decomposition] = svd  # type: ignore[assignment]
    names = [f"layer {one.layer}" + (f" {one.component}" if one.component else "") for one in bases]
    return tuple(names), tuple(one.rank for one in bases)


def names_of_directions(names: Sequence[str], sizes: Sequence[int], count: int) -> tuple[str, ...]:
    """The name of each direction: its number, after that of its basis if there are several."""
    if not names:
        return tuple(str(j) for j in range(count))
    pairs = zip(names, sizes, strict=True)
    return tuple(f"{name}: {j}" for name, size in pairs for j in range(size))


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
