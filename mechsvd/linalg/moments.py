"""Moments of any number of vectors: count, mean and scatter, summed block by block, and their SVD.

Tensors only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.fields import require_between, require_declared, require_finite
from mechsvd.linalg.decomposition import (
    SCALES,
    Decomposition,
    groups_of,
    kind_of,
    of_sites,
    warn_unseen,
)
from mechsvd.linalg.subspace import at_least_single, signs
from mechsvd.linalg.svd import eigh_or_again, numerical_rank, require_representable
from mechsvd.results import Provenance, Result, result, with_notes

BLOCK = 1024  # vectors per product: wide enough for its speed, and little memory
PANEL = 256  # columns of a symmetric matrix that are multiplied at once


@result
class Moments(Result):
    """Count, mean and scatter of the vectors of each site, in float64: all that their SVD needs.

    The scatter is about the mean. A Gram matrix about zero would lose, to rounding, what is small
    next to the mean; it is the scatter + count · mean meanᵀ.

    Attributes:
        count: number of vectors.
        mean: in the units of the vectors.
        scatter: Σ (x − mean)(x − mean)ᵀ.
        dtype: of the vectors, such as "float32".
    """

    count: Int[Tensor, " site"]
    mean: Float[Tensor, "site d_model"]
    scatter: Float[Tensor, "site d_model d_model"]
    dtype: str

    def __post_init__(self) -> None:
        require_declared(self)
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                f"`dtype` of Moments is {self.dtype!r:.40}, which torch does not have."
            )

    def _require_values(self) -> None:
        require_between(self, ["count"], 0)
        require_finite(self, "mean", "scatter")
        spread = self.scatter.diagonal(dim1=-2, dim2=-1)
        about_zero = spread + self.count.to(spread)[:, None] * self.mean.square()
        # a coordinate that is always the same has no spread but rounding, of either sign
        if (self.scatter != self.scatter.mT).any() or (spread < -1e-6 * about_zero).any():
            raise ValueError("`scatter` of Moments must be symmetric and not negative, but is not.")

    @property
    def is_half(self) -> bool:
        """Whether the vectors were in half precision, so that products were in float32."""
        return torch.finfo(getattr(torch, self.dtype)).bits < 32

    def to_pandas(self) -> Any:
        """One row per site: its count, the norm of its mean, and the root mean square norm."""
        import pandas as pd

        return pd.DataFrame(
            {
                "count": self.count.tolist(),
                "mean_norm": self.mean.norm(dim=-1).tolist(),
                "rms_norm": rms_norms(self).tolist(),
            }
        )

    def __repr__(self) -> str:
        sites, d_model = self.mean.shape
        return (
            f"Moments of {int(self.count.sum()):,} vectors: {sites} sites, {d_model} dimensions\n"
            f"  root mean square norms {float(rms_norms(self).min()):.3g} to "
            f"{float(rms_norms(self).max()):.3g}\n"
            f"  of {self.dtype} vectors"
        )


class Accumulator:
    """Adds vectors to the moments of a site, in place, with memory for one block beside them.

    Products are in float64. Those of half-precision vectors are in float32 within a block, where
    each product is exact and only their sum is rounded, and in float64 across blocks.

    Args:
        start: the moments that the vectors are added to; they stay as they are.
        device: of the vectors.
    """

    def __init__(self, start: Moments, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self._count, self._dtype, self._is_half = start.count.tolist(), start.dtype, start.is_half
        self._mean = start.mean.to(device, torch.float64, copy=True)
        self._scatter = start.scatter.to(device, torch.float64, copy=True)
        # made once, so that memory cannot run out within a sum
        d_model = self._mean.shape[1]
        self._block = self._mean.new_empty(d_model, BLOCK)
        self._single = self._block.float() if self._is_half else None
        self._product = self._block.new_empty(d_model * PANEL, dtype=torch.float32)

    def add(self, site: int, vectors: Float[Tensor, "n d_model"]) -> None:
        """Add vectors of one site, at most `BLOCK` at a time."""
        for block in vectors.split(BLOCK):
            if len(block):
                self._add(site, block)

    def moments(self) -> Moments:
        """A copy of the moments so far."""
        exact = _mirrored(self._scatter)
        return Moments(torch.tensor(self._count), self._mean.clone(), exact, self._dtype)

    def _add(self, site: int, block: Tensor) -> None:
        before, added = self._count[site], len(block)
        exact = self._block[:, :added].copy_(block.T)
        block_mean = exact.mean(dim=1)
        step = block_mean - self._mean[site]
        scatter = self._scatter[site]
        if self._single is not None and block.element_size() < 4:
            self._add_square(scatter, self._single[:, :added].copy_(block.T))
            scatter.addr_(block_mean, block_mean, alpha=-added)
        else:
            exact -= block_mean[:, None]
            self._add_square(scatter, exact)
        share = added / (before + added)
        scatter.addr_(step, step, alpha=before * share)
        self._mean[site].add_(step, alpha=share)
        self._count[site] = before + added

    def _add_square(
        self, total: Float[Tensor, "d_model d_model"], columns: Float[Tensor, "d_model n"]
    ) -> None:
        """Add X Xᵀ, multiplied in its dtype, to the lower triangle, and to some of the upper one."""
        for first in range(0, len(total), PANEL):
            own, panel = total[first:, first : first + PANEL], columns[first : first + PANEL].T
            if columns.dtype == total.dtype:
                own.addmm_(columns[first:], panel)
            else:
                product = self._product[: own.numel()].view(own.shape)
                own.add_(torch.mm(columns[first:], panel, out=product))


def no_moments(sites: int, d_model: int, dtype: torch.dtype) -> Moments:
    """The moments of no vectors, to begin with."""
    return Moments(
        torch.zeros(sites, dtype=torch.int64),
        torch.zeros(sites, d_model, dtype=torch.float64),
        torch.zeros(sites, d_model, d_model, dtype=torch.float64),
        str(dtype).removeprefix("torch."),
    )


def moments_of(values: Float[Tensor, "site pos d_model"]) -> Moments:
    """The moments of vectors that are at hand."""
    sites, _, d_model = values.shape
    accumulator = Accumulator(no_moments(sites, d_model, values.dtype), values.device)
    for site, vectors in enumerate(values):
        accumulator.add(site, vectors)
    return accumulator.moments()


def merge_moments(
    parts: Sequence[Moments], total: Callable[[Tensor], Tensor] | None = None
) -> Moments:
    """The moments of all vectors of several parts: two sums, of means and of scatters about them.

    Args:
        total: adds what other processes have to the sum over these parts; see `processes.total`.

    Reference: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing
    sample variances, 1979.
    """
    first = parts[0]
    whole = total or (lambda own: own)
    count = whole(torch.stack([part.count for part in parts]).sum(dim=0))
    shares = [part.count.to(first.mean) / count.clamp(min=1).to(first.mean) for part in parts]
    mean = torch.zeros_like(first.mean)
    for part, share in zip(parts, shares, strict=True):
        mean += share[:, None] * part.mean.to(mean)
    mean = whole(mean)
    scatter = torch.zeros_like(first.scatter)
    for part in parts:
        scatter += scatter_about(part, mean)
    if total is not None:  # which may add the two entries of a pair in another order
        scatter = _mirrored(total(scatter))
    return Moments(count, mean, scatter, first.dtype)


def _mirrored(lower: Float[Tensor, "site n n"]) -> Float[Tensor, "site n n"]:
    """Symmetric matrices to the last bit, from their lower triangles."""
    exact = lower.clone()
    for own in exact:  # one by one, which needs little memory
        own.copy_(own.tril() + own.tril(-1).T)
    return exact


def scatter_about(
    moments: Moments, centre: Float[Tensor, "site d_model"]
) -> Float[Tensor, "site d_model d_model"]:
    """Σ (x − centre)(x − centre)ᵀ of each site; about zero it is the Gram matrix."""
    steps = moments.mean.to(centre) - centre
    squares = steps[:, :, None] * steps[:, None, :]  # symmetric to the last bit
    return moments.scatter.to(centre) + moments.count.to(centre)[:, None, None] * squares


def rms_norms(moments: Moments) -> Float[Tensor, " site"]:
    """The root mean square of the norms of each site's vectors."""
    squares = moments.scatter.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    count = moments.count.to(squares)
    return (squares / count.clamp(min=1) + moments.mean.square().sum(dim=-1)).sqrt()


def decompose_moments(
    moments: Moments,
    sites: Sequence[Any],
    *,
    per: str = "pool",
    per_layer: bool = False,
    center: bool = False,
    scale: str | None = None,
    source: Provenance | None = None,
) -> Decomposition | tuple[Decomposition, ...]:
    """The SVD of the vectors that some moments are of; options and order as in `decompose`.

    Raises:
        ValueError: another `per` or `scale`; "norm" needs the writes themselves.
    """
    kind = kind_of(per, per_layer)
    if scale is not None:
        moments, source = (
            _scaled(moments, scale),
            source and with_notes(source, f"writes divided by {SCALES[scale]}"),
        )
    if center:
        source = source and with_notes(source, "centred")
    svds = tuple(
        of_sites(
            _decompose(moments, chosen, layer, center, source), [sites[i] for i in chosen], kind
        )
        for (layer, _), chosen in groups_of(sites, kind).items()
    )
    warn_unseen(svds)
    return svds[0] if kind == "pool" else svds


def _scaled(moments: Moments, scale: str) -> Moments:
    if scale == "norm":
        raise ValueError(
            "`scale='norm'` divides each write by its own norm, which a stream does not keep; "
            "take scale='site', or `decompose` of collected writes."
        )
    if scale != "site":
        raise ValueError(f"`scale` is {scale!r:.40}, but must be 'site' or None for a stream.")
    sizes = rms_norms(moments)
    sizes = torch.where(sizes > 0, sizes, 1.0)[:, None]
    return Moments(
        moments.count,
        moments.mean / sizes,
        moments.scatter / sizes[..., None].square(),
        moments.dtype,
    )


def _decompose(
    moments: Moments,
    chosen: Sequence[int],
    layer: int | None,
    center: bool,
    source: Provenance | None,
) -> Decomposition:
    """The SVD of the vectors of some sites together."""
    group = [_of_site(moments, site) for site in chosen]
    count = sum(int(part.count) for part in group)
    centre = torch.zeros_like(group[0].mean)
    for part in group if center else ():
        centre += int(part.count) / max(1, count) * part.mean
    gram = torch.zeros_like(group[0].scatter)
    for part in group:
        gram += scatter_about(part, centre)
    squares, directions = eigh_or_again(gram)
    sizes, directions = squares[0].flip(0).clamp(min=0).sqrt(), directions[0].flip(1)
    rank = min(numerical_rank(sizes, torch.Size((count, len(sizes)))), count)
    if moments.is_half:
        rank = min(rank, _rank_in_single(gram[0]))
    sizes, directions = sizes[:rank], directions[:, :rank]
    shares = torch.stack(
        [((scatter_about(part, centre)[0] @ directions) * directions).sum(dim=0) for part in group]
    ).clamp(min=0)  # rounding of a share near zero
    dtype = at_least_single(getattr(torch, moments.dtype))
    require_representable(sizes.to(dtype))
    return Decomposition(
        sizes.to(dtype),
        (directions * signs(directions)).to(dtype),
        torch.zeros(len(group), 0, rank, dtype=dtype, device=sizes.device),
        layer,
        source,
        site_shares=(shares / shares.sum(dim=0)).to(dtype),
        n_positions=int(group[0].count),
    )


def _rank_in_single(gram: Float[Tensor, "n n"]) -> int:
    """The rank that can be told from the rounding of products in float32.

    That rounding is relative to the sizes of the two coordinates, so they are divided out first,
    which does not change the rank. Few huge coordinates would hide what the others hold.
    """
    roots = gram.diagonal().sqrt()
    roots = torch.where(roots > 0, roots, 1.0)
    squares, _ = eigh_or_again((gram / roots / roots[:, None])[None])
    return int((squares[0] > torch.finfo(torch.float32).eps * squares[0, -1]).sum())


def _of_site(moments: Moments, site: int) -> Moments:
    own = slice(site, site + 1)
    return Moments(moments.count[own], moments.mean[own], moments.scatter[own], moments.dtype)
