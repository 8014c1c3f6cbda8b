"""The gate: a gain per direction of a basis, and one gain for the rest. Most edits are gates."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.checks import real_tensor, single
from mechsvd.edits.baselines import Baseline, Shifted, require_baseline
from mechsvd.linalg.decomposition import Decomposition
from mechsvd.linalg.subspace import Subspace, at_least_single, complete, require_orthonormal
from mechsvd.results import Provenance

Basis = Subspace | Decomposition | Float[Tensor, "d_model rank"] | np.ndarray
Call = TypeVar("Call", bound=Callable[..., Any])


def takes_tuples(call: Call) -> Call:
    """Let an edit take the tuple that a hook of torch gets: it edits the first element.

    Attention of transformers returns its write first. The others stay as they are.
    """
    place = [*inspect.signature(call).parameters].index("x")

    @functools.wraps(call)
    def edited(*args: Any, **options: Any) -> Any:
        x = args[place] if len(args) > place else options.get("x")
        of = x[0] if isinstance(x, tuple) and x else x
        if isinstance(of, Tensor) and not (of.is_floating_point() and of.layout == torch.strided):
            raise TypeError(
                f"An edit takes a dense tensor of floats, but this one is {of.dtype}, {of.layout}; "
                "writes are floats, so it is something else."
            )
        if isinstance(x, Tensor):
            return call(*args, **options)
        if not isinstance(x, tuple) or not x or not isinstance(x[0], Tensor):
            raise TypeError(
                f"An edit takes a tensor, or a tuple that begins with one, but this is "
                f"{type(x).__name__} {x!r:.40}; pass it the tensor of the writes."
            )
        first, *rest = x
        own = {**options, "x": first} if "x" in options else options
        return (
            call(*args[:place], *([first] if own is options else []), *args[place + 1 :], **own),
            *rest,
        )

    return edited  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Gate:
    """The affine edit x → m + V diag(g) Vᵀ(x − m) + rest·(I − VVᵀ)(x − m), or a stack of them.

    m is the baseline: 0 by default, or a point for each site and position.

    With a leading axis in `gains` it is a stack: edit i acts on row i of "edit pos d_model".
    A single row, "1 pos d_model", is shared by all edits. `gate[rows]` selects edits, and
    `len(gate)` counts them. Build one with `gate`, which checks its input.

    It is computed as r·x + (1 − r)·m + V_S diag(g_S − r) (V_Sᵀx − V_Sᵀm). S holds the directions whose gain differs
    from r, so removing one direction costs a dot product. r is `rest`; when the basis spans
    everything, it is whichever of `rest` and 1 gives the smaller S. With gradients, r is `rest`
    and S holds all directions, because a gain equal to r has a slope too. `rest` may be a tensor,
    one number per edit, so that it can have a gradient.
    """

    basis: Float[Tensor, "d_model rank"]
    gains: Float[Tensor, "*edit rank"]
    rest: float | Float[Tensor, "*edit"] = 0.0
    source: Provenance | None = None
    baseline: Baseline | Shifted | None = None

    @takes_tuples
    def __call__(
        self, x: Float[Tensor, "... d_model"], hook: Any = None
    ) -> Float[Tensor, "... d_model"]:
        """Edit the writes `x`: a new tensor in the dtype of `x`, computed in float32 or wider."""
        if x.shape[-1] != len(self.basis):
            raise ValueError(
                f"The basis has {len(self.basis)} dimensions, but this tensor {list(x.shape)}; "
                "give the edit the writes, [..., d_model], or take a basis of this hook point."
            )
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, hook)
        plan, wide = self._plan, x.to(at_least_single(x.dtype))
        columns, delta = plan.columns.to(wide), plan.delta.to(wide)
        product = _coordinates(wide, columns)
        point = None if self.baseline is None else self.baseline.at(hook, wide)
        if point is not None:
            product = product - _coordinates(point, columns)
        coordinates = product.mul(delta)
        if plan.is_constant(1):
            return _add_product(wide, coordinates, columns).to(x.dtype)
        if plan.is_constant(0):
            if point is None:
                return (coordinates @ columns.mT).to(x.dtype)
            return _add_product(point, coordinates, columns).to(x.dtype)
        rest = plan.constant.to(wide) if isinstance(plan.constant, Tensor) else plan.constant
        base = wide * rest
        if point is not None:
            base = base + (1 - rest) * point
        return _add_product(base, coordinates, columns).to(x.dtype)

    def __repr__(self) -> str:
        stack = f"stack of {len(self)} gates" if self.is_stack else "gate"
        rank, d_model = self.basis.shape[1], self.d_model
        rest = (
            f"times {self.rest:g}"
            if isinstance(self.rest, float | int)
            else "times one gain per edit"
        )
        origin = self.source.model if self.source else "bare tensors"
        about = "" if self.baseline is None else f", about the {self.baseline.kind}"
        return (
            f"A {stack} over {rank} directions in {d_model} dimensions\n"
            f"  the rest {rest}{about}\n  from {origin}"
        )

    def __getitem__(self, rows: Any) -> "Gate":
        """Some edits of a stack, in the order of `rows`."""
        rest = self.rest[rows] if isinstance(self.rest, Tensor) else self.rest
        baseline = self.baseline
        if baseline is not None and self.is_stack:
            baseline = baseline.rows(rows)
        return Gate(self.basis, self.gains[rows], rest, self.source, baseline)

    def to(self, device: torch.device) -> "Gate":
        """The gate on another device."""
        rest = self.rest.to(device) if isinstance(self.rest, Tensor) else self.rest
        baseline = self.baseline and self.baseline.to(device)
        return Gate(self.basis.to(device), self.gains.to(device), rest, self.source, baseline)

    def __len__(self) -> int:
        """Number of edits in the stack."""
        return len(self.gains) if self.is_stack else 1

    @property
    def is_stack(self) -> bool:
        """Whether `gains` has a leading axis of edits."""
        return self.gains.ndim == 2

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return self.basis.shape[0]

    @property
    def costs(self) -> Int[Tensor, "constant edit"]:
        """Number of directions in each edit's product, per way of computing it."""
        gains = self.gains if self.is_stack else self.gains[None]
        return torch.stack(
            [(gains != _for_directions(constant)).sum(dim=-1) for constant in self._constants]
        )

    @property
    def changes_nothing(self) -> Bool[Tensor, " edit"]:
        """Which edits are the identity.

        Every gain is 1, and the basis spans everything or the gain outside it is 1.
        """
        gains = self.gains if self.is_stack else self.gains[None]
        keeps_rest = torch.stack(
            [torch.as_tensor(constant, device=gains.device) == 1 for constant in self._constants]
        )
        return (gains == 1).all(dim=-1) & keeps_rest.any(dim=0)

    def order_by_cost(self) -> Int[Tensor, " edit"]:
        """An order that puts edits of similar cost, computed the same way, next to each other."""
        cost, way = self.costs.min(dim=0)
        return (way * (self.basis.shape[1] + 1) + cost).argsort(stable=True)

    @property
    def _plan(self) -> "_Plan":
        if any(
            isinstance(part, Tensor) and part.requires_grad
            for part in (self.gains, self.basis, self.rest)
        ):
            delta = self.gains - _for_directions(self.rest)
            return _Plan(
                _for_writes(self.rest), self.basis, delta[:, None] if self.is_stack else delta
            )
        return self._kept_plan

    @cached_property
    def _kept_plan(self) -> "_Plan":
        # may be made while a model generates, but must support gradients later
        with torch.inference_mode(False):
            plans = (_plan_with(self.basis, self.gains, constant) for constant in self._constants)
            return min(plans, key=lambda plan: plan.columns.shape[-1])

    @property
    def _constants(self) -> tuple[float | Tensor, ...]:
        if self.basis.shape[0] != self.basis.shape[1]:
            return (self.rest,)
        # a complete basis leaves no rest, so 1 is as good a constant as `rest`
        return (1.0,) if isinstance(self.rest, Tensor) or self.rest == 1.0 else (self.rest, 1.0)


@dataclass(frozen=True)
class _Plan:
    """How a gate is computed: r, the columns V_S (shared, or gathered per edit), and g_S − r."""

    constant: float | Float[Tensor, "..."]
    columns: Float[Tensor, "*own d_model m"]
    delta: Float[Tensor, "*edit m"]

    def is_constant(self, value: float | int) -> bool:
        """Whether r is this number."""
        return not isinstance(self.constant, Tensor) and self.constant == value


def _plan_with(basis: Tensor, gains: Tensor, constant: float | Tensor) -> _Plan:
    delta, r = gains - _for_directions(constant), _for_writes(constant)
    differs = delta != 0
    if gains.ndim == 1:
        return _Plan(r, basis[:, differs], delta[differs])
    widest, union = int(differs.sum(dim=-1).max()), differs.any(dim=0)
    # few directions per edit, but different ones: each row gets its own columns
    if 4 * widest < int(union.sum()):
        own = differs.float().topk(widest, dim=-1).indices
        columns = basis.T[own].mT
        return _Plan(r, columns, delta.gather(-1, own)[:, None])
    return _Plan(r, basis[:, union], delta[:, union][:, None])


def _for_directions(rest: float | Tensor) -> Any:
    """One number per edit, with an axis for the directions."""
    return rest[..., None] if isinstance(rest, Tensor) else rest


def _for_writes(rest: float | Tensor) -> Any:
    """One number per edit, with axes for positions and dimensions."""
    return rest[..., None, None] if isinstance(rest, Tensor) else rest


def _coordinates(x: Tensor, columns: Tensor) -> Tensor:
    # with columns per row, the transposed product is ten times as fast on a CPU for few rows
    return (columns.mT @ x.mT).mT if columns.ndim > 2 else x @ columns


def _add_product(
    base: Tensor, coordinates: Tensor, columns: Tensor
) -> Float[Tensor, "*edit pos d_model"]:
    """Compute base + coordinates Vᵀ.

    It takes one pass over the result where rows share V and each has its own base, or all have
    one, or V is one column.
    """
    if columns.shape[-1] == 0:
        return base.expand(*coordinates.shape[:-1], -1).clone()
    if columns.ndim == 2 and base.numel() == base.shape[-1]:  # a point for all positions
        flat = torch.addmm(base.reshape(1, -1), coordinates.flatten(0, -2), columns.mT)
        return flat.view(*coordinates.shape[:-1], -1)
    if columns.ndim > 2 and columns.shape[-1] == 1:
        return torch.addcmul(base, coordinates, columns.mT)
    if columns.ndim > 2 or base.shape[:-1] != coordinates.shape[:-1]:
        return base + coordinates @ columns.mT
    flat = torch.addmm(
        base.reshape(-1, base.shape[-1]), coordinates.reshape(-1, columns.shape[1]), columns.mT
    )
    return flat.view(base.shape)


def gate_of(
    basis: Basis,
    gains: Any,
    rest: Any = 0.0,
    baseline: Baseline | None = None,
) -> Gate:
    """The gate over one basis, with its input checked; see `mechsvd.gate`."""
    directions, source = directions_of(basis)
    rank, gains = directions.shape[1], real_tensor("gains", gains, "rank")
    if not isinstance(rest := single(rest), int | float):
        rest = single(real_tensor("rest", rest, "edit"))
    if gains.ndim not in (1, 2) or gains.shape[-1] != rank:
        raise ValueError(
            f"`gains` has shape {list(gains.shape)}, but the basis has {rank} directions; "
            "give one gain for each."
        )
    if not gains.isfinite().all() or not torch.as_tensor(rest).isfinite().all():
        raise ValueError("`gains` and `rest` must be finite, but hold NaN or inf.")
    if isinstance(rest, Tensor) and rest.shape != gains.shape[:-1]:
        raise ValueError(
            f"`rest` has shape {list(rest.shape)}, but must be one number per edit, "
            f"{list(gains.shape[:-1])}."
        )
    require_baseline(baseline, len(directions), source)
    return Gate(
        directions,
        gains.to(directions),
        rest.to(directions) if isinstance(rest, Tensor) else float(rest),
        source,
        baseline,
    )


def directions_of(basis: Basis) -> tuple[Float[Tensor, "d_model rank"], Provenance | None]:
    """The directions of a basis as columns, and the model they come from, or None if unknown.

    Raises:
        TypeError, ValueError: not a basis, or not an orthonormal one.
    """
    if isinstance(basis, Subspace):
        return basis.basis, basis.source
    if isinstance(basis, Decomposition):
        return basis.directions, basis.source
    if not isinstance(basis, Tensor | np.ndarray):
        raise TypeError(
            "A basis must be a Subspace, a Decomposition or a tensor [d_model, rank], "
            f"but is {type(basis).__name__}."
        )
    basis = real_tensor("basis", basis, "d_model rank")
    require_orthonormal(basis)
    return basis, None


def cheapest_gate(
    svd: Decomposition, gains: Float[Tensor, "edit rank"], baseline: Baseline | None = None
) -> Gate:
    """A stack that drops what the basis does not span, computed on the smaller side.

    When most directions are kept, the basis is completed: keeping k directions is then removing
    the other d − k.
    """
    if 2 * svd.rank <= svd.d_model:
        return Gate(svd.directions, gains, 0.0, svd.source, baseline)
    unseen = gains.new_zeros(len(gains), svd.d_model - svd.rank)
    completed = torch.cat([gains, unseen], dim=1)
    return Gate(complete(svd.directions), completed, 0.0, svd.source, baseline)
