"""Measure, once per model, whether its hooks are its writes, and its logits right."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.fields import require_between
from mechsvd.model.cache import versions, warn_uncached
from mechsvd.model.evaluation import alone, evaluation, torch_hooks, without_hook_points
from mechsvd.model.probing import (
    cache_error,
    errors_and_sizes,
    first_run,
    probe_length,
    probe_tokens,
    run_long,
)
from mechsvd.model.runs import run_model
from mechsvd.model.sites import (
    COMPONENTS,
    Model,
    Site,
    dictionaries,
    end_of_stream,
    find_sites,
    require_model,
    stream_names,
)
from mechsvd.results import Result, result

_CHECKED: "WeakKeyDictionary[Any, dict[Any, SelfCheck]]" = WeakKeyDictionary()
_CACHES: "WeakKeyDictionary[Any, dict[Any, float]]" = WeakKeyDictionary()


@result
class SelfCheck(Result):
    """The errors that the self-check of a model measured.

    Attributes:
        block_error: of resid_pre + writes = resid_post in each block, the largest over entries of
            |difference| ÷ sum of the sizes of the entry's terms. Rounding alone keeps it near the
            precision of the dtype, even with huge entries nearby. After the last block it is what
            the final norm gets, where there is a hook point for it.
        stream_error: the same for resid_pre of the first block = resid_post of the last one, with
            all writes zeroed.
        unchecked: layers that lack a hook (`missing="skip"`), where the identity need not hold.
        output_change: largest change of a logit with all writes zeroed, relative to the largest
            logit.
        scored_error: error of the logits when only some positions are unembedded, relative to the
            largest logit.
        sharing_error: error of the logits when the rows of a batch share everything before the
            first write. It is infinite if the model's own code does not allow that; rows are then
            not shared.
        tolerance: allowed error in the model's dtype; ten times that for logits, which are a whole
            model deep.
        fused_error: error of the logits and of every write on fused kernels, for one row and for
            two, relative to the largest entry at the same position. It is infinite if they cannot
            run; the plain ones run then.
        fused_tolerance: allowed error on fused kernels. In float64 it is far smaller than
            `tolerance`: norms that a model computes in float32 must stay what they are.
        beginning_error: the same error for rows that go on from the keys and values of the first
            half of their text; see `Beginning`. If it is larger than `fused_tolerance`, rows
            run whole.
        length: tokens of the longer text, which begins with BOS.
        reference_error: error of that text's last logits, compared with the plain Hugging Face
            model that the bridge wraps, relative to the largest entry. None if there is none to
            compare with.
        unreferenced: why there is none.
        cache_error: error of the last logits if the text is read in chunks through a cache. If it
            is larger than `10 * tolerance`, text is written without a cache.
        not_finite: where the longer text's logits or writes are not finite; empty if they are.

    Example:
        >>> check.to_pandas().columns.tolist()
        ['layer', 'block_error']
    """

    block_error: Float[Tensor, " layer"]
    stream_error: float
    unchecked: tuple[int, ...]
    output_change: float
    scored_error: float
    sharing_error: float
    tolerance: float
    fused_error: float = float("inf")
    fused_tolerance: float = 0.0
    beginning_error: float = float("inf")
    length: int = 0
    reference_error: float | None = None
    unreferenced: str = ""
    cache_error: float = float("inf")
    not_finite: str = ""

    def _require_values(self) -> None:
        errors = (
            "block_error",
            "stream_error",
            "output_change",
            "scored_error",
            "sharing_error",
            "tolerance",
            "fused_error",
            "fused_tolerance",
            "beginning_error",
            "reference_error",
            "cache_error",
            "length",
        )
        require_between(self, errors, 0)  # they may hold NaN or inf if the model fails
        require_between(self, ["unchecked"], 0, len(self.block_error) - 1)

    @property
    def failure(self) -> str | None:
        """The reason why the model fails, or None if it passes."""
        if self.not_finite:
            return self.not_finite.rstrip(".")
        for layer, error in enumerate(self.block_error.tolist()):
            if layer not in self.unchecked and not error <= self.tolerance:
                return (
                    f"in block {layer}, resid_pre + attn_out + mlp_out differs from resid_post by "
                    f"{error:.2g} of the size of its terms (allowed: {self.tolerance:.0e}), "
                    "so the hooks are not the whole write"
                )
        if not self.unchecked and not self.stream_error <= self.tolerance:
            return (
                "with all writes zeroed the residual stream still changes by "
                f"{self.stream_error:.2g} of its size"
            )
        if not self.output_change > 0:
            return "zeroing all writes leaves the output as it is, so the hooks do not act"
        if self.reference_error is not None and not self.reference_error <= 10 * self.tolerance:
            return (
                f"on a text of {self.length} tokens, TransformerLens's logits differ by "
                f"{self.reference_error:.2g} of their size from those of the Hugging Face model "
                f"that it wraps (allowed: {10 * self.tolerance:.0e}; {versions()})"
            )
        return None

    @property
    def shares_prefix(self) -> bool:
        """Whether the rows of a batch may share what comes before the first edit."""
        return self.sharing_error <= 10 * self.tolerance

    @property
    def scores_alone(self) -> bool:
        """Whether the scored positions can be unembedded alone."""
        return self.scored_error <= 10 * self.tolerance

    @property
    def runs_fused(self) -> bool:
        """Whether passes with hooks at writes only may run on fused kernels."""
        return self.fused_error <= self.fused_tolerance

    @property
    def goes_on(self) -> bool:
        """Whether rows may go on from the keys and values of what no edit reaches."""
        return self.beginning_error <= self.fused_tolerance

    @property
    def keeps_cache(self) -> bool:
        """Whether a text may be read in chunks through the model's cache."""
        return self.cache_error <= 10 * self.tolerance

    def to_pandas(self) -> Any:
        """One row per block, with its error."""
        import pandas as pd

        return pd.DataFrame(
            {"layer": range(len(self.block_error)), "block_error": self.block_error.numpy()}
        )

    def __repr__(self) -> str:
        fused = f"{'' if self.runs_fused else 'not used, '}{self.fused_error:.1e}"
        cache = f"{'' if self.keeps_cache else 'not used, '}{self.cache_error:.1e}"
        reference = f"not compared{self.unreferenced and f', since {self.unreferenced}'}"
        if self.reference_error is not None:
            reference = f"{self.reference_error:.1e}"
        return (
            f"SelfCheck: {'passed' if self.failure is None else self.failure}\n"
            f"  writes + stream: {self.block_error.max():.1e} in the worst block; "
            f"zeroed writes: {self.stream_error:.1e}; output changes by {self.output_change:.2g}\n"
            f"  shared prefix: {self.sharing_error:.1e}; fused kernels: {fused}; cache: {cache}; "
            f"plain transformers, {self.length} tokens: {reference}"
        )


@plain
def self_check(model: Model, length: int | None = None) -> SelfCheck:
    """Measure on two short texts whether the model's hooks are its writes, and its logits right.

    The answer is kept per model, dtype, processing mode, torch hooks and spliced dictionaries. In a
    clean run of six tokens, `resid_pre + writes == resid_post` must hold in every block, and every
    hook must fire once. In a run with all writes zeroed, the stream must stay constant and the
    output must change. Short runs test what the engine does for speed: it unembeds only some
    positions, splits the rows of a batch at the first write, runs on fused kernels, goes on from a
    beginning, and reads a text in chunks through a cache. A longer text begins with BOS and crosses
    each length from which the model computes otherwise: windows of attention, original contexts,
    rotary factors. On it the logits must be finite, and those of the plain Hugging Face model.

    The user's hooks at hook points are off meanwhile. Torch hooks and patched forwards stay: they
    are part of the model that is measured.

    Args:
        length: tokens of the longest text that is to run. Lengths beyond it are not crossed. By
            default all up to 128 are.

    Raises:
        KeyError: the model lacks the hooks of the residual stream.
        RuntimeError: a hook does not fire exactly once.

    Example:
        >>> check = ms.self_check(model)
        >>> check.failure is None, float(check.block_error.max()) < check.tolerance
        (True, True)
    """
    require_model(model)
    longer = probe_length(model, length)
    key = (_state(model), longer)
    with alone(model):
        checks = _CHECKED.setdefault(model, {})
        if key not in checks and longer > probe_length(model):
            checks[key] = _beyond(model, self_check(model), longer)
        if key not in checks:
            checks[key] = _measure(model, longer)
        return checks[key]


def keeps_cache(model: Model, length: int) -> bool:
    """Whether texts of up to some length may be read in chunks through the model's cache.

    It is measured once, also for models whose writes have no hooks, and warned of if not.
    """
    longer = probe_length(model, length)
    key = (_state(model), longer)
    with alone(model):
        errors = _CACHES.setdefault(model, {})
        if key not in errors:
            with without_hook_points(model), evaluation(model, quiet=True):
                errors[key] = cache_error(model, longer)
            if not errors[key] <= 10 * _tolerance(model):
                warn_uncached(errors[key], longer)
    return errors[key] <= 10 * _tolerance(model)


def _state(model: Model) -> tuple[Any, ...]:
    """What the answers of the checks depend on, besides the model's code and weights."""
    return (
        next(model.parameters()).dtype,
        getattr(model, "compatibility_mode", False),
        *torch_hooks(model),
        *map(ref, dictionaries(model).values()),
    )


def _tolerance(model: Model) -> float:
    return 4 * torch.finfo(next(model.parameters()).dtype).eps + 1e-5


def require_sound(
    model: Model, check: bool = True, missing: str = "error", length: int | None = None
) -> tuple[SelfCheck, tuple[str, ...]]:
    """Run the self-check, and refuse a model that fails it if `check` is set.

    Returns:
        The self-check, and notes for the provenance.

    Raises:
        ValueError: with the block and the measured error.
    """
    outcome = self_check(model, length)
    if outcome.failure and check:
        hooks = [*torch_hooks(model), *dictionaries(model)]
        cause = f", perhaps because of what is on it at {', '.join(hooks)}" if hooks else ""
        raise ValueError(
            f"mechsvd cannot use this model: {outcome.failure}{cause}. Results would be wrong "
            "without any sign; `check=False` goes on all the same, and every result records it."
        )
    skipped = (
        [f"layers without all hooks: {list(outcome.unchecked)}"]
        if missing == "skip" and outcome.unchecked
        else []
    )
    return outcome, (*([] if check else ["self-check skipped"]), *skipped)


def _beyond(model: Model, check: SelfCheck, length: int) -> SelfCheck:
    """A check with what a longer text shows, too."""
    sites = find_sites(model, missing="skip")
    with without_hook_points(model), evaluation(model, quiet=True):
        long = run_long(model, length, sites, check.fused_tolerance)
    reference = long.reference
    if reference is not None and check.reference_error is not None:
        reference = _larger(reference, check.reference_error)
    return replace(
        check,
        length=length,
        fused_error=_larger(check.fused_error, long.fused),
        beginning_error=_larger(check.beginning_error, long.beginning),
        cache_error=_larger(check.cache_error, long.cache),
        reference_error=reference,
        unreferenced=long.unreferenced,
        not_finite=check.not_finite or long.not_finite,
    )


def _larger(first: float, second: float) -> float:
    """The larger of two errors; NaN if one is."""
    return float(torch.tensor([first, second], dtype=torch.float64).max())


def _measure(model: Model, length: int) -> SelfCheck:
    tokens = probe_tokens(model)
    sites, names = find_sites(model, missing="skip"), stream_names(model)
    stored: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        return name, lambda x, hook=None: stored.__setitem__(name, x.detach().cpu().double())

    with without_hook_points(model), evaluation(model, quiet=True):
        writes = [store(site.hook_name) for site in sites]
        ends = [*names[:-1], (names[-1][0], end_of_stream(model))]
        try:
            logits = first_run(model, tokens, [*writes, *map(store, sum(ends, ()))])
            names = ends
        except RuntimeError:  # a model may not pass its final norm by that name
            logits = run_model(model, tokens, [*writes, *map(store, sum(names, ()))])
        clean = dict(stored)
        zero = [(s.hook_name, lambda x, hook=None: torch.zeros_like(x)) for s in sites]
        zeroed = run_model(model, tokens, [*zero, store(names[0][0]), store(names[-1][1])])
        scored = slice(tokens.shape[1] - 2, tokens.shape[1])
        scored_error = _difference(run_model(model, tokens, scored=scored), logits[:, scored])
        firsts = {site.component: site for site in reversed(sites)}.values()
        sharing_error = max(
            _sharing_error(model, tokens, site.hook_name, logits) for site in firsts
        )
        tolerance, eps = _tolerance(model), torch.finfo(logits.dtype).eps
        fused_tolerance = min(10 * tolerance, 1000 * eps)
        long = run_long(model, length, sites, fused_tolerance)
    blocks = [
        [clean[s.hook_name] for s in sites if s.layer == layer] for layer in range(len(names))
    ]
    block_error = [
        _imbalance([clean[pre], *writes], clean[post])
        for (pre, post), writes in zip(names, blocks, strict=True)
    ]
    return SelfCheck(
        block_error=torch.tensor(block_error),
        stream_error=_imbalance([stored[names[0][0]]], stored[names[-1][1]]),
        unchecked=_incomplete_layers(model, sites),
        output_change=_difference(zeroed, logits),
        scored_error=scored_error,
        sharing_error=sharing_error,
        tolerance=tolerance,
        fused_error=long.fused,
        fused_tolerance=fused_tolerance,
        beginning_error=long.beginning,
        length=length,
        reference_error=long.reference,
        unreferenced=long.unreferenced,
        cache_error=long.cache,
        not_finite=long.not_finite,
    )


def _sharing_error(model: Model, tokens: Tensor, first: str, logits: Tensor) -> float:
    try:
        shared = run_model(
            model, tokens, [(first, lambda x, hook=None: x.expand(2, -1, -1).contiguous())]
        )
    # the model's own code may reshape with the batch size that it started with
    except (RuntimeError, ValueError, IndexError):
        return float("inf")
    return _difference(shared, logits.expand(2, -1, -1)) if shared.shape[0] == 2 else float("inf")


def _incomplete_layers(model: Model, sites: tuple[Site, ...]) -> tuple[int, ...]:
    expected = 1 if getattr(model.cfg, "attn_only", False) else len(COMPONENTS)
    counts = [sum(site.layer == layer for site in sites) for layer in range(model.cfg.n_layers)]
    return tuple(layer for layer, count in enumerate(counts) if count < expected)


def _imbalance(terms: list[Tensor], total: Tensor) -> float:
    error = (sum(term.reshape(total.shape) for term in terms) - total).abs()
    size = sum(term.reshape(total.shape).abs() for term in terms) + total.abs()
    return float((error / torch.where(size > 0, size, 1.0)).max())


def _difference(measured: Tensor, expected: Tensor) -> float:
    error, size = errors_and_sizes(measured, expected)
    return float(error.max() / size.max())
