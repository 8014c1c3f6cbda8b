"""Contrasts: which directions are special to a group of texts, and what removing them costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_number, require_whole, whole_numbers
from mechsvd.engine.progress import progress_bar
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session, require_same_positions
from mechsvd.engine.writes import collect_writes
from mechsvd.experiments.contrast_results import Contrast, ContrastSweep
from mechsvd.experiments.contrast_runs import Run, split_texts
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks

DAMPINGS = (0.01, 0.05, 0.2, 1.0)
RANKS = (1, 2, 4, 8, 16)


@runs_model(RunOptions)
def contrast(
    model: Model,
    groups: Mapping[str, Sequence[Task]],
    k: int = 8,
    *,
    damping: float = 0.05,
    per: Literal["pool", "site"] = "pool",
    train_share: float = 0.5,
    seeds: int = 3,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Contrast:
    """Split the dimensions into those special to each group of texts and those shared by all.

    Each group's texts are split at random into training and held-out texts. The special directions
    of a group come from the training texts only; see `special_directions`. They are removed from
    the writes of the held-out texts of every group. If they are special, that costs the own group
    much and the others little.

    Two controls of the same rank stand next to them: the group's top singular directions, and
    random directions. So does a null: the same contrast between two random halves of one group,
    where nothing is special.

    Args:
        groups: texts by the group's name; at least four each, all different.
        k: how many directions per group.
        damping: how much every direction counts as used by the other groups, relative to their
            mean eigenvalue. Small values find rare directions, and noise.
        per: "pool", or different directions at each "site".
        train_share: share of the texts that the directions are fitted to.
        seeds: number of random splits.
        seed: of the first.
        options: see `RunOptions` (layers, components, positions, batch_size, …).

    Raises:
        TypeError: not groups of tasks.
        ValueError: fewer than two groups, a group with too few texts or with a text twice, more
            directions than dimensions or training writes, or an option out of range.

    Example:
        >>> special = ms.contrast(model, {"I": tasks[:4], "We": tasks[4:]}, k=2, seeds=1)
        >>> special.summary().columns.tolist()[:4]
        ['method', 'group', 'own', 'others']
    """
    (found,) = _contrasts(model, groups, [(k, damping)], per, train_share, seeds, seed, options)
    return found


@runs_model(RunOptions)
def contrast_sweep(
    model: Model,
    groups: Mapping[str, Sequence[Task]],
    ranks: Iterable[int] = RANKS,
    dampings: Iterable[float] = DAMPINGS,
    *,
    per: Literal["pool", "site"] = "pool",
    train_share: float = 0.5,
    seeds: int = 3,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> ContrastSweep:
    """Repeat a contrast for several numbers of directions and several dampings.

    All of them share forward passes, and the splits of the texts.

    Args:
        groups, per, train_share, seeds, seed, options: see `contrast`.

    Raises:
        TypeError, ValueError: as `contrast`; no ranks or no dampings.

    Example:
        >>> groups = {"I": tasks[:4], "We": tasks[4:]}
        >>> several = ms.contrast_sweep(model, groups, ranks=[1, 2], dampings=[0.05], seeds=1)
        >>> [part.k for part in several.parts]
        [1, 2]
    """
    chosen = whole_numbers("ranks", ranks).tolist(), [*dampings]
    if not chosen[1]:
        raise ValueError("`dampings` is empty; give at least one.")
    arms = list(product(*chosen))
    return ContrastSweep(
        tuple(_contrasts(model, groups, arms, per, train_share, seeds, seed, options))
    )


def _contrasts(
    model: Model,
    groups: Any,
    arms: Sequence[tuple[int, float]],
    per: str,
    train_share: float,
    seeds: int,
    seed: int,
    options: RunOptions,
) -> list[Contrast]:
    """One contrast per rank and damping, all from the same forward passes."""
    require_same_positions(options)
    names, tasks, text_group = _valid_groups(groups)
    arms = [(_valid_rank(k, model), _valid_damping(damping)) for k, damping in arms]
    if per not in ("pool", "site"):
        raise ValueError(f"`per` is {per!r:.40}, but must be 'pool' or 'site'.")
    seeds, seed = require_whole("seeds", seeds, 1), require_whole("seed", seed)
    splits = [split_texts(names, text_group, train_share, seed + i) for i in range(seeds)]
    quiet: RunOptions = {**options, "progress": False}
    with (
        open_session(model, tasks, **options) as session,
        progress_bar(seeds * len(names), "held-out groups", options.get("progress")) as bar,
    ):
        source = replace(session.provenance(session.sites), seed=seed)
        writes = collect_writes(model, tasks, **quiet)
        run = Run(model, tasks, text_group, writes, arms, per, quiet)
        parts = []
        for number, split in enumerate(splits):
            fit = run.fit(split, seed + number, names)
            parts.append(run.measure(split, fit, noise_floor=number == 0, update=bar.update))
    held_out = torch.stack([split.held_out for split in splits])
    return [
        Contrast(
            names,
            torch.stack([part.values[arm] for part in parts]),
            torch.stack([part.null[arm] for part in parts]),
            text_group,
            held_out,
            torch.stack([part.directions[arm] for part in parts]),
            damping,
            per,
            parts[0].noise_floor,
            source,
        )
        for arm, (_, damping) in enumerate(arms)
    ]


def _valid_groups(groups: Any) -> tuple[tuple[str, ...], tuple[Task, ...], Int[Tensor, " text"]]:
    if not isinstance(groups, Mapping):
        raise TypeError(f"`groups` must be lists of tasks by name, but is {type(groups).__name__}.")
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} group(s) given, but it takes two to contrast.")
    lists = [as_tasks(tasks) for tasks in groups.values()]
    tasks = tuple(task for one in lists for task in one)
    numbers = torch.tensor([group for group, one in enumerate(lists) for _ in one])
    names = tuple(str(name) for name in groups)
    seen: dict[tuple[int, ...], str] = {}
    for task, group in zip(tasks, numbers.tolist(), strict=True):
        tokens = tuple(task.tokens.tolist())
        if tokens in seen:
            raise ValueError(
                f"A text of group {names[group]!r:.40} is also a text of {seen[tokens]!r:.40}, so "
                "it could be held out and fitted at once; give different texts."
            )
        seen[tokens] = names[group]
    return names, tasks, numbers


def _valid_rank(k: Any, model: Model) -> int:
    return require_whole("k", k, 1, int(model.cfg.d_model) - 1)


def _valid_damping(damping: Any) -> float:
    if not is_number(damping, 0) or damping == 0:
        raise ValueError(f"`damping` is {damping!r:.40}, but must be finite and above 0.")
    return float(damping)
