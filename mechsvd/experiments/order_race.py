"""Comparing orders and bases on held-out texts, between random subspaces and a learned one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import quiet, require_whole, whole_numbers
from mechsvd.edits.bases import first_of, is_several, keep
from mechsvd.edits.gates import directions_of
from mechsvd.edits.maps import Edit
from mechsvd.engine.metrics import kl_divergence
from mechsvd.engine.passes import measure
from mechsvd.engine.reads import DRAWS, Reads, collect_reads
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, require_same_positions
from mechsvd.engine.writes import Writes, collect_writes
from mechsvd.experiments.balance import balanced_with
from mechsvd.experiments.elimination import order_by_elimination
from mechsvd.experiments.heldout import OTHERS, OWN, decompose_texts, folds_of
from mechsvd.experiments.learning import learn_subspace
from mechsvd.experiments.order_comparison import SIDES, OrderComparison
from mechsvd.experiments.ranking import order_at_random, order_by_effect, rank_directions
from mechsvd.linalg.comparison import random_subspace
from mechsvd.linalg.decomposition import Decomposition, decompose
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks

LEARNED = "learned"
RANDOM_DRAWS = 20
Key = tuple[str, str]  # of an order: its name, and "pooled" or "per site"


@runs_model(RunOptions)
def compare_orders(
    model: Model,
    tasks: Sequence[Task],
    ranks: Iterable[int],
    folds: int = 2,
    *,
    orders: Sequence[str] | None = None,
    groups: Iterable[Any] | None = None,
    steps: int = 200,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> OrderComparison:
    """Compare orders and bases by what they keep, on the texts they are fitted on and on others.

    Two ends say how far an order is from possible: random subspaces (20, Haar), and a subspace
    learned by gradient descent (see `learn_subspace`), which begins at the best of the orders. All
    directions are fitted on each text itself, and on the texts of the other folds.

    Args:
        ranks: numbers of directions to keep; of each site, for a basis per site. A basis with fewer
            keeps all that it has.
        folds: as in `fit_and_measure`, with `groups`, a label per text.
        orders: those of the result to take; all by default. Pooled or per site: "singular value";
            "balanced" and "balanced, read", its other side (see `balanced_directions`);
            "gradients", the eigenvectors of their second moment (see `collect_reads`); "learned".
            Pooled only: "effect", by the KL divergence of removing each; "elimination"; "shuffled",
            singular directions at random.
        steps: of each learned subspace.
        seed: of the folds and of all that is random.
        options: see `RunOptions` (layers, components, batch_size, …).

    Raises:
        ValueError: fewer than two texts or groups, more folds than groups, ranks out of range, or
            an unknown order.

    Example:
        >>> race = ms.compare_orders(model, tasks[:4], [64], orders=["singular value"])
        >>> race.summary().columns.tolist()[:5]
        ['order', 'basis', 'fitted', 'rank', 'mean']
    """
    require_same_positions(options)
    texts, seed = as_tasks(tasks), require_whole("seed", seed)
    fold = folds_of(len(texts), groups, folds, seed)
    chosen = whole_numbers("ranks", ranks)
    wanted = _wanted(orders)
    with open_session(model, texts, **options) as session:
        d_model = session.model.cfg.d_model
        if chosen.min() < 1 or chosen.max() > d_model:
            raise ValueError(f"`ranks` is {chosen.tolist()}, but must be from 1 to {d_model}.")
        writes = collect_writes(model, texts, **options)
        reads = collect_reads(model, texts, draws=DRAWS, seed=seed, **options)
        race = _Race(model, texts, writes, reads, chosen.tolist(), wanted, steps, seed, options)
        values = torch.full((len(SIDES), len(wanted), len(chosen), len(texts)), torch.nan)
        values = values.double()
        for i in range(len(texts)):
            values[SIDES.index(OWN), ..., [i]] = race.run([i], [i])
        for number in range(int(fold.max()) + 1):
            held = (fold == number).nonzero().flatten().tolist()
            others = (fold != number).nonzero().flatten().tolist()
            values[SIDES.index(OTHERS), ..., held] = race.run(others, held)
        random = race.random()
        source = session.provenance(session.sites)
    names, kinds = zip(*wanted, strict=True)
    return OrderComparison(names, kinds, chosen, values, random, fold, steps, seed, source)


@dataclass(frozen=True)
class _Fit:
    """What orders are made from: the texts they are fitted on, and their decompositions."""

    model: Model
    tasks: list[Task]
    svd: Decomposition
    per_site: tuple[Decomposition, ...]
    reads: Reads
    seed: int
    options: RunOptions

    def by_effect(self) -> Tensor:
        """The order by the KL divergence of removing each direction alone."""
        ranking = rank_directions(self.model, self.tasks, self.svd, **self.options)
        return order_by_effect(ranking, by="kl_divergence")

    def by_elimination(self) -> Tensor:
        """The order by elimination."""
        return order_by_elimination(self.model, self.tasks, self.svd, **self.options)

    def in_order(self, order: Tensor) -> Subspace:
        """The pooled directions in another order."""
        return Subspace(self.svd.directions[:, order], self.svd.source)


# each gives directions, or those of each site, whose first ones are kept
ORDERS: dict[Key, Callable[[_Fit], Any]] = {
    ("singular value", "pooled"): lambda fit: fit.svd,
    ("effect", "pooled"): lambda fit: fit.in_order(fit.by_effect()),
    ("elimination", "pooled"): lambda fit: fit.in_order(fit.by_elimination()),
    ("shuffled", "pooled"): lambda fit: fit.in_order(order_at_random(fit.svd, fit.seed)),
    ("balanced", "pooled"): lambda fit: balanced_with(fit.svd, fit.reads),
    ("balanced, read", "pooled"): lambda fit: balanced_with(fit.svd, fit.reads, "read"),
    ("gradients", "pooled"): lambda fit: decompose(fit.reads),
    ("singular value", "per site"): lambda fit: fit.per_site,
    ("balanced", "per site"): lambda fit: balanced_with(fit.per_site, fit.reads),
    ("balanced, read", "per site"): lambda fit: balanced_with(fit.per_site, fit.reads, "read"),
    ("gradients", "per site"): lambda fit: decompose(fit.reads, per="site"),
}
ALL: tuple[Key, ...] = (*ORDERS, (LEARNED, "pooled"), (LEARNED, "per site"))


def _wanted(orders: Any) -> list[Key]:
    if orders is None:
        return [*ALL]
    names = list(dict.fromkeys(name for name, _ in ALL))
    chosen = [orders] if isinstance(orders, str) else [*orders]
    if wrong := [name for name in chosen if name not in names]:
        raise ValueError(f"`orders` holds {wrong[0]!r:.40}, but must be of {names}.")
    if all(name == LEARNED for name in chosen):
        raise ValueError(
            f"`orders` is {chosen}, but a learned subspace begins at an order; give at least one."
        )
    return [key for key in ALL if key[0] in chosen]


@dataclass(frozen=True)
class _Race:
    """What all fits have in common."""

    model: Model
    tasks: tuple[Task, ...]
    writes: Writes
    reads: Reads
    ranks: list[int]
    wanted: list[Key]
    steps: int
    seed: int
    options: RunOptions

    def run(self, fitted: list[int], held: list[int]) -> Float[Tensor, "order rank task"]:
        """The divergences of some texts with directions fitted on some texts."""
        fit = self._fit(fitted)
        with quiet():  # few texts leave directions unseen: that is what is measured
            bases = {key: ORDERS[key](fit) for key in self.wanted if key in ORDERS}
        edits = {key: [_kept(basis, k) for k in self.ranks] for key, basis in bases.items()}
        if learned := [key for key in self.wanted if key[0] == LEARNED]:
            costs = self._measured(edits, fitted).mean(dim=2)
            for key in learned:
                edits[key] = self._learned(fit, bases, costs, key[1])
        return self._measured(edits, held)

    def random(self) -> Float[Tensor, "draw rank task"]:
        """The divergences with random subspaces."""
        like = self.writes.values
        bases = [
            random_subspace(like.shape[-1], like.shape[-1], self.seed + draw).basis.to(like)
            for draw in range(RANDOM_DRAWS)
        ]
        edits = {("", str(i)): [_kept(b, k) for k in self.ranks] for i, b in enumerate(bases)}
        return self._measured(edits, range(len(self.tasks)))

    def _fit(self, fitted: list[int]) -> _Fit:
        svd, per_site = (decompose_texts(self.writes, fitted, per) for per in ("pool", "site"))
        reads = self.reads.at(torch.isin(self.reads.task_index, torch.tensor(fitted)))
        tasks = [self.tasks[i] for i in fitted]
        return _Fit(self.model, tasks, svd, per_site, reads, self.seed, self.options)

    def _learned(
        self, fit: _Fit, bases: dict[Key, Any], costs: Float[Tensor, "order rank"], kind: str
    ) -> list[Edit]:
        """The learned subspaces of all ranks, each from the order that costs least there."""
        own = [i for i, (_, basis) in enumerate(bases) if basis == kind]
        own = own or [*range(len(bases))]
        found: list[Edit] = []
        for place, k in enumerate(self.ranks):
            best = min(own, key=lambda i: float(costs[i, place]))
            learned = learn_subspace(
                self.model,
                fit.tasks,
                k,
                per="pool" if kind == "pooled" else "site",
                start=[*bases.values()][best],
                steps=self.steps,
                seed=self.seed,
                **self.options,
            )
            found.append(keep(learned.subspace))
        return found

    def _measured(
        self, edits: dict[Key, list[Edit]], texts: Iterable[int]
    ) -> Float[Tensor, "order rank task"]:
        tasks = [self.tasks[i] for i in texts]
        every = [edit for own in edits.values() for edit in own]
        found = measure(self.model, tasks, every, metric=kl_divergence, **self.options)
        return found.effect.double().T.reshape(len(edits), len(self.ranks), len(tasks))


def _kept(basis: Any, k: int) -> Edit:
    """Keep the first k directions, or all that there are."""
    bases = basis if is_several(basis) else [basis]
    most = max(directions_of(one)[0].shape[1] for one in bases)
    return keep(first_of(basis, min(k, most)))
