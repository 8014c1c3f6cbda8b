"""What two directions of w cost together, next to what each one costs alone."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.checks import with_plain_arguments
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.results import Provenance, Result, result

Amount = Literal["interaction", "relative"]


@result
class Interactions(Result):
    """What pairs of directions cost together and alone, in some bases and in random ones.

    A direction u holds the part a = u uᵀw of w. Removing it costs f(w) − f(w − a). The interaction
    of two parts is what their costs alone exceed their cost together by:
    f(w) − f(w − a) − f(w − b) + f(w − a − b). It is 0 if they work independently, and positive if
    one of them alone already costs what both do.

    Random bases span the same directions, so they share out the same part of w among as many.

    Attributes:
        names: of the bases.
        basis: number of the basis of each pair.
        first, second: numbers of the two directions of each pair.
        first_scores, second_scores: cost of removing one of them. Draw 0 is the basis itself, and
            the others are its random bases, where pairs stand in the same places.
        both_scores: cost of removing both.
        whole: cost of removing all chosen directions of a basis.
        held: share of ‖w‖² that they hold.
        values: f(w).
        noise_floor: rounding noise of f(w).
        objective, over: what f and w are.
        seed: of the random bases.

    Example:
        >>> pairs.to_pandas().columns.tolist()[:5]
        ['basis', 'first', 'second', 'first_score', 'second_score']
    """

    names: tuple[str, ...]
    basis: Int[Tensor, " pair"]
    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    first_scores: Float[Tensor, "task draw pair"]
    second_scores: Float[Tensor, "task draw pair"]
    both_scores: Float[Tensor, "task draw pair"]
    whole: Float[Tensor, "task name"]
    held: Float[Tensor, "task name"]
    values: Float[Tensor, " task"]
    noise_floor: Float[Tensor, " task"]
    objective: str
    over: str
    seed: int = 0
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "names", self.whole.shape[1], "basis")

    def _require_values(self) -> None:
        require_finite(self, "held", "values", "noise_floor")
        require_between(self, ["basis"], 0, len(self.names) - 1)
        require_between(self, ["first", "second", "held", "noise_floor", "seed"], 0)

    @property
    def interaction(self) -> Float[Tensor, "task draw pair"]:
        """The interaction of each pair, in units of f."""
        return self.first_scores + self.second_scores - self.both_scores

    @property
    def relative(self) -> Float[Tensor, "task draw pair"]:
        """|interaction| ÷ the sum of the sizes of the three costs.

        From 0 for independent parts to 1, where two parts do nothing alone. NaN where all three
        are 0.
        """
        scores = (self.first_scores, self.second_scores, self.both_scores)
        sizes = torch.stack(scores).abs().sum(dim=0)
        return self.interaction.abs() / torch.where(sizes > 0, sizes, torch.nan)

    @property
    def is_noise(self) -> Bool[Tensor, "task draw pair"]:
        """Whether an interaction is within twice the noise floor: four values are summed."""
        return self.interaction.abs() <= 2 * self.noise_floor[:, None, None]

    def to_pandas(self) -> Any:
        """One row per pair of the bases themselves.

        The columns are basis, first, second, first_score, second_score, both_score, interaction,
        relative and is_noise. With several tasks the first column is `task`.
        """
        import pandas as pd

        tables = []
        for task in range(len(self.values)):
            columns = {
                "first": self.first,
                "second": self.second,
                "first_score": self.first_scores[task, 0],
                "second_score": self.second_scores[task, 0],
                "both_score": self.both_scores[task, 0],
                "interaction": self.interaction[task, 0],
                "relative": self.relative[task, 0],
                "is_noise": self.is_noise[task, 0],
            }
            table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
            table.insert(0, "basis", [self.names[i] for i in self.basis.tolist()])
            table.insert(0, "task", task)
            tables.append(table)
        whole = pd.concat(tables, ignore_index=True)
        return whole if len(tables) > 1 else whole.drop(columns="task")

    @with_plain_arguments
    def summary(self, of: Amount = "interaction", total: bool = False) -> Any:
        """One row per basis: the median over its pairs, next to that of its random bases.

        The columns are basis, pairs, held, whole, median, random_median, random_low, random_high
        and p_value. The random ones are the median of the random bases' medians, and the ends of
        95 % of them. The p-value is the share of all bases, this one included, whose median is at
        most as large: it is small if no random basis is as independent. With several tasks the
        first column is `task`.

        Args:
            of: "interaction" takes sizes in units of f; "relative" is without unit, so it does not
                fall when parts hold little.
            total: the sum over the pairs in place of the median; its columns are named after it.

        Raises:
            ValueError: `of` is none of these.
        """
        import pandas as pd

        if of not in ("interaction", "relative"):
            raise ValueError(f"`of` is {of!r:.40}, but must be 'interaction' or 'relative'.")
        amounts = self.interaction.abs() if of == "interaction" else self.relative
        rows = []
        for task, number in torch.cartesian_prod(
            torch.arange(len(self.values)), torch.arange(len(self.names))
        ).tolist():
            chosen = amounts[task][:, self.basis == number]
            middles = chosen.nansum(dim=1) if total else chosen.nanmedian(dim=1).values
            lost = self.interaction[task][:, self.basis == number].isnan().any(dim=1)
            middles = middles.masked_fill(lost, torch.nan)  # 0 ÷ 0 is left out, NaN is not
            rows.append(
                {
                    "task": task,
                    "basis": self.names[number],
                    "pairs": chosen.shape[1],
                    "held": float(self.held[task, number]),
                    "whole": float(self.whole[task, number]),
                    **_beside_random(middles, "sum" if total else "median"),
                }
            )
        table = pd.DataFrame(rows)
        return table if len(self.values) > 1 else table.drop(columns="task")

    def __repr__(self) -> str:
        own, random = self.interaction[:, 0].abs(), self.interaction[:, 1:].abs()
        medians = [
            f"{name} {float(own[:, self.basis == i].nanmedian()):.3g} "
            f"(random {float(random[:, :, self.basis == i].nanmedian()):.3g})"
            for i, name in enumerate(self.names)
        ]
        return (
            f"Interactions of {len(self.basis)} pairs of directions in {len(self.names)} bases, "
            f"{len(self.values)} text(s)\n"
            f"  median |interaction| in the {self.objective}: {', '.join(medians)}\n"
            f"  on {self._origin('a function')}"
        )


def _beside_random(values: Float[Tensor, " draw"], name: str) -> dict[str, float]:
    """The value of the basis itself, and where it stands among those of its random bases."""
    own, random = values[0], values[1:]
    low, high = torch.quantile(random, torch.tensor([0.025, 0.975], dtype=random.dtype))
    return {
        name: float(own),
        f"random_{name}": float(torch.quantile(random, 0.5)),
        "random_low": float(low),
        "random_high": float(high),
        "p_value": torch.nan if values.isnan().any() else float((values <= own).double().mean()),
    }
