"""Decompose, clip and measure what a transformer writes to its residual stream.

A worked example. The examples of all docstrings use its names, and go on from each other in the
order of `mechsvd.__all__`, which is that of the pipeline:

    import mechsvd as ms
    import torch

    # the embedded model; or a name ("gpt2"), a directory, or a TransformerLens model
    model = ms.load_model()
    # the continuation is greedy text, unless you pass one
    task = ms.Task.from_text(model, "I believe the meaning of life is", max_new_tokens=12)
    writes = ms.collect_writes(model, task)  # what attention and MLPs add to the residual stream
    svd = ms.decompose(writes)  # singular values, directions, and who writes them
    sweep = ms.sweep_rank(model, task, svd)  # keep the first k directions of every write, per k
    ranking = ms.rank_directions(model, task, svd)  # remove one direction at a time
    mine = svd.subspace(32)
    clipped = ms.measure(model, task, [ms.keep(mine)])  # any edits, in few forward passes
    hooks = ms.fwd_hooks(model, ms.keep(mine))  # plain TransformerLens hooks, next to yours
    logits = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)

    # calls that take a task take a list of tasks, and give intervals by `.summary()`
    texts = [f"{who} {verb}" for who in ("I", "We") for verb in ("believe", "hope", "think", "say")]
    tasks = ms.tasks_from(model, texts, max_new_tokens=3)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechsvd.attribution.curvature_ridge import CurvatureRidge, shrink_by_curvature
from mechsvd.attribution.estimate_results import RankingEstimate, RankingEstimates
from mechsvd.attribution.estimates import estimate_ranking, refine_ranking
from mechsvd.attribution.gradients import (
    GradientBasis,
    Gradients,
    collect_gradients,
    gradient_basis,
)
from mechsvd.attribution.hessian import (
    Attributions,
    hessian_attribution,
    hessian_attribution_of,
)
from mechsvd.attribution.interacting import Interactions
from mechsvd.attribution.pair_scores import interactions, interactions_of
from mechsvd.attribution.scores import Attribution
from mechsvd.attribution.stress import WorstGains, worst_gains
from mechsvd.edits.baselines import Baseline
from mechsvd.edits.bases import ablate, gate, keep, shrink
from mechsvd.edits.exchange import from_transformer_lens, to_transformer_lens
from mechsvd.edits.hooks import fwd_hooks
from mechsvd.edits.maps import chain, shift
from mechsvd.engine.ablations import donor_baseline, mean_baseline, resample_baseline
from mechsvd.engine.checkpoint import Checkpoint
from mechsvd.engine.folds import folded
from mechsvd.engine.measurement import Measurement, Measurements
from mechsvd.engine.metrics import (
    Metric,
    absolute_change,
    cross_entropy,
    greedy_share,
    kl_divergence,
    log_prob,
    logit_difference,
)
from mechsvd.engine.passes import estimate_seconds, measure
from mechsvd.engine.reads import Reads, collect_reads
from mechsvd.engine.session import MeasureOptions, RunOptions
from mechsvd.engine.stream import stream_writes
from mechsvd.engine.stream_results import WriteStream, merge
from mechsvd.engine.weights import weight_svd
from mechsvd.engine.writes import Writes, collect_writes
from mechsvd.experiments.adaptive import AdaptiveSweep, sweep_adaptively
from mechsvd.experiments.anchors import OverlapAnchors, overlap_anchors
from mechsvd.experiments.balance import balanced_directions
from mechsvd.experiments.contrast_results import Contrast, ContrastSweep
from mechsvd.experiments.contrasts import contrast, contrast_sweep
from mechsvd.experiments.criteria import (
    change_at_most,
    drop_at_most,
    kl_at_most,
    same_greedy_text,
)
from mechsvd.experiments.direction_cards import DirectionCards
from mechsvd.experiments.directions import describe
from mechsvd.experiments.dose import DoseResponse, dose_response
from mechsvd.experiments.elimination import order_by_elimination
from mechsvd.experiments.exports import FoldReport, fold
from mechsvd.experiments.faithfulness import Faithfulness, areas, measure_faithfulness
from mechsvd.experiments.generation import GenerateOptions, generate, generate_tasks
from mechsvd.experiments.heldout import Fit, HeldOut, fit_and_measure
from mechsvd.experiments.learning import LearnedSubspace, learn_subspace
from mechsvd.experiments.literature import Literature, compare_with_literature
from mechsvd.experiments.nulls import (
    another_text,
    covariance_matched,
    equal_energy,
    null,
    random_tokens,
    reinitialised,
)
from mechsvd.experiments.optimal import (
    BaselineComparison,
    OptimalBaseline,
    compare_baselines,
    optimal_baseline,
)
from mechsvd.experiments.order_comparison import OrderComparison
from mechsvd.experiments.order_race import compare_orders
from mechsvd.experiments.random_texts import RandomTextComparison, compare_with_random_texts
from mechsvd.experiments.ranking import (
    Ranking,
    Rankings,
    order_at_random,
    order_by_compromise,
    order_by_effect,
    order_by_singular_value,
    rank_directions,
)
from mechsvd.experiments.read_angles import ReadWriteAngles, read_write_angles
from mechsvd.experiments.ridge import RidgeSweep, RidgeSweeps, sweep_ridge
from mechsvd.experiments.search import (
    CriticalRank,
    CriticalRanks,
    critical_rank,
    critical_rank_of,
    ranks_without_each_token,
)
from mechsvd.experiments.sweeps import RankSweep, RankSweeps, sweep_rank
from mechsvd.linalg.comparison import (
    Overlap,
    Pool,
    overlap,
    pool,
    principal_angles,
    random_subspace,
)
from mechsvd.linalg.decomposition import Decomposition, decompose
from mechsvd.linalg.subspace import Subspace, span, union
from mechsvd.model.loading import load_model
from mechsvd.model.selfcheck import SelfCheck, self_check
from mechsvd.model.sites import Site, SiteOptions, find_sites
from mechsvd.model.tasks import SHORTFORM_PROMPTS, Task
from mechsvd.model.texts import tasks_from
from mechsvd.results import Provenance, load
from mechsvd.version import __version__ as __version__

if TYPE_CHECKING:
    from mechsvd import figures

__all__ = [  # noqa: RUF022 (in the order of the pipeline)
    # models and tasks
    "load_model", "self_check", "SelfCheck", "find_sites", "Site", "Task", "tasks_from", "SHORTFORM_PROMPTS",
    # writes and their directions
    "collect_writes", "Writes", "decompose", "Decomposition", "weight_svd",
    "stream_writes", "WriteStream", "merge", "Checkpoint", "span", "union", "Subspace",
    # edits and hooks
    "gate", "keep", "ablate", "shrink", "shift", "chain", "fwd_hooks", "fold", "FoldReport", "folded",
    "mean_baseline", "Baseline", "resample_baseline", "donor_baseline",
    "optimal_baseline", "OptimalBaseline", "compare_baselines", "BaselineComparison",
    # the options of calls that run a model
    "SiteOptions", "RunOptions", "MeasureOptions", "GenerateOptions",
    # metrics
    "Metric", "log_prob", "logit_difference", "kl_divergence", "absolute_change",
    "cross_entropy", "greedy_share",
    # measurements
    "measure", "Measurement", "Measurements", "estimate_seconds",
    "sweep_rank", "RankSweep", "RankSweeps", "sweep_adaptively", "AdaptiveSweep", "sweep_ridge", "RidgeSweep", "RidgeSweeps",
    "dose_response", "DoseResponse", "areas",
    # the critical rank, and text from inside a subspace
    "critical_rank", "critical_rank_of", "CriticalRank", "CriticalRanks", "ranks_without_each_token",
    "drop_at_most", "kl_at_most", "change_at_most", "same_greedy_text", "generate", "generate_tasks",
    # rankings and orders of directions
    "rank_directions", "Ranking", "Rankings", "estimate_ranking", "refine_ranking", "RankingEstimate", "RankingEstimates",
    "order_by_singular_value", "order_by_effect", "order_by_compromise", "order_at_random", "order_by_elimination",
    "collect_reads", "Reads", "balanced_directions", "read_write_angles", "ReadWriteAngles",
    "learn_subspace", "LearnedSubspace", "compare_orders", "OrderComparison",
    # what directions do, and whether they are faithful
    "describe", "DirectionCards", "measure_faithfulness", "Faithfulness", "worst_gains", "WorstGains",
    "fit_and_measure", "HeldOut", "Fit",
    # attribution in a Hessian eigenbasis, and in other bases
    "hessian_attribution", "hessian_attribution_of", "Attribution", "Attributions",
    "collect_gradients", "Gradients", "gradient_basis", "GradientBasis",
    "interactions", "interactions_of", "Interactions", "shrink_by_curvature", "CurvatureRidge",
    # comparison of subspaces
    "overlap", "Overlap", "pool", "Pool", "principal_angles", "random_subspace",
    "to_transformer_lens", "from_transformer_lens", "overlap_anchors", "OverlapAnchors",
    "contrast", "Contrast", "contrast_sweep", "ContrastSweep",
    # comparison with chance, and with what others found
    "null", "random_tokens", "reinitialised", "another_text", "covariance_matched", "equal_energy",
    "compare_with_random_texts", "RandomTextComparison", "compare_with_literature", "Literature",
    # provenance and figures
    "load", "Provenance", "figures",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "figures":  # imported on first use, because plotly imports slowly
        return import_module("mechsvd.figures")
    raise AttributeError(f"module 'mechsvd' has no attribute {name!r}")
