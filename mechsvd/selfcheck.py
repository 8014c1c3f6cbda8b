"""Is it true of this model? That its writes make up the residual stream, measured on a few tokens, once a model."""

from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.results import load_result, result, save_result
from mechsvd.sites import Model, evaluation, find_sites, run_model, stream_names

_CHECKED: "WeakKeyDictionary[Any, SelfCheck]" = WeakKeyDictionary()


@result
class SelfCheck:
    """What was measured; errors are relative to the largest entry of the residual stream.

    Attributes:
        block_error: of resid_pre + writes = resid_post, for each block.
        stream_error: of resid_pre₀ = resid_post of the last block when all writes are zeroed.
        output_change: largest change of a logit when all writes are zeroed, relative to the largest logit.
        scored_error: of the logits when only some positions are unembedded.
        sharing_error: of the logits when the rows of a batch share everything before the first write; infinite where the
            model's own code does not allow it, and then they do not share.
        tolerance: what the errors may be in the model's dtype; ten times that for logits, which are a whole model deep.
    """

    block_error: Float[Tensor, " layer"]
    stream_error: float
    output_change: float
    scored_error: float
    sharing_error: float
    tolerance: float

    save = save_result

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "SelfCheck":
        """Load what `save` wrote; see `load_result`."""
        return load_result(cls, path)

    @property
    def failure(self) -> str | None:
        """What is wrong, in a sentence; None when the model passes."""
        layer = int(self.block_error.argmax())
        if not self.block_error[layer] <= self.tolerance:
            return (
                f"in block {layer}, resid_pre + attn_out + mlp_out differs from resid_post by {self.block_error[layer]:.2g} of its "
                f"size (allowed: {self.tolerance:.0e}), so the hooks are not the whole write"
            )
        if not self.stream_error <= self.tolerance:
            return f"with all writes zeroed the residual stream still changes by {self.stream_error:.2g} of its size"
        if not self.output_change > 0:
            return "zeroing all writes leaves the output as it is, so the hooks do not act"
        if not self.scored_error <= 10 * self.tolerance:
            return f"unembedding some positions only changes their logits by {self.scored_error:.2g} of their size"
        return None

    @property
    def shares_prefix(self) -> bool:
        """Whether rows of a batch may share what comes before the first edit."""
        return self.sharing_error <= 10 * self.tolerance

    def to_pandas(self) -> Any:
        """One row a block, with its error."""
        import pandas as pd

        return pd.DataFrame({"layer": range(len(self.block_error)), "block_error": self.block_error.numpy()})

    def __repr__(self) -> str:
        return (
            f"SelfCheck: {'passed' if self.failure is None else self.failure}\n"
            f"  writes + stream: {self.block_error.max():.1e} in the worst block; zeroed writes: {self.stream_error:.1e}\n"
            f"  output changes by {self.output_change:.2g}; shared prefix: {self.sharing_error:.1e}"
        )


def self_check(model: Model) -> SelfCheck:
    """Measure on six tokens whether the model's hooks are its writes; cached, since it is a fact of the architecture.

    Three runs: a clean one (`resid_pre + writes == resid_post` in every block, every hook fires once), one with all writes
    zeroed (the stream stays constant and the output changes), one whose two rows part at the first write.

    Raises:
        KeyError: a block without the hooks of the residual stream.
        RuntimeError: a hook that does not fire exactly once.
    """
    if model not in _CHECKED:
        _CHECKED[model] = _measure(model)
    return _CHECKED[model]


def require_sound(model: Model) -> SelfCheck:
    """Run the self-check and refuse a model that fails it.

    Raises:
        ValueError: with the block and the measured error.
    """
    check = self_check(model)
    if check.failure:
        raise ValueError(
            f"mechsvd cannot use this model: {check.failure}. Results would be wrong without a sign of it; `check=False` goes on "
            "all the same, and every result records it."
        )
    return check


def _measure(model: Model) -> SelfCheck:
    tokens = _probe_tokens(model)
    sites, names = find_sites(model, missing="skip"), stream_names(model)
    stored: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        return name, lambda x, hook=None: stored.__setitem__(name, x.detach().double())

    with evaluation(model):
        logits = run_model(model, tokens, [store(n) for n in [*(s.hook_name for s in sites), *sum(names, ())]])
        clean = dict(stored)
        zero = [(s.hook_name, lambda x, hook=None: torch.zeros_like(x)) for s in sites]
        zeroed = run_model(model, tokens, [*zero, store(names[0][0]), store(names[-1][1])])
        scored = slice(tokens.shape[1] - 2, tokens.shape[1])
        scored_error = _difference(run_model(model, tokens, scored=scored), logits[:, scored])
        sharing = _sharing_error(model, tokens, sites[0].hook_name, logits)
    writes = [sum(clean[s.hook_name] for s in sites if s.layer == i) for i in range(len(names))]
    block_error = [_difference(clean[pre] + write, clean[post]) for (pre, post), write in zip(names, writes, strict=True)]
    return SelfCheck(
        block_error=torch.tensor(block_error),
        stream_error=_difference(stored[names[0][0]], stored[names[-1][1]]),
        output_change=_difference(zeroed, logits),
        scored_error=scored_error,
        sharing_error=sharing,
        tolerance=4 * torch.finfo(next(model.parameters()).dtype).eps + 1e-5,
    )


def _sharing_error(model: Model, tokens: Tensor, first: str, logits: Tensor) -> float:
    try:
        shared = run_model(model, tokens, [(first, lambda x, hook=None: x.expand(2, -1, -1).contiguous())])
    except (RuntimeError, ValueError, IndexError):  # the model's own code reshapes with the batch size it started with
        return float("inf")
    return _difference(shared, logits.expand(2, -1, -1)) if shared.shape[0] == 2 else float("inf")


def _difference(measured: Tensor, expected: Tensor) -> float:
    return float((measured.double() - expected.double()).abs().max() / expected.double().abs().max())


def _probe_tokens(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    count = min(6, model.cfg.n_ctx)
    tokens = torch.randperm(model.cfg.d_vocab, generator=generator)[: count + 8]
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    return torch.tensor([[t for t in tokens.tolist() if t not in special][:count]], device=next(model.parameters()).device)
