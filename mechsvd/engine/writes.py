"""Collecting writes: what every site adds to the residual stream at every position of a text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_whole, whole_numbers
from mechsvd.engine.batches import run_batches
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.model.finite import overflow_advice
from mechsvd.model.runs import run_model
from mechsvd.model.sites import COMPONENTS, Hook, Model, Site
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.model.tokenization import pieces_of, prompt_tokens
from mechsvd.results import Provenance, Result, result


@result
class Writes(Result):
    """Writes of a model: site by site in the order of writing, over the positions of the texts.

    Attributes:
        values: in the units of the residual stream.
        sites: the first axis.
        tokens, positions, task_index: the second axis: token id, absolute position, and number
            of the text.
        pieces: the text of each token; `[id]` for tokens of a task without texts, and empty if
            no task has them.

    Example:
        >>> writes.select(layers=[2], components=["mlp"]).values.shape
        torch.Size([1, 21, 128])
    """

    values: Float[Tensor, "site pos d_model"]
    sites: tuple[Site, ...]
    tokens: Int[Tensor, " pos"]
    positions: Int[Tensor, " pos"]
    task_index: Int[Tensor, " pos"]
    pieces: tuple[str, ...] = ()
    source: Provenance | None = None

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

    def select(
        self,
        *,
        layers: int | Iterable[int] | None = None,
        components: str | Sequence[str] | None = None,
        tasks: int | Iterable[int] | None = None,
    ) -> "Writes":
        """The writes of some layers, components and texts; texts keep their numbers.

        Raises:
            ValueError: nothing is left.

        Example: `decompose(writes.select(layers=range(3), components="attn"))`.
        """
        in_layer, in_task = _among("layers", layers), _among("tasks", tasks)
        names = {components} if isinstance(components, str) else components and {*components}
        sites = [
            i
            for i, site in enumerate(self.sites)
            if in_layer(site.layer) and (names is None or site.component in names)
        ]
        kept = torch.tensor([in_task(text) for text in self.task_index.tolist()], dtype=torch.bool)
        if not sites or not kept.any():
            raise ValueError(
                f"Nothing is left of layers {layers}, components {components} and tasks {tasks}: "
                f"the writes have layers {sorted({s.layer for s in self.sites}, key=str)}, "
                f"components {sorted({str(s.component) for s in self.sites})} and tasks 0 to "
                f"{int(self.task_index.max())}."
            )
        chosen = tuple(self.sites[i] for i in sites)
        source = self.source and replace(self.source, hooks=tuple(site.name for site in chosen))
        own = replace(self, values=self.values[sites], sites=chosen, source=source)
        return own.at(kept)

    def at(self, kept: Bool[Tensor, " pos"]) -> "Writes":
        """The writes at some of the positions; texts keep their numbers."""
        pieces = zip(self.pieces, kept.tolist(), strict=False)  # there may be none
        return replace(
            self,
            values=self.values[:, kept],
            tokens=self.tokens[kept],
            positions=self.positions[kept],
            task_index=self.task_index[kept],
            pieces=tuple(piece for piece, is_kept in pieces if is_kept),
        )

    def to_pandas(self) -> Any:
        """One row per write, with its L2 norm."""
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
        if not all(site.is_write for site in self.sites):
            return (
                f"{len(self)} vectors at {self.sites[0].name}, …: {len(self.sites)} hook points × "
                f"{len(self.tokens)} positions, in {self.values.shape[2]} dimensions\n"
                f"  not writes; {int(self.task_index.max()) + 1} task(s)\n"
                f"  from {self._origin('bare tensors')}"
            )
        kinds = " and ".join(c for c in COMPONENTS if any(s.component == c for s in self.sites))
        return (
            f"{len(self)} writes: {len(self.sites)} sites × {len(self.tokens)} positions, "
            f"in {self.values.shape[2]} dimensions\n"
            f"  {kinds} of {layers} layers, {int(self.task_index.max()) + 1} task(s)\n"
            f"  from {self._origin('bare tensors')}"
        )


@runs_model(RunOptions)
def collect_writes(
    model: Model,
    tasks: Task | str | Sequence[Task | str],
    *,
    skip_bos: bool = False,
    **options: Unpack[RunOptions],
) -> Writes:
    """Collect what attention and MLP layers write to the residual stream.

    It takes one forward pass per text length, or more if memory requires it. Every position
    counts by default, prompt and continuation and BOS, as in the shortform. BOS can dominate the
    top direction.

    Args:
        tasks: one or more, or texts, of which nothing needs to be scored; those of the same length
            run together, without padding.
        skip_bos: leave out the BOS token.
        options: see `RunOptions` (layers, components, at, positions, batch_size, …).
            `components=("attn",)` gives the shortform's first, attention-only diagrams. With `at`,
            what is collected are the values at other hook points, not writes.

    Returns:
        Writes with the positions of all tasks one after the other, in the order given.

    Raises:
        ValueError: no tasks, nothing left to collect, a model that fails the self-check, or NaN
            or inf in the writes.
        KeyError: an unknown layer or component.

    Example:
        >>> ms.collect_writes(model, task, layers=[0, 1], skip_bos=True).values.shape
        torch.Size([4, 20, 128])
    """
    chosen = as_tasks(_read(model, tasks))
    with open_session(model, chosen, **options) as session:
        sites = session.sites
        kept = [_kept_positions(session, task, skip_bos) for task in chosen]
        values = _values_of_tasks(session)
        source = session.provenance(sites)
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
        pieces=tuple(
            task.texts[i] for task, keep in zip(chosen, kept, strict=True) for i in keep.tolist()
        )
        if any_text
        else (),
        source=source,
    )


def _read(model: Model, tasks: Any) -> Any:
    """Texts as tasks; everything else as it is."""
    if isinstance(tasks, str):
        return [_text(model, tasks)]
    if isinstance(tasks, Iterable) and not isinstance(tasks, Task):
        return [_text(model, one) if isinstance(one, str) else one for one in tasks]
    return tasks


def _text(model: Model, text: str) -> Task:
    """The task of a text; which of its tokens count as scored plays no part in its writes."""
    ids = prompt_tokens(model, text)
    tokens = torch.tensor(ids)
    targets = None if len(ids) > 1 else tokens
    return Task(tokens, max(1, len(ids) - 1), pieces_of(model, ids), targets=targets)


def _among(name: str, chosen: Any) -> Callable[[Any], bool]:
    """Whether a number is one of those chosen; all are for None."""
    if chosen is None:
        return lambda number: True
    numbers = {*whole_numbers(name, [chosen] if is_whole(chosen) else chosen).tolist()}
    return lambda number: number in numbers


def _values_of_tasks(session: Session) -> list[Float[Tensor, "site pos d_model"]]:
    tasks, parts = session.tasks, [[torch.empty(0)] * len(session.sites) for _ in session.tasks]
    device = next(session.model.parameters()).device  # of a model on several devices, the first

    def take(site: int, texts: Sequence[int], values: Tensor) -> None:
        for text, value in zip(texts, values, strict=True):
            parts[text][site] = value.to(device, copy=True)  # its module may change it in place

    def passes_of(texts: Sequence[int]) -> tuple[int, Callable[[int], int]]:
        return session.rows_per_pass(tasks[texts[0]]), session.halve(tasks[texts[0]])

    progress = session.progress or False
    run_by_length(session, [task.tokens for task in tasks], take, passes_of, progress)
    return [torch.stack(parts.pop(0)) for _ in tasks]


def run_by_length(
    session: Session,
    rows: Sequence[Tensor],
    take: Callable[[int, Sequence[int], Float[Tensor, "row pos d_model"]], None],
    passes_of: Callable[[Sequence[int]], tuple[int, Callable[[int], int]]],
    progress: bool | None = False,
    sites: Sequence[Site] | None = None,
) -> None:
    """Run rows of tokens, those of one length together, and hand on what each site writes.

    Args:
        rows: of any lengths, " pos" each.
        take: is called with the number of a site, the numbers of some rows, and their writes, while
            the model runs; once per site and row, also where memory runs out within a pass.
        passes_of: how many of some rows of one length share a pass, and what halves that; see
            `halving`.
        sites: instead of the session's; where not all are writes, the plain kernels run.
    """
    device = next(session.model.parameters()).device
    sites = session.sites if sites is None else sites
    fused = session.check.runs_fused and all(site.is_write for site in sites)
    taken: list[set[int]] = [set() for _ in sites]

    def hook_of(index: int, site: Site, numbers: list[int]) -> Hook:
        def hand_on(x: Tensor, hook: Any = None) -> None:
            new = [k for k, number in enumerate(numbers) if number not in taken[index]]
            values = x if site.head is None else x[:, :, site.head]
            if new:
                values = values if len(new) == len(numbers) else values[new]
                take(index, [numbers[k] for k in new], values)
                taken[index].update(numbers)

        return site.hook_name, hand_on

    def forward(chosen: Tensor) -> None:
        numbers = chosen.tolist()
        tokens = torch.stack([rows[number] for number in numbers]).to(device)
        hooks = [hook_of(index, site, numbers) for index, site in enumerate(sites)]
        run_model(session.model, tokens, hooks, scored=slice(0, 1), fused=fused)

    for length in sorted({len(row) for row in rows}):
        same = [number for number, row in enumerate(rows) if len(row) == length]
        run_batches(forward, torch.tensor(same), *passes_of(same), progress, "texts")


def _kept_positions(session: Session, task: Task, skip_bos: bool) -> Int[Tensor, " kept"]:
    length = len(task.tokens)
    positions = list(session.positions(task) or range(length))
    if skip_bos:
        bos = getattr(session.model.tokenizer, "bos_token_id", None)
        positions = [p for p in positions if not (p == 0 and int(task.tokens[0]) == bos)]
    if not positions:
        raise ValueError(
            f"No writes are left: `positions` and `skip_bos` exclude all {length} positions "
            "of the task."
        )
    return torch.tensor(positions)


def _require_finite(values: Tensor, sites: Sequence[Site], kept: Tensor, number: int) -> None:
    if values.isfinite().all():
        return
    site, pos, _ = (~values.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"The writes hold NaN or inf, first at {sites[site].place}, "
        f"position {int(kept[pos])} of prompt {number} ({values.dtype}).{overflow_advice(values.dtype)}"
    )
