"""What a contrast of groups finds: effects on held-out texts, ratios, intervals and a null."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.checks import is_number, require_whole
from mechsvd.fields import (
    ROUNDED,
    require_between,
    require_declared,
    require_finite,
    require_length,
)
from mechsvd.linalg.subspace import Subspace, require_orthonormal
from mechsvd.results import Provenance, Result, result

CONTROLS = ("singular", "random")
METHODS = ("special", *CONTROLS)
NULL = "same kind"


@result
class Contrast(Result):
    """What removing each group's directions costs the held-out texts of every group.

    Attributes:
        groups: their names.
        values: KL divergence of clean ‖ edited of each text, in nats per token, when the
            directions of a group are removed; NaN where the text was for training. The methods are
            "special", and the controls "singular" and "random".
        null_values: the same for the null: with the special directions of the text's own random
            half of its group (side 0), and of the other half (side 1).
        text_group: number of each text's group.
        held_out: whether a text was held out.
        directions: what was removed; one basis, or one per site.
        damping, per: as given.
        noise_floor: the largest over the held-out texts of the first split; see `measure`.

    Example:
        >>> special.subspace("We").rank, special.matrix().shape
        (2, torch.Size([2, 2]))
    """

    groups: tuple[str, ...]
    values: Float[Tensor, "seed method group text"]
    null_values: Float[Tensor, "seed side text"]
    text_group: Int[Tensor, " text"]
    held_out: Bool[Tensor, "seed text"]
    directions: Float[Tensor, "seed method group basis d_model k"]
    damping: float
    per: str
    noise_floor: float
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "groups", self.values.shape[2], "group of `values`")

    def _require_values(self) -> None:
        require_finite(self, "directions", "damping", "noise_floor")
        require_between(self, ["text_group"], 0, len(self.groups) - 1)
        require_between(self, ["values", "null_values"], ROUNDED)
        require_between(self, ["damping", "noise_floor"], 0)
        for basis in self.directions.flatten(0, -3):
            require_orthonormal(basis, name="`directions` of a Contrast")
        for name, axes in (("values", (1, 2)), ("null_values", (1,))):
            wrong = (~getattr(self, name).isfinite()).any(dim=axes) & self.held_out
            if wrong.any():
                raise ValueError(f"`{name}` must be finite for every text that was held out.")

    @property
    def k(self) -> int:
        """Number of directions per group."""
        return self.directions.shape[-1]

    @property
    def seeds(self) -> int:
        """Number of random splits of the texts."""
        return len(self.values)

    @property
    def effects(self) -> Float[Tensor, "seed method group measured"]:
        """Mean effect on the held-out texts of each measured group, in nats per token."""
        weights = torch.eye(self.seeds, dtype=torch.float64)[:, :, None] * self._held_out
        return torch.stack(
            [self._means(self.values[:, i], weights) for i in range(len(METHODS))], dim=1
        )

    def matrix(self, method: str = "special") -> Float[Tensor, "group measured"]:
        """Mean effect over the seeds, in nats per token: removed group by measured group.

        Raises:
            ValueError: another method.
        """
        return self.effects[:, _method(method)].mean(dim=0)

    def subspace(
        self, group: str, method: str = "special", seed: int = 0
    ) -> Subspace | tuple[Subspace, ...]:
        """The subspace that was removed for a group; with `per="site"`, one per site.

        Args:
            seed: number of the split, from 0.

        Raises:
            ValueError: no such group, method or split.
        """
        if group not in self.groups:
            raise ValueError(f"`group` is {group!r:.40}, but must be one of {list(self.groups)}.")
        number = require_whole("seed", seed, 0, self.seeds - 1)
        bases = self.directions[number, _method(method), self.groups.index(group)]
        if self.per == "pool":
            return Subspace(bases[0], self.source)
        names = self.source.hooks if self.source else ()
        sources = [self.source and replace(self.source, hooks=(name,)) for name in names]
        return tuple(Subspace(*pair) for pair in zip(bases, sources, strict=True))

    def to_pandas(self) -> Any:
        """One row per seed, method, removed group and measured group, with the mean effect.

        `texts` counts the held-out texts, and `is_own` says whether the groups are the same. The
        null's rows remove the directions of one random half of a group.
        """
        import pandas as pd

        held = torch.stack([(self.held_out & (self.text_group == g)).sum(1) for g in self._numbers])
        names = ["seed", "method", "removed", "measured", "is_own", "effect", "texts"]
        effects, rows = self.effects.tolist(), []
        for seed in range(self.seeds):
            texts = held[:, seed].tolist()
            for i, method in enumerate(METHODS):
                for a, removed in enumerate(self.groups):
                    for b, measured in enumerate(self.groups):
                        effect = effects[seed][i][a][b]
                        rows.append([seed, method, removed, measured, a == b, effect, texts[b]])
            for g, name in enumerate(self.groups):
                kept = self.held_out[seed] & (self.text_group == g)
                for side, which in enumerate(("own half", "other half")):
                    effect = float(self.null_values[seed, side, kept].mean())
                    removed = f"{name}, {which}"
                    rows.append([seed, NULL, removed, name, side == 0, effect, texts[g]])
        return pd.DataFrame(rows, columns=names)

    def summary(self, confidence: float = 0.95, draws: int = 2000) -> Any:
        """What it costs the own group and the others, per method and group, and for all groups.

        `ratio` is own / others, with `low` and `high`. The interval is over texts and splits: each
        draw gives every text and every split a random weight. The directions are not fitted again,
        so it says nothing of other training texts than those of these splits, and with few splits
        it is too narrow for "random". The null, "same kind", contrasts two random halves of one
        group: its ratio is 1 up to chance. Costs below the noise floor count as the noise floor in
        a ratio, so a very large one is a lower bound.

        Args:
            confidence: of the interval.
            draws: number of random weightings.

        Reference: Owen and Eckles, Bootstrapping data arrays of arbitrary order, 2012,
            arXiv:1106.2125.
        """
        import pandas as pd

        draws = require_whole("draws", draws, 1)
        if not is_number(confidence, 0) or not 0 < confidence < 1:
            raise ValueError(f"`confidence` is {confidence!r:.40}, but must be between 0 and 1.")
        tail, least = (1 - confidence) / 2, max(self.noise_floor, 1e-12)
        rows = []
        for method in (*METHODS, NULL):
            own, others = self._costs(method, self._weights(draws))
            own, others = (torch.cat([x, x.mean(1, keepdim=True)], dim=1) for x in (own, others))
            # a cost within rounding has no sign: it counts as the noise floor
            ratio = own.clamp(min=least) / others.clamp(min=least)
            low, high = ratio[1:].quantile(torch.tensor([tail, 1 - tail]).to(ratio), dim=0)
            for i, group in enumerate((*self.groups, "all")):
                numbers = (own[0, i], others[0, i], ratio[0, i], low[i], high[i])
                rows.append([method, group, *map(float, numbers)])
        return pd.DataFrame(
            rows, columns=["method", "group", "own", "others", "ratio", "low", "high"]
        )

    def __repr__(self) -> str:
        own, others = (float(x.mean()) for x in self._costs("special", self._held_out[None]))
        null_own, null_other = (float(x.mean()) for x in self._costs(NULL, self._held_out[None]))
        return (
            f"Contrast of {len(self.groups)} groups: {self.k} directions special to each "
            f"(per {self.per}), {self.seeds} split(s) of {len(self.text_group)} texts\n"
            f"  removed from held-out texts: own group {own:.3g}, others {others:.3g} nats per "
            f"token, ratio {own / others:.3g}; halves of one group {null_own / null_other:.3g}\n"
            f"  on {self._origin()}"
        )

    @property
    def _numbers(self) -> range:
        return range(len(self.groups))

    @property
    def _held_out(self) -> Float[Tensor, "seed text"]:
        return self.held_out.double()

    def _weights(self, draws: int) -> Float[Tensor, "draw seed text"]:
        """The weights of the held-out texts: all 1, then random ones of splits times texts."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(draws, self.seeds, 1), (draws, 1, len(self.text_group))]
        splits, texts = (
            -torch.rand(size, generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
            for size in sizes
        )
        random = splits * texts if self.seeds > 1 else texts
        return torch.cat([torch.ones(1, *random.shape[1:]).double(), random]) * self._held_out

    def _costs(
        self, method: str, weights: Float[Tensor, "draw seed text"]
    ) -> tuple[Float[Tensor, "draw group"], Float[Tensor, "draw group"]]:
        """What removing a group's directions costs itself, and the mean over the other groups."""
        if method == NULL:
            own, other = (
                self._means(self.null_values[:, side, None], weights)[:, 0] for side in (0, 1)
            )
            return own, other
        means = self._means(self.values[:, _method(method)], weights)
        own = means.diagonal(dim1=1, dim2=2)
        return own, (means.sum(dim=2) - own) / (len(self.groups) - 1)

    def _means(
        self, values: Float[Tensor, "seed removed text"], weights: Float[Tensor, "draw seed text"]
    ) -> Float[Tensor, "draw removed measured"]:
        """Weighted means over the texts of each group."""
        member = torch.nn.functional.one_hot(self.text_group, len(self.groups)).double()
        exact = torch.where(self.held_out[:, None], values.double(), 0.0)
        sums = torch.einsum("dst,srt,tm->drm", weights, exact, member)
        return sums / torch.einsum("dst,tm->dm", weights, member)[:, None]


@result
class ContrastSweep(Result):
    """Contrasts of the same groups for several numbers of directions and several dampings.

    Attributes:
        parts: one contrast per rank and damping.

    Example:
        >>> several.to_pandas().columns.tolist()[:3]
        ['k', 'damping', 'method']
    """

    parts: tuple[Contrast, ...]

    @property
    def source(self) -> Provenance | None:
        """The model and the texts."""
        return self.parts[0].source if self.parts else None

    def __getitem__(self, number: int) -> Contrast:
        """The contrast of one rank and damping, in the order of the table."""
        return self.parts[number]

    def __len__(self) -> int:
        """Number of contrasts."""
        return len(self.parts)

    def to_pandas(self, confidence: float = 0.95, draws: int = 500) -> Any:
        """One row per rank, damping and method: own, others, ratio, low, high, over all groups.

        The controls do not depend on the damping, so they repeat.
        """
        import pandas as pd

        tables = []
        for part in self.parts:
            table = part.summary(confidence, draws)
            table = table[table["group"] == "all"].drop(columns="group")
            table.insert(0, "k", part.k)
            table.insert(1, "damping", part.damping)
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def __repr__(self) -> str:
        ratios = [float(own.mean() / others.mean()) for own, others in map(_all, self.parts)]
        best = self.parts[max(range(len(ratios)), key=ratios.__getitem__)]
        return (
            f"ContrastSweep of {len(self)} contrasts of {len(best.groups)} groups\n"
            f"  own / others from {min(ratios):.3g} to {max(ratios):.3g}, largest at k {best.k} "
            f"and damping {best.damping:g} (chosen on the texts it was measured on)\n"
            f"  on {self._origin()}"
        )


def _all(part: Contrast) -> tuple[Tensor, Tensor]:
    return part._costs("special", part._held_out[None])


def _method(method: Any) -> int:
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r:.40}, but must be one of {list(METHODS)}.")
    return METHODS.index(method)
