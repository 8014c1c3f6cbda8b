"""How much each head repeats what followed the same token before."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.model.evaluation import evaluation, without_hook_points
from mechsvd.model.runs import run_model
from mechsvd.model.sites import Hook, Model

_PATTERN = "attn.hook_pattern"


@torch.no_grad()
def induction_scores(
    model: Model, length: int = 24, rows: int = 4, seed: int = 0
) -> Float[Tensor, "layer head"]:
    """How much each head attends to the token after the last time that its token was there.

    The texts are random tokens, twice in a row after BOS. The score is the mean of the attention
    from each token of the second half to the one after its first occurrence: 1 for a perfect
    induction head, about 1 ÷ length for one that attends evenly.

    Returns:
        NaN in layers whose attention pattern has no hook point.

    Reference: Olsson et al., In-context Learning and Induction Heads, 2022, arXiv:2209.11895. It is
        the score of TransformerLens's demos: the mean of the diagonal at offset 1 − length.
    """
    tokens = _repeated(model, min(length, (model.cfg.n_ctx - 1) // 2), rows, seed)
    half = (tokens.shape[1] - 1) // 2
    queries = torch.arange(half + 1, 2 * half + 1)
    scores = torch.full((model.cfg.n_layers, model.cfg.n_heads), torch.nan)

    def hook_of(layer: int) -> Hook:
        def score(pattern: Tensor, hook: Any = None) -> None:
            seen = pattern[:, :, queries, queries - half + 1]
            scores[layer] = seen.float().mean(dim=(0, 2)).cpu()

        return f"blocks.{layer}.{_PATTERN}", score

    names = model.hook_dict
    hooks = [hook_of(i) for i in range(len(scores)) if f"blocks.{i}.{_PATTERN}" in names]
    with without_hook_points(model), evaluation(model, quiet=True):
        run_model(model, tokens, hooks, scored=slice(0, 1))
    return scores


def _repeated(model: Model, length: int, rows: int, seed: int) -> Tensor:
    """Random tokens twice in a row, each different, after BOS where the model has one."""
    special = {*(getattr(model.tokenizer, "all_special_ids", ()) or ())}
    usual = torch.tensor([t for t in range(model.cfg.d_vocab) if t not in special])
    generator = torch.Generator().manual_seed(seed)
    halves = [usual[torch.randperm(len(usual), generator=generator)[:length]] for _ in range(rows)]
    bos = getattr(model.tokenizer, "bos_token_id", None)
    start = usual[:1] if bos is None else torch.tensor([bos])
    tokens = torch.stack([torch.cat([start, half, half]) for half in halves])
    return tokens.to(next(model.parameters()).device)


def induction_chance(model: Model, length: int = 24) -> float:
    """The induction score of a head that attends evenly to all that came before."""
    half = min(length, (model.cfg.n_ctx - 1) // 2)
    return sum(1 / (query + 1) for query in range(half + 1, 2 * half + 1)) / half
