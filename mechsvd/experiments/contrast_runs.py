"""Runs of a contrast: directions fitted to training texts, and removed from held-out ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.edits.bases import ablate
from mechsvd.edits.maps import Edit
from mechsvd.engine.metrics import kl_divergence
from mechsvd.engine.passes import measure
from mechsvd.engine.session import RunOptions
from mechsvd.engine.writes import Writes
from mechsvd.experiments.contrast_results import CONTROLS
from mechsvd.linalg.contrasts import (
    orthonormal,
    second_moment,
    special_directions,
    top_directions,
)
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task


@dataclass(frozen=True)
class Split:
    """Which texts are held out, and the random half of its group that each text belongs to."""

    held_out: Bool[Tensor, " text"]
    half: Int[Tensor, " text"]


@dataclass(frozen=True)
class Fit:
    """Directions fitted to the training texts of one split, for the largest rank.

    The null's are those of one half of a group, compared with its other half.
    """

    special: Float[Tensor, "basis damping group d_model rank"]
    controls: Float[Tensor, "basis control group d_model rank"]
    null: Float[Tensor, "basis damping group half d_model rank"]


@dataclass(frozen=True)
class Part:
    """What one split gives; each list has one entry per rank and damping."""

    values: list[Float[Tensor, "method group text"]]
    null: list[Float[Tensor, "half text"]]
    directions: list[Float[Tensor, "method group basis d_model _"]]
    noise_floor: float


@dataclass(frozen=True)
class Run:
    """What all splits have in common."""

    model: Model
    tasks: tuple[Task, ...]
    text_group: Int[Tensor, " text"]
    writes: Writes
    arms: Sequence[tuple[int, float]]
    per: str
    options: RunOptions

    @property
    def dampings(self) -> list[float]:
        """Each once, in the order given."""
        return list(dict.fromkeys(damping for _, damping in self.arms))

    @property
    def ranks(self) -> list[int]:
        """Each once, in the order given."""
        return list(dict.fromkeys(k for k, _ in self.arms))

    def fit(self, split: Split, seed: int, names: Sequence[str]) -> Fit:
        """Fit all directions to the training texts."""
        rank, count = max(self.ranks), len(names)
        text = self.writes.task_index
        trained = ~split.held_out[text]
        member = [
            [trained & (self.text_group[text] == g) & (split.half[text] == h) for h in (0, 1)]
            for g in range(count)
        ]
        values = self.writes.values.cpu()
        samples = values.flatten(0, 1)[None] if self.per == "pool" else values
        repeats = len(values) if self.per == "pool" else 1
        self._require_enough(rank, names, member, repeats)
        random = _random_vectors(rank, (len(samples), count, values.shape[-1]), seed)
        fits = [
            _fit_basis(
                [[sample[mask.repeat(repeats)] for mask in pair] for pair in member],
                rank,
                self.dampings,
                vectors,
            )
            for sample, vectors in zip(samples, random, strict=True)
        ]
        return Fit(*(torch.stack(parts).to(values) for parts in zip(*fits, strict=True)))

    def _require_enough(
        self, rank: int, names: Sequence[str], member: Sequence[Sequence[Tensor]], repeats: int
    ) -> None:
        for name, pair in zip(names, member, strict=True):
            count = repeats * int(sum(mask.sum() for mask in pair))
            if count < rank:
                raise ValueError(
                    f"`k` is {rank}, but group {name!r:.40} has {count} training writes per basis; "
                    "choose fewer directions, or give more texts."
                )

    def measure(self, split: Split, fit: Fit, noise_floor: bool, update: Any) -> Part:
        """Remove the directions from the held-out texts: one call per group, with all edits."""
        count, texts = int(self.text_group.max()) + 1, len(self.tasks)
        special = torch.full((len(self.arms), count, texts), torch.nan, dtype=torch.float64)
        null = torch.full((len(self.arms), 2, texts), torch.nan, dtype=torch.float64)
        controls = special.new_full((len(self.ranks), len(CONTROLS), count, texts), torch.nan)
        shared, floor = self._shared_edits(fit), 0.0
        for group in range(count):
            held = (split.held_out & (self.text_group == group)).nonzero().flatten()
            found = measure(
                self.model,
                [self.tasks[i] for i in held],
                [*shared, *self._null_edits(fit, group)],
                metric=kl_divergence,
                noise_floor=noise_floor,
                **self.options,
            )
            sizes = [part[..., 0].numel() for part in (special, controls, null)]
            own, control, halves = found.effect.T.split(sizes)
            special[..., held] = own.view(*special.shape[:-1], len(held))
            controls[..., held] = control.view(*controls.shape[:-1], len(held))
            # side 0: the directions of the text's own half
            sides = halves.view(len(self.arms), 2, len(held))
            null[..., held] = torch.where(split.half[held] == 1, sides.flip(1), sides)
            floor = max(floor, *(part.noise_floor or 0.0 for part in found.parts))
            update()
        return Part(
            [
                torch.cat([special[arm][None], controls[self.ranks.index(k)]])
                for arm, (k, _) in enumerate(self.arms)
            ],
            [*null],
            [self._directions(fit, *arm) for arm in self.arms],
            floor,
        )

    def _shared_edits(self, fit: Fit) -> list[Edit]:
        """The edits of the texts of every group: special by arm, then controls by rank."""
        count = fit.special.shape[2]
        special = [
            self._ablation(fit.special[:, self.dampings.index(damping), g, :, :k])
            for k, damping in self.arms
            for g in range(count)
        ]
        return special + [
            self._ablation(fit.controls[:, control, g, :, :k])
            for k in self.ranks
            for control in range(len(CONTROLS))
            for g in range(count)
        ]

    def _null_edits(self, fit: Fit, group: int) -> list[Edit]:
        return [
            self._ablation(fit.null[:, self.dampings.index(damping), group, half, :, :k])
            for k, damping in self.arms
            for half in (0, 1)
        ]

    def _ablation(self, bases: Float[Tensor, "basis d_model k"]) -> Edit:
        source = self.writes.source
        if self.per == "pool":
            return ablate(Subspace(bases[0], source))
        sources = [source and replace(source, hooks=(site.name,)) for site in self.writes.sites]
        return ablate([Subspace(*pair) for pair in zip(bases, sources, strict=True)])

    def _directions(
        self, fit: Fit, k: int, damping: float
    ) -> Float[Tensor, "method group basis d_model k"]:
        special = fit.special[:, self.dampings.index(damping)]
        return torch.stack([special, *fit.controls.unbind(1)])[..., :k].transpose(1, 2)


def _fit_basis(
    samples: Sequence[Sequence[Float[Tensor, "_ d_model"]]],
    rank: int,
    dampings: Sequence[float],
    random: Float[Tensor, "group d_model rank"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of each group, from the training writes of its two halves."""
    halves = torch.stack(
        [torch.stack([second_moment(one, unit=True) for one in pair]) for pair in samples]
    )
    whole, count = halves.sum(dim=1), len(samples)
    others = torch.stack([whole[[j for j in range(count) if j != i]] for i in range(count)])
    special = [special_directions(whole, others, rank, damping)[0] for damping in dampings]
    null = [
        special_directions(halves, halves.flip(1)[:, :, None], rank, damping)[0]
        for damping in dampings
    ]
    plain = torch.stack([sum(second_moment(one) for one in pair) for pair in samples])  # type: ignore[misc]
    controls = torch.stack([top_directions(plain, rank), orthonormal(random)])
    return torch.stack(special), controls, torch.stack(null)


def _random_vectors(
    rank: int, shape: tuple[int, int, int], seed: int
) -> Float[Tensor, "basis group d_model rank"]:
    """Gaussian vectors, one draw per rank: the first ones do not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(rank)]
    return torch.stack(draws, dim=-1)


def split_texts(
    names: Sequence[str], text_group: Int[Tensor, " text"], train_share: float, seed: int
) -> Split:
    """Split the texts of every group at random, and both parts into two random halves."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(text_group), dtype=torch.bool)
    half = torch.zeros(len(text_group), dtype=torch.long)
    for group, name in enumerate(names):
        own = (text_group == group).nonzero().flatten()
        trained = round(train_share * len(own))
        if min(trained, len(own) - trained) < 2:
            raise ValueError(
                f"Group {name!r:.40} has {len(own)} texts, of which {trained} would be for "
                "training, but it takes two for training and two held out; give at least four."
            )
        order = own[torch.randperm(len(own), generator=generator)]
        held_out[order[trained:]] = True
        for part in (order[:trained], order[trained:]):
            half[part] = torch.arange(len(part)) % 2
    return Split(held_out, half)
