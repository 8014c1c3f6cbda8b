"""How far a random sample shows that estimates agree with what is measured."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def spread_sample(values: Float[Tensor, " rank"], count: int, seed: int) -> Int[Tensor, " sampled"]:
    """A random sample, stratified by falling value: one of each of `count` equal blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = values.argsort(descending=True, stable=True).tensor_split(count)
    chosen = [block[torch.randint(len(block), (), generator=generator)] for block in blocks]
    return torch.stack(chosen).sort().values


def share_interval(hits: int, count: int, confidence: float) -> tuple[float, float, float]:
    """A share and its exact binomial interval; NaN, 0 and 1 where nothing was counted.

    A stratified sample varies less than the binomial distribution, so the interval is wide enough.

    Reference: Clopper and Pearson, The use of confidence or fiducial limits, 1934.
    """
    from scipy.stats import beta

    if count == 0:
        return math.nan, 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, count - hits + 1))
    high = 1.0 if hits == count else float(beta.ppf(1 - tail, hits + 1, count - hits))
    return hits / count, low, high


def spearman_interval(
    first: Float[Tensor, " n"], second: Float[Tensor, " n"], confidence: float
) -> tuple[float, float, float]:
    """Spearman's correlation with its interval, on Fisher's scale; NaN below four pairs.

    Reference: Fieller, Hartley, Pearson, Tests for rank correlation coefficients, 1957 (variance
        1.06 / (n − 3)).
    """
    from scipy.stats import norm, spearmanr

    if len(first) < 4:
        return math.nan, -1.0, 1.0
    correlation = float(spearmanr(first.numpy(), second.numpy()).statistic)
    if math.isnan(correlation):  # one of them is constant
        return math.nan, -1.0, 1.0
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, correlation)))
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(1.06 / (len(first) - 3))
    return correlation, math.tanh(centre - half), math.tanh(centre + half)


def redrawn_spearman(
    estimate: Float[Tensor, " rank"],
    scale: Float[Tensor, " rank"],
    errors: Float[Tensor, " sampled"],
    confidence: float,
    seed: int,
    draws: int = 300,
) -> tuple[float, float]:
    """The interval of Spearman's correlation if all errors are like those of the sample.

    Each draw gives every direction an error of the sample at random, times its own scale.

    Args:
        scale: of the error of each direction; `errors` are in units of it.
    """
    generator = torch.Generator().manual_seed(seed)
    pick = lambda n, *shape: torch.randint(n, shape, generator=generator)  # noqa: E731
    values = []
    for _ in range(draws):
        redrawn = errors[pick(len(errors), len(errors))]
        effect = estimate + scale * redrawn[pick(len(errors), len(estimate))]
        values.append(torch.corrcoef(torch.stack([_ranks(estimate), _ranks(effect)]))[0, 1])
    tail = (1 - confidence) / 2
    low, high = torch.stack(values).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return values.argsort().argsort().double()


def upper_share(hits: int, count: int, confidence: float) -> float:
    """The one-sided upper limit of a share; 1 where nothing was counted."""
    return share_interval(hits, count, 2 * confidence - 1)[2]
