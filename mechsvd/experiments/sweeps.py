"""Rank sweeps: keep the first k directions of every write, for every k, in any order."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import whole_numbers, with_options
from mechsvd.edits.gates import cheapest_gate
from mechsvd.engine.measurement import Measurement, measure
from mechsvd.engine.session import MeasureOptions, warn_other_sites
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, result


@result
class RankSweep(Result):
    """What is left of a task in the first k directions, for several k.

    Attributes:
        ranks: the numbers of directions kept.
        order: the order in which directions are added; the first k of it are kept.
        measurement: one row per rank, and the clean run.
        basis_source: the writes that the directions come from.
    """

    ranks: Int[Tensor, " edit"]
    order: Int[Tensor, " rank"]
    measurement: Measurement
    basis_source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "measurement", len(self.ranks), "rank")

    def _require_values(self) -> None:
        require_between(self, ["ranks"], 0, len(self.order))
        if not torch.equal(self.order.sort().values, torch.arange(len(self.order))):
            raise ValueError(
                f"`order` must name each of the {len(self.order)} directions once, but does not."
            )

    def to_pandas(self) -> Any:
        """One row per rank: rank, log_prob, probability, surprise, orig_delta, kept_delta."""
        table = self.measurement.to_pandas()
        table.insert(0, "rank", self.ranks.numpy())
        return table

    def sites_to_pandas(self) -> Any:
        """One row per rank and site: rank, layer, component, orig_delta, kept_delta."""
        table = self.measurement.sites_to_pandas()
        table.insert(0, "rank", self.ranks.numpy()[table.pop("edit")])
        return table

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.measurement.source

    def __repr__(self) -> str:
        ranks = f"{int(self.ranks.min())} to {int(self.ranks.max())}"
        return (
            f"RankSweep over {len(self.ranks)} ranks, {ranks} of {len(self.order)} directions\n"
            + "\n".join(repr(self.measurement).splitlines()[1:])
        )


@with_options(MeasureOptions)
def sweep_rank(
    model: Model,
    task: Task,
    svd: Decomposition,
    ranks: Iterable[int] | Int[Tensor, " edit"] | None = None,
    order: Iterable[int] | Int[Tensor, " rank"] | None = None,
    **options: Unpack[MeasureOptions],
) -> RankSweep:
    """Clip every write to the first k directions while the model runs, for each k.

    Args:
        ranks: numbers of directions to keep; 0 to all of them by default.
        order: a permutation of the directions; the first ones are kept first. By default, by
            falling singular value.
        options: see `MeasureOptions` (layers, components, positions, batch_size, progress, …).

    Returns:
        One row per rank, in the order of `ranks`. At full rank, what the decomposition did not
        see is still clipped.

    Raises:
        ValueError: a rank below 0 or above the number of directions, or an order that is not a
            permutation.
    """
    require_decomposition(svd)
    chosen = _valid_ranks(svd, ranks)
    permutation = _valid_order(svd, order)
    place = permutation.argsort()  # of each direction in the order
    gains = (place[None, :] < chosen[:, None]).to(svd.directions)
    measurement = measure(model, task, cheapest_gate(svd, gains), **options)
    warn_other_sites(svd, measurement.sites)
    return RankSweep(chosen, permutation, measurement, svd.source)


def _valid_ranks(svd: Decomposition, ranks: Any) -> Int[Tensor, " edit"]:
    chosen = torch.arange(svd.rank + 1) if ranks is None else whole_numbers("ranks", ranks)
    if chosen.min() < 0 or chosen.max() > svd.rank:
        wrong = chosen[(chosen < 0) | (chosen > svd.rank)].tolist()
        raise ValueError(
            f"`ranks` holds {wrong[:5]}, but the decomposition has {svd.rank} directions; "
            f"choose 0 to {svd.rank}."
        )
    return chosen


def _valid_order(svd: Decomposition, order: Any) -> Int[Tensor, " rank"]:
    if order is None:
        return torch.arange(svd.rank)
    permutation = whole_numbers("order", order)
    if not torch.equal(permutation.sort().values, torch.arange(svd.rank)):
        raise ValueError(
            f"`order` must name each of the {svd.rank} directions once, 0 to {svd.rank - 1}, "
            "but does not."
        )
    return permutation
