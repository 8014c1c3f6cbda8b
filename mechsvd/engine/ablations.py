"""Baselines from writes: their mean, another text's, or a donor's, to replace what is ablated."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.checks import require_whole
from mechsvd.edits.baselines import Baseline
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions
from mechsvd.engine.writes import Writes, collect_writes
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import require_kind


@plain
def mean_baseline(writes: Writes, by: Literal["site", "position"] = "site") -> Baseline:
    """The mean write of each site, for mean ablation.

    A mean of the text that is measured knows that text; the measurement's provenance says so.

    Args:
        writes: of one or many texts.
        by: one mean per site, or one per site and position (over the texts that reach it).

    Raises:
        TypeError: not writes.
        ValueError: another `by`; or by position, but positions were left out.

    Example:
        >>> baseline = ms.mean_baseline(writes)
        >>> measured = ms.measure(model, task, [ms.ablate(mine, baseline=baseline)])
        >>> bool(measured.kl_divergence > 0)
        True
    """
    require_kind(writes, Writes)
    if by == "site":
        values = writes.values.double().mean(dim=1, keepdim=True)
        return _baseline(values[None], writes, "mean of each site")
    if by != "position":
        raise ValueError(f"`by` is {by!r:.40}, but must be 'site' or 'position'.")
    texts = _by_text(writes)
    longest = max(text.shape[1] for text in texts)
    shape = (len(writes.sites), longest, writes.values.shape[-1])
    total, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(longest, 1)
    for text in texts:
        total[:, : text.shape[1]] += text.cpu().double()
        count[: text.shape[1]] += 1
    return _baseline((total / count)[None], writes, "mean of each site and position")


@plain
def resample_baseline(writes: Writes, seed: int = 0) -> Baseline:
    """The writes of another text at the same positions, for resample ablation.

    Each text gets the writes of another one of the same length, by a seeded cycle through them,
    so none gets its own.

    Args:
        writes: of at least two texts, at all positions.

    Raises:
        TypeError: not writes.
        ValueError: a text has no other one of its length, or positions were left out.

    Reference: Chan et al., Causal scrubbing, 2022.

    Example:
        >>> others = ms.resample_baseline(ms.collect_writes(model, tasks[:2]))
        >>> ms.measure(model, tasks[:2], [ms.ablate(mine, baseline=others)]).value.shape
        torch.Size([2, 1])
    """
    require_kind(writes, Writes)
    seed = require_whole("seed", seed)
    texts = _by_text(writes)
    if writes.source is None or len(writes.source.tokens) != len(texts):
        raise ValueError("The writes do not say of which texts they are; collect them again.")
    tokens = writes.source.tokens
    generator = torch.Generator().manual_seed(seed)
    donors = list(range(len(texts)))
    for length in sorted({text.shape[1] for text in texts}):
        same = [i for i, text in enumerate(texts) if text.shape[1] == length]
        if len({tokens[i] for i in same}) < 2:
            raise ValueError(
                f"Text {same[0]} is the only one of {length} tokens, so no other text has writes "
                "at the same positions; collect at least two texts of each length."
            )
        shuffled = [same[i] for i in torch.randperm(len(same), generator=generator).tolist()]
        for text, donor in zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True):
            donors[text] = donor
    values = _padded([texts[donor].cpu() for donor in donors])
    baseline = _baseline(values.double(), writes, f"writes of another text (seed {seed})", tokens)
    return replace(baseline, source=writes.source and replace(writes.source, seed=seed))


@runs_model(RunOptions)
def donor_baseline(
    model: Model,
    task: Task | Sequence[Task],
    texts: Sequence[Task] | None = None,
    **options: Unpack[RunOptions],
) -> Baseline:
    """The writes of another run at each site and position, for activation patching.

    In TransformerLens's convention, a donor of the corrupted text on the clean run is noising, and
    the clean donor on the corrupted text is denoising. With `ablate(subspace, baseline=donor)` only
    the part in the subspace is exchanged (an interchange intervention).

    Args:
        task: the donor's text; at least as long as the text that is measured. Or a list of donors,
            one per text of `texts`.
        texts: the texts that will be measured, in the order of their donors; with one donor, none.
        options: see `RunOptions` (layers, components, batch_size, …), but no `positions`: choose
            them where the edit acts.

    Raises:
        TypeError: several donors without their texts, or one with texts.
        ValueError: as `collect_writes`; `positions`; another number of texts than of donors, a text
            that is there twice, or one that is longer than its donor.

    Reference: Geiger et al., Causal abstractions of neural networks, 2021, arXiv:2106.02997.

    Example:
        >>> itself = ms.ablate(mine, baseline=ms.donor_baseline(model, task))  # its own donor
        >>> bool(ms.measure(model, task, [itself]).kl_divergence < 1e-6)
        True
    """
    if options.get("positions") is not None:
        raise ValueError(
            "A donor gives all positions; choose `positions` where the edit acts, in `measure`."
        )
    donors = as_tasks(task)
    if isinstance(task, Task) != (texts is None):
        raise TypeError(
            "`texts` are the texts that are measured, one per donor; give them with a list of "
            "donors, and only then."
        )
    pairs = [] if texts is None else _pairs(donors, as_tasks(texts))
    writes = collect_writes(model, donors, **options)
    values = _padded(_by_text(writes))
    return _baseline(values, writes, "writes of a donor", tuple(pairs))


def _pairs(donors: Sequence[Task], texts: Sequence[Task]) -> list[tuple[int, ...]]:
    """The tokens of the texts, each of which has its donor."""
    tokens = [tuple(text.tokens.tolist()) for text in texts]
    if len(donors) != len(texts) or len({*tokens}) < len(tokens):
        raise ValueError(
            f"{len(donors)} donors for {len({*tokens})} different texts; give each text one donor."
        )
    for i, (donor, text) in enumerate(zip(donors, tokens, strict=True)):
        if len(donor.tokens) < len(text):
            raise ValueError(
                f"Donor {i} has {len(donor.tokens)} tokens, but its text has {len(text)}; a donor "
                "must be at least as long."
            )
    return tokens


def _padded(
    texts: Sequence[Float[Tensor, "site _ d_model"]],
) -> Float[Tensor, "text site longest d_model"]:
    longest = max(text.shape[1] for text in texts)
    return torch.stack([pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])


def _baseline(
    values: Tensor, writes: Writes, kind: str, texts: tuple[tuple[int, ...], ...] = ()
) -> Baseline:
    return Baseline(
        values.to(writes.values.device, torch.promote_types(writes.values.dtype, torch.float32)),
        tuple(writes.sites),
        kind,
        texts,
        writes.source,
    )


def _by_text(writes: Writes) -> list[Float[Tensor, "site pos d_model"]]:
    """The writes of each text, at all its positions from 0."""
    texts = []
    for index in range(int(writes.task_index.max()) + 1):
        text = writes.at(writes.task_index == index)
        if not torch.equal(text.positions, torch.arange(len(text.positions)).to(text.positions)):
            raise ValueError(
                f"The writes of text {index} lack positions (`positions` or `skip_bos`); a baseline "
                "by position needs all of them."
            )
        texts.append(text.values)
    return texts
