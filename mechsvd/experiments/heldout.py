"""Held-out texts: directions fitted on some texts, measured on others, next to a text's own."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_whole, quiet, require_whole, whole_numbers
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, require_same_positions
from mechsvd.engine.writes import Writes, collect_writes
from mechsvd.experiments.criteria import kl_at_most
from mechsvd.experiments.intervals import interval_columns
from mechsvd.experiments.ranking import (
    order_at_random,
    order_by_effect,
    order_by_singular_value,
    rank_directions,
)
from mechsvd.experiments.search import critical_rank_of
from mechsvd.experiments.sweeps import RankSweep, RankSweeps, sweep_rank
from mechsvd.linalg.comparison import random_subspace
from mechsvd.linalg.decomposition import Decomposition, decompose
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

OWN, ONE, OTHERS = "own text", "one other text", "other texts"
RANDOM = "random directions"
BASES = {"pooled": "pool", "per site": "site"}  # the names of the bases, and what `decompose` takes
ORDERS = ("singular value", "KL divergence", "random")


@result
class Fit(Result):
    """The sweeps of all texts with directions that were fitted in one way.

    Attributes:
        fitted: on which texts.
        basis, order: of the directions.
        d_model: dimension of the residual stream.

    Example:
        >>> held_out.fits[0].fitted, held_out.fits[0].basis
        ('other texts', 'pooled')
    """

    fitted: str
    basis: str
    order: str
    sweeps: RankSweeps
    d_model: int

    def lasting_ranks(self, nats: float = 1.0) -> Int[Tensor, " task"]:
        """The lasting rank of each text: from it on, the summed KL divergence is at most `nats`.

        A text that never comes so close with the directions that there are counts as `d_model`,
        which is too few: it needs what they do not span.
        """
        ranks = [lasting_rank_within(sweep, nats) for sweep in self.sweeps.parts]
        return torch.tensor([self.d_model if rank is None else rank for rank in ranks])

    def reached(self, nats: float = 1.0) -> int:
        """The number of texts that have a lasting rank."""
        return sum(lasting_rank_within(sweep, nats) is not None for sweep in self.sweeps.parts)

    @property
    def source(self) -> Provenance | None:
        """The model and the first text."""
        return self.sweeps.source

    def to_pandas(self) -> Any:
        """One row per text and rank, with what the directions are fitted on."""
        table = self.sweeps.to_pandas()
        for name in ("order", "basis", "fitted"):
            table.insert(0, name, getattr(self, name))
        return table

    def __repr__(self) -> str:
        return f"Fit on {self.fitted}, {self.basis}, by {self.order}\n{self.sweeps!r}"


@result
class HeldOut(Result):
    """Sweeps with directions of the text itself, of one other text, and of other texts.

    Attributes:
        fits: one per way of fitting, basis and order; all of the same texts.
        fold: of each text; the directions of "other texts" come from the other folds.

    Example:
        >>> held_out.fit("own text", "pooled").lasting_ranks().shape
        torch.Size([2])
    """

    fits: tuple[Fit, ...]
    fold: Int[Tensor, " task"]

    @property
    def source(self) -> Provenance | None:
        """The model and the first text."""
        return self.fits[0].source

    def fit(self, fitted: str, basis: str = "pooled", order: str = "singular value") -> Fit:
        """One of the fits.

        Raises:
            KeyError: there is none of this kind.
        """
        for fit in self.fits:
            if (fit.fitted, fit.basis, fit.order) == (fitted, basis, order):
                return fit
        kinds = [(fit.fitted, fit.basis, fit.order) for fit in self.fits]
        raise KeyError(f"No fit {(fitted, basis, order)}: there are {kinds}.")

    def summary(self, nats: float = 1.0, confidence: float = 0.95) -> Any:
        """One row per fit: fitted, basis, order, mean, low, high, n of the lasting rank over texts.

        The last column, reached, is the number of texts that have one; the others count as
        `d_model`.

        Args:
            nats: of KL divergence, summed over the text, that every larger rank must stay within.
        """
        import pandas as pd

        rows = []
        for fit in self.fits:
            columns = interval_columns(fit.lasting_ranks(nats).double()[:, None], confidence)
            numbers = {name: c if name == "n" else float(c[0]) for name, c in columns.items()}
            kind = {"fitted": fit.fitted, "basis": fit.basis, "order": fit.order}
            rows.append({**kind, **numbers, "reached": fit.reached(nats)})
        return pd.DataFrame(rows)

    def to_pandas(self) -> Any:
        """One row per fit, text and rank: fitted, basis, order, task, then as a sweep."""
        import pandas as pd

        return pd.concat([fit.to_pandas() for fit in self.fits], ignore_index=True)

    def __repr__(self) -> str:
        own, others = (
            float(fit.lasting_ranks().double().mean()) for fit in (self.fit(OWN), self.fit(OTHERS))
        )
        return (
            f"HeldOut: {len(self.fold)} texts in {int(self.fold.max()) + 1} folds, "
            f"{len(self.fits)} fits\n"
            f"  lasting rank for 1 nat of KL divergence, mean: {own:.1f} with a text's own "
            f"directions, {others:.1f} with those of other texts\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def fit_and_measure(
    model: Model,
    tasks: Sequence[Task],
    folds: int = 5,
    *,
    groups: Iterable[Any] | None = None,
    orders: Sequence[str] = ("singular value",),
    ranks: Iterable[int] | None = None,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> HeldOut:
    """Sweep every text with directions that it had no part in, next to its own.

    The texts are split into folds at random. The directions of each fold's texts come from the
    writes of all other folds, pooled over sites and per site. Next to them stand the directions of
    the text itself, of one other text of another fold, and random ones.

    Args:
        folds: at most as many as there are texts or groups.
        groups: a label per text; texts of one group stay in one fold, as texts of one source should.
        orders: "singular value", "KL divergence" (of removing each direction, in the mean over the
            texts that it is fitted on), "random".
        ranks: for all sweeps; every rank by default.
        seed: of the folds, of the other text and of the random directions.
        options: see `RunOptions` (layers, components, batch_size, …).

    Raises:
        ValueError: fewer than two texts or groups, more folds than groups, or an unknown order.

    Example:
        >>> held_out = ms.fit_and_measure(model, tasks[:2], folds=2, ranks=[0, 64, 128])
        >>> held_out.summary().columns.tolist()[:4]
        ['fitted', 'basis', 'order', 'mean']
    """
    require_same_positions(options)
    texts = as_tasks(tasks)
    fold = folds_of(len(texts), groups, folds, require_whole("seed", seed))
    named = [orders] if isinstance(orders, str) else [*orders]
    if wrong := [order for order in named or ["nothing"] if order not in ORDERS]:
        raise ValueError(f"`orders` holds {wrong[0]!r:.40}, but must be of {list(ORDERS)}.")
    chosen_ranks = None if ranks is None else whole_numbers("ranks", ranks).tolist()
    found: dict[tuple[str, str, str], dict[int, RankSweep]] = {}
    with open_session(model, texts, **options):
        everything = collect_writes(model, texts, **options)
        random = random_directions(everything, seed)
        if wrong := [k for k in chosen_ranks or () if not 0 <= k <= random.rank]:
            raise ValueError(f"`ranks` holds {wrong[:5]}, but must be from 0 to {random.rank}.")

        def sweep(key: tuple[str, str], svd: Any, fitted_on: list[int], own: list[int]) -> None:
            for order in named:
                places = _order(model, [texts[i] for i in fitted_on], svd, order, seed, options)
                most = max(one.rank for one in (svd if isinstance(svd, tuple) else [svd]))
                kept = chosen_ranks and _up_to(most, chosen_ranks)
                sweeps = sweep_rank(model, [texts[i] for i in own], svd, kept, places, **options)
                found.setdefault((*key, order), {}).update(zip(own, sweeps.parts, strict=True))

        for number in range(int(fold.max()) + 1):
            own = (fold == number).nonzero().flatten().tolist()
            others = (fold != number).nonzero().flatten().tolist()
            for basis, per in BASES.items():
                svd = decompose_texts(everything, others, per)
                sweep((OTHERS, basis), svd, others, own)
        generator = torch.Generator().manual_seed(seed)
        for i in range(len(texts)):
            others = (fold != fold[i]).nonzero().flatten().tolist()
            other = others[int(torch.randint(len(others), (1,), generator=generator))]
            for basis, per in BASES.items():
                for fitted, source in ((OWN, i), (ONE, other)):
                    svd = decompose_texts(everything, [source], per)
                    sweep((fitted, basis), svd, [source], [i])
        sweeps = sweep_rank(model, texts, random, chosen_ranks, **options)
        found[RANDOM, "pooled", "random"] = dict(enumerate(sweeps.parts))
    fits = tuple(
        Fit(*key, RankSweeps(tuple(parts[i] for i in range(len(texts)))), random.d_model)
        for key, parts in found.items()
    )
    return HeldOut(fits, fold)


def _up_to(most: int, ranks: list[int]) -> list[int]:
    """The ranks that a basis has; all of them where it has none, to be refused by name."""
    return [rank for rank in ranks if rank <= most] or ranks


def folds_of(count: int, groups: Any, folds: Any, seed: int) -> Int[Tensor, " task"]:
    """The fold of each text; texts of one group share one. See `fit_and_measure`.

    Raises:
        ValueError: fewer than two texts or groups, or more folds than groups.
    """
    labels = [*range(count)] if groups is None else [*groups]
    if len(labels) != count:
        raise ValueError(f"`groups` has {len(labels)} labels for {count} texts; give one for each.")
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise ValueError(
            f"There is {len(names)} text or group, but held-out texts need at least two: with one, "
            "the curve is fitted on what it measures."
        )
    if not is_whole(folds, 2, len(names)):
        raise ValueError(
            f"`folds` is {folds!r:.40}, but must be from 2 to the {len(names)} texts or groups."
        )
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    fold_of = {names[i]: place % int(folds) for place, i in enumerate(shuffled)}
    return torch.tensor([fold_of[label] for label in labels])


def decompose_texts(writes: Writes, texts: Sequence[int], per: str) -> Any:
    """The decomposition of the writes of some texts, by their numbers; see `decompose`."""
    chosen = torch.isin(writes.task_index, torch.tensor(texts))
    with quiet():  # few texts leave directions unseen: that is what is measured
        return decompose(writes.at(chosen), per=per)  # type: ignore[call-overload]


def _order(
    model: Model, tasks: list[Task], svd: Any, order: str, seed: int, options: RunOptions
) -> Tensor:
    if order == "singular value":
        return order_by_singular_value(svd)
    if order == "random":
        return order_at_random(svd, seed)
    return order_by_effect(rank_directions(model, tasks, svd, **options), by="kl_divergence")


def random_directions(writes: Writes, seed: int) -> Decomposition:
    """Haar-random directions of the whole space, with the sizes of the writes along them."""
    d_model = writes.values.shape[-1]
    basis = random_subspace(d_model, d_model, seed).basis
    coordinates = writes.values.cpu().double() @ basis
    sizes = coordinates.flatten(0, 1).norm(dim=0)
    order = sizes.argsort(descending=True)
    left = coordinates / torch.where(sizes > 0, sizes, 1.0)
    kept = writes.values
    return Decomposition(
        sizes[order].to(kept),
        basis[:, order].to(kept),
        left[..., order].to(kept),
        source=writes.source,
    )


def lasting_rank_within(sweep: RankSweep, nats: float) -> int | None:
    """The rank from which all larger ones stay within `nats`, summed over the text; or None."""
    criterion = kl_at_most(nats / sweep.measurement.log_probs.shape[1])
    return critical_rank_of(sweep, criterion=criterion).lasting_rank
