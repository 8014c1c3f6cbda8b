"""Estimated effects of removing directions, next to those that were run."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.attribution.agreement import (
    redrawn_spearman,
    share_interval,
    spearman_interval,
    upper_share,
)
from mechsvd.checks import is_number, require_whole
from mechsvd.edits.bases import names_of_directions
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.results import OverTexts, Provenance, Result, result

TOP = 32  # directions that a ranking is for, if nothing else is said


@result
class RankingEstimate(Result):
    """Estimates of what each removal costs, and the exact effects of those that were run.

    Attributes:
        singular_values: in the units of the residual stream; NaN for a basis without any.
        derivative: the effect of each removal as derivatives at the clean run, or on a path, give
            it, in `unit`; damage is positive.
        exact: the effect where the removal was run; NaN elsewhere.
        is_sampled: the random sample of those, which tests the estimates.
        correction: a in estimate = derivative + a·σ²; see `estimate_ranking`.
        order: "1", "2" or "path".
        metric, unit: of the effects.
        gradients, products: what the derivatives took: gradients, and products with the Hessian.
        seed: of the sample.
        bases, sizes: as in `Ranking`.
        source: the model and the text.

    Example:
        >>> estimate.to_pandas().columns.tolist()[:4]
        ['direction', 'singular_value', 'derivative', 'estimate']
    """

    singular_values: Float[Tensor, " rank"]
    derivative: Float[Tensor, " rank"]
    exact: Float[Tensor, " rank"]
    is_sampled: Bool[Tensor, " rank"]
    correction: float
    order: str
    metric: str
    unit: str
    gradients: int
    products: int
    seed: int
    bases: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sizes", len(self.bases), "basis")

    def _require_values(self) -> None:
        known = [] if self.singular_values.isnan().all() else ["singular_values"]
        require_finite(self, *known, "derivative", "correction")
        require_between(self, [*known, "gradients", "products"], 0)
        if (self.is_sampled & ~self.is_exact).any():
            raise ValueError("`exact` must hold the effect of every sampled direction.")

    def __len__(self) -> int:
        """Number of directions."""
        return len(self.derivative)

    @property
    def is_exact(self) -> Bool[Tensor, " rank"]:
        """Which removals were run."""
        return ~self.exact.isnan()

    @property
    def estimate(self) -> Float[Tensor, " rank"]:
        """The estimated effect of each removal, in `unit`: derivative + correction·σ²."""
        return self.derivative + self.correction * self._squares

    @property
    def effect(self) -> Float[Tensor, " rank"]:
        """The exact effect where the removal was run, and else the estimate."""
        return torch.where(self.is_exact, self.exact, self.estimate)

    @property
    def cost(self) -> float:
        """Work, as a share of that of the exact ranking: one forward pass per direction.

        A gradient counts as 3 forward passes and a Hessian product as 6: a backward pass costs at
        most twice its forward pass. The run time differs from it, as kernels do.
        """
        rows = int(self.is_exact.sum()) + 3 * self.gradients + 6 * self.products
        return rows / max(1, len(self))

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each direction: its number, after that of its basis if there are several."""
        return names_of_directions(self.bases, self.sizes, len(self))

    def held_out(self) -> Float[Tensor, " sampled"]:
        """The estimate of each sampled direction with the correction that the others give."""
        squares, errors = self._squares[self.is_sampled], self._errors
        if self.correction == 0 or len(errors) < 2:
            return self.estimate[self.is_sampled]
        others = [
            _smaller_quartile(errors[torch.arange(len(errors)) != i]) for i in range(len(errors))
        ]
        return self.derivative[self.is_sampled] + torch.tensor(others).to(squares) * squares

    @property
    def shown_correction(self) -> float:
        """The a that the sample shows: of the quartiles of error ÷ σ², the one nearer to 0."""
        return _smaller_quartile(self._errors)

    def order_by_estimate(self) -> Int[Tensor, " rank"]:
        """The directions by falling effect; an order for `sweep_rank`."""
        return self.effect.argsort(descending=True, stable=True)

    def doubt(self, top: int = TOP) -> Float[Tensor, " rank"]:
        """How near each estimate is to the last of the top effects, in units of its likely error.

        Errors grow with σ², as the curvature in a gain does, and the sample says by how much: below
        1 an error such as nine in ten of the sample have would change the side. Infinite where the
        effect is exact.
        """
        errors = (self.held_out() - self.exact[self.is_sampled]).abs()
        relative = errors / self._squares[self.is_sampled]
        scale = relative.quantile(0.9) if len(errors) else relative.new_tensor(1.0)
        likely = (scale * self._squares).clamp(min=torch.finfo(torch.float64).tiny)
        distance = (self.estimate - self._threshold(top)).abs() / likely
        return torch.where(self.is_exact, torch.inf, distance)

    def is_flagged(self, top: int = TOP) -> Bool[Tensor, " rank"]:
        """Which estimates are too near to the last of the top effects to tell their side."""
        return self.doubt(top) < 1

    def agreement(self, top: int = TOP, confidence: float = 0.95) -> Any:
        """One row: how well the estimates do, as far as the random sample shows it.

        Columns, each with `_low` and `_high` limits: `spearman`, the rank correlation of estimate
        and exact effect; `sign`, the share of equal signs; `recall`, of the directions at least as
        harmful as the last of the `top` reported, the share whose estimate says so. Also
        `sampled`; `missed_high`, the upper limit (one-sided) of how many directions that were not
        run belong to the top but are not reported; and `cost`. Each sampled direction is estimated
        with the correction of the others. A sample of eight tells little: the intervals are wide.
        That of `spearman` is the hull of Fieller's and of one in which errors per σ² are redrawn
        for all directions; on the trained models here, more than nine in ten held the true value.

        Raises:
            ValueError: `top` is no number of directions, or `confidence` not between 0.5 and 1.
        """
        import pandas as pd

        top = require_whole("top", top, 1, len(self))
        if not is_number(confidence, 0.5) or not confidence < 1:
            raise ValueError(
                f"`confidence` is {confidence!r:.40}, but must be from 0.5 to below 1."
            )
        exact, guess = self.exact[self.is_sampled], self.held_out()
        last = self._threshold(top)
        worst = exact >= last
        rows = {
            "spearman": self._spearman(confidence),
            "sign": _share(guess.sign() == exact.sign(), confidence),
            "recall": _share((guess >= last)[worst], confidence),
        }
        row: dict[str, Any] = {"sampled": len(exact)}
        for name, (value, low, high) in rows.items():
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        row |= {"missed_high": self._missed(guess, last, confidence), "cost": self.cost}
        return pd.DataFrame([row])

    def to_pandas(self) -> Any:
        """One row per direction: direction, singular_value, derivative, estimate, exact, effect, …

        The last columns are `is_sampled`, and `is_flagged` for the top 32. With several bases, the
        first column is `basis`, and directions count within it.
        """
        import pandas as pd

        sizes = self.sizes or (len(self),)
        columns: dict[str, Any] = {
            "direction": [j for size in sizes for j in range(size)],
            "singular_value": self.singular_values.numpy(),
            "derivative": self.derivative.numpy(),
            "estimate": self.estimate.numpy(),
            "exact": self.exact.numpy(),
            "effect": self.effect.numpy(),
            "is_sampled": self.is_sampled.numpy(),
            "is_flagged": self.is_flagged(min(TOP, len(self))).numpy(),
        }
        table = pd.DataFrame(columns)
        if self.bases:
            names = [n for n, size in zip(self.bases, sizes, strict=True) for _ in range(size)]
            table.insert(0, "basis", names)
        return table

    def __repr__(self) -> str:
        correlation, low, high = self._spearman(0.95)
        return (
            f"RankingEstimate of {len(self)} directions, order {self.order}, "
            f"{int(self.is_exact.sum())} of them run\n"
            f"  `{self.metric}`: rank correlation {correlation:.2f} ({low:.2f} to {high:.2f}) in a "
            f"sample of {int(self.is_sampled.sum())}; {self.cost:.0%} of the exact work\n"
            f"  on {self._origin()}"
        )

    def _spearman(self, confidence: float) -> tuple[float, float, float]:
        guess, exact = self.held_out(), self.exact[self.is_sampled]
        value, *limits = spearman_interval(guess, exact, confidence)
        if value != value or not len(exact):
            return value, -1.0, 1.0
        squares = self._squares
        errors = (exact - guess) / squares[self.is_sampled]
        redrawn = redrawn_spearman(self.estimate, squares, errors, confidence, self.seed)
        return value, min(limits[0], redrawn[0]), max(limits[1], redrawn[1])

    @property
    def _squares(self) -> Float[Tensor, " rank"]:
        tiny = torch.finfo(torch.float64).tiny
        return self.singular_values.double().square().nan_to_num(1.0).clamp(min=tiny)

    @property
    def _errors(self) -> Float[Tensor, " sampled"]:
        """The errors of the derivatives in the sample, per σ²."""
        sampled = self.is_sampled
        return ((self.exact - self.derivative) / self._squares)[sampled]

    def _threshold(self, top: int) -> Float[Tensor, ""]:
        """The last of the top effects."""
        return self.effect.topk(min(top, len(self))).values[-1]

    def _missed(self, guess: Tensor, last: Tensor, confidence: float) -> float:
        """The upper limit of directions that were not run, seem below the top, and are not."""
        outside = ~self.is_exact & (self.estimate < last)
        if not outside.any():
            return 0.0
        exact = self.exact[self.is_sampled]
        comparable = (guess < last) & (guess <= self.estimate[outside].max())
        hits = int((exact >= last)[comparable].sum())
        return int(outside.sum()) * upper_share(hits, int(comparable.sum()), confidence)


def _smaller_quartile(errors: Tensor) -> float:
    """Of the lower and the upper quartile, the one nearer to 0; 0 if they have two signs."""
    low, high = errors.quantile(torch.tensor([0.25, 0.75]).to(errors)).tolist()
    return max(0.0, low) + min(0.0, high)


def _share(hits: Tensor, confidence: float) -> tuple[float, float, float]:
    return share_interval(int(hits.sum()), len(hits), confidence)


@result
class RankingEstimates(OverTexts):
    """The estimates of several texts, of the same directions.

    Example:
        >>> len(ms.estimate_ranking(model, tasks[:2], svd, verify=0.0))
        2
    """

    parts: tuple[RankingEstimate, ...]

    @property
    def effect(self) -> Float[Tensor, "task rank"]:
        """What each removal costs each text: exact where it was run, and else the estimate."""
        return torch.stack([part.effect for part in self.parts])

    def agreement(self, top: int = TOP, confidence: float = 0.95) -> Any:
        """One row per text; see `RankingEstimate.agreement`."""
        import pandas as pd

        tables = [part.agreement(top, confidence) for part in self.parts]
        table = pd.concat(tables, ignore_index=True)
        table.insert(0, "task", range(len(tables)))
        return table
