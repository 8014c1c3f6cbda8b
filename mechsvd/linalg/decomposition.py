"""The SVD of a sample of vectors: singular values, directions, and their writers.

Tensors only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.checks import is_whole, require_whole, warn, whole_numbers
from mechsvd.fields import require_between, require_declared, require_falling, require_finite
from mechsvd.linalg.subspace import Subspace, at_least_single, require_orthonormal, rounding, signs
from mechsvd.linalg.svd import numerical_rank, thin_svd
from mechsvd.results import Provenance, Result, result, with_notes

Scale = Literal["site", "norm"]
SCALES = {"site": "the root mean square of their site", "norm": "the root of their norm"}


@result
class Decomposition(Result):
    """The singular value decomposition of a sample of writes, largest value first.

    Attributes:
        singular_values: in the units of the residual stream.
        directions: right singular vectors as orthonormal columns; in each, the entry largest in
            size is positive.
        left: left singular vectors: how much of each direction each write holds, with sign. Of
            streamed writes, which are not kept, it has no positions.
        layer, component: of the writes; None when pooled over several.
        source: the model and tokens that the writes came from.
        site_shares: of streamed writes: the share of each site in writing each direction, which
            is the sum of its squared left singular vectors. They sum to 1 over the sites.
        n_positions: of streamed writes: how many positions there were.

    Example:
        >>> svd.directions.shape, svd.subspace(8).rank
        (torch.Size([128, 128]), 8)
        >>> svd.to_pandas().columns.tolist()
        ['direction', 'singular_value', 'cumulative_share']
    """

    singular_values: Float[Tensor, " rank"]
    directions: Float[Tensor, "d_model rank"]
    left: Float[Tensor, "site pos rank"]
    layer: int | None = None
    source: Provenance | None = None
    component: str | None = None
    site_shares: Float[Tensor, "site rank"] | None = None
    n_positions: int | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_between(self, ["layer", "n_positions"], 0)
        if (self.site_shares is None) != (self.n_positions is None) or (
            self.is_streamed and self.left.shape[1]
        ):
            raise ValueError(
                "A Decomposition of streamed writes has `site_shares` and `n_positions`, and no "
                f"positions in `left`, but its shape is {list(self.left.shape)}; other "
                "decompositions have neither."
            )

    def _require_values(self) -> None:
        require_finite(self, "singular_values", "directions", "left")
        require_between(self, ["singular_values"], 0)
        require_falling(self, "singular_values")
        if self.rank:
            require_orthonormal(self.directions, rounding(self.directions.dtype), "`directions`")
        lengths = self.left.double().square().sum(dim=(0, 1)).sqrt()
        # at a singular value of zero there is no left vector
        wrong = ((lengths - 1).abs() > 0.1) & (lengths > 0)
        if wrong.any():
            raise ValueError(
                f"`left` must have columns of length 1, but has one of {lengths[wrong][0]:g}."
            )
        if self.site_shares is not None:
            require_between(self, ["site_shares"], 0, 1)
            totals = self.site_shares.double().sum(dim=0)
            if ((totals - 1).abs() > 1e-3).any():
                raise ValueError("`site_shares` must sum to 1 over the sites, but do not.")

    @property
    def is_streamed(self) -> bool:
        """Whether the writes were streamed, so that nothing of single positions is known."""
        return self.site_shares is not None

    @property
    def n_writes(self) -> int:
        """Number of writes: sites × positions."""
        sites, positions = self.left.shape[:2]
        return sites * (positions if self.n_positions is None else self.n_positions)

    @property
    def rank(self) -> int:
        """Numerical rank: the number of directions."""
        return self.singular_values.shape[0]

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return self.directions.shape[0]

    def subspace(self, rank: int | Iterable[int] | Int[Tensor, " chosen"]) -> Subspace:
        """The span of the first `rank` directions, or of the directions of some numbers.

        `svd.subspace([3, 5])` has two directions; `svd.subspace(order[:8])` those that come first
        in an order.

        Raises:
            ValueError: `rank` is not a whole number from 0 to the number of directions, or a list
                of different numbers below it.
        """
        if not is_whole(rank) and isinstance(rank, Iterable):
            chosen = whole_numbers("rank", rank)
            if len(chosen.unique()) != len(chosen) or chosen.min() < 0 or chosen.max() >= self.rank:
                raise ValueError(
                    f"`rank` holds {chosen.tolist()!s:.60}, but directions must be different "
                    f"numbers from 0 to {self.rank - 1}."
                )
            return Subspace(self.directions[:, chosen.to(self.directions.device)], self.source)
        if not is_whole(rank, 0, self.rank):
            raise ValueError(
                f"`rank` is {rank!r}, but the decomposition has {self.rank} directions; "
                f"choose 0 to {self.rank}."
            )
        return Subspace(self.directions[:, : int(rank)], self.source)  # type: ignore[arg-type]

    def writer_map(self, direction: int) -> Float[Tensor, "site pos"]:
        """The share of each site and position in writing a direction.

        The shares are the squared left singular vector, and sum to 1. Of streamed writes there is
        one column, with the share of each site over all positions.
        """
        if not 0 <= direction < self.rank:
            raise ValueError(
                f"`direction` is {direction}, but the decomposition has directions "
                f"0 to {self.rank - 1}."
            )
        if self.site_shares is not None:
            return self.site_shares[:, direction, None]
        return self.left[:, :, direction].square()

    def to_pandas(self) -> Any:
        """One row per direction: its singular value and the cumulative share.

        The share is that of the summed squares, up to and including the direction.
        """
        import pandas as pd

        squares = self.singular_values.cpu().double().square()
        return pd.DataFrame(
            {
                "direction": range(self.rank),
                "singular_value": self.singular_values.cpu().numpy(),
                "cumulative_share": (squares.cumsum(0) / squares.sum()).numpy(),
            }
        )

    def __repr__(self) -> str:
        where = "pooled over layers" if self.layer is None else f"layer {self.layer}"
        where += f" {self.component}" if self.component else ""
        top = ", ".join(f"{s:.3g}" for s in self.singular_values[:4].tolist())
        sites, kept = self.left.shape[:2]
        positions = f"{kept}" if self.n_positions is None else f"{self.n_positions:,} streamed"
        return (
            f"Decomposition of {sites} sites × {positions} positions, {where}\n"
            f"  rank {self.rank} of {self.d_model} dimensions, singular values {top}, …\n"
            f"  from {self._origin('bare tensors')}"
        )


@runtime_checkable
class Sample(Protocol):
    """Vectors by site and position with their source, as `collect_writes` gives."""

    @property
    def values(self) -> Tensor:
        """Of shape [site, pos, d_model]."""

    @property
    def source(self) -> Provenance | None:
        """The model that they come from."""


@overload
def decompose(
    writes: Sample | Tensor,
    *,
    per: Literal["pool"] = "pool",
    per_layer: Literal[False] = False,
    center: bool = False,
    scale: Scale | None = None,
) -> Decomposition: ...
@overload
def decompose(
    writes: Sample | Tensor,
    *,
    per: Literal["layer", "site"],
    per_layer: bool = False,
    center: bool = False,
    scale: Scale | None = None,
) -> tuple[Decomposition, ...]: ...
@overload
def decompose(
    writes: Sample | Tensor,
    *,
    per: Literal["pool", "layer"] = "pool",
    per_layer: Literal[True],
    center: bool = False,
    scale: Scale | None = None,
) -> tuple[Decomposition, ...]: ...
@plain
def decompose(
    writes: Sample | Tensor,
    *,
    per: Literal["pool", "layer", "site"] = "pool",
    per_layer: bool = False,
    center: bool = False,
    scale: Scale | None = None,
) -> Decomposition | tuple[Decomposition, ...]:
    """Take the SVD of all writes, pooled over all sites, or one per layer or per site.

    All are the same batched function. As in the shortform, nothing is centred by default.
    Directions below the numerical rank are left out, so there are never more directions than
    writes.

    Args:
        writes: what `collect_writes` gives, or a bare tensor "site pos d_model".
        per: "pool", or one decomposition per "layer" (over its sites) or per "site". Calls that
            take a decomposition take the tuple too, and give each write the basis of its site.
        per_layer: the same as `per="layer"`.
        center: subtract the mean write of each sample first. Only the directions change: an edit
            still acts on whole writes, so clipping to centred directions clips the mean too.
        scale: divide the writes first, so that a large site or token does not own the first
            directions: "site" by the root mean square of the norms of the site's writes, "norm" by
            the root of their own norm. The singular values are then those of the divided writes.

    Returns:
        A `Decomposition`; or a tuple of them in the order of layers or sites.

    Raises:
        ValueError: no writes, NaN or inf among them, another `per` or `scale`, or a bare tensor
            where layers must be known.

    Example:
        >>> ms.decompose(writes).rank, len(ms.decompose(writes, per="site"))
        (128, 12)
        >>> ms.decompose(torch.diag(torch.tensor([3.0, 2.0]))[None]).singular_values
        tensor([3., 2.])
    """
    values: Any = writes if isinstance(writes, Tensor) else getattr(writes, "values", None)
    source: Provenance | None = getattr(writes, "source", None)
    _require_sample(values)
    kind = kind_of(per, per_layer)
    values, source = _scaled(values, source, scale)
    if kind == "pool":
        pooled = decompose_groups(values[None], (None,), center, source)
        warn_unseen(pooled)
        return pooled[0]
    sites = _sites_of(writes, kind)
    groups = groups_of(sites, kind)
    samples = [values[chosen] for chosen in groups.values()]
    layers = tuple(layer for layer, _ in groups)
    if len({len(sample) for sample in samples}) > 1:  # a hybrid: some layers have fewer sites
        svds = tuple(
            decompose_groups(sample[None], (layer,), center, source)[0]
            for sample, layer in zip(samples, layers, strict=True)
        )
    else:
        svds = decompose_groups(torch.stack(samples), layers, center, source)
    svds = tuple(
        of_sites(svd, [sites[i] for i in chosen], kind)
        for svd, chosen in zip(svds, groups.values(), strict=True)
    )
    warn_unseen(svds)
    return svds


def kind_of(per: str, per_layer: bool) -> str:
    """What there is one decomposition for: "pool", "layer" or "site".

    Raises:
        ValueError: another `per`, or one that `per_layer` contradicts.
    """
    kind = "layer" if per_layer and per == "pool" else per
    if kind not in ("pool", "layer", "site") or (per_layer and kind != "layer"):
        raise ValueError(f"`per` is {per!r:.40}, but must be 'pool', 'layer' or 'site'.")
    return kind


def groups_of(sites: Sequence[Any], kind: str) -> dict[tuple[int | None, str | None], list[int]]:
    """The places of the sites of each layer or site, by layer and, per site, by name."""
    if kind == "pool":
        return {(None, None): list(range(len(sites)))}
    names = [(s.layer, None if kind == "layer" else s.name) for s in sites]
    return {name: [i for i, other in enumerate(names) if other == name] for name in names}


def _scaled(
    values: Float[Tensor, "site pos d_model"], source: Provenance | None, scale: Scale | None
) -> tuple[Float[Tensor, "site pos d_model"], Provenance | None]:
    if scale is None:
        return values, source
    exact = values.double() if values.device.type != "mps" else values.float()
    norms = exact.norm(dim=-1, keepdim=True)
    if scale == "site":
        sizes = norms.square().mean(dim=1, keepdim=True).sqrt()
    elif scale == "norm":
        sizes = norms.sqrt()
    else:
        raise ValueError(f"`scale` is {scale!r:.40}, but must be 'site', 'norm' or None.")
    # a write of zero stays zero
    scaled = (exact / torch.where(sizes > 0, sizes, 1.0)).to(at_least_single(values.dtype))
    return scaled, source and with_notes(source, f"writes divided by {SCALES[scale]}")


def of_sites(svd: Decomposition, sites: Sequence[Any], kind: str) -> Decomposition:
    """A decomposition that names the sites of its writes."""
    source = svd.source and replace(svd.source, hooks=tuple(site.name for site in sites))
    component = str(sites[0]).split(" ", 1)[-1] if kind == "site" else None
    return replace(svd, source=source, component=component)


def require_decomposition(svd: Any) -> None:
    """Refuse anything but a decomposition with at least one direction.

    Raises:
        TypeError, ValueError: saying what it is.
    """
    if isinstance(svd, list | tuple):
        raise TypeError(
            f"`svd` must be one Decomposition here, but is {len(svd)} of them; take one of them."
        )
    require_decompositions(svd)


def require_decompositions(svd: Any) -> tuple[Decomposition, ...]:
    """Take one decomposition, or one per layer or site, as a tuple.

    Raises:
        TypeError, ValueError: anything else, or no directions at all.
    """
    bases = tuple(svd) if isinstance(svd, list | tuple) else (svd,)
    for one in bases:
        if not isinstance(one, Decomposition):
            raise TypeError(
                f"`svd` must be a Decomposition, but {'is' if one is svd else 'holds'} "
                f"{type(one).__name__}; see `mechsvd.decompose`."
            )
    if not any(one.rank for one in bases):
        what = "This decomposition has" if bases else "The list is empty, so there are"
        raise ValueError(
            f"{what} no directions (its writes were all zero), so there is nothing to measure."
            if bases
            else f"{what} no directions to measure."
        )
    return bases


def require_directions(bases: Any) -> tuple[Decomposition, ...]:
    """Take one basis, or one per layer or site, where only its directions are used.

    Returns:
        Decompositions; those of a subspace or a tensor have NaN for singular values.

    Raises:
        TypeError, ValueError: anything else, or no directions at all.
    """
    several = isinstance(bases, list | tuple)
    listed = tuple(bases) if several else (bases,)
    made = [_unmeasured(one) if isinstance(one, Subspace | Tensor) else one for one in listed]
    return require_decompositions(tuple(made) if several else made[0])


def _unmeasured(basis: Subspace | Tensor) -> Decomposition:
    """Directions whose sizes are not known, as a decomposition."""
    subspace = basis if isinstance(basis, Subspace) else Subspace(basis)
    directions = subspace.basis.to(at_least_single(subspace.basis.dtype))
    unknown = directions.new_full((subspace.rank,), torch.nan)
    left = directions.new_empty(0, 0, subspace.rank)
    return Decomposition(unknown, directions, left, source=subspace.source)


def kept_directions(svd: Decomposition, kept: Any) -> Int[Tensor, " direction"]:
    """Take the numbers of some directions, or how many of the first, as numbers.

    Raises:
        ValueError: directions out of range or repeated, or none or all of them.
    """
    first = torch.arange(require_whole("kept", kept)) if isinstance(kept, int) else None
    chosen = whole_numbers("kept", kept) if first is None else first
    is_valid = len(chosen.unique()) == len(chosen) and (chosen >= 0).all()
    if not is_valid or len(chosen) in (0, svd.rank) or chosen.max() >= svd.rank:
        raise ValueError(
            f"`kept` is {kept!r:.60}, but must be different directions from 0 to {svd.rank - 1}, "
            "neither none nor all of them."
        )
    return chosen


def joint_source(bases: Sequence[Decomposition]) -> Provenance | None:
    """The provenance of several decompositions of one model: that of the first, with all sites."""
    source = bases[0].source
    names = [name for one in bases if one.source for name in one.source.hooks]
    return source and replace(source, hooks=tuple(dict.fromkeys(names)))


def decompose_groups(
    values: Float[Tensor, "group site pos d_model"],
    layers: tuple[int | None, ...] = (None,),
    center: bool = False,
    source: Provenance | None = None,
) -> tuple[Decomposition, ...]:
    """The SVD of several samples of equal size at once, in float64; see `decompose`."""
    shape, device, dtype = values.shape, values.device, at_least_single(values.dtype)
    exact = values.to("cpu" if device.type == "mps" else device).double()  # MPS has no float64
    vectors = rearrange(exact, "group site pos d_model -> group (site pos) d_model")
    if center:
        vectors = vectors - vectors.mean(dim=1, keepdim=True)
        source = source and with_notes(source, "centred")
    svds = []
    for left, sizes, directions, layer in zip(*thin_svd(vectors), layers, strict=True):
        rank = numerical_rank(sizes, vectors.shape[1:])
        sign = signs(directions[:, :rank])
        left = rearrange(left[:, :rank] * sign, "(site pos) rank -> site pos rank", site=shape[1])
        sizes, directions, left = (
            t.to(device=device, dtype=dtype)
            for t in (sizes[:rank], directions[:, :rank] * sign, left)
        )
        svds.append(Decomposition(sizes, directions, left, layer, source))
    return tuple(svds)


def warn_unseen(svds: Sequence[Decomposition]) -> None:
    """Warn of fewer writes than dimensions, or none but zero."""
    few = [svd for svd in svds if svd.rank == 0 or svd.n_writes < svd.d_model]
    if not few:
        return
    ranks, d_model = sorted({svd.rank for svd in few}), few[0].d_model
    kind = "site" if few[0].component else "layer"
    where = "" if few[0].layer is None else f" in each of {len(few)} {kind}s"
    whose = "the decomposition" if few[0].layer is None else f"each {kind}'s decomposition"
    directions = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    warn(
        f"{min(svd.n_writes for svd in svds)} writes{where} for {d_model} dimensions: {whose} has "
        f"{directions} directions, and the rest of the residual stream is unseen"
        f"{' (all writes are zero)' if ranks[0] == 0 else ''}.",
    )


def _require_sample(values: Any) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(
            "`writes` must be what `collect_writes` gives (of several tasks, too), "
            "or a tensor [site, pos, d_model]; what `stream_writes` gives has its own `.decompose`."
        )
    if values.ndim != 3 or values.numel() == 0 or not values.is_floating_point():
        raise ValueError(
            "`writes` must be a non-empty float tensor [site, pos, d_model], "
            f"but is {values.dtype} of shape {list(values.shape)}."
        )
    if not values.isfinite().all():
        site, pos, _ = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"`writes` hold NaN or inf, first at site {site}, position {pos}; they must be finite."
        )


def _sites_of(writes: Any, kind: str) -> Sequence[Any]:
    if not hasattr(writes, "sites"):
        raise ValueError(
            f"`per={kind!r}` needs to know the sites: "
            "pass what `collect_writes` gives, not a bare tensor."
        )
    sites: Sequence[Any] = writes.sites
    return sites
