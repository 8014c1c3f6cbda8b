"""Ridge instead of clipping: shrink every direction by its singular value, ever more strongly."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.edits.baselines import Baseline, require_baseline
from mechsvd.edits.gates import cheapest_gate
from mechsvd.engine.measurement import Measurement
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import rows_called
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import MeasureOptions, warn_other_sites
from mechsvd.experiments.intervals import summary
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.linalg.shrinkage import (
    LEFT,
    effective_number,
    evenly_spaced_strengths,
    require_strengths,
    ridge_gains,
)
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import OverTexts, Provenance, Result, result

STEPS = 64  # number of strengths by default


@result
class RidgeSweep(Result):
    """What is left of a task when ridge regression shrinks every write, for several strengths.

    Attributes:
        alphas: strengths, in squared units of the residual stream.
        effective_directions: Σ s²/(s² + alpha), the effective number of directions that are left
            (ridge regression's effective degrees of freedom).
        measurement: one row per strength, and the clean run.
        directions_left: number of directions whose gain is above 0.1; None in a file of an older
            version. Few effective directions may be many with small gains.
        basis_source: the writes that the directions come from.

    Example:
        >>> ridge.effective_directions[0]
        tensor(128., dtype=torch.float64)
    """

    alphas: Float[Tensor, " edit"]
    effective_directions: Float[Tensor, " edit"]
    measurement: Measurement
    basis_source: Provenance | None = None
    directions_left: Int[Tensor, " edit"] | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "measurement", len(self.alphas), "strength")

    def _require_values(self) -> None:
        require_finite(self, "alphas", "effective_directions")
        require_between(self, ["alphas", "effective_directions", "directions_left"], 0)

    def to_pandas(self) -> Any:
        """One row per strength.

        Columns: alpha, effective_directions, directions_left (where known), log_prob, probability,
        surprise, orig_delta, kept_delta.
        """
        table = self.measurement.to_pandas()
        if self.directions_left is not None:
            table.insert(0, "directions_left", self.directions_left.numpy())
        table.insert(0, "effective_directions", self.effective_directions.numpy())
        table.insert(0, "alpha", self.alphas.numpy())
        return table

    @property
    def source(self) -> Provenance | None:
        """The model and task of the measurement."""
        return self.measurement.source

    def __repr__(self) -> str:
        low, high = float(self.effective_directions.min()), float(self.effective_directions.max())
        return (
            f"RidgeSweep over {len(self.alphas)} strengths, "
            f"{low:.3g} to {high:.3g} effective directions\n"
            + "\n".join(repr(self.measurement).splitlines()[1:])
        )


@result
class RidgeSweeps(OverTexts):
    """The ridge sweeps of several texts over the same strengths.

    Example:
        >>> ms.sweep_ridge(model, tasks[:2], svd, [0.0, 10.0]).summary().shape
        (2, 6)
    """

    parts: tuple[RidgeSweep, ...]

    def summary(self, column: str | None = None, confidence: float = 0.95) -> Any:
        """One row per strength: alpha, effective_directions, mean, low, high, n.

        Args:
            column: of the table of a sweep; by default the metric that was measured.

        Raises:
            ValueError: there is one text only, or no such column.
        """
        name = column or self.parts[0].measurement.metric
        keys = ["alpha", "effective_directions"]
        return summary(self.to_pandas(), keys, name, confidence)


@overload
def sweep_ridge(
    model: Model,
    task: Task,
    svd: Decomposition,
    alphas: Iterable[float] | Float[Tensor, " edit"] | None = None,
    *,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> RidgeSweep: ...
@overload
def sweep_ridge(
    model: Model,
    task: Sequence[Task],
    svd: Decomposition,
    alphas: Iterable[float] | Float[Tensor, " edit"] | None = None,
    *,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> RidgeSweeps: ...
@runs_model(MeasureOptions)
def sweep_ridge(
    model: Model,
    task: Task | Sequence[Task],
    svd: Decomposition,
    alphas: Iterable[float] | Float[Tensor, " edit"] | None = None,
    *,
    baseline: Baseline | None = None,
    **options: Unpack[MeasureOptions],
) -> RidgeSweep | RidgeSweeps:
    """Shrink every write by `shrink(svd, alpha)` while the model runs, for each `alpha`.

    Args:
        alphas: strengths. By default 64, with evenly spaced effective numbers of directions; the
            last one is 0, which keeps all that the decomposition saw. What it did not see is
            dropped, as in `sweep_rank`.
        baseline: the point that writes shrink towards, 0 by default; see `gate`.
        options: see `MeasureOptions` (metric, layers, components, positions, batch_size, …).

    Raises:
        TypeError: strengths that are not numbers.
        ValueError: a strength below 0, NaN or inf, or no strengths.

    Example:
        >>> ridge = ms.sweep_ridge(model, task, svd, [0.0, 10.0])
        >>> ridge.to_pandas().columns.tolist()[:3]
        ['alpha', 'effective_directions', 'directions_left']
    """
    require_decomposition(svd)
    strengths = (
        evenly_spaced_strengths(svd.singular_values, STEPS)
        if alphas is None
        else require_strengths(alphas)
    )
    gains = ridge_gains(svd.singular_values, strengths.to(svd.singular_values.device))
    require_baseline(baseline, svd.d_model, svd.source)
    stack = cheapest_gate(svd, gains.to(svd.directions), baseline)
    with rows_called("strengths"):
        measured = measure(model, as_tasks(task), stack, **options)
    warn_other_sites(svd, measured[0].sites)
    numbers = effective_directions(svd, strengths)
    left = (gains > LEFT).sum(dim=1).cpu()
    sweeps = tuple(
        RidgeSweep(strengths, numbers, part, svd.source, left) for part in measured.parts
    )
    return sweeps[0] if isinstance(task, Task) else RidgeSweeps(sweeps)


def effective_directions(
    svd: Decomposition, alphas: Float[Tensor, " edit"]
) -> Float[Tensor, " edit"]:
    """The effective number of directions, Σ s²/(s² + alpha), per strength.

    Reference: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 2nd ed.,
        eq. 3.50.
    """
    return effective_number(svd.singular_values, alphas)
