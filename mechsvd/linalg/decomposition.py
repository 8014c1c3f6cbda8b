"""The SVD of a sample of vectors: singular values, directions, and their writers.

Tensors only.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.checks import is_whole, warn
from mechsvd.fields import require_between, require_declared, require_falling, require_finite
from mechsvd.linalg.subspace import Subspace, at_least_single, require_orthonormal, rounding, signs
from mechsvd.linalg.svd import numerical_rank, thin_svd
from mechsvd.results import Provenance, Result, result, with_notes


@result
class Decomposition(Result):
    """The singular value decomposition of a sample of writes, largest value first.

    Attributes:
        singular_values: in the units of the residual stream.
        directions: right singular vectors as orthonormal columns; in each, the entry largest in
            size is positive.
        left: left singular vectors: how much of each direction each write holds, with sign.
        layer: the layer of the writes, or None when pooled over all layers.
        source: the model and tokens that the writes came from.
    """

    singular_values: Float[Tensor, " rank"]
    directions: Float[Tensor, "d_model rank"]
    left: Float[Tensor, "site pos rank"]
    layer: int | None = None
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_between(self, ["layer"], 0)

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

    @property
    def rank(self) -> int:
        """Numerical rank: the number of directions."""
        return self.singular_values.shape[0]

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return self.directions.shape[0]

    def subspace(self, rank: int) -> Subspace:
        """The span of the first `rank` directions.

        Raises:
            ValueError: `rank` is not a whole number from 0 to the number of directions.
        """
        if not is_whole(rank, 0, self.rank):
            raise ValueError(
                f"`rank` is {rank!r}, but the decomposition has {self.rank} directions; "
                f"choose 0 to {self.rank}."
            )
        return Subspace(self.directions[:, : int(rank)], self.source)

    def writer_map(self, direction: int) -> Float[Tensor, "site pos"]:
        """The share of each site and position in writing a direction.

        The shares are the squared left singular vector, and sum to 1.
        """
        if not 0 <= direction < self.rank:
            raise ValueError(
                f"`direction` is {direction}, but the decomposition has directions "
                f"0 to {self.rank - 1}."
            )
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
        top = ", ".join(f"{s:.3g}" for s in self.singular_values[:4].tolist())
        return (
            f"Decomposition of {self.left.shape[0]} sites × {self.left.shape[1]} positions, "
            f"{where}\n"
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
    writes: Sample | Tensor, *, per_layer: Literal[False] = False, center: bool = False
) -> Decomposition: ...
@overload
def decompose(
    writes: Sample | Tensor, *, per_layer: Literal[True], center: bool = False
) -> tuple[Decomposition, ...]: ...
def decompose(
    writes: Sample | Tensor, *, per_layer: bool = False, center: bool = False
) -> Decomposition | tuple[Decomposition, ...]:
    """Take the SVD of all writes, pooled over layers or one per layer.

    Pooled and per layer are the same batched function. As in the shortform, nothing is centred by
    default. Directions below the numerical rank are left out, so there are never more directions
    than writes.

    Args:
        writes: what `collect_writes` gives, or a bare tensor "site pos d_model".
        per_layer: one decomposition per layer, each over the sites of that layer.
        center: subtract the mean write of each sample first. Only the directions change: an edit
            still acts on whole writes, so clipping to centred directions clips the mean too.

    Returns:
        A `Decomposition`; with `per_layer`, a tuple of them in the order of the layers.

    Raises:
        ValueError: no writes, NaN or inf among them, or `per_layer` for a bare tensor.

    Example:
        >>> decompose(torch.diag(torch.tensor([3.0, 2.0]))[None]).singular_values
        tensor([3., 2.])
    """
    values: Any = writes if isinstance(writes, Tensor) else getattr(writes, "values", None)
    source: Provenance | None = getattr(writes, "source", None)
    _require_sample(values)
    if not per_layer:
        pooled = decompose_groups(values[None], (None,), center, source)
        _warn_unseen([values], pooled)
        return pooled[0]
    at, layers = _site_layers(writes), _site_layers(writes).unique().tolist()
    groups = [values[at == layer] for layer in layers]
    if len({len(group) for group in groups}) > 1:  # a hybrid model: some layers have fewer sites
        svds = tuple(
            decompose_groups(g[None], (n,), center, source)[0]
            for g, n in zip(groups, layers, strict=True)
        )
    else:
        svds = decompose_groups(torch.stack(groups), tuple(layers), center, source)
    _warn_unseen(groups, svds)
    return svds


def require_decomposition(svd: Any) -> None:
    """Refuse anything but a decomposition with at least one direction.

    Raises:
        TypeError, ValueError: saying what it is.
    """
    if not isinstance(svd, Decomposition):
        raise TypeError(
            f"`svd` must be a Decomposition, but is {type(svd).__name__}; "
            "of a `per_layer` tuple, take one and its layer."
        )
    if svd.rank == 0:
        raise ValueError(
            "This decomposition has no directions (its writes were all zero), "
            "so there is nothing to measure."
        )


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
        svds.append(Decomposition(sizes, directions, left, layer, _of_layer(source, layer)))
    return tuple(svds)


def _of_layer(source: Provenance | None, layer: int | None) -> Provenance | None:
    if source is None or layer is None:
        return source
    return replace(
        source, hooks=tuple(name for name in source.hooks if name.startswith(f"blocks.{layer}."))
    )


def _warn_unseen(groups: Sequence[Tensor], svds: Sequence[Decomposition]) -> None:
    sizes = [group.shape[0] * group.shape[1] for group in groups]
    few = [
        svd for svd, size in zip(svds, sizes, strict=True) if svd.rank == 0 or size < svd.d_model
    ]
    if not few:
        return
    ranks, d_model = sorted({svd.rank for svd in few}), few[0].d_model
    where = "" if few[0].layer is None else f" in each of {len(few)} layers"
    whose = "the decomposition" if few[0].layer is None else "each layer's decomposition"
    directions = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    warn(
        f"{min(sizes)} writes{where} for {d_model} dimensions: {whose} has {directions} "
        "directions, and the rest of the residual stream is unseen"
        f"{' (all writes are zero)' if ranks[0] == 0 else ''}.",
    )


def _require_sample(values: Any) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(
            "`writes` must be what `collect_writes` gives (of several tasks, too), "
            "or a tensor [site, pos, d_model]."
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


def _site_layers(writes: Any) -> Int[Tensor, " site"]:
    if not hasattr(writes, "sites"):
        raise ValueError(
            "`per_layer` needs to know the layers: "
            "pass what `collect_writes` gives, not a bare tensor."
        )
    return torch.tensor([site.layer for site in writes.sites])
