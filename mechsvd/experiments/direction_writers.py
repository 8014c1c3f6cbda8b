"""Who writes a direction: sites and positions, then heads and neurons, which add up."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.model.sites import Site
from mechsvd.results import Provenance, Result, result

# what parts are: the last is what is left to the write, and the whole write where it is not split
KINDS = ("head", "other heads", "neuron", "other neurons", "constant", "remainder", "not split")


@result
class DirectionWriters(Result):
    """The coefficients of some directions in every write, and the parts that add up to them.

    The coefficient of a direction in a write is their dot product, in the units of the residual
    stream.

    Attributes:
        directions: their numbers in the decomposition.
        coefficients: of each direction in the write of each site at each position.
        sites: the second axis of `coefficients`.
        tokens, positions, task_index: its third: token id, absolute position, number of the text.
        pieces: the text of each token.
        is_split: which sites are split into heads or neurons; the others cannot be reached, or
            their writes are not the sum of their parts (a norm after the output weight).
        shares: of a part in writing a direction: Σ part × write ÷ Σ write², over the positions of
            its site, with the second sum over all sites. Those of a direction add up to 1, and a
            share may be negative.
        share_directions, share_sites: which, by their places in `directions` and `sites`.
        share_kinds, share_numbers: what the part is, of `KINDS`; the number of a head or neuron,
            and −1 for others. "constant" are biases, "remainder" is rounding.
        place_directions, place_sites, place_positions: for each direction the writes with the
            largest coefficients in size, by their places in the axes of `coefficients`.
        parts: coefficients of the largest parts of such a write and of the others together; those
            of a place add up to its coefficient.
        part_places, part_kinds, part_numbers: which.
        induction: induction score of each head, on repeated random tokens, as in TransformerLens's
            demos; NaN where attention patterns cannot be reached.
        induction_chance: the same for a head that attends evenly.
    """

    directions: Int[Tensor, " direction"]
    coefficients: Float[Tensor, "direction site pos"]
    sites: tuple[Site, ...]
    tokens: Int[Tensor, " pos"]
    positions: Int[Tensor, " pos"]
    task_index: Int[Tensor, " pos"]
    pieces: tuple[str, ...]
    is_split: Bool[Tensor, " site"]
    shares: Float[Tensor, " share"]
    share_directions: Int[Tensor, " share"]
    share_sites: Int[Tensor, " share"]
    share_kinds: tuple[str, ...]
    share_numbers: Int[Tensor, " share"]
    place_directions: Int[Tensor, " place"]
    place_sites: Int[Tensor, " place"]
    place_positions: Int[Tensor, " place"]
    parts: Float[Tensor, " part"]
    part_places: Int[Tensor, " part"]
    part_kinds: tuple[str, ...]
    part_numbers: Int[Tensor, " part"]
    induction: Float[Tensor, "layer head"]
    induction_chance: float
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.coefficients.shape[1], "site of `coefficients`")
        require_length(self, "pieces", len(self.tokens), "token")
        require_length(self, "share_kinds", len(self.shares), "share")
        require_length(self, "part_kinds", len(self.parts), "part")

    def _require_values(self) -> None:
        require_finite(self, "coefficients", "shares", "parts")
        require_between(self, ["induction", "induction_chance"], 0, 1 + 1e-6)
        for name in ("share_kinds", "part_kinds"):
            if unknown := {*getattr(self, name)} - {*KINDS}:
                raise ValueError(f"`{name}` holds {min(unknown)!r:.40}, but kinds are {KINDS}.")

    @property
    def net(self) -> Float[Tensor, "direction pos"]:
        """What all sites together write of each direction at each position."""
        return self.coefficients.sum(dim=1)

    def to_pandas(self) -> Any:
        """One row per direction, site and position: coefficient."""
        import pandas as pd

        count, sites, length = self.coefficients.shape
        return pd.DataFrame(
            {
                "direction": self.directions.repeat_interleave(sites * length).numpy(),
                "layer": [s.layer for s in self.sites for _ in range(length)] * count,
                "component": [s.component for s in self.sites for _ in range(length)] * count,
                "task": self.task_index.repeat(count * sites).numpy(),
                "position": self.positions.repeat(count * sites).numpy(),
                "token": [*self.pieces] * (count * sites),
                "coefficient": self.coefficients.flatten().numpy(),
            }
        )

    def shares_to_pandas(self) -> Any:
        """One row per direction and part, the largest share first: layer, component, part, …

        Columns `share` (those of a direction add up to 1) and `induction` (the score of a head).
        """
        import pandas as pd

        sites = [self.sites[i] for i in self.share_sites.tolist()]
        numbers = self.share_numbers.tolist()
        scores = [
            float(self.induction[site.layer or 0, number]) if kind == "head" else torch.nan
            for site, kind, number in zip(sites, self.share_kinds, numbers, strict=True)
        ]
        table = pd.DataFrame(
            {
                "direction": self.directions[self.share_directions].numpy(),
                "layer": [site.layer for site in sites],
                "component": [site.component for site in sites],
                "part": self.share_kinds,
                "number": numbers,
                "share": self.shares.numpy(),
                "induction": scores,
            }
        )
        order = table["share"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].sort_values("direction", kind="stable").reset_index(drop=True)

    def parts_to_pandas(self) -> Any:
        """One row per part of the largest writes: the write's coefficient, and the part's.

        The parts of a write add up to its coefficient.
        """
        import pandas as pd

        places = self.part_places
        own, sites, where = (
            index[places]
            for index in (self.place_directions, self.place_sites, self.place_positions)
        )
        return pd.DataFrame(
            {
                "direction": self.directions[own].numpy(),
                "layer": [self.sites[i].layer for i in sites.tolist()],
                "component": [self.sites[i].component for i in sites.tolist()],
                "task": self.task_index[where].numpy(),
                "position": self.positions[where].numpy(),
                "token": [self.pieces[i] for i in where.tolist()],
                "write": self.coefficients[own, sites, where].numpy(),
                "part": self.part_kinds,
                "number": self.part_numbers.numpy(),
                "coefficient": self.parts.numpy(),
            }
        )

    def __repr__(self) -> str:
        whole = [str(s) for s, split in zip(self.sites, self.is_split, strict=True) if not split]
        return (
            f"DirectionWriters of {len(self.directions)} directions: {len(self.sites)} sites × "
            f"{len(self.tokens)} positions\n"
            f"  split into heads and neurons: {int(self.is_split.sum())} sites"
            f"{', not ' + ', '.join(whole[:4]) if whole else ''}\n"
            f"  on {self._origin()}"
        )
