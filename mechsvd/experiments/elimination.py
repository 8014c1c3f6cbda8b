"""An order by elimination: the directions that cost least go first, given those already gone."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_number, require_numbers
from mechsvd.edits.gates import cheapest_gate
from mechsvd.engine.metrics import AnyMetric, kl_divergence
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import rows_called
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, warn_other_sites
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks


@runs_model(RunOptions)
def order_by_elimination(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition,
    *,
    share: float | int = 0.125,
    metric: AnyMetric = kl_divergence,
    **options: Unpack[RunOptions],
) -> Int[Tensor, " rank"]:
    """Order directions by removing, again and again, those whose loss costs least.

    Unlike `order_by_effect`, it sees what directions do together: each round measures every
    remaining direction with the ones already removed gone too. It fits the texts that it sees, and
    need not help on others; see `compare_orders`.

    Args:
        tasks: the texts whose mean cost counts.
        share: of the remaining directions that go in each round, at least one. 0 removes one at a
            time, which takes rank² / 2 measurements per text instead of about rank / share.
        metric: of the cost; the KL divergence by default.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Returns:
        The numbers of the directions: those that stay longest come first. Within a round they are
        by falling cost, and ties by falling singular value.

    Raises:
        TypeError, ValueError: as `rank_directions`; or a share outside 0 to below 1.

    Example:
        >>> ms.order_by_elimination(model, tasks[0], svd, share=0.5).shape
        torch.Size([128])
    """
    require_decomposition(svd)
    if not is_number(share, 0) or share >= 1:
        raise ValueError(f"`share` is {share!r:.40}, but must be from 0 to below 1.")
    chosen = as_tasks(tasks)
    remaining, removed = torch.arange(svd.rank), torch.zeros(0, dtype=torch.long)
    while len(remaining) > 1:
        gains = _without_each(svd, remaining)
        with rows_called("directions"):
            measured = measure(model, chosen, cheapest_gate(svd, gains), metric=metric, **options)
        if not len(removed):
            warn_other_sites(svd, measured[0].sites)
        costs = measured.effect.double().mean(dim=0)
        require_numbers("Of the remaining directions, the costs of", costs, "an order")
        # stable, from the smallest singular value on
        cheapest = len(remaining) - 1 - costs.flip(0).argsort(stable=True)
        going = cheapest[: max(1, math.floor(share * len(remaining)))]
        removed = torch.cat([removed, remaining[going]])
        remaining = remaining[~torch.isin(torch.arange(len(remaining)), going)]
    return torch.cat([removed, remaining]).flip(0)


def _without_each(
    svd: Decomposition, remaining: Int[Tensor, " remaining"]
) -> Float[Tensor, "remaining rank"]:
    """Gains that keep the remaining directions but one, each in turn."""
    gains = torch.zeros(len(remaining), svd.rank)
    gains[:, remaining] = 1
    gains[torch.arange(len(remaining)), remaining] = 0
    return gains.to(svd.directions)
