"""The cards that `describe` gives: one per direction."""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.experiments.direction_writers import DirectionWriters
from mechsvd.experiments.dose import DoseResponse
from mechsvd.experiments.token_columns import COLUMNS, TokenColumns
from mechsvd.experiments.value_vectors import ValueVectors
from mechsvd.fields import ROUNDED, require_between, require_declared, require_finite
from mechsvd.results import Provenance, Result, result

EXAMPLES = 3  # positions of each kind
EXAMPLE_KINDS = ("most", "least", "random")


@result
class DirectionCards(Result):
    """What is known of some directions, one card each; it shows itself in a notebook.

    Each part has a table of its own: `cards.tokens.to_pandas()`, `.agreement_to_pandas()` and
    `.summary()`; `cards.writers.to_pandas()`, `.shares_to_pandas()` and `.parts_to_pandas()`;
    `cards.values.to_pandas()` and `.layers_to_pandas()`; `cards.examples_to_pandas()`;
    `cards.dose.to_pandas()`.

    Attributes:
        directions, singular_values: of the decomposition.
        effects: what removing each direction costs each text in the metric, in `unit`; damage is
            positive.
        kl_divergences: mean of clean ‖ edited over the scored positions, in nats per token.
        tokens, writers, values, dose: the parts.
        examples: positions, by their places in `writers.positions`: those that write the direction
            most, the least (most of the opposite) and a uniform sample, equally many of each.

    Example:
        >>> cards.tokens.summary().columns.tolist()[:2]
        ['first', 'second']
    """

    directions: Int[Tensor, " direction"]
    singular_values: Float[Tensor, " direction"]
    effects: Float[Tensor, "task direction"]
    kl_divergences: Float[Tensor, "task direction"]
    tokens: TokenColumns
    writers: DirectionWriters
    values: ValueVectors
    dose: DoseResponse
    examples: Int[Tensor, "direction example"]
    metric: str
    unit: str
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        for name in ("tokens", "writers", "values", "dose"):
            own = getattr(self, name).directions
            if own.shape != self.directions.shape or not torch.equal(own, self.directions):
                raise ValueError(
                    f"`{name}` is of directions {own.tolist()!s:.40}, but must be of "
                    f"{self.directions.tolist()!s:.40}."
                )

    def _require_values(self) -> None:
        require_finite(self, "singular_values")
        require_between(self, ["singular_values"], 0)
        require_between(self, ["kl_divergences"], ROUNDED)
        require_between(self, ["examples"], 0, len(self.writers.tokens) - 1)

    def __len__(self) -> int:
        """Number of directions."""
        return len(self.directions)

    def to_pandas(self) -> Any:
        """One row per direction: its effect, its top tokens by each column, and its main writer.

        Columns: direction, singular_value, effect (mean over the texts), kl_divergence, read,
        local, measured (the five tokens that it supports most, as the texts write it), held_down
        (the five that become most probable without it), writer (the site with the largest share)
        and share, head (the head with the largest share; "none" where no write is split into heads)
        and head_share.
        """
        import pandas as pd

        energy = self.writers.coefficients.square().sum(dim=2)
        shares = energy / energy.sum(dim=1, keepdim=True).clamp(min=1e-300)
        texts = self.tokens.vocabulary
        tops = {
            column: [
                "|".join(texts[t] for t in self.tokens.top(i, column, 5).tolist())
                for i in range(len(self))
            ]
            for column in COLUMNS
        }
        return pd.DataFrame(
            {
                "direction": self.directions.numpy(),
                "singular_value": self.singular_values.numpy(),
                "effect": self.effects.mean(dim=0).numpy(),
                "kl_divergence": self.kl_divergences.mean(dim=0).numpy(),
                **tops,
                "held_down": [
                    "|".join(texts[t] for t in self.tokens.top(i, "measured", -5).tolist())
                    for i in range(len(self))
                ],
                "writer": [str(self.writers.sites[i]) for i in shares.argmax(dim=1).tolist()],
                "share": shares.amax(dim=1).numpy(),
                **self._heads(),
            }
        )

    def _heads(self) -> dict[str, list[Any]]:
        """The head that writes most of each direction, and its share."""
        table = self.writers.shares_to_pandas()
        table = table[table["part"] == "head"]
        columns: dict[str, list[Any]] = {"head": [], "head_share": []}
        for direction in self.directions.tolist():
            own = table[table["direction"] == direction].nlargest(1, "share")
            for head in own.itertuples():
                columns["head"].append(f"layer {head.layer} head {head.number}")
                columns["head_share"].append(float(head.share))
            if own.empty:
                columns["head"].append("none")
                columns["head_share"].append(0.0)
        return columns

    def examples_to_pandas(self) -> Any:
        """One row per direction and example: kind, task, position, token, coefficient.

        The coefficient is that of all sites together.
        """
        import pandas as pd

        each = self.examples.shape[1] // len(EXAMPLE_KINDS)
        kinds = [kind for kind in EXAMPLE_KINDS for _ in range(each)]
        where = self.examples.flatten()
        return pd.DataFrame(
            {
                "direction": self.directions.repeat_interleave(self.examples.shape[1]).numpy(),
                "kind": kinds * len(self),
                "task": self.writers.task_index[where].numpy(),
                "position": self.writers.positions[where].numpy(),
                "token": [self.writers.pieces[i] for i in where.tolist()],
                "coefficient": self.writers.net.gather(1, self.examples).flatten().numpy(),
            }
        )

    def to_html(self) -> str:
        """A page of the cards: inline SVG and no script, at most 25 KB per card."""
        return str(_drawing().cards_page(self))

    def _repr_html_(self) -> str:
        return str(_drawing().cards_html(self))

    def __repr__(self) -> str:
        own = self.tokens.agreement.diagonal(dim1=1, dim2=2).mean(dim=1)
        return (
            f"DirectionCards of {len(self)} directions, {len(self.effects)} text(s)\n"
            f"  rank agreement with what is measured: read {float(own[1]):.2f}, "
            f"local {float(own[2]):.2f}\n"
            f"  on {self._origin()}"
        )


def _drawing() -> Any:
    # figures come after results: imported when a card is shown, as `mechsvd.figures` itself is
    return import_module("mechsvd.figures.cards")
