"""How faithful a set of directions is: errors that may cancel, areas under curves, and stress."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.checks import require_whole
from mechsvd.edits.baselines import Baseline, require_baseline
from mechsvd.edits.gates import Gate
from mechsvd.engine.metrics import AnyMetric
from mechsvd.engine.passes import measure
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions
from mechsvd.experiments.sweeps import RankSweep, RankSweeps
from mechsvd.fields import (
    ROUNDED,
    require_between,
    require_declared,
    require_finite,
    require_length,
)
from mechsvd.linalg.decomposition import (
    Decomposition,
    kept_directions,
    require_decomposition,
)
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, result

STRESS = 64  # random gains of the removed part


@plain
def areas(sweeps: RankSweep | RankSweeps) -> Any:
    """The areas of each text's curve of the metric against the number of kept directions.

    The metric is scaled so that keeping nothing is 0 and the clean run is 1. CPR is the area under
    the curve, and CMD the area between it and 1; both over the ranks on a linear axis and, from
    rank 1, on a logarithmic one, as shares of the axis.

    Returns:
        A table with one row per text: task, cpr, cmd, cpr_log, cmd_log.

    Raises:
        ValueError: a sweep without rank 0, or of fewer than three ranks.

    Reference: Mueller et al., MIB: a mechanistic interpretability benchmark, 2025,
        arXiv:2504.13151.

    Example:
        >>> ms.areas(sweep).columns.tolist()
        ['task', 'cpr', 'cmd', 'cpr_log', 'cmd_log']
    """
    import pandas as pd

    parts = sweeps.parts if isinstance(sweeps, RankSweeps) else (sweeps,)
    rows = []
    for number, sweep in enumerate(parts):
        order = sweep.ranks.argsort()
        ranks, values = sweep.ranks[order].double(), sweep.measurement.value[order].double()
        if len(ranks) < 3 or ranks[0] != 0:
            raise ValueError(
                f"The sweep has the ranks {ranks.long().tolist()!s:.40}, but its areas need rank 0 "
                "and at least two others."
            )
        clean = float(sweep.measurement.clean_run.value)
        scaled = (values - values[0]) / (clean - values[0])
        cpr, cmd = (_area(ranks, curve) for curve in (scaled, (1 - scaled).abs()))
        logs = ranks[1:].log()
        cpr_log, cmd_log = (_area(logs, curve[1:]) for curve in (scaled, (1 - scaled).abs()))
        row = {"task": number, "cpr": cpr, "cmd": cmd, "cpr_log": cpr_log, "cmd_log": cmd_log}
        rows.append(row)
    return pd.DataFrame(rows)


@result
class Faithfulness(Result):
    """What is left of some texts when only some directions are kept, and what the rest does.

    Attributes:
        kept: numbers of the kept directions.
        token_changes: of each text, edited − clean log-probability of each token under the kept
            directions; NaN beyond its last token.
        divergences: KL divergence of clean ‖ kept of each text, in nats per token.
        effects: on the metric, per text, in `unit`: with the kept directions only, without them
            (completeness: the rest alone should do nothing), and with each kept direction dropped
            alone (minimality: each should matter).
        single, joint: what the removed directions cost one at a time, summed, and all together.
        stress: with random gains from 0 to 1 on the removed directions.
        seed: of the random gains.

    Example:
        >>> faithfulness.divergences.shape
        torch.Size([1])
    """

    kept: Int[Tensor, " direction"]
    token_changes: Float[Tensor, "task token"]
    divergences: Float[Tensor, " task"]
    effects: Float[Tensor, "task edit"]
    single: Float[Tensor, " task"]
    joint: Float[Tensor, " task"]
    stress: Float[Tensor, "task draw"]
    metric: str
    unit: str
    seed: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "kept", self.effects.shape[1] - 2, "edit of `effects` after two")

    def _require_values(self) -> None:
        require_finite(self, "divergences", "effects", "single", "joint", "stress")
        require_between(self, ["divergences"], ROUNDED)

    @property
    def non_additivity(self) -> Float[Tensor, " task"]:
        """Joint ÷ summed single effects of the removed directions; not a test of interaction."""
        return self.joint / torch.where(self.single != 0, self.single, torch.nan)

    def to_pandas(self) -> Any:
        """One row per text.

        Columns: task, effect (kept directions only), mean_abs_change (E|Δ| over tokens, nats),
        abs_mean_change (|EΔ|: tokens cancel), worst_change and worst_token, kl_divergence,
        effect_of_the_rest (completeness), least_needed (minimality: the smallest effect of dropping
        one kept direction), non_additivity, stress_mean and stress_worst.
        """
        import pandas as pd

        lost = self.divergences.isnan()[:, None]  # NaN at a token, not only beyond the last one
        changes = self.token_changes.masked_fill(lost, torch.nan)
        sizes = changes.abs()
        worst = sizes.nan_to_num(-1).argmax(dim=1)
        dropped = self.effects[:, 2:] - self.effects[:, :1]
        columns = {
            "task": torch.arange(len(sizes)),
            "effect": self.effects[:, 0],
            "mean_abs_change": sizes.nanmean(dim=1),
            "abs_mean_change": changes.nanmean(dim=1).abs(),
            "worst_change": sizes.gather(1, worst[:, None])[:, 0],
            "worst_token": worst,
            "kl_divergence": self.divergences,
            "effect_of_the_rest": self.effects[:, 1],
            "least_needed": dropped.amin(dim=1) if dropped.shape[1] else self.joint * torch.nan,
            "non_additivity": self.non_additivity,
            "stress_mean": self.stress.mean(dim=1),
            "stress_worst": self.stress.amax(dim=1),
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def __repr__(self) -> str:
        table = self.to_pandas()
        return (
            f"Faithfulness of {len(self.kept)} directions on {len(table)} text(s)\n"
            f"  per token: mean |change| {table.mean_abs_change.mean():.3g} nats, "
            f"|mean change| {table.abs_mean_change.mean():.3g}, worst {table.worst_change.max():.3g}; "
            f"KL {table.kl_divergence.mean():.3g}\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def measure_faithfulness(
    model: Model,
    tasks: Task | Sequence[Task],
    svd: Decomposition,
    kept: Any,
    *,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Faithfulness:
    """Measure how faithful a set of directions is, in ways in which errors do not cancel.

    All edits share forward passes: the kept directions alone, the rest alone, each kept direction
    dropped, each removed one alone, and 64 random gains from 0 to 1 on the removed directions. What
    the decomposition did not see is dropped where only kept directions stay, as in `sweep_rank`.
    `worst_gains` looks for gains that are worse than random ones.

    Args:
        kept: numbers of the directions to keep, or how many of the first.
        baseline: what the removed part is replaced by, 0 by default; see `gate`.
        options: see `RunOptions` (layers, components, batch_size, …).

    Raises:
        ValueError: directions out of range or repeated, or none or all of them.

    Example:
        >>> faithfulness = ms.measure_faithfulness(model, task, svd, range(64))
        >>> faithfulness.to_pandas().columns.tolist()[:4]
        ['task', 'effect', 'mean_abs_change', 'abs_mean_change']
    """
    require_decomposition(svd)
    require_baseline(baseline, svd.d_model, svd.source)
    seed = require_whole("seed", seed)
    chosen = kept_directions(svd, kept)
    is_kept = torch.zeros(svd.rank)
    is_kept[chosen] = 1.0
    removed = (is_kept == 0).nonzero().flatten()
    dropped = is_kept.repeat(len(chosen), 1)
    dropped[torch.arange(len(chosen)), chosen] = 0
    alone = torch.ones(len(removed), svd.rank)
    alone[torch.arange(len(removed)), removed] = 0
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(STRESS, svd.rank, generator=generator)
    random[:, chosen] = 1.0
    gains = torch.cat([is_kept[None], 1 - is_kept[None], dropped, alone, random])
    rest = torch.ones(len(gains))
    rest[[0, *range(2, 2 + len(chosen))]] = 0  # unseen parts are dropped with what is not kept
    stack = Gate(
        svd.directions, gains.to(svd.directions), rest.to(svd.directions), svd.source, baseline
    )
    measured = measure(model, as_tasks(tasks), stack, metric=metric, **options)
    effects = measured.effect.double()
    several = [2 + len(chosen), len(removed), STRESS]
    first, single, stress = effects.split(several, dim=1)
    changes = [part.log_probs[0] - part.clean_run.log_probs[0] for part in measured.parts]
    return Faithfulness(
        chosen,
        torch.nn.utils.rnn.pad_sequence(changes, batch_first=True, padding_value=torch.nan),
        torch.stack([part.kl_divergence[0] for part in measured.parts]),
        first,
        single.sum(dim=1),
        first[:, 0],
        stress,
        measured[0].metric,
        measured[0].unit,
        seed,
        measured.source,
    )


def _area(x: Float[Tensor, " rank"], y: Float[Tensor, " rank"]) -> float:
    """The area under a curve, as a share of its axis."""
    return float(torch.trapezoid(y, x) / (x[-1] - x[0]))
