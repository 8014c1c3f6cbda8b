"""What orders and bases keep of texts, their own and others, between chance and a learned end."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.experiments.heldout import OTHERS, OWN
from mechsvd.experiments.intervals import interval_columns
from mechsvd.fields import (
    ROUNDED,
    require_between,
    require_declared,
    require_finite,
    require_length,
)
from mechsvd.results import Provenance, Result, result

SIDES = (OWN, OTHERS)
REFERENCE = ("singular value", "pooled")


@result
class OrderComparison(Result):
    """KL divergence with the first k directions of several orders and bases kept, of each text.

    Attributes:
        orders, bases: one name of each per row: the order, and "pooled" or "per site".
        ranks: the numbers of kept directions; of each basis, where there is one per site.
        values: of clean ‖ kept, in nats per token: with directions fitted on the text itself, and
            on the texts of the other folds.
        random: with Haar-random subspaces of the same ranks.
        fold: of each text.
        steps: of the learned subspaces.
        seed: of all that is random.

    Example:
        >>> race.of("singular value").shape
        torch.Size([1, 4])
    """

    orders: tuple[str, ...]
    bases: tuple[str, ...]
    ranks: Int[Tensor, " rank"]
    values: Float[Tensor, "fitted order rank task"]
    random: Float[Tensor, "draw rank task"]
    fold: Int[Tensor, " task"]
    steps: int
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        for name in ("orders", "bases"):
            require_length(self, name, self.values.shape[1], "order of `values`")
        if len(self.values) != len(SIDES):
            raise ValueError(
                f"`values` of an OrderComparison must be of {SIDES}, but has {len(self.values)}."
            )

    def _require_values(self) -> None:
        require_finite(self, "values", "random")
        require_between(self, ["ranks", "fold"], 0)
        require_between(self, ["values", "random"], ROUNDED)

    def of(
        self, order: str, basis: str = "pooled", fitted: str = OTHERS
    ) -> Float[Tensor, "rank task"]:
        """The divergences of one order and basis, in nats per token.

        Args:
            fitted: "own text" or "other texts".

        Raises:
            KeyError: there is none of this kind.
        """
        kinds = [*zip(self.orders, self.bases, strict=True)]
        if (order, basis) not in kinds or fitted not in SIDES:
            raise KeyError(
                f"No order {(order, basis)} fitted on {fitted!r}: there are {kinds}, fitted on "
                f"{list(SIDES)}."
            )
        return self.values[SIDES.index(fitted), kinds.index((order, basis))]

    def to_pandas(self) -> Any:
        """One row per order, text it is fitted on, rank and text: order, basis, fitted, rank, task,
        kl_divergence. Random subspaces are fitted on nothing; theirs is the mean over the draws.
        """
        import pandas as pd

        tables = []
        for order, basis, fitted, values in self._all():
            index = {"order": order, "basis": basis, "fitted": fitted}
            grid = torch.cartesian_prod(self.ranks, torch.arange(values.shape[1])).view(-1, 2)
            columns = {"rank": grid[:, 0].numpy(), "task": grid[:, 1].numpy()}
            tables.append(
                pd.DataFrame({**index, **columns, "kl_divergence": values.flatten().numpy()})
            )
        return pd.concat(tables, ignore_index=True)

    def summary(self, confidence: float = 0.95) -> Any:
        """One row per order, text it is fitted on, and rank, with intervals over the texts.

        Columns: order, basis, fitted, rank; mean, low, high, n of the KL divergence in nats per
        token; and difference, difference_low, difference_high: what it loses more than the pooled
        singular values, fitted on the same, text by text. Where the interval holds 0, it cannot be
        told which is better. The fits are not repeated, so it says nothing of other fits.
        """
        import pandas as pd

        rows = []
        for order, basis, fitted, values in self._all():
            columns = interval_columns(values.T, confidence)
            table = pd.DataFrame({"rank": self.ranks.numpy(), **columns})
            if REFERENCE in zip(self.orders, self.bases, strict=True):
                reference = self.of(*REFERENCE, OWN if fitted == OWN else OTHERS)
                gap = interval_columns((values - reference).T, confidence)
                names = {"mean": "difference", "low": "difference_low", "high": "difference_high"}
                table = table.assign(**{new: gap[old] for old, new in names.items()})
            for name, value in (("fitted", fitted), ("basis", basis), ("order", order)):
                table.insert(0, name, value)
            rows.append(table)
        return pd.concat(rows, ignore_index=True)

    def __repr__(self) -> str:
        middle = len(self.ranks) // 2
        means = self.values[SIDES.index(OTHERS), :, middle].mean(dim=1)
        best = int(means.argmin())
        return (
            f"OrderComparison of {len(self.orders)} orders at {len(self.ranks)} ranks, "
            f"{len(self.fold)} texts in {int(self.fold.max()) + 1} folds\n"
            f"  held out, k = {int(self.ranks[middle])}: least with {self.orders[best]} "
            f"({self.bases[best]}), {float(means[best]):.3g} nats per token; random subspaces "
            f"{float(self.random[:, middle].mean()):.3g}\n"
            f"  on {self._origin()}"
        )

    def _all(self) -> list[tuple[str, str, str, Float[Tensor, "rank task"]]]:
        """Order, basis, what it is fitted on, and values; random subspaces last."""
        found = [
            (order, basis, fitted, self.values[side, i])
            for i, (order, basis) in enumerate(zip(self.orders, self.bases, strict=True))
            for side, fitted in enumerate(SIDES)
        ]
        return [*found, ("random subspace", "pooled", "nothing", self.random.mean(dim=0))]
