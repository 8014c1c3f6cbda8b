"""Subspaces compared with each other and with chance: overlap, angles, pooled spectrum."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.checks import is_whole, require_whole
from mechsvd.fields import require_between, require_falling, require_finite
from mechsvd.linalg.subspace import Subspace
from mechsvd.results import Provenance, Result, require_same_model, result


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
    def z_score(self) -> Float[Tensor, "n n"]:
        """Standard deviations above the overlap of random subspaces.

        NaN at a rank of 0 or d, where every subspace has the same overlap.
        """
        return torch.where(
            self.deviation > 0, (self.values - self.expected) / self.deviation, torch.nan
        )

    def to_pandas(self) -> Any:
        """One row per pair; null where undefined.

        Columns: first, second, overlap, expected, deviation, ratio, z_score.
        """
        import pandas as pd

        pairs = list(combinations(range(len(self.values)), 2))
        columns = {"overlap": self.values, "expected": self.expected, "deviation": self.deviation}
        columns |= {"ratio": self.ratio, "z_score": self.z_score}
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
            f"  {spread} that of random subspaces"
        )


def overlap(subspaces: Sequence[Subspace]) -> Overlap:
    """Compare subspaces pair by pair with each other and with chance.

    Raises:
        ValueError: fewer than two subspaces, or different `d_model` or models.

    Example:
        >>> e = torch.eye(4)
        >>> float(overlap([Subspace(e[:, :2]), Subspace(e[:, 1:3])]).values[0, 1])
        1.0
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


def principal_angles(first: Subspace, second: Subspace) -> Float[Tensor, " smaller_rank"]:
    """Angles between two subspaces, in radians, rising from 0 (shared direction) to π/2.

    Small angles come from sines and large ones from cosines, so both ends are exact.

    Reference: Björck and Golub, Numerical methods for computing angles between linear subspaces,
    Math. Comp. 27 (1973).
    """
    _common_dimension([first, second])
    a, b = sorted(
        (s.basis.cpu().double() for s in (first, second)), key=lambda basis: -basis.shape[1]
    )
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.arccos(), sines.arcsin())


def random_subspace(d_model: int, rank: int, seed: int = 0) -> Subspace:
    """A uniformly random subspace, in double precision.

    Raises:
        ValueError: the rank is below 0 or above `d_model`.
    """
    if not is_whole(rank, 0, d_model):
        raise ValueError(f"`rank` is {rank}, but must be from 0 to `d_model` = {d_model}.")
    generator = torch.Generator().manual_seed(seed)
    return Subspace(
        torch.linalg.qr(torch.randn(d_model, rank, generator=generator, dtype=torch.float64))[0]
    )


@result
class Pool(Result):
    """The spectrum of several bases side by side, and the band of random subspaces.

    A singular value of √n belongs to a direction that all n subspaces share. A value of 1 belongs
    to a direction of one subspace only.

    Attributes:
        singular_values: of the concatenated bases.
        random_low, random_mean, random_high: smallest, mean and largest value per place over the
            seeded draws of random subspaces of the same ranks.
    """

    singular_values: Float[Tensor, " rank"]
    random_low: Float[Tensor, " rank"]
    random_mean: Float[Tensor, " rank"]
    random_high: Float[Tensor, " rank"]
    seed: int
    source: Provenance | None = None

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
        outside = (self.singular_values < self.random_low) | (
            self.singular_values > self.random_high
        )
        if len(self.singular_values) == 0:
            return "Pool of bases: no singular values, because no subspace has a direction"
        return (
            f"Pool of bases: {len(self.singular_values)} singular values, "
            f"{float(self.singular_values[0]):.4f} the largest\n"
            f"  random subspaces of the same ranks: {float(self.random_mean[0]):.4f} the largest\n"
            f"  {int(outside.sum())} outside the random band (seed {self.seed})"
        )


def pool(subspaces: Sequence[Subspace], *, draws: int = 8, seed: int = 0) -> Pool:
    """Take the SVD of several bases side by side, and of random bases of the same ranks.

    Args:
        draws: number of random draws for the band.
        seed: of the first draw.

    Raises:
        ValueError: fewer than two subspaces, different `d_model` or models, or no draws.
    """
    draws, seed = require_whole("draws", draws, 1), require_whole("seed", seed)
    d_model = _common_dimension(subspaces)
    ranks = [subspace.rank for subspace in subspaces]
    spectra = []
    for draw in range(draws):
        first = seed + draw * len(ranks)
        spectra.append(
            _spectrum(
                [random_subspace(d_model, rank, first + i).basis for i, rank in enumerate(ranks)]
            )
        )
    band = torch.stack(spectra)
    values = _spectrum([subspace.basis.cpu().double() for subspace in subspaces])
    return Pool(
        values, band.amin(dim=0), band.mean(dim=0), band.amax(dim=0), seed, subspaces[0].source
    )


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
