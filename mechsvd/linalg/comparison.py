"""Subspaces compared with each other and with chance: overlap, angles, pooled spectrum."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.checks import is_whole, require_whole, with_plain_arguments
from mechsvd.fields import require_between, require_falling, require_finite
from mechsvd.linalg.subspace import Subspace
from mechsvd.results import Provenance, Result, require_same_model, result

COVERAGE = 0.95  # share of random spectra that lie in the band as a whole
LEAST = 19  # draws, below which a share of 0.95 has no quantile
DRAWS, DRAWS_OF_LARGE, LARGE = 600, 99, 256  # LARGE: singular values, above which a draw is slow
BLOCK = 2**21  # numbers in one block of draws
FIXED = 1e-9  # standard deviation below which a singular value cannot vary, but is rounded


@result
class Overlap(Result):
    """Pairwise overlaps ‖AᵀB‖² of subspaces, and those of random subspaces.

    The overlap is the sum of the squared cosines of the principal angles. It counts the shared
    dimensions, from 0 to the smaller rank. For uniformly random subspaces of ranks p and q in d
    dimensions its mean is pq/d and its variance is 2pq(d − p)(d − q) / (d²(d − 1)(d + 2)).

    A large z-score is no sign of shared content: the writes of random tokens, and those of an
    untrained model, overlap more than random subspaces do.

    Attributes:
        values: the overlaps; on the diagonal, the ranks.
        expected, deviation: mean and standard deviation for random subspaces of the same ranks.

    Example:
        >>> overlaps = ms.overlap([svd.subspace(8), ms.random_subspace(128, 8)])
        >>> float(overlaps.expected[0, 1]), overlaps.chance_corrected.shape
        (0.5, torch.Size([2, 2]))
    """

    values: Float[Tensor, "n n"]
    expected: Float[Tensor, "n n"]
    deviation: Float[Tensor, "n n"]
    source: Provenance | None = None

    def _require_values(self) -> None:
        require_finite(self, "values", "expected", "deviation")
        require_between(self, ["values", "expected", "deviation"], 0)
        if not torch.allclose(self.values, self.values.T):
            raise ValueError(
                "`values` must be symmetric, but are not: an overlap belongs to a pair."
            )

    @property
    def ratio(self) -> Float[Tensor, "n n"]:
        """Overlap divided by that of random subspaces; NaN where one has no directions."""
        return self.values / self.expected

    @property
    def forced(self) -> Float[Tensor, "n n"]:
        """Dimensions that any two subspaces of these ranks share: max(0, p + q − d)."""
        p, q = self._ranks
        held = torch.where(self.expected > 0, p * q / self.expected, torch.inf)
        d_model = held.min().round()  # infinite only where at most one subspace has directions
        return torch.where(self.expected > 0, p + q - d_model, 0.0).clamp(min=0)

    @property
    def chance_corrected(self) -> Float[Tensor, "n n"]:
        """(overlap − expected) / (smaller rank − expected).

        It is 0 for random subspaces in the mean, 1 for nested ones, and negative below chance.
        NaN at a rank of 0 or d, where every subspace has the same overlap.
        """
        most = torch.minimum(*self._ranks)
        free = most - self.expected
        return torch.where(
            free > 1e-9 * most.clamp(min=1), (self.values - self.expected) / free, torch.nan
        )

    @property
    def _ranks(self) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "1 n"]]:
        ranks = self.values.diagonal().round()
        return ranks[:, None], ranks[None, :]

    @property
    def z_score(self) -> Float[Tensor, "n n"]:
        """Standard deviations above the overlap of random subspaces.

        NaN at a rank of 0 or d, where every subspace has the same overlap.
        """
        return torch.where(
            self.deviation > 0, (self.values - self.expected) / self.deviation, torch.nan
        )

    def to_pandas(self) -> Any:
        """One row per pair; null where undefined.

        Columns: first, second, overlap, expected, deviation, ratio, z_score, forced,
        chance_corrected.
        """
        import pandas as pd

        pairs = list(combinations(range(len(self.values)), 2))
        columns = {"overlap": self.values, "expected": self.expected, "deviation": self.deviation}
        columns |= {"ratio": self.ratio, "z_score": self.z_score}
        columns |= {"forced": self.forced, "chance_corrected": self.chance_corrected}
        table = {"first": [i for i, _ in pairs], "second": [j for _, j in pairs]}
        return pd.DataFrame(
            table
            | {name: [float(column[pair]) for pair in pairs] for name, column in columns.items()}
        )

    def __repr__(self) -> str:
        ranks = ", ".join(f"{rank:.0f}" for rank in self.values.diagonal().tolist())
        table = self.to_pandas()
        ratios = table["ratio"].dropna()
        spread = (
            f"{ratios.min():.3f} to {ratios.max():.3f} times" if len(ratios) else "nothing, as is"
        )
        return (
            f"Overlap of {len(self.values)} subspaces of ranks {ranks}\n"
            f"  {table['overlap'].min():.2f} to {table['overlap'].max():.2f} dimensions "
            "shared by two of them\n"
            f"  {spread} that of random subspaces; those of random tokens overlap too: "
            "`overlap_anchors`"
        )


@plain
def overlap(subspaces: Sequence[Subspace]) -> Overlap:
    """Compare subspaces pair by pair with each other and with chance.

    Raises:
        ValueError: fewer than two subspaces, or different `d_model` or models.

    Example:
        >>> axes = torch.eye(4)
        >>> ms.overlap([ms.Subspace(axes[:, :2]), ms.Subspace(axes[:, 1:3])]).values
        tensor([[2., 1.],
                [1., 2.]], dtype=torch.float64)
    """
    d_model = _common_dimension(subspaces)
    bases = [subspace.basis.cpu().double() for subspace in subspaces]
    values = torch.tensor(
        [[float((a.T @ b).square().sum()) for b in bases] for a in bases], dtype=torch.float64
    )
    ranks = torch.tensor([subspace.rank for subspace in subspaces], dtype=torch.float64)
    p, q = ranks[:, None], ranks[None, :]
    freedom = max(1, d_model**2 * (d_model - 1) * (d_model + 2))
    return Overlap(
        values,
        p * q / d_model,
        (2 * p * q * (d_model - p) * (d_model - q) / freedom).sqrt(),
        subspaces[0].source,
    )


@plain
def principal_angles(first: Subspace, second: Subspace) -> Float[Tensor, " smaller_rank"]:
    """Angles between two subspaces, in radians, rising from 0 (shared direction) to π/2.

    Small angles come from sines and large ones from cosines, so both ends are exact.

    Reference: Björck and Golub, Numerical methods for computing angles between linear subspaces,
    Math. Comp. 27 (1973).

    Example:
        >>> bool(ms.principal_angles(svd.subspace(3), svd.subspace(8)).max() < 1e-3)
        True
    """
    _common_dimension([first, second])
    a, b = sorted(
        (s.basis.cpu().double() for s in (first, second)), key=lambda basis: -basis.shape[1]
    )
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.arccos(), sines.arcsin())


@with_plain_arguments
def random_subspace(d_model: int, rank: int, seed: int = 0) -> Subspace:
    """A uniformly random subspace, in double precision.

    Raises:
        ValueError: the rank is below 0 or above `d_model`.

    Example:
        >>> ms.random_subspace(128, 8, seed=1).basis.dtype
        torch.float64
    """
    if not is_whole(rank, 0, d_model):
        raise ValueError(f"`rank` is {rank}, but must be from 0 to `d_model` = {d_model}.")
    generator = torch.Generator().manual_seed(require_whole("seed", seed))
    return Subspace(
        torch.linalg.qr(torch.randn(d_model, int(rank), generator=generator, dtype=torch.float64))[
            0
        ]
    )


@result
class Pool(Result):
    """The spectrum of several bases side by side, and the band of random subspaces.

    A singular value of √n belongs to a direction that all n subspaces share. A value of 1 belongs
    to a direction of one subspace only.

    Attributes:
        singular_values: of the concatenated bases.
        random_mean: mean per place over the seeded draws of random subspaces of the same ranks.
        random_low, random_high: a simultaneous band. 95 % of random spectra lie in it at all
            places at once, so one value outside is a finding at the level of 5 %.
        draws: 0 in a file of an older version. Its band is the smallest and largest value of a
            few draws, and many random spectra leave it.

    Example:
        >>> both = ms.pool([svd.subspace(2), svd.subspace(2)])  # each direction twice: √2
        >>> both.singular_values[:2].round(decimals=4)
        tensor([1.4142, 1.4142], dtype=torch.float64)
    """

    singular_values: Float[Tensor, " rank"]
    random_low: Float[Tensor, " rank"]
    random_mean: Float[Tensor, " rank"]
    random_high: Float[Tensor, " rank"]
    seed: int
    source: Provenance | None = None
    draws: int = 0

    def _require_values(self) -> None:
        names = ("singular_values", "random_low", "random_mean", "random_high")
        require_finite(self, *names)
        require_between(self, names, 0)
        require_falling(self, "singular_values")
        slack = 1e-6 * (1 + self.random_high)  # a mean of equal numbers is rounded
        if (
            (self.random_low > self.random_mean + slack)
            | (self.random_mean > self.random_high + slack)
        ).any():
            raise ValueError(
                "`random_mean` must lie between `random_low` and `random_high`, but does not."
            )

    @property
    def outside(self) -> bool:
        """Whether any value is outside the band; so are 5 % of random spectra."""
        return self._count_outside() > 0

    def _count_outside(self) -> int:
        values = self.singular_values
        return int(((values < self.random_low) | (values > self.random_high)).sum())

    def to_pandas(self) -> Any:
        """One row per singular value, with the random band."""
        import pandas as pd

        names = ("singular_values", "random_low", "random_mean", "random_high")
        return (
            pd.DataFrame({name: getattr(self, name).numpy() for name in names})
            .rename_axis("direction")
            .reset_index()
        )

    def __repr__(self) -> str:
        if len(self.singular_values) == 0:
            return "Pool of bases: no singular values, because no subspace has a direction"
        band = (
            f"band that holds {100 * COVERAGE:.0f} % of random spectra as a whole (seed {self.seed})"
            if self.draws
            else f"range of a few random draws (seed {self.seed})"
        )
        return (
            f"Pool of bases: {len(self.singular_values)} singular values, "
            f"{float(self.singular_values[0]):.4f} the largest\n"
            f"  random subspaces of the same ranks: {float(self.random_mean[0]):.4f} the largest\n"
            f"  {self._count_outside()} outside the {band}"
        )


@plain
def pool(subspaces: Sequence[Subspace], *, draws: int | None = None, seed: int = 0) -> Pool:
    """Take the SVD of several bases side by side, and of random bases of the same ranks.

    The band is mean ± c·sd per place. c is the 95 % quantile over the draws of the largest |z|
    along a spectrum, where each draw is measured by the mean and sd of the others. So the band
    holds 95 % of fresh random spectra in the mean over seeds. With 600 draws, that of one seed
    holds 93–97 %; with 99 draws, 91–99 %.

    Args:
        draws: random draws for the band, at least 19. By default 600, or 99 where there are more
            than 256 singular values.
        seed: of the draws.

    Raises:
        ValueError: fewer than two subspaces, different `d_model` or models, or too few draws.

    Example:
        >>> ms.pool([svd.subspace(8), ms.random_subspace(128, 8)]).singular_values.shape
        torch.Size([16])
    """
    d_model = _common_dimension(subspaces)
    ranks = [subspace.rank for subspace in subspaces]
    if draws is None:
        draws = DRAWS if min(d_model, sum(ranks)) <= LARGE else DRAWS_OF_LARGE
    draws, seed = require_whole("draws", draws, LEAST), require_whole("seed", seed)
    values = _spectrum([subspace.basis.cpu().double() for subspace in subspaces])
    rounding = 10 * max(torch.finfo(subspace.basis.dtype).eps for subspace in subspaces)
    low, mean, high = _band(_random_spectra(d_model, ranks, draws, seed), rounding)
    return Pool(values, low, mean, high, seed, subspaces[0].source, draws)


def _band(
    spectra: Float[Tensor, "draw rank"], rounding: float
) -> tuple[Float[Tensor, " rank"], Float[Tensor, " rank"], Float[Tensor, " rank"]]:
    """Mean ± c·sd per place, so wide that the share COVERAGE of spectra is inside everywhere."""
    if spectra.shape[1] == 0:  # no subspace has a direction
        return spectra[0], spectra[0], spectra[0]
    count, mean, deviation = len(spectra), spectra.mean(dim=0), spectra.std(dim=0)
    # the variance of the others, and the distance to their mean, in closed form
    squares = (spectra - mean).square()
    others = ((count - 1) * deviation.square() - count / (count - 1) * squares) / (count - 2)
    scores = squares.sqrt() * count / (count - 1) / others.clamp(min=FIXED**2).sqrt()
    scores = torch.where(deviation > FIXED, scores, 0.0)
    if scores.numel() == 0:
        return mean, mean, mean
    largest = scores.amax(dim=1).sort().values
    half = largest[math.ceil(COVERAGE * (count + 1)) - 1] * deviation + rounding
    return (mean - half).clamp(min=0), mean, mean + half


def _random_spectra(
    d_model: int, ranks: Sequence[int], draws: int, seed: int
) -> Float[Tensor, "draw rank"]:
    """Singular values of random bases side by side, largest first.

    They are roots of the eigenvalues of the Gram matrix or of the sum of the projectors. The
    first subspace is the span of the first axes: only relative positions matter.
    """
    generator = torch.Generator().manual_seed(seed)
    total, rows = sum(ranks), max(1, BLOCK // d_model**2)
    use_gram = total <= d_model and 2 * max(ranks) <= d_model
    axes = torch.eye(d_model, dtype=torch.float64)
    blocks = []
    for first in range(0, draws, rows):
        count = min(rows, draws - first)
        bases = [axes[:, : ranks[0]].expand(count, -1, -1)]
        if use_gram:
            bases += [_random_bases(count, d_model, rank, generator) for rank in ranks[1:]]
            joint = torch.cat(bases, dim=2)
            squares = torch.linalg.eigvalsh(joint.mT @ joint)
        else:
            projectors = bases[0] @ bases[0].mT
            for rank in ranks[1:]:
                projectors = projectors + _random_projectors(count, d_model, rank, generator)
            squares = torch.linalg.eigvalsh(projectors)
        blocks.append(squares.flip(1)[:, :total].clamp(min=0).sqrt())
    return torch.cat(blocks)


def _random_projectors(
    count: int, d_model: int, rank: int, generator: torch.Generator
) -> Float[Tensor, "draw d_model d_model"]:
    thin = _random_bases(count, d_model, min(rank, d_model - rank), generator)
    projectors = thin @ thin.mT
    if 2 * rank <= d_model:
        return projectors
    return torch.eye(d_model, dtype=torch.float64) - projectors  # from the smaller complement


def _random_bases(
    count: int, d_model: int, rank: int, generator: torch.Generator
) -> Float[Tensor, "draw d_model rank"]:
    """Orthonormal bases of at most half of the dimensions, where Cholesky's factor is exact."""
    vectors = torch.randn(count, d_model, rank, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(vectors.mT @ vectors)
    return torch.linalg.solve_triangular(factor, vectors.mT, upper=False).mT


def _spectrum(bases: Sequence[Tensor]) -> Float[Tensor, " rank"]:
    return torch.linalg.svdvals(torch.cat(list(bases), dim=1))


def _common_dimension(subspaces: Sequence[Subspace]) -> int:
    if not isinstance(subspaces, Sequence):
        raise TypeError(
            f"`subspaces` must be a list of subspaces, but is {type(subspaces).__name__}."
        )
    if len(subspaces) < 2:
        raise ValueError(f"{len(subspaces)} subspace(s) given, but it takes two to compare.")
    for number, subspace in enumerate(subspaces):
        if not isinstance(subspace, Subspace):
            raise TypeError(
                f"Subspace {number} is {type(subspace).__name__}; "
                "see `svd.subspace` and `mechsvd.span`."
            )
        if subspace.d_model != subspaces[0].d_model:
            raise ValueError(
                f"Subspace {number} lies in {subspace.d_model} dimensions, "
                f"but the first in {subspaces[0].d_model}."
            )
        require_same_model(subspaces[0].source, subspace.source, f"Subspaces 0 and {number}")
    return subspaces[0].d_model
