"""Collecting writes: what every site adds to the residual stream at every position of a text."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.batches import halving, rows_a_pass, run_batches
from mechsvd.evaluation import evaluation
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.models import provenance_of
from mechsvd.results import Provenance, load_result, result, save_result
from mechsvd.runs import run_model
from mechsvd.selfcheck import require_sound
from mechsvd.sites import COMPONENTS, Model, Site, find_sites
from mechsvd.tasks import Positions, Task, as_tasks, require_fitting, valid_positions


@result
class Writes:
    """Writes of a model, site by site in the order of writing, over the positions of one text or several.

    Attributes:
        values: in the units of the residual stream.
        sites: what the first axis is.
        tokens, positions, task_index: what the second axis is: token id, absolute position, and number of the text.
        pieces: the text of each token; `[id]` for tokens of a task that does not know it, and empty where none does.
    """

    values: Float[Tensor, "site pos d_model"]
    sites: tuple[Site, ...]
    tokens: Int[Tensor, " pos"]
    positions: Int[Tensor, " pos"]
    task_index: Int[Tensor, " pos"]
    pieces: tuple[str, ...] = ()
    source: Provenance | None = None

    save = save_result

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Writes":
        """Load what `save` wrote; see `load_result`."""
        return load_result(cls, path)

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.values.shape[0], "site of `values`")
        if self.pieces:
            require_length(self, "pieces", len(self.tokens), "token")

    def _require_values(self) -> None:
        require_finite(self, "values")
        require_between(self, ["tokens", "positions", "task_index"], 0)

    def __len__(self) -> int:
        """Number of writes: sites × positions."""
        return self.values.shape[0] * self.values.shape[1]

    def to_pandas(self) -> Any:
        """One row a write, with its L2 norm."""
        import pandas as pd

        sites, count = len(self.sites), len(self.tokens)
        return pd.DataFrame(
            {
                "layer": [s.layer for s in self.sites for _ in range(count)],
                "component": [s.component for s in self.sites for _ in range(count)],
                "task": self.task_index.tolist() * sites,
                "position": self.positions.tolist() * sites,
                "token": (list(self.pieces) or self.tokens.tolist()) * sites,
                "norm": self.values.float().norm(dim=-1).flatten().cpu().numpy(),
            }
        )

    def __repr__(self) -> str:
        layers = len({site.layer for site in self.sites})
        kinds = " and ".join(c for c in COMPONENTS if any(s.component == c for s in self.sites))
        return (
            f"{len(self)} writes: {len(self.sites)} sites × {len(self.tokens)} positions, in {self.values.shape[2]} dimensions\n"
            f"  {kinds} of {layers} layers, {int(self.task_index.max()) + 1} task(s)\n"
            f"  from {self.source.model if self.source else 'bare tensors'}"
        )


def collect_writes(
    model: Model,
    tasks: Task | Sequence[Task],
    *,
    layers: int | Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS,
    positions: Positions = None,
    skip_bos: bool = False,
    missing: Literal["error", "skip"] = "error",
    check: bool = True,
    batched_hooks: bool = False,
) -> Writes:
    """Collect what attention and MLP layers write to the residual stream, in one forward pass a text length, or more
    where memory asks for it.

    Every position counts by default, prompt and continuation and BOS, as in the shortform; BOS can own the top direction.

    Args:
        tasks: one or several; those of the same length run together, and none is padded.
        layers, components: which sites; `components=("attn",)` gives the shortform's first, attention-only diagrams.
        positions: absolute positions to keep in each text.
        skip_bos: leave out the BOS token.
        missing: whether a layer without a hook is refused or left out.
        check: refuse a model whose hooks are not its writes; see `self_check`.
        batched_hooks: hooks of yours that are on the model act on every row of a batch; see `measure`.

    Returns:
        Writes with the positions of all tasks one after the other, in the order given.

    Raises:
        ValueError: no tasks, nothing left to collect, a model that fails the self-check, NaN or inf in the writes.
        KeyError: an unknown layer or component.
    """
    chosen = as_tasks(tasks)
    for task in chosen:
        require_fitting(model, task)
    sites = find_sites(model, layers, components, missing)
    _, notes = require_sound(model, check, missing)
    wanted = valid_positions(positions)
    kept = [_kept_positions(model, task, wanted, skip_bos) for task in chosen]
    with evaluation(model, batched_hooks=batched_hooks) as others:
        values = _run_by_length(model, chosen, sites, others.one_row)
    values = [value[:, keep] for value, keep in zip(values, kept, strict=True)]
    for number, (value, keep) in enumerate(zip(values, kept, strict=True)):
        _require_finite(value, sites, keep, number)
    any_text = any(task.pieces for task in chosen)
    return Writes(
        values=torch.cat(values, dim=1),
        sites=sites,
        tokens=torch.cat([task.tokens[keep] for task, keep in zip(chosen, kept, strict=True)]),
        positions=torch.cat(kept),
        task_index=torch.cat([torch.full_like(keep, i) for i, keep in enumerate(kept)]),
        pieces=tuple(task.texts[i] for task, keep in zip(chosen, kept, strict=True) for i in keep.tolist()) if any_text else (),
        source=provenance_of(model, tuple(tuple(t.tokens.tolist()) for t in chosen), sites, (*notes, *others.notes)),
    )


def _run_by_length(
    model: Model, tasks: Sequence[Task], sites: Sequence[Site], one_row: bool
) -> list[Float[Tensor, "site pos d_model"]]:
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}

    def forward(rows: Tensor) -> None:
        stored: list[Tensor] = []
        hooks = [(site.hook_name, lambda x, hook=None: stored.append(x.clone())) for site in sites]
        run_model(model, torch.stack([tasks[i].tokens for i in rows]).to(device), hooks, scored=slice(0, 1))
        found.update({int(i): torch.stack([x[row] for x in stored]) for row, i in enumerate(rows)})

    for length in {len(task.tokens) for task in tasks}:
        same = [i for i, task in enumerate(tasks) if len(task.tokens) == length]
        one = tasks[same[0]]
        size = 1 if one_row else rows_a_pass(model, one)
        run_batches(forward, torch.tensor(same), size, halving(model, one), progress=False)
    return [found[i] for i in range(len(tasks))]


def _kept_positions(model: Model, task: Task, positions: Positions, skip_bos: bool) -> Int[Tensor, " kept"]:
    length = len(task.tokens)
    chosen = list(valid_positions(positions, length) or range(length))
    if skip_bos:
        bos = getattr(model.tokenizer, "bos_token_id", None)
        chosen = [p for p in chosen if not (p == 0 and int(task.tokens[0]) == bos)]
    if not chosen:
        raise ValueError(f"No writes are left: `positions` and `skip_bos` exclude all {length} positions of the task.")
    return torch.tensor(chosen)


def _require_finite(values: Tensor, sites: Sequence[Site], kept: Tensor, number: int) -> None:
    if values.isfinite().all():
        return
    site, pos, _ = (~values.isfinite()).nonzero()[0].tolist()
    hint = " Half precision overflows easily: load the model with dtype=torch.float32." if values.element_size() < 4 else ""
    raise ValueError(
        f"The writes hold NaN or inf, first at layer {sites[site].layer} {sites[site].component}, position {int(kept[pos])} of "
        f"prompt {number} ({values.dtype}).{hint}"
    )
