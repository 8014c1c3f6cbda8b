"""Rank sweeps: keep the first k directions of every write, for every k, in any order."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import whole_numbers
from mechsvd.edits.baselines import Baseline, require_baseline
from mechsvd.edits.bases import Bases, is_several, site_gates
from mechsvd.edits.gates import cheapest_gate
from mechsvd.engine.measurement import Measurement, concatenate
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import rows_called
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import MeasureOptions, warn_other_sites
from mechsvd.experiments.intervals import summary
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.decomposition import joint_source, require_directions
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import OverTexts, Provenance, Result, result


@result
class RankSweep(Result):
    """What is left of a task in the first k directions, for several k.

    Attributes:
        ranks: the numbers of directions kept; with one basis per site, of each basis.
        order: the order in which directions are added; the first k of it are kept. With one basis
            per site, it names the directions of all bases one after the other, and the first k of
            each basis are kept.
        measurement: one row per rank, and the clean run.
        basis_source: the writes that the directions come from.
        sizes: number of directions of each basis; empty for a single one.

    Example:
        >>> sweep.full_rank, len(sweep.ranks)
        (128, 129)
    """

    ranks: Int[Tensor, " edit"]
    order: Int[Tensor, " rank"]
    measurement: Measurement
    basis_source: Provenance | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "measurement", len(self.ranks), "rank")
        if self.sizes and sum(self.sizes) != len(self.order):
            raise ValueError(
                f"`sizes` must sum to the {len(self.order)} directions of `order`, "
                f"but sum to {sum(self.sizes)}."
            )

    def _require_values(self) -> None:
        require_between(self, ["ranks"], 0, self.full_rank)
        if not torch.equal(self.order.sort().values, torch.arange(len(self.order))):
            raise ValueError(
                f"`order` must name each of the {len(self.order)} directions once, but does not."
            )

    @property
    def full_rank(self) -> int:
        """The rank that keeps every direction."""
        return max(self.sizes, default=len(self.order))

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

    def tokens_to_pandas(self) -> Any:
        """One row per rank and scored token: rank, position, token, log_prob, kl_divergence, …"""
        table = self.measurement.tokens_to_pandas()
        table.insert(0, "rank", self.ranks.numpy()[table.pop("edit")])
        return table

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.measurement.source

    def __repr__(self) -> str:
        ranks = f"{int(self.ranks.min())} to {int(self.ranks.max())}"
        bases = f" of each of {len(self.sizes)} bases" if self.sizes else ""
        return (
            f"RankSweep over {len(self.ranks)} ranks, {ranks} of {self.full_rank} directions"
            f"{bases}\n" + "\n".join(repr(self.measurement).splitlines()[1:])
        )


@result
class RankSweeps(OverTexts):
    """The sweeps of several texts.

    Example:
        >>> ms.sweep_rank(model, tasks[:2], svd, ranks=[0, 64, 128]).summary().columns.tolist()
        ['rank', 'mean', 'low', 'high', 'n']
    """

    parts: tuple[RankSweep, ...]

    def summary(self, column: str | None = None, confidence: float = 0.95) -> Any:
        """One row per rank that all texts have: rank, mean, low, high, n; the interval is over texts.

        Args:
            column: of the table of a sweep; by default the metric that was measured.

        Raises:
            ValueError: there is one text only, or no such column.
        """
        name = column or self.parts[0].measurement.metric
        return summary(self.to_pandas(), ["rank"], name, confidence)


@overload
def sweep_rank(
    model: Model,
    task: Task,
    svd: Bases,
    ranks: Iterable[int] | Int[Tensor, " edit"] | None = None,
    order: Iterable[int] | Int[Tensor, " rank"] | None = None,
    *,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> RankSweep: ...
@overload
def sweep_rank(
    model: Model,
    task: Sequence[Task],
    svd: Bases,
    ranks: Iterable[int] | Int[Tensor, " edit"] | None = None,
    order: Iterable[int] | Int[Tensor, " rank"] | None = None,
    *,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> RankSweeps: ...
@runs_model(MeasureOptions)
def sweep_rank(
    model: Model,
    task: Task | Sequence[Task],
    svd: Bases,
    ranks: Iterable[int] | Int[Tensor, " edit"] | None = None,
    order: Iterable[int] | Int[Tensor, " rank"] | None = None,
    *,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> RankSweep | RankSweeps:
    """Clip every write to the first k directions while the model runs, for each k.

    Args:
        task: one text, or a list of texts.
        svd: the directions, of a decomposition, a subspace or a tensor "d_model rank"; or one basis
            per layer or site (`decompose(writes, per="site")`), where each write keeps the first k
            of its own.
        ranks: numbers of directions to keep; 0 to all of them by default.
        order: a permutation of the directions; the first ones are kept first. By default, by
            falling singular value.
        baseline: what the rest of a write is replaced by, 0 by default; see `gate`.
        options: see `MeasureOptions` (metric, layers, components, positions, batch_size, …).

    Returns:
        One row per rank, in the order of `ranks`. At full rank, what the decomposition did not
        see is still clipped. Of a list of texts, `RankSweeps`.

    Raises:
        KeyError: a site without a basis or a baseline.
        ValueError: a rank below 0 or above the number of directions, or an order that is not a
            permutation.

    Example:
        >>> few = ms.sweep_rank(model, task, svd, ranks=[0, 64, 128])
        >>> few.to_pandas().columns.tolist()[:4]
        ['rank', 'log_prob', 'probability', 'surprise']
    """
    bases = require_directions(svd)
    sizes = tuple(one.rank for one in bases)
    chosen = _valid_ranks(max(sizes), ranks)
    permutation = _valid_order(sum(sizes), order)
    require_baseline(baseline, bases[0].d_model, bases[0].source)
    gates, places = [], permutation.argsort()  # of each direction in the order
    for one, own in zip(bases, places.split(list(sizes)), strict=True):
        within = own.argsort().argsort()  # its place among the directions of its basis
        gains = (within[None, :] < chosen[:, None]).to(one.directions)
        gates.append(cheapest_gate(one, gains, baseline))
    edits = site_gates(bases, gates) if is_several(svd) else gates[0]
    tasks = as_tasks(task)
    with rows_called("ranks"):
        measured = measure(model, tasks, edits, **options)
    warn_other_sites(bases, measured[0].sites)
    own = sizes if is_several(svd) else ()
    sweeps = tuple(
        RankSweep(chosen, permutation, part, joint_source(bases), own) for part in measured.parts
    )
    return sweeps[0] if isinstance(task, Task) else RankSweeps(sweeps)


def join_sweeps(first: RankSweep, second: RankSweep) -> RankSweep:
    """Join two sweeps of one task over different ranks.

    The clean log-probability may differ between them, by other batch sizes; the noise floor is at
    least this difference.
    """
    joint = concatenate([first.measurement, second.measurement])
    clean, other = first.measurement.clean_run.log_prob, second.measurement.clean_run.log_prob
    floor = max(float((clean - other).abs()), joint.noise_floor or 0.0)
    joint = replace(joint, noise_floor=floor)
    return replace(first, ranks=torch.cat([first.ranks, second.ranks]), measurement=joint)


def _valid_ranks(most: int, ranks: Any) -> Int[Tensor, " edit"]:
    chosen = torch.arange(most + 1) if ranks is None else whole_numbers("ranks", ranks)
    if chosen.min() < 0 or chosen.max() > most:
        wrong = chosen[(chosen < 0) | (chosen > most)].tolist()
        raise ValueError(
            f"`ranks` holds {wrong[:5]}, but the decomposition has {most} directions; "
            f"choose 0 to {most}."
        )
    return chosen


def _valid_order(count: int, order: Any) -> Int[Tensor, " rank"]:
    if order is None:
        return torch.arange(count)
    permutation = whole_numbers("order", order)
    if not torch.equal(permutation.sort().values, torch.arange(count)):
        raise ValueError(
            f"`order` must name each of the {count} directions once, 0 to {count - 1}, "
            "but does not."
        )
    return permutation
