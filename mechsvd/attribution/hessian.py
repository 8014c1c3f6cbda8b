"""Attribution: a probability, or any function, taken apart in the eigenbasis of its Hessian or in another basis."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.attribution.curvature import DENSE, Function, differentiate, eigenpairs
from mechsvd.attribution.diagnostics import warn_unconverged, warn_undefined, warn_unlike_values
from mechsvd.attribution.gradients import GradientBasis
from mechsvd.attribution.objective import Over, batched, objective_over
from mechsvd.attribution.scores import (
    HESSIAN,
    RANDOM,
    Attribution,
    attribution_of,
    score_components,
)
from mechsvd.checks import is_number, is_whole, require_whole, with_options
from mechsvd.edits.gates import Basis, directions_of
from mechsvd.engine.measurement import clean_noise
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.linalg.comparison import random_subspace
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task

PAIRS = 20  # where there is no whole Hessian, and it is not said how many
CONTROLS = 128  # random directions at most
Kind = Literal["probability", "log_prob"]


@with_options(RunOptions)
def hessian_attribution(
    model: Model,
    task: Task,
    over: Over,
    *,
    objective: Kind = "probability",
    pairs: int | None = None,
    bases: Mapping[str, Basis | GradientBasis] | None = None,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    path_steps: int = 32,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Attribution:
    """Attribute the probability of a continuation to the components of a vector w in the eigenbasis of its Hessian.

    All is computed relative to the clean probability, so that ratios stay exact where the probability itself is tiny.

    Args:
        over: what w is. A decomposition: the gains of its directions in every write (and one for all that they do not span),
            w = 1 the model as it is, w = 0 all writes removed. Sites: their writes, w minus the clean writes being added to
            what they write. Patterns of weight names ("blocks.2.mlp.*", "*"): those weights.
        objective: f, the probability of the whole continuation, or its natural logarithm in nats.
        pairs: eigenpairs, the largest in size; by default all where w has at most 2048 entries, for which the whole Hessian is
            made, and otherwise 20, by Lanczos.
        bases: more bases to be scored beside the eigenvectors and random directions, by name: orthonormal columns in the space of
            w, not necessarily as many as its entries. Of gains, `torch.eye(rank)` are the singular directions themselves
            (`torch.eye(rank + 1)` where they do not span everything: the last entry is the gain of the rest); `gradient_basis`
            gives another.
        tolerance: Lanczos stops when every residual ‖Hu − λu‖ is at most this times |λ|, and the table marks what is above.
        max_products: Hessian-vector products that Lanczos may use, at least one a pair; 200 and 20 a pair by default.
        path_steps: Gauss–Legendre nodes of the path integral.
        seed: of Lanczos's start and of the random directions.
        options: see `RunOptions` (layers, components, positions, batch_size, …): where gains act; of sites, `positions` alone. A
            backward pass takes a fourth of the rows.

    Returns:
        One row a component, by falling |eigenvalue|; the other bases, in their own order, in `.bases`.

    Raises:
        TypeError: `over` is none of these.
        KeyError: a pattern that matches no weight.
        ValueError: more pairs than entries, a basis of another size, a probability that underflows, an f that is not finite.
    """
    if objective not in ("probability", "log_prob"):
        raise ValueError(f"`objective` is {objective!r}, but must be 'probability' or 'log_prob'.")
    choices = _Choices(pairs, bases, tolerance, max_products, path_steps, seed)
    with open_session(model, [task], gradients=True, **options) as session:
        source = session.provenance()
        f = objective_over(session, task, over)
        clean = float(f.log_prob(f.point[None]).detach())
        unit = 1.0 if objective == "log_prob" else _probability(clean)
        relative_to = None if objective == "log_prob" else clean
        size = session.rows_per_pass(task)
        function = Function(
            f.log_prob, f.point, size, session.halve(task), session.progress, relative_to
        )
        noise = clean_noise(session, task)
        source = replace(source, hooks=f.hooks, seed=int(choices.seed))
        header = {
            "objective": objective,
            "over": f.over,
            "parts": f.parts,
            "noise_floor": noise * unit,
            "source": source,
        }
        return _attribute(function, choices, unit, header, noise)


def hessian_attribution_of(
    function: Callable[[Float[Tensor, " entry"]], Float[Tensor, ""]],
    w: Float[Tensor, " entry"],
    *,
    pairs: int | None = None,
    bases: Mapping[str, Basis | GradientBasis] | None = None,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    path_steps: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> Attribution:
    """Attribute a function of your own, a scalar of one vector, as `hessian_attribution` does a probability.

    Args:
        function: twice differentiable, of torch operations; where `torch.func.vmap` can batch it, many points go together.
        pairs, bases, tolerance, max_products, path_steps, seed: see `hessian_attribution`.

    Raises:
        TypeError: no function.
        ValueError: w is no float vector, the function's value no differentiable scalar or not finite; as `hessian_attribution`.

    Example:
        >>> hessian_attribution_of(torch.prod, torch.tensor([3.0, 2.0]).double()).quadratic
        tensor([ 6.2500, -0.2500], dtype=torch.float64)
    """
    if not callable(function):
        raise TypeError(
            f"`function` must be a function of one vector, but is {type(function).__name__}."
        )
    if not isinstance(w, Tensor) or w.ndim != 1 or not w.is_floating_point() or len(w) == 0:
        what = (
            f"{w.dtype} of shape {list(w.shape)}"
            if isinstance(w, Tensor)
            else f"{type(w).__name__}"
        )
        raise ValueError(f"`w` must be a float tensor with one axis, but is {what}.")
    value = function(w)
    if not isinstance(value, Tensor) or value.ndim != 0:
        what = (
            f"a tensor of shape {list(value.shape)}"
            if isinstance(value, Tensor)
            else f"{type(value).__name__} {value!r:.20}"
        )
        raise ValueError(f"`function` must give a scalar tensor (no `.item()`), but gives {what}.")

    choices = _Choices(pairs, bases, tolerance, max_products, path_steps, seed)
    with torch.inference_mode(False):  # in which there are no gradients
        f = Function(
            batched(function), w.clone(), require_whole("batch_size", batch_size, 1), _halve
        )
        return _attribute(
            f,
            choices,
            1.0,
            {"objective": "value of a function", "over": "a vector", "parts": (("w", (len(w),)),)},
        )


@dataclass(frozen=True)
class _Choices:
    """What is asked of an attribution, checked."""

    pairs: int | None = None
    bases: Mapping[str, Basis | GradientBasis] | None = None
    tolerance: float = 1e-4
    max_products: int | None = None
    path_steps: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.tolerance) or not 0 < self.tolerance < 1:
            raise ValueError(
                f"`tolerance` is {self.tolerance!r}, but must be a number above 0 and below 1."
            )
        require_whole("path_steps", self.path_steps, 1)
        require_whole("seed", self.seed)
        if self.max_products is not None:
            require_whole("max_products", self.max_products, 1)

    def count(self, entries: int) -> int:
        """Eigenpairs that are wanted."""
        if self.pairs is None:
            return entries if entries <= DENSE else PAIRS
        if not is_whole(self.pairs, 1, entries):
            raise ValueError(
                f"`pairs` is {self.pairs!r}, but w has {entries} entries; choose 1 to {entries}."
            )
        return int(self.pairs)

    def directions(
        self, point: Float[Tensor, " entry"], over: str
    ) -> dict[str, Float[Tensor, "entry component"]]:
        """The bases that are given, on the device and in the dtype of w; none of them made for another w."""
        if self.bases is None:
            return {}
        if not isinstance(self.bases, Mapping):
            raise TypeError(
                f"`bases` must be bases by name, such as {{'mine': basis}}, but is {type(self.bases).__name__}."
            )
        found = {}
        for name, basis in self.bases.items():
            if name in (HESSIAN, RANDOM):
                raise ValueError(
                    f"`bases` names one {name!r}, which is always there; choose another name."
                )
            directions = (
                basis.directions if isinstance(basis, GradientBasis) else directions_of(basis)[0]
            )
            if len(directions) != len(point):
                raise ValueError(
                    f"The basis {name!r} has columns of {len(directions)} entries, but w has {len(point)}: {over[:80]}."
                )
            if isinstance(basis, GradientBasis) and basis.over != over:
                raise ValueError(
                    f"The basis {name!r} is of gradients with respect to {basis.over[:60]}, but w is {over[:60]}; collect the "
                    "gradients over it."
                )
            found[name] = directions.to(point)
        return found


def _attribute(
    function: Function,
    choices: _Choices,
    unit: float,
    header: dict[str, Any],
    noise: float | None = None,
) -> Attribution:
    """One gradient, one path integral and one Hessian, or Lanczos, for all bases."""
    entries = len(function.point)
    pairs, others = choices.count(entries), choices.directions(function.point, header["over"])
    most = 200 + 20 * pairs if choices.max_products is None else choices.max_products
    curvature = differentiate(function)
    if noise is not None:
        warn_unlike_values(curvature, noise)
    found = eigenpairs(
        curvature, pairs, tolerance=choices.tolerance, max_products=most, seed=choices.seed
    )
    from_zero = function.path_gradient(choices.path_steps), function.at_zero
    random = random_subspace(entries, min(pairs, CONTROLS), choices.seed).basis.to(function.point)
    bases = {HESSIAN: found.vectors.to(function.point), **others, RANDOM: random}
    scores = {name: score_components(curvature, basis, *from_zero) for name, basis in bases.items()}
    attribution = attribution_of(
        scores, unit, found.products, tolerance=float(choices.tolerance), **header
    )
    warn_unconverged(attribution, most if entries > DENSE else None)
    warn_undefined(attribution, curvature, choices.path_steps)
    return attribution


def _probability(log_prob: float) -> float:
    if log_prob < math.log(sys.float_info.min):
        raise ValueError(
            f"The log-probability of the continuation is {log_prob:.0f} nats, so its probability is too small for a number (it "
            'underflows); shorten the continuation, or attribute the logarithm by `objective="log_prob"`.'
        )
    return math.exp(log_prob)


def _halve(size: int) -> int:
    if size == 1:
        raise MemoryError("One evaluation of the function alone does not fit into memory.")
    return size // 2
