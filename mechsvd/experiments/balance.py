"""Directions that are both written and read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import quiet
from mechsvd.edits.bases import is_several, site_index
from mechsvd.engine.reads import DRAWS, Reads, collect_reads
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions
from mechsvd.engine.writes import collect_writes
from mechsvd.linalg.balancing import balanced_basis
from mechsvd.linalg.contrasts import second_moment
from mechsvd.linalg.decomposition import Decomposition, decompose, require_decompositions
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import require_same_model, with_notes

NOTE = "balanced: the singular values are Hankel's"


@overload
def balanced_directions(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition | None = None,
    *,
    side: str = "write",
    draws: int = DRAWS,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Decomposition: ...
@overload
def balanced_directions(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Sequence[Decomposition],
    *,
    side: str = "write",
    draws: int = DRAWS,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> tuple[Decomposition, ...]: ...
@runs_model(RunOptions)
def balanced_directions(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition | Sequence[Decomposition] | None = None,
    *,
    side: str = "write",
    draws: int = DRAWS,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Decomposition | tuple[Decomposition, ...]:
    """Order the directions of writes by how much is both written and read along them.

    A direction may be large and hardly matter, or be read strongly and hardly written. Balanced
    truncation weighs both: the second moment of the writes, and that of the gradients of the
    predictions (see `collect_reads`). Its modes are made orthogonal one after the other, since
    edits project at right angles. This is an application of a known method.

    Args:
        tasks: the texts whose gradients count.
        svd: of the writes; by default those of the tasks, pooled. Or one decomposition per layer or
            site, each balanced with the gradients at its own sites.
        side: "write" takes the modes that are written, "read" those by which they are read. The
            first are near the singular directions; the second may keep far more, or far less.
        draws: random outputs per text.
        seed: of the outputs.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Returns:
        A `Decomposition` of as many directions, or one per layer or site. Its `singular_values`
        are the Hankel singular values, in roots of nats, and order the directions.

    Raises:
        TypeError, KeyError, ValueError: no decomposition, one of streamed writes, or as
            `collect_writes`.

    Reference: Moore 1981 (see `balanced_basis`); Otto, Padovan and Rowley, 2023, arXiv:2207.14387,
        for gradients; Hsu et al., Language model compression with weighted low-rank factorization,
        2022, arXiv:2207.00112, weigh by Fisher information too.

    Example:
        >>> ms.balanced_directions(model, task, svd, draws=2).directions.shape
        torch.Size([128, 128])
    """
    chosen = as_tasks(tasks)
    if svd is None:
        with quiet():
            svd = decompose(collect_writes(model, chosen, **options))
    require_decompositions(svd)
    reads = collect_reads(model, chosen, draws=draws, seed=seed, **options)
    return balanced_with(svd, reads, side)


def balanced_with(
    svd: Decomposition | Sequence[Decomposition], reads: Reads, side: str = "write"
) -> Decomposition | tuple[Decomposition, ...]:
    """Balance decompositions with gradients that are at hand; see `balanced_directions`."""
    bases = require_decompositions(svd)
    require_same_model(bases[0].source, reads.source, "The decomposition and the gradients")
    if not is_several(svd):
        return _balanced(bases[0], reads.values.flatten(0, 1), reads.draws, side)
    index = site_index(bases)
    if missing := [site.name for site in reads.sites if site.name not in index]:
        raise KeyError(f"No basis is of the site {missing[0]}; give one per site.")
    members = [
        [i for i, site in enumerate(reads.sites) if index[site.name] == number]
        for number in range(len(bases))
    ]
    return tuple(
        _balanced(one, reads.values[own].flatten(0, 1), reads.draws, side)
        for one, own in zip(bases, members, strict=True)
    )


def _balanced(
    svd: Decomposition, reads: Float[Tensor, "read d_model"], draws: int, side: str
) -> Decomposition:
    if svd.is_streamed:
        raise ValueError(
            "Balanced directions need the writes of each position, but this decomposition is of "
            "streamed writes; take that of `collect_writes`."
        )
    device = svd.directions.device
    directions, sizes = svd.directions.cpu().double(), svd.singular_values.cpu().double()
    basis, hankel = balanced_basis(directions, sizes, second_moment(reads) / draws, side)
    left = (svd.left.cpu().double() * sizes) @ (directions.T @ basis)
    lengths = left.flatten(0, 1).norm(dim=0)
    left = left / torch.where(lengths > 0, lengths, 1.0)
    dtype = svd.directions.dtype
    return replace(
        svd,
        singular_values=hankel.to(device, dtype),
        directions=basis.to(device, dtype),
        left=left.to(device, dtype),
        source=svd.source and with_notes(svd.source, NOTE),
    )
