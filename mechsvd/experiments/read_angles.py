"""How what is read of each site differs from what it writes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import quiet, require_whole
from mechsvd.engine.reads import DRAWS, collect_reads
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions
from mechsvd.engine.writes import collect_writes
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.linalg.comparison import principal_angles, random_subspace
from mechsvd.linalg.decomposition import decompose
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model, Site
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result


@result
class ReadWriteAngles(Result):
    """Principal angles at each site between what is written and what is read.

    Attributes:
        angles: between the spans of the first directions of the writes and of the gradients, in
            radians, rising from 0 (a shared direction) to π/2.
        random: the same for random subspaces of this rank.
        sites: the first axis.
        d_model: dimension of the residual stream.
        seed: of the gradients and the random subspaces.

    Example:
        >>> angles.to_pandas().columns.tolist()[2:4]
        ['smallest_angle', 'random_smallest']
    """

    angles: Float[Tensor, "site rank"]
    random: Float[Tensor, "draw rank"]
    sites: tuple[Site, ...]
    d_model: int
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", len(self.angles), "row of `angles`")

    def _require_values(self) -> None:
        require_finite(self, "angles", "random")
        require_between(self, ["angles", "random"], 0, 1.5708)

    @property
    def shared(self) -> Float[Tensor, " site"]:
        """The shared dimensions of each site: the sum of squared cosines, from 0 to the rank."""
        return self.angles.double().cos().square().sum(dim=1)

    @property
    def expected(self) -> float:
        """The shared dimensions of random subspaces in the mean: rank² / d_model."""
        return self.angles.shape[1] ** 2 / self.d_model

    def to_pandas(self) -> Any:
        """One row per site.

        Columns: layer, component; smallest_angle and median_angle in degrees, with those of random
        subspaces in the mean over the draws; shared dimensions, those expected of random subspaces,
        and the share of random draws that share at least as many.
        """
        import pandas as pd

        degrees, random = self.angles.double().rad2deg(), self.random.double()
        drawn = random.cos().square().sum(dim=1)
        above = (drawn[None] >= self.shared[:, None]).double().mean(dim=1)
        typical = random.rad2deg()
        return pd.DataFrame(
            {
                "layer": [site.layer for site in self.sites],
                "component": [site.component for site in self.sites],
                "smallest_angle": degrees[:, 0].numpy(),
                "random_smallest": float(typical[:, 0].mean()),
                "median_angle": degrees.median(dim=1).values.numpy(),
                "random_median": float(typical.median(dim=1).values.mean()),
                "shared": self.shared.numpy(),
                "expected": self.expected,
                "random_share": above.numpy(),
            }
        )

    def __repr__(self) -> str:
        low, high = float(self.shared.min()), float(self.shared.max())
        return (
            f"ReadWriteAngles of the first {self.angles.shape[1]} directions written and read at "
            f"{len(self.sites)} sites\n"
            f"  {low:.3g} to {high:.3g} dimensions shared, {self.expected:.3g} by random subspaces\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def read_write_angles(
    model: Model,
    tasks: Task | Sequence[Task],
    rank: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    null_draws: int = 200,
    **options: Unpack[RunOptions],
) -> ReadWriteAngles:
    """Measure the angles between the directions that a site writes and those that are read of it.

    At each site, the first directions of its writes are compared with the first eigenvectors of the
    second moment of the gradients there; see `collect_reads`. At right angles, what is large would
    not be what matters.

    Args:
        rank: number of directions on each side.
        draws: random outputs per text.
        seed: of the outputs and of the random subspaces.
        null_draws: pairs of random subspaces of this rank.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Raises:
        ValueError: a site with fewer than `rank` directions.

    Example:
        >>> angles = ms.read_write_angles(model, task, 4, draws=2, null_draws=9)
        >>> angles.angles.shape
        torch.Size([12, 4])
    """
    chosen = as_tasks(tasks)
    rank, null_draws = require_whole("rank", rank, 1), require_whole("null_draws", null_draws, 1)
    writes = collect_writes(model, chosen, **options)
    reads = collect_reads(model, chosen, draws=draws, seed=seed, **options)
    with quiet():
        sides = [decompose(sample, per="site") for sample in (writes, reads)]
    for site, *pair in zip(writes.sites, *sides, strict=True):
        if min(one.rank for one in pair) < rank:
            raise ValueError(
                f"`rank` is {rank}, but {site.place} has {pair[0].rank} directions that are written and "
                f"{pair[1].rank} that are read; choose fewer, or give more texts."
            )
    angles = [
        principal_angles(a.subspace(rank), b.subspace(rank)) for a, b in zip(*sides, strict=True)
    ]
    d_model = writes.values.shape[-1]
    fixed = Subspace(torch.eye(d_model, dtype=torch.float64)[:, :rank])
    random = [
        principal_angles(fixed, random_subspace(d_model, rank, seed + i)) for i in range(null_draws)
    ]
    return ReadWriteAngles(
        torch.stack(angles), torch.stack(random), writes.sites, d_model, seed, writes.source
    )
