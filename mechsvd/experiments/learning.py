"""A learned subspace: the one that loses least, found by gradient descent. An end for all orders."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import quiet, require_whole
from mechsvd.edits.gates import Basis
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.engine.writes import collect_writes
from mechsvd.experiments.descent import Texts, descend, start_bases
from mechsvd.fields import ROUNDED, require_between, require_declared, require_finite
from mechsvd.linalg.decomposition import decompose
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.places import width_of
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result


@result
class LearnedSubspace(Result):
    """A subspace that keeps the predictions, found by gradient descent, and its loss curve.

    Attributes:
        bases: the subspace of all sites; or one per site, whose source names the site.
        losses: KL divergence of clean ‖ kept at each step, in nats per token, in the mean over the
            texts. The first is that of the start.
        divergences: the same for each text with these bases, which are the best that were met.
        seed: of a random start.

    Example:
        >>> learned.rank, learned.to_pandas().columns.tolist()
        (24, ['step', 'kl_divergence'])
    """

    bases: tuple[Subspace, ...]
    losses: Float[Tensor, " step"]
    divergences: Float[Tensor, " task"]
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        if not self.bases:
            raise ValueError("`bases` of a LearnedSubspace is empty, but must be one or more.")

    def _require_values(self) -> None:
        require_finite(self, "losses", "divergences")
        require_between(self, ["losses", "divergences"], ROUNDED)

    @property
    def subspace(self) -> Subspace | tuple[Subspace, ...]:
        """What `keep` takes: a subspace, or one per site."""
        return self.bases[0] if len(self.bases) == 1 else self.bases

    @property
    def rank(self) -> int:
        """Number of directions, of each basis."""
        return self.bases[0].rank

    def to_pandas(self) -> Any:
        """One row per step: step, kl_divergence."""
        import pandas as pd

        steps = range(len(self.losses))
        return pd.DataFrame({"step": steps, "kl_divergence": self.losses.numpy()})

    def __repr__(self) -> str:
        first, best = float(self.losses[0]), float(self.losses.min())
        where = "for all sites" if len(self.bases) == 1 else f"at each of {len(self.bases)} sites"
        return (
            f"LearnedSubspace of rank {self.rank} {where}, on {len(self.divergences)} text(s)\n"
            f"  KL divergence {first:.4g} → {best:.4g} nats per token in {len(self.losses) - 1} "
            f"steps\n  on {self._origin()}"
        )


@runs_model(RunOptions)
def learn_subspace(
    model: Model,
    tasks: Task | Sequence[Task],
    rank: int,
    *,
    per: str = "pool",
    start: Basis | Sequence[Basis] | str | None = None,
    steps: int = 200,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> LearnedSubspace:
    """Learn the subspace whose projection of every write keeps the predictions best.

    An order of directions can reach some subspaces; this may be any. So it says how far an order is
    from possible on these texts. Adam follows the gradient of the mean KL divergence of clean ‖
    kept per token along the Stiefel manifold, with a falling step. The best point that was met is
    returned, so it is never worse than its start. There are local minima, so the start matters: the
    loss is an upper bound of the least possible. A subspace fitted to few texts may also work by
    what it does to these alone, and says nothing of how the model works.

    Args:
        tasks: the texts whose mean counts; all of them are in every step. On others it may be no
            better than an order; see `compare_orders`.
        rank: number of directions; of each site with `per="site"`.
        per: "pool" for one subspace of all sites, or "site" for one each.
        start: where descent begins: a decomposition or subspace of at least `rank` directions, or
            one per site; of these, the first ones. Missing directions are added. By default those
            of the writes of the tasks. Or "random".
        steps: gradients.
        seed: of a random start.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Returns:
        `.subspace` is what `keep` takes, in the model's dtype (at least float32).

    Raises:
        ValueError: a rank that the model does not have, another `per`, or a start that does not fit.

    Reference: Lezcano-Casado, Trivializations for gradient-based optimization on manifolds, 2019,
        arXiv:1909.09501.

    Example:
        >>> learned = ms.learn_subspace(model, task, 24, start=svd, steps=2)
        >>> learned.subspace.rank, learned.losses.shape
        (24, torch.Size([3]))
    """
    chosen = as_tasks(tasks)
    steps, seed = require_whole("steps", steps), require_whole("seed", seed)
    if per not in ("pool", "site"):
        raise ValueError(f"`per` is {per!r:.40}, but must be 'pool' or 'site'.")
    if start is None:
        with quiet():
            start = decompose(collect_writes(model, chosen, **options), per=per)  # type: ignore[call-overload]
    with open_session(model, chosen, gradients=True, **options) as session:
        d_model = width_of(model, session.sites)
        rank = require_whole("rank", rank, 1, d_model)
        first = start_bases(session, start, per, rank, seed)
        texts = Texts.of(session)
        bases, losses, divergences = descend(texts, first, rank, steps)
        source = session.provenance(session.sites)
    sources = [source]
    if per == "site":
        sources = [replace(source, hooks=(site.name,)) for site in session.sites]
    return LearnedSubspace(
        tuple(Subspace(*pair) for pair in zip(bases, sources, strict=True)),
        losses,
        divergences,
        seed,
        source,
    )
