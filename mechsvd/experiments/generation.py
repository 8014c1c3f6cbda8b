"""Text from inside a subspace: a model continues a prompt while every write is edited."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import is_number, require_whole
from mechsvd.edits.hooks import hooks_at
from mechsvd.edits.maps import Edit, chain
from mechsvd.edits.stacks import GateStack
from mechsvd.engine.batches import run_batches
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.model.decoding import continue_tokens, end_tokens
from mechsvd.model.padding import warn_pads
from mechsvd.model.positions import absolute_positions, positions_in
from mechsvd.model.sites import Model, require_model
from mechsvd.model.tasks import Task, require_known
from mechsvd.model.tokenization import fit_context, pieces_of, prompt_tokens, warn_unusual_start

Prompt = str | Int[Tensor, " pos"]
RUN = RunOptions.__optional_keys__  # the options of a session


class GenerateOptions(RunOptions, total=False):
    """The options of `generate`; see `generate_tasks`.

    Example:
        >>> options: ms.GenerateOptions = {"max_new_tokens": 3, "temperature": 0.8, "seed": 1}
        >>> len(ms.generate(model, "I believe", [None, ms.keep(mine)], **options))
        2
    """

    max_new_tokens: int
    temperature: float
    seed: int
    prepend_bos: bool | None
    truncate: Literal["left"] | None
    use_kv_cache: bool


@overload
def generate(
    model: Model, prompt: Prompt, edit: Edit | None = None, **options: Unpack[GenerateOptions]
) -> str: ...
@overload
def generate(
    model: Model, prompt: Prompt, edit: Sequence[Edit | None], **options: Unpack[GenerateOptions]
) -> list[str]: ...
@overload
def generate(
    model: Model, prompt: list[Prompt], edit: Any = None, **options: Unpack[GenerateOptions]
) -> list[Any]: ...
@runs_model(GenerateOptions)
def generate(
    model: Model,
    prompt: Prompt | list[Prompt],
    edit: Any = None,
    **options: Unpack[GenerateOptions],
) -> str | list[Any]:
    """Let a model continue a prompt while an edit acts on every write; greedily by default.

    Args:
        prompt: the text to continue, or its token ids; "" is BOS alone. A list of prompts gives a
            list of what each gives.
        edit: one edit, None for the model as it is, or several (a list or a stack of gates).
            Greedy texts of several edits are written together, as rows of one batch.
        options: see `GenerateOptions` (max_new_tokens, temperature, seed, layers, positions, …).

    Returns:
        The prompt and its continuation, up to the end of the text; for several edits, a list of
        texts.

    Raises:
        TypeError, ValueError: as `generate_tasks`.

    Example:
        >>> ms.generate(model, "I believe", edit=ms.keep(svd), max_new_tokens=3)
        'I believe the secrets of'
    """
    if isinstance(prompt, list):
        with open_session(model, **{k: v for k, v in options.items() if k in RUN}):  # type: ignore[arg-type]
            return [generate(model, one, edit, **options) for one in prompt]
    is_list = isinstance(edit, list | tuple) or (isinstance(edit, GateStack) and edit.is_stack)
    tasks = generate_tasks(model, prompt, edit if is_list else [edit], **options)
    texts = [
        (prompt if isinstance(prompt, str) else task.text()[0]) + _continuation_text(model, task)
        for task in tasks
    ]
    return texts if is_list else texts[0]


@runs_model(RunOptions)
def generate_tasks(
    model: Model,
    prompt: Prompt,
    edits: GateStack | Sequence[Edit | None],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    prepend_bos: bool | None = None,
    truncate: Literal["left"] | None = None,
    use_kv_cache: bool = True,
    **options: Unpack[RunOptions],
) -> list[Task]:
    """Like `generate`, but returns tasks, ready to be measured, collected or decomposed.

    Args:
        temperature: 0 takes the most probable token; above 0, tokens are drawn. Each edit gets
            the same random numbers, whatever the other edits are.
        seed: of the draws; the global generators are left unchanged.
        truncate: "left" drops the oldest prompt tokens when prompt and new tokens do not fit into
            the context.
        use_kv_cache: reuse keys and values of earlier positions; without it, the text is the same
            but slower.
        options: see `RunOptions` (layers, components, positions, batch_size, …); positions count
            through the prompt and its continuation.

    Raises:
        TypeError: a prompt that is not a string, or edits that are not edits.
        ValueError: a prompt that does not fit, no BOS to start from, a basis of another model, or
            a temperature below 0, logits that are not finite, or a generation setting of the model
            that is not honoured.

    Example:
        >>> written = ms.generate_tasks(model, "I believe", [None, ms.keep(mine)], max_new_tokens=3)
        >>> [one.prompt_length for one in written]
        [3, 3]
    """
    _require_options(max_new_tokens, temperature, seed)
    start = fit_context(model, _start(model, prompt, prepend_bos), max_new_tokens, truncate)
    longest = _longest(start, max_new_tokens)
    with open_session(model, **options) as session:
        sites, positions = session.sites, absolute_positions(session.where.positions)
        positions = positions_in(positions, len(longest.tokens), 0)
        stack = session.stack(
            [chain() if e is None else e for e in edits]
            if isinstance(edits, list | tuple)
            else edits
        )
        extend = partial(
            continue_tokens, temperature=temperature, seed=seed, use_kv_cache=use_kv_cache
        )

        def forward(rows: Int[Tensor, " row"]) -> list[Tensor]:
            hooks = hooks_at(model, stack[rows], sites, positions)
            return extend(model, torch.tensor([start] * len(rows)), max_new_tokens, hooks)

        size = 1 if temperature > 0 else session.rows_per_pass(longest)
        parts = run_batches(
            forward,
            torch.arange(len(stack)),
            size,
            session.halve(longest),
            session.progress,
            "texts",
        )
    has_text = model.tokenizer is not None
    return [
        Task(tokens, len(start), pieces_of(model, tokens.tolist()) if has_text else ())
        for part in parts
        for tokens in part
    ]


def _continuation_text(model: Model, task: Task) -> str:
    has_ended = int(task.tokens[-1]) in end_tokens(model)
    return "".join(task.pieces[task.prompt_length : -1]) if has_ended else task.text()[1]


def _start(model: Model, prompt: Any, prepend_bos: bool | None) -> list[int]:
    require_model(model)
    if not isinstance(prompt, Tensor):
        return prompt_tokens(model, prompt, prepend_bos, may_be_empty=True)
    if (
        prompt.ndim != 1
        or len(prompt) == 0
        or prompt.is_floating_point()
        or prompt.dtype == torch.bool
    ):
        raise ValueError(
            "`prompt` must be text, or token ids of shape [pos], "
            f"but is {prompt.dtype} of shape {list(prompt.shape)}."
        )
    require_known(model, prompt)
    warn_pads(model, prompt.tolist())
    warn_unusual_start(model, prompt[:2].tolist(), "".join(map(str, prompt[:8].tolist())))
    return prompt.tolist()


def _longest(start: list[int], max_new_tokens: int) -> Task:
    """A task of the longest length that the text can have."""
    return Task(torch.tensor(start + [0] * max_new_tokens), len(start))


def _require_options(max_new_tokens: Any, temperature: Any, seed: Any) -> None:
    require_whole("max_new_tokens", max_new_tokens, 1)
    require_whole("seed", seed, 0, 2**63 - 1)
    if not is_number(temperature, 0):
        raise ValueError(
            f"`temperature` is {temperature!r}, but must be 0 (the most probable token) or more, "
            "and finite."
        )
