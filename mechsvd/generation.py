"""Text from inside a subspace: a model goes on from a prompt, or from nothing, while every write is edited."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor

from mechsvd.batches import halving, rows_a_pass, run_batches
from mechsvd.checks import warn
from mechsvd.edits import Edit, Gate, chain
from mechsvd.evaluation import evaluation
from mechsvd.hooks import as_stack, hooks_at
from mechsvd.models import provenance_of
from mechsvd.runs import continue_tokens, end_tokens
from mechsvd.selfcheck import require_sound
from mechsvd.sites import COMPONENTS, Model, Site, find_sites, require_model
from mechsvd.tasks import Positions, Task, require_known, valid_positions
from mechsvd.tokenization import fit_context, pieces_of, prompt_tokens, warn_unusual_start

Prompt = str | Int[Tensor, " pos"]


@overload
def generate(model: Model, prompt: Prompt, edit: Edit | None = None, **options: Any) -> str: ...
@overload
def generate(model: Model, prompt: Prompt, edit: Sequence[Edit | None], **options: Any) -> list[str]: ...
def generate(model: Model, prompt: Prompt, edit: Any = None, **options: Any) -> str | list[str]:
    """Let a model write on from a prompt while an edit acts on every write; greedily by default.

    Args:
        prompt: the text to go on from, or its token ids; "" is the bare start, BOS alone.
        edit: one edit, None for the model as it is, or several (a list or a stack of gates), whose greedy texts are written
            side by side as rows of one batch.
        options: as `generate_tasks` takes them (max_new_tokens, temperature, seed, layers, positions, …).

    Returns:
        The prompt and what follows, up to the end of the text; a list of texts for several edits.

    Raises:
        TypeError, ValueError: as `generate_tasks`.
    """
    several = isinstance(edit, list | tuple) or (isinstance(edit, Gate) and edit.is_stack)
    tasks = generate_tasks(model, prompt, edit if several else [edit], **options)
    texts = [(prompt if isinstance(prompt, str) else task.text()[0]) + _said(model, task) for task in tasks]
    return texts if several else texts[0]


def generate_tasks(
    model: Model,
    prompt: Prompt,
    edits: Gate | Sequence[Edit | None],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    layers: int | Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS,
    positions: Positions = None,
    missing: Literal["error", "skip"] = "error",
    prepend_bos: bool | None = None,
    truncate: Literal["left"] | None = None,
    use_kv_cache: bool = True,
    check: bool = True,
    batched_hooks: bool = False,
    progress: bool | None = None,
) -> list[Task]:
    """As `generate`, but as tasks: what each edit wrote, ready to be measured, collected or decomposed.

    Args:
        temperature: 0 takes the most probable token; above 0, tokens are drawn, and each edit gets the same random numbers,
            whatever stands beside it.
        seed: of the draws; the global generators stay as they were.
        positions: absolute positions to edit, in the prompt and in what follows; all by default.
        truncate: "left" drops the oldest prompt tokens when prompt and new tokens do not fit into the context.
        use_kv_cache: reuse keys and values of earlier positions; the text is the same without, but slower.
        batched_hooks: hooks of yours that are on the model act on every row of a batch; see `measure`.

    Raises:
        TypeError: a prompt that is not a string, edits that are none.
        ValueError: a prompt that does not fit, no BOS to start from, a basis of another model, a temperature below 0.
    """
    _require_options(max_new_tokens, temperature, seed)
    start = fit_context(model, _start(model, prompt, prepend_bos), max_new_tokens, truncate)
    sites = find_sites(model, layers, components, missing)
    chosen = valid_positions(positions, len(start) + max_new_tokens)
    require_sound(model, check, missing)
    with evaluation(model, batched_hooks=batched_hooks) as others:
        wanted = [chain() if e is None else e for e in edits] if isinstance(edits, list | tuple) else edits
        stack = as_stack(model, wanted, provenance_of(model) if check else None)
        extend = partial(continue_tokens, temperature=temperature, seed=seed, use_kv_cache=use_kv_cache)

        broken: dict[Site, Tensor] = {}

        def observe(site: Site, attempted: Tensor, kept: Tensor) -> None:
            broken[site] = ~kept.isfinite().all() | broken.get(site, False)

        def forward(rows: Int[Tensor, " row"]) -> list[Tensor]:
            hooks = hooks_at(model, stack[rows], sites, chosen, observe)
            return extend(model, torch.tensor([start] * len(rows)), max_new_tokens, hooks)

        longest = _longest(start, max_new_tokens)
        size = 1 if others.one_row or temperature > 0 else rows_a_pass(model, longest)
        parts = run_batches(forward, torch.arange(len(stack)), size, halving(model, longest), progress)
    if wrong := [str(site) for site, is_broken in broken.items() if is_broken]:
        warn(f"The edits gave writes that are not finite, first at layer {wrong[0]}: the text says nothing.")
    has_text = model.tokenizer is not None
    return [Task(t, len(start), pieces_of(model, t.tolist()) if has_text else ()) for part in parts for t in part]


def _said(model: Model, task: Task) -> str:
    has_ended = int(task.tokens[-1]) in end_tokens(model)
    return "".join(task.pieces[task.prompt_length : -1]) if has_ended else task.text()[1]


def _start(model: Model, prompt: Any, prepend_bos: bool | None) -> list[int]:
    require_model(model)
    if not isinstance(prompt, Tensor):
        return prompt_tokens(model, prompt, prepend_bos, may_be_empty=True)
    if prompt.ndim != 1 or len(prompt) == 0 or prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise ValueError(
            f"`prompt` must be text, or token ids of shape [pos], but is {prompt.dtype} of shape {list(prompt.shape)}."
        )
    require_known(model, prompt)
    warn_unusual_start(model, prompt[:2].tolist(), "".join(map(str, prompt[:8].tolist())))
    return prompt.tolist()


def _longest(start: list[int], max_new_tokens: int) -> Task:
    """A task of the size that the text can have."""
    return Task(torch.tensor(start + [0] * max_new_tokens), len(start))


def _require_options(max_new_tokens: Any, temperature: Any, seed: Any) -> None:
    for name, number, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, Integral) or not least <= int(number) < 2**63:
            raise ValueError(f"`{name}` is {number!r}, but must be a whole number of at least {least}.")
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 <= float(temperature) < math.inf:
        raise ValueError(f"`temperature` is {temperature!r}, but must be 0 (the most probable token) or more, and finite.")
