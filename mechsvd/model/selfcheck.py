"""Measure, once per model, whether the hooks' values make up the residual stream.

A few tokens are enough.
"""

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.fields import require_between
from mechsvd.model.beginnings import read_beginning
from mechsvd.model.evaluation import alone, evaluation, torch_hooks, without_hook_points
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
        )
        require_between(self, errors, 0)  # they may hold NaN or inf if the model fails
        require_between(self, ["unchecked"], 0, len(self.block_error) - 1)

    @property
    def failure(self) -> str | None:
        """The reason why the model fails, or None if it passes."""
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

    def to_pandas(self) -> Any:
        """One row per block, with its error."""
        import pandas as pd

        return pd.DataFrame(
            {"layer": range(len(self.block_error)), "block_error": self.block_error.numpy()}
        )

    def __repr__(self) -> str:
        unused = "" if self.runs_fused else "not used, "
        return (
            f"SelfCheck: {'passed' if self.failure is None else self.failure}\n"
            f"  writes + stream: {self.block_error.max():.1e} in the worst block; "
            f"zeroed writes: {self.stream_error:.1e}\n"
            f"  output changes by {self.output_change:.2g}; shared prefix: {self.sharing_error:.1e}; "
            f"fused kernels: {unused}{self.fused_error:.1e}"
        )


@plain
def self_check(model: Model) -> SelfCheck:
    """Measure on six tokens whether the model's hooks are its writes.

    The answer is kept per model, dtype, processing mode, torch hooks and spliced
    dictionaries. In a clean run,
    `resid_pre + writes == resid_post` must hold in every block, and every hook must fire once. In a
    run with all writes zeroed, the stream must stay constant and the output must change. Short runs
    test what the engine does for speed: it unembeds only some positions, splits the rows of a batch
    at the first write, runs on fused kernels, and goes on from a beginning.

    The user's hooks at hook points are off meanwhile. Torch hooks and patched forwards stay: they
    are part of the model that is measured.

    Raises:
        KeyError: the model lacks the hooks of the residual stream.
        RuntimeError: a hook does not fire exactly once.

    Example:
        >>> check = ms.self_check(model)
        >>> check.failure is None, float(check.block_error.max()) < check.tolerance
        (True, True)
    """
    require_model(model)
    state = (
        next(model.parameters()).dtype,
        getattr(model, "compatibility_mode", False),
        *torch_hooks(model),
        *map(ref, dictionaries(model).values()),
    )
    with alone(model):
        checks = _CHECKED.setdefault(model, {})
        if state not in checks:
            checks[state] = _measure(model)
        return checks[state]


def require_sound(
    model: Model, check: bool = True, missing: str = "error"
) -> tuple[SelfCheck, tuple[str, ...]]:
    """Run the self-check, and refuse a model that fails it if `check` is set.

    Returns:
        The self-check, and notes for the provenance.

    Raises:
        ValueError: with the block and the measured error.
    """
    outcome = self_check(model)
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


def _measure(model: Model) -> SelfCheck:
    tokens = probe_tokens(model)
    sites, names = find_sites(model, missing="skip"), stream_names(model)
    stored: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        return name, lambda x, hook=None: stored.__setitem__(name, x.detach().cpu().double())

    with without_hook_points(model), evaluation(model, quiet=True):
        if _passes(model, tokens, end_of_stream(model)):
            names[-1] = (names[-1][0], end_of_stream(model))
        logits = run_model(
            model, tokens, [store(n) for n in [*(s.hook_name for s in sites), *sum(names, ())]]
        )
        clean = dict(stored)
        zero = [(s.hook_name, lambda x, hook=None: torch.zeros_like(x)) for s in sites]
        zeroed = run_model(model, tokens, [*zero, store(names[0][0]), store(names[-1][1])])
        scored = slice(tokens.shape[1] - 2, tokens.shape[1])
        scored_error = _difference(run_model(model, tokens, scored=scored), logits[:, scored])
        firsts = {site.component: site for site in reversed(sites)}.values()
        sharing_error = max(
            _sharing_error(model, tokens, site.hook_name, logits) for site in firsts
        )
        fused_error = _fused_error(
            model, tokens, sites, [logits, *(clean[site.hook_name] for site in sites)]
        )
    blocks = [
        [clean[s.hook_name] for s in sites if s.layer == layer] for layer in range(len(names))
    ]
    block_error = [
        _imbalance([clean[pre], *writes], clean[post])
        for (pre, post), writes in zip(names, blocks, strict=True)
    ]
    eps = torch.finfo(next(model.parameters()).dtype).eps
    tolerance = 4 * eps + 1e-5
    fused_tolerance = min(10 * tolerance, 1000 * eps)
    runs_fused = fused_error <= fused_tolerance
    with without_hook_points(model), evaluation(model, quiet=True):
        beginning_error = _beginning_error(model, tokens, sites, runs_fused)
    return SelfCheck(
        block_error=torch.tensor(block_error),
        stream_error=_imbalance([stored[names[0][0]]], stored[names[-1][1]]),
        unchecked=_incomplete_layers(model, sites),
        output_change=_difference(zeroed, logits),
        scored_error=scored_error,
        sharing_error=sharing_error,
        tolerance=tolerance,
        fused_error=fused_error,
        fused_tolerance=fused_tolerance,
        beginning_error=beginning_error,
    )


def _passes(model: Model, tokens: Tensor, name: str) -> bool:
    """Whether a run passes a hook point once."""
    try:
        run_model(model, tokens, [(name, lambda x, hook=None: None)])
    except RuntimeError:
        return False
    return True


def _sharing_error(model: Model, tokens: Tensor, first: str, logits: Tensor) -> float:
    try:
        shared = run_model(
            model, tokens, [(first, lambda x, hook=None: x.expand(2, -1, -1).contiguous())]
        )
    # the model's own code may reshape with the batch size that it started with
    except (RuntimeError, ValueError, IndexError):
        return float("inf")
    return _difference(shared, logits.expand(2, -1, -1)) if shared.shape[0] == 2 else float("inf")


def _fused_error(
    model: Model, tokens: Tensor, sites: tuple[Site, ...], plain: list[Tensor]
) -> float:
    """The largest error on fused kernels, of one row and of two different ones.

    Args:
        plain: the logits and the writes of the one row.
    """

    both = torch.cat([tokens, tokens.flip(1)])
    try:
        fused = [run for rows in (tokens, both) for run in _values(model, rows, sites, fused=True)]
    except Exception:  # no bridge, or a version of one in which something is otherwise
        return float("inf")
    return _worst(fused, [*plain, *_values(model, both, sites)])


def _beginning_error(
    model: Model, tokens: Tensor, sites: tuple[Site, ...], runs_fused: bool
) -> float:
    """The largest error of two texts' second halves, after keys and values of the first ones."""
    both, half = torch.cat([tokens, tokens.flip(1)]), tokens.shape[1] // 2
    try:
        cache = read_beginning(model, both[:, :half]).of(torch.tensor([1, 0]))
        after = _values(model, both.flip(0)[:, half:], sites, runs_fused, cache)
    except Exception:  # as above, or a model that keeps something else
        return float("inf")
    whole = [value.flip(0)[:, half:] for value in _values(model, both, sites)]
    return _worst(after, whole)


def _values(
    model: Model, rows: Tensor, sites: tuple[Site, ...], fused: bool = False, beginning: Any = None
) -> list[Tensor]:
    """The logits and all writes of one pass."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        return name, lambda x, hook=None: seen.__setitem__(name, x.detach())

    hooks = [see(site.hook_name) for site in sites]
    logits = run_model(model, rows, hooks, fused=fused, beginning=beginning)
    writes = (seen[site.hook_name] for site in sites)
    return [logits, *(write.reshape(*rows.shape, write.shape[-1]) for write in writes)]


def _worst(measured: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of any position; NaN if any is."""
    pairs = zip(measured, expected, strict=True)
    return float(torch.stack([_worst_position(*pair) for pair in pairs]).max())


def _worst_position(measured: Tensor, expected: Tensor) -> Tensor:
    """The largest error, relative to the largest entry at its position.

    Entries below a thousandth of the largest of all count as that; they may be rounding alone.
    """
    measured, expected = measured.cpu().double(), expected.cpu().double()
    size = expected.abs().amax(dim=-1)
    least = 1e-3 * size.max() + torch.finfo(torch.float64).tiny
    return ((measured - expected).abs().amax(dim=-1) / size.clamp(min=least)).max()


def _incomplete_layers(model: Model, sites: tuple[Site, ...]) -> tuple[int, ...]:
    expected = 1 if getattr(model.cfg, "attn_only", False) else len(COMPONENTS)
    counts = [sum(site.layer == layer for site in sites) for layer in range(model.cfg.n_layers)]
    return tuple(layer for layer, count in enumerate(counts) if count < expected)


def _imbalance(terms: list[Tensor], total: Tensor) -> float:
    error = (sum(term.reshape(total.shape) for term in terms) - total).abs()
    size = sum(term.reshape(total.shape).abs() for term in terms) + total.abs()
    return float((error / torch.where(size > 0, size, 1.0)).max())


def _difference(measured: Tensor, expected: Tensor) -> float:
    measured, expected = measured.cpu().double(), expected.cpu().double()
    return float((measured - expected).abs().max() / expected.abs().max())


def probe_tokens(model: Model) -> Int[Tensor, "1 pos"]:
    """A few tokens, none of them special, for a short run that checks a model."""
    generator = torch.Generator().manual_seed(0)
    count = min(6, model.cfg.n_ctx)
    tokens = torch.randperm(model.cfg.d_vocab, generator=generator)[: count + 8]
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    return torch.tensor(
        [[t for t in tokens.tolist() if t not in special][:count]],
        device=next(model.parameters()).device,
    )
