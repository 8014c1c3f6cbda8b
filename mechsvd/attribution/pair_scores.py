"""Do the parts of w work alone? All pairs of directions, next to pairs of random bases."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.attribution.chosen import Chosen, Directions, choose, kind_of
from mechsvd.attribution.curvature import Function
from mechsvd.attribution.functions import Kind, function_of, require_one_function, task_function
from mechsvd.attribution.interacting import Interactions
from mechsvd.attribution.objective import Over
from mechsvd.attribution.scores import Order
from mechsvd.checks import require_whole
from mechsvd.engine.metrics import AnyMetric
from mechsvd.engine.passes import clean_noise
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.linalg.comparison import random_subspace
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance

DRAWS, ROWS = 19, 12  # by default: random bases per basis, and directions of each


@runs_model(RunOptions)
def interactions(
    model: Model,
    task: Task | Sequence[Task],
    over: Over,
    directions: Directions,
    *,
    rows: int | Sequence[int] = ROWS,
    order: Order = "measured",
    objective: Kind | None = None,
    metric: AnyMetric | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Interactions:
    """Measure whether directions of w work independently: all pairs of some, next to random bases.

    To second order the interaction of two parts is aᵀHb. It is 0 in an eigenbasis, and for the Ritz
    vectors from w too, but steps that remove whole parts are long. So it is measured, by running
    the model without either part and without both. All bases share the forward passes.

    Args:
        task: one, or several, for which the same directions of w are measured.
        over: what w is; see `hessian_attribution`.
        directions: an attribution, whose bases are taken except the random one; or bases by name,
            as `bases` of `hessian_attribution`.
        rows: how many directions of each basis, the first in the order, or their numbers.
        order: of an attribution's directions; see `Attribution.order`. Given bases keep theirs.
        objective, metric: what f is; see `hessian_attribution`. By default that of the
            attribution.
        draws: random bases per basis. 19 make a p-value of 0.05 possible.
        seed: of the random bases.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Returns:
        The costs of each pair, in units of f, for every task and random basis.

    Raises:
        TypeError, KeyError: as `hessian_attribution`.
        ValueError: the attribution is of another w or model, a basis has fewer than 2 directions,
            or a number of `rows` is out of range.

    Example:
        >>> pairs = ms.interactions(model, task, svd, {"first": svd.subspace(3)})
        >>> pairs.summary().columns.tolist()[:5]
        ['basis', 'pairs', 'held', 'whole', 'median']
    """
    require_one_function(objective, metric)
    texts = as_tasks(task)
    draws, seed = require_whole("draws", draws, 1), require_whole("seed", seed)
    kind = kind_of(directions, objective, metric)
    found, floors = [], []
    with open_session(model, texts, gradients=True, **options) as session:
        for text in texts:
            f = task_function(session, text, over, kind, metric)
            point, what = f.function.point, f.objective.over
            sets = _pairable(directions, rows, order, point, what, session.required_source)
            floors.append(clean_noise(session, text, f.metric) * f.unit)
            found.append(_measure(f.function, sets, draws, seed, f.unit))
        source = session.provenance()
    return _together(sets, found, floors, f.name, what, seed, source)


@plain
def interactions_of(
    function: Callable[[Float[Tensor, " entry"]], Float[Tensor, ""]],
    w: Float[Tensor, " entry"],
    directions: Directions,
    *,
    rows: int | Sequence[int] = ROWS,
    order: Order = "measured",
    draws: int = DRAWS,
    batch_size: int = 64,
    seed: int = 0,
) -> Interactions:
    """Measure interactions in your own scalar function of one vector, like `interactions`.

    Args:
        function, w, batch_size: see `hessian_attribution_of`.
        directions, rows, order, draws, seed: see `interactions`.

    Raises:
        TypeError, ValueError: as `hessian_attribution_of` and `interactions`.

    Example:
        >>> w, axes = torch.tensor([3.0, 2.0]), {"axes": torch.eye(2)}
        >>> product = ms.interactions_of(torch.prod, w, axes)
        >>> product.interaction[0, 0]  # without either factor nothing is left
        tensor([6.], dtype=torch.float64)
    """
    f = function_of(function, w, batch_size)
    draws, seed = require_whole("draws", draws, 1), require_whole("seed", seed)
    sets = _pairable(directions, rows, order, f.point, "a vector", None)
    found = [_measure(f, sets, draws, seed, 1.0)]
    return _together(sets, found, [0.0], "value of a function", "a vector", seed)


def _pairable(
    directions: Directions,
    rows: int | Sequence[int],
    order: Order,
    point: Float[Tensor, " entry"],
    over: str,
    source: Provenance | None,
) -> dict[str, Chosen]:
    """The chosen directions of each basis; refuses those that make no pairs."""
    sets = choose(directions, rows, order, point, over, source)
    if not sets:
        raise ValueError("There are no bases; give at least one by its name.")
    for name, chosen in sets.items():
        if len(chosen.numbers) < 2:
            raise ValueError(
                f"The basis {name!r:.40} has {len(chosen.numbers)} chosen direction(s), but pairs "
                "need at least 2."
            )
    return sets


class _Costs(NamedTuple):
    """What removing costs in one text: each of a pair, both, and all of a basis."""

    first: Float[Tensor, "draw pair"]
    second: Float[Tensor, "draw pair"]
    both: Float[Tensor, "draw pair"]
    whole: Float[Tensor, " name"]
    held: Float[Tensor, " name"]
    value: float


def _measure(f: Function, sets: Mapping[str, Chosen], draws: int, seed: int, unit: float) -> _Costs:
    """Run everything in one loop: f(w), then what is removed in each basis and each random one."""
    w = f.point.detach()
    vectors = torch.cat([chosen.vectors for chosen in sets.values()], dim=1)
    held = w.cpu().double() @ vectors.cpu().double()
    sizes = [len(chosen.numbers) for chosen in sets.values()]
    parts = [_removals(c, draws, seed) for c in held.split(sizes)]
    blocks = [part.flatten(0, 1) for part in parts]
    # the first row removes nothing: f(w) comes from the same batch
    removed = torch.cat([held.new_zeros(1, len(held)), torch.block_diag(*blocks)])
    change = lambda rows: removed[rows].to(w) @ vectors.mT  # noqa: E731
    values = f.at(lambda rows: w - change(rows), len(removed), f.progress, "pairs").cpu().double()
    costs = (values[0] - values[1:]) * unit
    found = [cost.view(draws + 1, -1) for cost in costs.split([len(block) for block in blocks])]
    first, second, both = (
        torch.cat(part, dim=1) for part in zip(*map(_pairs, found, sizes), strict=True)
    )
    norm = w.cpu().double().square().sum()
    shares = [c.square().sum() / (norm or torch.nan) for c in held.split(sizes)]
    whole = torch.stack([cost[0, -1] for cost in found])
    return _Costs(first, second, both, whole, torch.stack(shares), float(values[0]) * unit)


def _removals(
    held: Float[Tensor, " chosen"], draws: int, seed: int
) -> Float[Tensor, "draw row chosen"]:
    """What to remove, in coordinates of the chosen directions: each part, each pair, and all.

    Draw 0 is the basis itself. The others are random bases of the same span.
    """
    count = len(held)
    first, second = torch.triu_indices(count, count, 1)
    bases = [torch.eye(count, dtype=held.dtype)]
    bases += [random_subspace(count, count, seed + 1 + draw).basis for draw in range(draws)]
    rows = []
    for basis in bases:
        parts = basis.mT * (held @ basis)[:, None]
        rows.append(torch.cat([parts, parts[first] + parts[second], held[None]]))
    return torch.stack(rows)


def _pairs(cost: Float[Tensor, "draw row"], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The costs of each pair: the one, the other, and both."""
    first, second = torch.triu_indices(count, count, 1)
    return cost[:, first], cost[:, second], cost[:, count:-1]


def _together(
    sets: Mapping[str, Chosen],
    found: Sequence[_Costs],
    floors: Sequence[float],
    objective: str,
    over: str,
    seed: int,
    source: Provenance | None = None,
) -> Interactions:
    """The costs of all texts as one result, with the numbers of the directions."""
    basis, first, second = [], [], []
    for number, chosen in enumerate(sets.values()):
        numbers = torch.tensor(chosen.numbers)
        one, other = torch.triu_indices(len(numbers), len(numbers), 1)
        basis.append(torch.full_like(one, number))
        first.append(numbers[one])
        second.append(numbers[other])
    return Interactions(
        tuple(sets),
        torch.cat(basis),
        torch.cat(first),
        torch.cat(second),
        torch.stack([costs.first for costs in found]),
        torch.stack([costs.second for costs in found]),
        torch.stack([costs.both for costs in found]),
        torch.stack([costs.whole for costs in found]),
        torch.stack([costs.held for costs in found]),
        torch.tensor([costs.value for costs in found], dtype=torch.float64),
        torch.tensor(floors, dtype=torch.float64),
        objective,
        over,
        seed,
        source,
    )
