"""Attribution of a probability, or any function, in its Hessian eigenbasis or another basis."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.attribution.curvature import DENSE, Function, differentiate, takes_whole
from mechsvd.attribution.diagnostics import warn_unconverged, warn_undefined, warn_unlike_values
from mechsvd.attribution.directions import (
    RANDOM,
    STARTS,
    Start,
    given_directions,
    hessian_directions,
)
from mechsvd.attribution.functions import Kind, function_of, require_one_function, task_function
from mechsvd.attribution.gradients import GradientBasis
from mechsvd.attribution.objective import Over
from mechsvd.attribution.scores import Attribution, score_directions
from mechsvd.checks import is_number, is_whole, require_whole
from mechsvd.edits.gates import Basis
from mechsvd.engine.metrics import AnyMetric
from mechsvd.engine.passes import clean_noise
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.linalg.comparison import random_subspace
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import OverTexts, result

PAIRS = 20  # default number of eigenpairs without the whole Hessian
CONTROLS = 128  # at most so many random directions


@result
class Attributions(OverTexts):
    """The attributions of several texts over the same kind of w, each with its own directions.

    Example:
        >>> len(ms.hessian_attribution(model, tasks[:2], over=svd, pairs=1))
        2
    """

    parts: tuple[Attribution, ...]


@overload
def hessian_attribution(
    model: Model,
    task: Task,
    over: Over,
    *,
    objective: Kind | None = None,
    metric: AnyMetric | None = None,
    basis: Start = "largest",
    pairs: int | None = None,
    bases: Mapping[str, Basis | GradientBasis] | None = None,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    path_steps: int = 32,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Attribution: ...
@overload
def hessian_attribution(
    model: Model,
    task: Sequence[Task],
    over: Over,
    *,
    objective: Kind | None = None,
    metric: AnyMetric | None = None,
    basis: Start = "largest",
    pairs: int | None = None,
    bases: Mapping[str, Basis | GradientBasis] | None = None,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    path_steps: int = 32,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Attributions: ...
@runs_model(RunOptions)
def hessian_attribution(
    model: Model,
    task: Task | Sequence[Task],
    over: Over,
    *,
    objective: Kind | None = None,
    metric: AnyMetric | None = None,
    basis: Start = "largest",
    pairs: int | None = None,
    bases: Mapping[str, Basis | GradientBasis] | None = None,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    path_steps: int = 32,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Attribution | Attributions:
    """Attribute a continuation's probability to directions of w, in its Hessian eigenbasis.

    Everything is computed relative to the clean probability. So ratios stay exact even if the
    probability is tiny.

    Args:
        task: one, or several, each of which gets its own directions.
        over: what w is. A decomposition: the gains of its directions in every write, and one gain
            for the rest that they do not span; w = 1 is the model as it is, w = 0 removes all
            writes. Sites: their writes; w minus the clean writes is added to every write.
            Patterns of weight names ("blocks.2.mlp.*", "*"): those weights.
        objective: f, the "probability" of the whole continuation (the default), or "log_prob", its
            natural logarithm in nats.
        metric: f, instead of `objective`: any metric that is differentiable; see `Metric`.
        basis: where the directions come from. "largest" takes the eigenvectors with the largest
            |eigenvalue|, of which w may hold little; see the column `held`. "from_w" takes all
            Ritz vectors of Lanczos started at w. They hold all of w, and the quadratic model of f
            along w is exact: Σ linear = w·∇f, and Σ λ(u·w)² = wᵀHw. Uᵀ H U is diagonal, though
            not every u is an eigenvector; see `converged`. "from_gradient" starts at ∇f, and
            "from_both" at the two.
        pairs: number of eigenpairs, or of steps from w or ∇f. By default all, from the whole
            Hessian, if they are the largest and w has at most 2048 entries; otherwise 20, by
            Lanczos. From w or ∇f there are fewer if H leads nowhere new.
        bases: more bases to score, by name, besides the eigenvectors and random directions. Each
            has orthonormal columns in the space of w, and needs not be complete. For gains,
            `torch.eye(rank)` gives the singular directions themselves. If they do not span
            everything, it is `torch.eye(rank + 1)`, where the last entry is the gain of the rest.
            `gradient_basis` gives another basis.
        tolerance: Lanczos stops when every residual ‖Hu − λu‖ is at most this times |λ|. The
            table marks pairs with larger residuals.
        max_products: Hessian-vector products that Lanczos may use for the largest pairs, at least
            one per pair; by default 200, plus 20 per pair.
        path_steps: Gauss–Legendre nodes of the path integral.
        seed: seed of the start of Lanczos and of the random directions.
        options: see `RunOptions` (layers, components, positions, batch_size, …). They say where
            gains act; sites take only `positions`. A backward pass has a fourth of the rows.

    Returns:
        One row per direction, by falling |eigenvalue|. `.bases` holds the other bases, with the
        directions in their given order. Several tasks give an attribution each, and one table
        whose first column is `task`.

    Raises:
        TypeError: `over` is none of these.
        KeyError: a pattern matches no weight.
        ValueError: there are more pairs than entries, a basis has another size, the probability
            underflows, f is not finite, or Lanczos should start from a zero vector.

    Example:
        >>> attribution = ms.hessian_attribution(model, task, over=svd, pairs=4)
        >>> attribution.to_pandas().columns.tolist()[:2]
        ['eigenvalue', 'projection']
    """
    require_one_function(objective, metric)
    choices = _Choices(basis, pairs, bases, tolerance, max_products, path_steps, seed)
    texts = as_tasks(task)
    with open_session(model, texts, gradients=True, **options) as session:
        parts = tuple(_of_text(session, text, over, objective, metric, choices) for text in texts)
    return parts[0] if isinstance(task, Task) else Attributions(parts)


def _of_text(
    session: Session,
    task: Task,
    over: Over,
    objective: Kind | None,
    metric: AnyMetric | None,
    choices: "_Choices",
) -> Attribution:
    """The attribution of one text."""
    source = session.provenance(tasks=[task])
    f = task_function(session, task, over, objective, metric)
    noise = clean_noise(session, task, f.metric)
    header = {
        "objective": f.name,
        "over": f.objective.over,
        "parts": f.objective.parts,
        "noise_floor": noise * f.unit,
        "source": replace(source, hooks=f.objective.hooks, seed=int(choices.seed)),
    }
    return _attribute(f.function, choices, f.unit, header, noise)


@plain
def hessian_attribution_of(
    function: Callable[[Float[Tensor, " entry"]], Float[Tensor, ""]],
    w: Float[Tensor, " entry"],
    *,
    basis: Start = "largest",
    pairs: int | None = None,
    bases: Mapping[str, Basis | GradientBasis] | None = None,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    path_steps: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> Attribution:
    """Attribute your own scalar function of one vector, like `hessian_attribution`.

    Args:
        function: twice differentiable, made of torch operations. If `torch.func.vmap` can batch
            it, many points are computed at once.
        basis, pairs, bases, tolerance, max_products, path_steps, seed: see `hessian_attribution`.

    Raises:
        TypeError: `function` is no function.
        ValueError: w is no float vector, or the function's value is no differentiable scalar or
            not finite; as `hessian_attribution`.

    Example:
        >>> ms.hessian_attribution_of(torch.prod, torch.tensor([3.0, 2.0]).double()).quadratic
        tensor([ 6.2500, -0.2500], dtype=torch.float64)
    """
    choices = _Choices(basis, pairs, bases, tolerance, max_products, path_steps, seed)
    f = function_of(function, w, batch_size)
    with torch.enable_grad():
        return _attribute(
            f,
            choices,
            1.0,
            {"objective": "value of a function", "over": "a vector", "parts": (("w", (len(w),)),)},
        )


@dataclass(frozen=True)
class _Choices:
    """Options of an attribution, checked."""

    basis: str = "largest"
    pairs: int | None = None
    bases: Mapping[str, Basis | GradientBasis] | None = None
    tolerance: float = 1e-4
    max_products: int | None = None
    path_steps: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.basis not in STARTS:
            raise ValueError(f"`basis` is {self.basis!r:.40}, but must be one of {list(STARTS)}.")
        if not is_number(self.tolerance) or not 0 < self.tolerance < 1:
            raise ValueError(
                f"`tolerance` is {self.tolerance!r}, but must be a number above 0 and below 1."
            )
        require_whole("path_steps", self.path_steps, 1)
        require_whole("seed", self.seed)
        if self.max_products is not None:
            require_whole("max_products", self.max_products, 1)
        if self.max_products is not None and self.basis != "largest":
            raise ValueError(
                f"`max_products` is for `basis='largest'`; {self.basis!r} takes one product per "
                "pair, so choose `pairs`."
            )

    def count(self, entries: int) -> int:
        """Number of eigenpairs to compute."""
        if self.pairs is None:
            whole = self.basis == "largest" and entries <= DENSE
            return entries if whole else min(PAIRS, entries)
        if not is_whole(self.pairs, 1, entries):
            raise ValueError(
                f"`pairs` is {self.pairs!r}, but w has {entries} entries; choose 1 to {entries}."
            )
        return int(self.pairs)

    def most(self, pairs: int) -> int:
        """How many products Lanczos may use for the largest pairs."""
        return 200 + 20 * pairs if self.max_products is None else self.max_products


def _attribute(
    function: Function,
    choices: _Choices,
    unit: float,
    header: dict[str, Any],
    noise: float | None = None,
) -> Attribution:
    """Attribute with one gradient, path integral and Hessian (or Lanczos) for all bases."""
    entries, over = len(function.point), header["over"]
    pairs = choices.count(entries)
    bases = {} if choices.bases is None else choices.bases
    others = given_directions(bases, function.point, over)
    curvature = differentiate(function)
    baseline = function.at_zero
    if noise is not None:
        warn_unlike_values(curvature, noise, baseline)
    solution = hessian_directions(
        curvature,
        choices.basis,
        pairs,
        tolerance=choices.tolerance,
        max_products=choices.most(pairs),
        seed=choices.seed,
    )
    path = function.path_gradient(choices.path_steps)
    random = random_subspace(entries, min(pairs, CONTROLS), choices.seed).basis.to(function.point)
    header = {**header, "tolerance": float(choices.tolerance)}

    def score(vectors: Tensor, **more: Any) -> Attribution:
        return score_directions(curvature, vectors, path, baseline, unit, **header, **more)

    attribution = score(
        solution.vectors.to(function.point),
        basis=choices.basis,
        products=solution.products,
        beside=tuple((name, score(basis)) for name, basis in {**others, RANDOM: random}.items()),
    )
    if choices.basis == "largest":  # others need not converge: they hold w or the gradient
        most = None if takes_whole(entries, pairs) else choices.most(pairs)
        warn_unconverged(attribution, most)
    warn_undefined(attribution, curvature, choices.path_steps)
    return attribution
