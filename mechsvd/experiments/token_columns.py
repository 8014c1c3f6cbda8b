"""The tokens of a direction in three columns, and whether the columns agree."""

from itertools import combinations, permutations
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.checks import require_numbers
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.results import Provenance, Result, result

COLUMNS = ("read", "local", "measured")
PAIRS = tuple(combinations(COLUMNS, 2))
DRAWS = 200  # random orders of the tokens
TOP = 10  # tokens of a direction that two columns may share
PAIRINGS = 2000  # random pairings of the directions, where all of them are more


@result
class TokenColumns(Result):
    """What some directions do to every token of the vocabulary, told in three ways.

    Attributes:
        directions: their numbers in the decomposition.
        read: of the direction alone, by the final norm's gain and the unembedding, in logits at a
            norm of scale 1, with mean 0. It is odd in the direction's sign.
        local: by the final norm's Jacobian at the scored positions, averaged, and the unembedding:
            logits per unit of the direction in the final residual stream, with mean 0; odd too.
        measured: mean over the scored positions of clean − edited log-probability in nats, where
            the direction is removed from every write. It does not depend on the sign.
        coefficients: how much of the direction all writes together have at the scored positions,
            on average. Where it is negative, the texts write the opposite direction.
        agreement: Spearman's correlation over the vocabulary, of the pairs of `PAIRS`: the first
            column of one direction (rows) with the second of another (columns). `read` and `local`
            are turned to the sign that the texts write, so it does not depend on signs.
        bounds: 95 % of random orders of the tokens correlate less than this, in size.
        p_values: of a direction's own correlation, against random orders of the tokens.
        vocabulary: the text of each token.
        seed: of the random orders.
    """

    directions: Int[Tensor, " direction"]
    read: Float[Tensor, "direction d_vocab"]
    local: Float[Tensor, "direction d_vocab"]
    measured: Float[Tensor, "direction d_vocab"]
    coefficients: Float[Tensor, " direction"]
    agreement: Float[Tensor, "pair direction other"]
    bounds: Float[Tensor, "pair direction"]
    p_values: Float[Tensor, "pair direction"]
    vocabulary: tuple[str, ...]
    seed: int = 0
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "vocabulary", self.read.shape[1], "token")
        require_length(self, "agreement", len(PAIRS), "pair of columns")

    def _require_values(self) -> None:
        require_finite(self, "read", "local", "coefficients")
        require_between(self, ["agreement"], -1 - 1e-9, 1 + 1e-9)
        require_between(self, ["p_values", "bounds"], 0, 1 + 1e-9)

    @property
    def signs(self) -> Float[Tensor, " direction"]:
        """The sign in which the texts write each direction: 1 or −1."""
        return signs_of(self.coefficients)

    def top(self, direction: int, column: str, count: int = 10) -> Int[Tensor, " token"]:
        """The tokens that a direction supports most, as the texts write it, by one column.

        Args:
            direction: its place in `directions`.
            column: "read", "local" or "measured".
            count: a negative one gives the tokens that it supports least, the least first.

        Raises:
            ValueError: no such column.
        """
        if column not in COLUMNS:
            raise ValueError(f"`column` is {column!r:.40}, but must be one of {list(COLUMNS)}.")
        values = self.as_written(direction, column)
        require_numbers("The changes of tokens", values, "an order")
        return values.argsort(descending=count > 0, stable=True)[: abs(count)]

    def as_written(self, direction: int, column: str) -> Float[Tensor, " d_vocab"]:
        """A column of a direction, in the sign in which the texts write it, with mean 0.

        So `measured` is in logits here: a removal that takes probability from a few tokens gives
        some to all others, which says nothing of them.
        """
        values: Tensor = getattr(self, column)[direction]
        if column == "measured":
            return values - values.mean()
        return self.signs[direction] * values

    def shared_top(self, direction: int, first: str, second: str) -> int:
        """How many of the ten tokens on top two columns share; by chance, 100 ÷ d_vocab."""
        tops = [{*self.top(direction, column, TOP).tolist()} for column in (first, second)]
        return len(tops[0] & tops[1])

    def to_pandas(self) -> Any:
        """One row per direction and token: read, local, measured."""
        import pandas as pd

        count, size = self.read.shape
        columns = {name: getattr(self, name).flatten().numpy() for name in COLUMNS}
        return pd.DataFrame(
            {
                "direction": self.directions.repeat_interleave(size).numpy(),
                "token": [*range(size)] * count,
                "text": [*self.vocabulary] * count,
                **columns,
            }
        )

    def agreement_to_pandas(self) -> Any:
        """One row per pair of columns and direction: spearman, bound, p, shared_top.

        The columns may disagree over the vocabulary and yet share the tokens on top: `shared_top`
        of ten, by chance 100 ÷ d_vocab.
        """
        import pandas as pd

        count = len(self.directions)
        return pd.DataFrame(
            {
                "first": [first for first, _ in PAIRS for _ in range(count)],
                "second": [second for _, second in PAIRS for _ in range(count)],
                "direction": self.directions.repeat(len(PAIRS)).numpy(),
                "spearman": self.agreement.diagonal(dim1=1, dim2=2).flatten().numpy(),
                "bound": self.bounds.flatten().numpy(),
                "p": self.p_values.flatten().numpy(),
                "shared_top": [
                    self.shared_top(i, first, second)
                    for first, second in PAIRS
                    for i in range(count)
                ],
            }
        )

    def summary(self) -> Any:
        """One row per pair of columns: do directions agree with themselves more than with others?

        Columns: spearman (mean over the directions), other (mean where the columns are of different
        directions), p (of random pairings of the directions; the smallest that n directions can
        give is 1 ÷ n!). With one direction, the last two are NaN.

        Random orders of tokens are a weak null: common tokens move together under any edit. Random
        pairings keep that.
        """
        import pandas as pd

        rows = [
            {"first": first, "second": second, **_paired(values, self.seed)}
            for (first, second), values in zip(PAIRS, self.agreement, strict=True)
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        own = self.agreement.diagonal(dim1=1, dim2=2).mean(dim=1)
        pairs = zip(PAIRS, own.tolist(), strict=True)
        shown = ", ".join(f"{first}–{second} {value:.2f}" for (first, second), value in pairs)
        return (
            f"TokenColumns of {len(self.directions)} directions over {len(self.vocabulary)} tokens"
            f"\n  mean rank agreement: {shown}\n  on {self._origin()}"
        )


def token_columns(
    directions: Int[Tensor, " direction"],
    columns: dict[str, Float[Tensor, "direction d_vocab"]],
    coefficients: Float[Tensor, " direction"],
    vocabulary: tuple[str, ...],
    seed: int,
    source: Provenance | None,
) -> TokenColumns:
    """Put the columns together with their agreement and its null."""
    signs = signs_of(coefficients)[:, None]
    ranks = {
        name: _unit_ranks(columns[name] if name == "measured" else signs * columns[name])
        for name in COLUMNS
    }
    agreement = torch.stack([ranks[first] @ ranks[second].T for first, second in PAIRS])
    own = agreement.diagonal(dim1=1, dim2=2).abs()
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(DRAWS):
        order = torch.randperm(len(vocabulary), generator=generator)
        pairs = [(ranks[first] * ranks[second][:, order]).sum(dim=1) for first, second in PAIRS]
        drawn.append(torch.stack(pairs).abs())
    null = torch.stack(drawn)
    # two orders that are equal but for rounding count as equal
    p_values = (1 + (null >= own - 1e-12).sum(dim=0)) / (1.0 + DRAWS)
    p_values = p_values.masked_fill(own.isnan(), torch.nan)
    bounds = null.quantile(0.95, dim=0)
    return TokenColumns(
        directions,
        columns["read"],
        columns["local"],
        columns["measured"],
        coefficients,
        agreement,
        bounds,
        p_values.double(),
        vocabulary,
        seed,
        source,
    )


def signs_of(coefficients: Float[Tensor, " direction"]) -> Float[Tensor, " direction"]:
    """1 or −1; 1 for a coefficient of 0."""
    return torch.where(coefficients < 0, -1.0, 1.0).to(coefficients)


def _unit_ranks(values: Float[Tensor, "direction d_vocab"]) -> Float[Tensor, "direction d_vocab"]:
    """Centred ranks of length 1, whose products are Spearman's correlations; 0 where all tie."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(values.double().cpu().numpy(), axis=1))
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-300)


def _paired(values: Float[Tensor, "direction other"], seed: int) -> dict[str, float]:
    """The mean of the diagonal, of the rest, and how rarely another pairing reaches the first."""
    count = len(values)
    own = float(values.diagonal().mean())
    if count < 2 or own != own:
        return {"spearman": own, "other": torch.nan, "p": torch.nan}
    other = float((values.sum() - values.diagonal().sum()) / (count * (count - 1)))
    if count <= 6:
        orders = torch.tensor([*permutations(range(count))])
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.rand(PAIRINGS, count, generator=generator).argsort(dim=1)
    means = values[torch.arange(count), orders].mean(dim=1)
    extreme = int((means >= own - 1e-12).sum())
    # all pairings hold the true one already
    p = extreme / len(orders) if count <= 6 else (1 + extreme) / (1 + len(orders))
    return {"spearman": own, "other": other, "p": p}
