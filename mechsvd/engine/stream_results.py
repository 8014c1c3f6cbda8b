"""The result of streaming writes, its decomposition, and how several are merged."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal, overload

from mechsvd.ambient import plain
from mechsvd.checks import with_plain_arguments
from mechsvd.fields import require_between, require_declared, require_length
from mechsvd.linalg.decomposition import Decomposition, Scale
from mechsvd.linalg.moments import Moments, decompose_moments, merge_moments
from mechsvd.model.rows import Layout, Place
from mechsvd.model.sites import Site
from mechsvd.results import (
    Provenance,
    Result,
    require_kind,
    require_same_model,
    result,
    with_notes,
)


@result
class WriteStream(Result):
    """What is kept of the writes over a corpus: their moments per site, and how far it was read.

    Attributes:
        moments: count, mean and scatter of each site's writes.
        sites: in the order of writing.
        layout: how documents became rows, and which positions count.
        places: how far each shard was read.
        tokens_per_pass: tokens that shared a forward pass, kept after an interruption.

    Example:
        >>> stream.tokens, [site.name for site in stream.sites]
        (12, ['blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out'])
    """

    moments: Moments
    sites: tuple[Site, ...]
    layout: Layout
    places: tuple[Place, ...]
    tokens_per_pass: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", len(self.moments.count), "site of `moments`")
        require_between(self, ["tokens_per_pass"], 1)

    def _require_values(self) -> None:
        counts = self.moments.count
        if (counts != counts[:1]).any() or (counts > self.tokens).any():
            raise ValueError(
                f"`moments` count {counts.tolist()!s:.40} writes, but each site has one per token at "
                f"most, of {self.tokens} tokens, and all have as many."
            )

    def __len__(self) -> int:
        """Number of writes: sites × positions."""
        return int(self.moments.count.sum())

    @property
    def documents(self) -> int:
        """Number of documents, over all shards."""
        return sum(place.documents for place in self.places)

    @property
    def tokens(self) -> int:
        """Number of tokens that were run, over all shards."""
        return sum(place.tokens for place in self.places)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the documents were read, for the provenance of what is made of them."""
        split, empty = (sum(getattr(p, name) for p in self.places) for name in ("split", "empty"))
        read = f"streamed {self.documents:,} documents, {self.tokens:,} tokens"
        rows = f"in rows of up to {self.layout.context}{', packed' if self.layout.packing else ''}"
        return (
            f"{read} {rows}",
            *([f"{split:,} of them cut into several rows"] if split else []),
            *([f"{empty:,} of them empty"] if empty else []),
            *(f"shard {i} of {n}" for i, n in (place.shard for place in self.places) if n > 1),
        )

    @overload
    def decompose(
        self,
        *,
        per: Literal["pool"] = "pool",
        per_layer: Literal[False] = False,
        center: bool = False,
        scale: Scale | None = None,
    ) -> Decomposition: ...
    @overload
    def decompose(
        self,
        *,
        per: Literal["layer", "site"],
        per_layer: bool = False,
        center: bool = False,
        scale: Scale | None = None,
    ) -> tuple[Decomposition, ...]: ...
    @overload
    def decompose(
        self,
        *,
        per: Literal["pool", "layer"] = "pool",
        per_layer: Literal[True],
        center: bool = False,
        scale: Scale | None = None,
    ) -> tuple[Decomposition, ...]: ...
    @with_plain_arguments
    def decompose(
        self,
        *,
        per: str = "pool",
        per_layer: bool = False,
        center: bool = False,
        scale: str | None = None,
    ) -> Decomposition | tuple[Decomposition, ...]:
        """Take the SVD of all writes, pooled over all sites, or one per layer or per site.

        It equals `decompose` of the collected writes, whose options it has. Of single positions
        nothing is known: `left` has none, and `writer_map` gives the share of each site. Of a model
        in half precision the products are in float32, whose rounding is about 1e-8 of σ₁² in each
        σ²; directions that this hides are left out.

        Args:
            scale: "site" or None; "norm" needs the writes themselves.

        Raises:
            ValueError: another `per` or `scale`.
        """
        source = self.source and with_notes(self.source, *self.notes)
        return decompose_moments(
            self.moments,
            self.sites,
            per=per,
            per_layer=per_layer,
            center=center,
            scale=scale,
            source=source,
        )

    def to_pandas(self) -> Any:
        """One row per site: number of writes, norm of their mean, root mean square of the norms."""
        table = self.moments.to_pandas()
        table.insert(0, "layer", [site.layer for site in self.sites])
        table.insert(1, "component", [site.component for site in self.sites])
        return table

    def __repr__(self) -> str:
        sites, d_model = self.moments.mean.shape
        what = "writes" if all(site.is_write for site in self.sites) else "vectors, not writes"
        return (
            f"{len(self):,} streamed {what}: {sites} sites × {len(self) // sites:,} positions, "
            f"in {d_model} dimensions\n"
            f"  {'; '.join(self.notes).removeprefix('streamed ')}\n"
            f"  from {self._origin()}"
        )


@plain
def merge(streams: Sequence[WriteStream]) -> WriteStream:
    """Join streams of one model over several corpora, or shards of one, to that of all of them.

    Up to rounding in float64 it is the same in any order, and as if one run had read everything.

    Args:
        streams: of the same sites, options and model.

    Raises:
        TypeError: something is not a stream.
        ValueError: none are given, they differ in what must be the same, or one is there twice.

    Example:
        >>> more = ms.stream_writes(model, ["They say so."], layers=[0])
        >>> ms.merge([stream, more]).documents
        3
    """
    parts = [streams] if isinstance(streams, WriteStream) else list(streams)
    if not parts:
        raise ValueError("There are no streams to merge: the list is empty; give at least one.")
    first = parts[0]
    for other in parts:
        require_kind(other, WriteStream)
        require_same_model(first.source, other.source, "The streams")
        _require_same_call(first, other)
    places = tuple(place for part in parts for place in part.places)
    seen: dict[tuple[str, tuple[int, int]], int] = {}
    for number, place in enumerate(places):
        earlier = seen.setdefault((place.fingerprint, place.shard), number)
        if earlier != number:
            raise ValueError(
                f"Streams {earlier} and {number} are of the same documents (shard "
                f"{place.shard[0]} of {place.shard[1]}, SHA-256 {place.fingerprint[:12]}…), which "
                "would count twice; give each once."
            )
    return replace(first, moments=merge_moments([p.moments for p in parts]), places=places)


def _require_same_call(first: WriteStream, other: WriteStream) -> None:
    differences = [
        f"`{field.name}` is {getattr(first.layout, field.name)} and "
        f"{getattr(other.layout, field.name)}"
        for field in fields(Layout)  # type: ignore[arg-type]
        if getattr(first.layout, field.name) != getattr(other.layout, field.name)
    ]
    if first.sites != other.sites:
        differences.append(f"there are {len(first.sites)} and {len(other.sites)} sites, or others")
    if differences:
        raise ValueError(
            f"The streams differ: {'; '.join(differences)}. Stream all with the same options."
        )
