"""Which directions of w are scored: where the Hessian's come from, given bases, and their order."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.attribution.curvature import Curvature, eigenpairs, pairs_from
from mechsvd.attribution.gradients import GradientBasis
from mechsvd.edits.gates import Basis, directions_of
from mechsvd.linalg.eigenpairs import Eigenpairs

HESSIAN, RANDOM = "Hessian", "random"  # names of the bases that are always scored
Start = Literal["largest", "from_w", "from_gradient", "from_both"]
STARTS = ("largest", "from_w", "from_gradient", "from_both")


def hessian_directions(
    curvature: Curvature,
    basis: str,
    pairs: int,
    *,
    tolerance: float,
    max_products: int,
    seed: int,
) -> Eigenpairs:
    """The Hessian's eigenpairs with the largest |eigenvalue|, or its Ritz pairs from a start.

    Raises:
        ValueError: w, or the gradient, is zero where Lanczos should start from it.
    """
    if basis == "largest":
        return eigenpairs(
            curvature, pairs, tolerance=tolerance, max_products=max_products, seed=seed
        )
    w, gradient = curvature.w.detach(), curvature.gradient.detach()
    starts = {"from_w": [w], "from_gradient": [gradient], "from_both": [w, gradient]}[basis]
    for start, what in zip(starts, {"from_gradient": ["∇f"]}.get(basis, ["w", "∇f"]), strict=False):
        if not start.any():
            raise ValueError(
                f"{what} is zero, so Lanczos cannot start from it; choose another `basis`."
            )
    return pairs_from(curvature, torch.stack(starts, dim=1), pairs)


def given_directions(
    bases: Any, point: Float[Tensor, " entry"], over: str
) -> dict[str, Float[Tensor, "entry direction"]]:
    """Bases by name, on the device and in the dtype of w; refuses those of another w.

    Raises:
        TypeError: they are no mapping, or hold what is no basis.
        ValueError: the columns are not orthonormal or not of the size of w, or the gradients are
            of another w.
    """
    if not isinstance(bases, Mapping):
        raise TypeError(
            "`bases` must be bases by name, such as {'mine': basis}, but is "
            f"{type(bases).__name__}."
        )
    return {name: _fitting(name, basis, point, over) for name, basis in bases.items()}


def _fitting(
    name: str, basis: Basis | GradientBasis, point: Tensor, over: str
) -> Float[Tensor, "entry direction"]:
    if name in (HESSIAN, RANDOM):
        raise ValueError(f"`bases` names one {name!r}, which is always there; choose another name.")
    directions = basis.directions if isinstance(basis, GradientBasis) else directions_of(basis)[0]
    require_size(f"The basis {name!r}", directions, point, over)
    if isinstance(basis, GradientBasis) and basis.over != over:
        raise ValueError(
            f"The basis {name!r} is of gradients with respect to {basis.over[:60]}, but w "
            f"is {over[:60]}; collect the gradients with the same `over`."
        )
    return directions.to(point)


def require_size(what: str, directions: Tensor, point: Tensor, over: str) -> None:
    """Refuse directions that are not of the size of w."""
    if len(directions) != len(point):
        raise ValueError(
            f"{what} has columns of {len(directions)} entries, but w has {len(point)}: {over[:80]}."
        )
