"""Tasks: a prompt and its continuation as tokens, and the scored positions."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.checks import is_whole
from mechsvd.fields import require_between, require_declared
from mechsvd.model.evaluation import evaluation
from mechsvd.model.runs import continue_tokens
from mechsvd.model.sites import Model, require_model
from mechsvd.model.tokenization import (
    continuation_tokens,
    fit_context,
    one_token,
    pieces_of,
    prompt_tokens,
    require_text,
    warn_unusual_start,
)
from mechsvd.results import Result, result

SHORTFORM_PROMPTS: dict[str, str] = {
    "meaning": "I believe the meaning of life is",
    "relativity": "Simply put, the theory of relativity states that",
    "launch": "A brief message congratulating the team on the launch:\n\nHi everyone,\n\nI just",
    "translation": (
        "Translate English to French:\n\nsea otter => loutre de mer\n"
        "peppermint => menthe poivrée\nplush giraffe => girafe peluche\ncheese =>"
    ),
}
"""The shortform's four prompts, by name.

Example:
    >>> list(ms.SHORTFORM_PROMPTS)
    ['meaning', 'relativity', 'launch', 'translation']
"""

APART = "targets apart from the tokens"  # a note for the provenance


@result
class Task(Result):
    """A prompt and its continuation as tokens; the continuation is scored.

    Attributes:
        tokens: prompt and continuation, with BOS if the model has one.
        prompt_length: number of tokens before the first scored one.
        pieces: the text of each token, for display; empty when made from bare tokens.
        right, wrong: tokens that a logit difference compares; empty where there is no choice.
        name: of the text, if it has one.
        targets: what is scored, where that is no text that the model reads: an answer at the last
            position, such as the sum in modular addition. `tokens` then holds inputs only, and the
            targets are predicted at the last positions, so
            `prompt_length = len(tokens) - len(targets) + 1`. None if the tokens hold them.

    Raises:
        TypeError: the tokens are not whole numbers.
        ValueError: wrong number of axes, no prompt, or nothing to score.

    Example:
        >>> ms.Task.from_text(model, "I believe", " in life").tokens.tolist()
        [0, 42, 498, 386, 767]
        >>> ms.Task(tokens=torch.tensor([0, 33, 117, 5]), prompt_length=3).continuation
        tensor([5])
    """

    tokens: Int[Tensor, " pos"]
    prompt_length: int
    pieces: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()
    name: str = ""
    targets: Int[Tensor, " scored"] | None = None

    def __post_init__(self) -> None:
        _require_ids("tokens", self.tokens)
        if self.targets is not None:
            _require_ids("targets", self.targets)
        if not is_whole(self.prompt_length, 1):
            raise ValueError(
                f"`prompt_length` is {self.prompt_length!r}, "
                "but a prompt needs at least one token (BOS counts)."
            )
        # a numpy integer becomes an int
        object.__setattr__(self, "prompt_length", int(self.prompt_length))
        require_declared(self)
        if self.pieces and len(self.pieces) != len(self.tokens):
            raise ValueError(
                f"`pieces` has {len(self.pieces)} texts for {len(self.tokens)} tokens; "
                "give one for each, or none."
            )
        if self.targets is not None:
            inputs, count = len(self.tokens), len(self.targets)
            if not 1 <= count <= inputs or self.prompt_length != inputs - count + 1:
                raise ValueError(
                    f"{count} `targets` are predicted at the last positions of {inputs} tokens, so "
                    f"`prompt_length` must be {inputs - count + 1}, but is {self.prompt_length}."
                )
        elif self.prompt_length >= len(self.tokens):
            raise ValueError(
                f"Nothing to score: `prompt_length` is {self.prompt_length} of {len(self.tokens)} "
                "tokens; the continuation needs at least one. Targets that are no inputs are "
                "given as `targets`."
            )

    def _require_values(self) -> None:
        require_between(self, ["tokens", "right", "wrong", "targets"], 0)

    @classmethod
    @plain
    def from_text(
        cls,
        model: Model,
        prompt: str,
        continuation: str | None = None,
        *,
        max_new_tokens: int = 40,
        prepend_bos: bool | None = None,
        truncate: Literal["left"] | None = None,
    ) -> "Task":
        """Make a task from text, with a given or a greedy continuation.

        The prompt keeps its own tokens, and the continuation is tokenised to follow them.

        Args:
            continuation: the text to score, spaces included (" Paris", not "Paris"). By default,
                what the model continues with greedily.
            max_new_tokens: length of the greedy continuation, which ends earlier at the end-of-text
                token.
            prepend_bos: start with BOS; by default as TransformerLens does
                (`cfg.default_prepend_bos`).
            truncate: "left" drops the oldest prompt tokens (after BOS) if the task does not fit
                into the context.

        Raises:
            TypeError: the text is not a string.
            ValueError: the prompt or continuation is empty, or the context holds fewer tokens.
        """
        prompt_ids = prompt_tokens(model, prompt, prepend_bos)
        if continuation is None:
            scored = None
        else:
            require_text("continuation", continuation)
            scored = continuation_tokens(model, prompt, continuation)
        prompt_ids = fit_context(
            model, prompt_ids, max_new_tokens if scored is None else len(scored), truncate
        )
        ids = prompt_ids + (
            _greedy(model, prompt_ids, max_new_tokens) if scored is None else scored
        )
        return cls(torch.tensor(ids), len(prompt_ids), pieces_of(model, ids))

    @classmethod
    @plain
    def from_choice(
        cls,
        model: Model,
        prompt: str,
        right: str | Sequence[str],
        wrong: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        truncate: Literal["left"] | None = None,
    ) -> "Task":
        """Make the task of a choice between single tokens, for `logit_difference`.

        The continuation that is scored is the (first) right token.

        Args:
            right, wrong: texts of one token each, spaces included (" Mary"); one or several.
            prepend_bos, truncate: as in `from_text`.

        Raises:
            TypeError: a text is not a string.
            ValueError: a text is empty or of several tokens, a token is on both sides, or the
                prompt does not fit.
        """
        start = fit_context(model, prompt_tokens(model, prompt, prepend_bos), 1, truncate)
        sides = {"right": right, "wrong": wrong}
        for name, texts in sides.items():
            if not isinstance(texts, Iterable):
                raise TypeError(
                    f"`{name}` must be a text or a list of texts, but is {type(texts).__name__}; "
                    "for token ids, make a `Task` and pass `logit_difference(right, wrong)`."
                )
        ids = {
            name: tuple(
                one_token(model, start, text, name)
                for text in ([texts] if isinstance(texts, str) else texts)
            )
            for name, texts in sides.items()
        }
        for name in sides:
            if not ids[name]:
                raise ValueError(f"`{name}` is empty; give at least one text of one token.")
        if both := {*ids["right"]} & {*ids["wrong"]}:
            raise ValueError(
                f"Tokens {sorted(both)} are both right and wrong, so they cancel; leave them out."
            )
        tokens = [*start, ids["right"][0]]
        return cls(
            torch.tensor(tokens), len(start), pieces_of(model, tokens), ids["right"], ids["wrong"]
        )

    @property
    def continuation(self) -> Int[Tensor, " scored"]:
        """The scored tokens."""
        return self.tokens[self.prompt_length :] if self.targets is None else self.targets

    @property
    def scored(self) -> slice:
        """Positions whose logits predict the continuation, each one before its token."""
        return slice(self.prompt_length - 1, self.prompt_length - 1 + len(self.continuation))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each token, or `[id]` if it is not known."""
        return self.pieces or tuple(f"[{i}]" for i in self.tokens.tolist())

    def text(self) -> tuple[str, str]:
        """The prompt and the continuation as text, from the pieces."""
        if self.targets is not None:
            return "".join(self.texts), "".join(f"[{i}]" for i in self.targets.tolist())
        return "".join(self.texts[: self.prompt_length]), "".join(self.texts[self.prompt_length :])

    def to_pandas(self) -> Any:
        """One row per token that the model reads."""
        import pandas as pd

        count = len(self.tokens)
        pieces: list[str | None] = [*self.pieces] or [None] * count
        scored = [i >= self.prompt_length and self.targets is None for i in range(count)]
        return pd.DataFrame(
            {
                "position": range(count),
                "token": self.tokens.tolist(),
                "text": pieces,
                "scored": scored,
            }
        )

    def __repr__(self) -> str:
        prompt, continuation = self.text()
        return (
            f"Task of {self.prompt_length} prompt and {len(self.continuation)} scored tokens\n"
            f"  {prompt!r}\n  → {continuation!r}"
        )


def as_tasks(tasks: Task | Sequence[Task]) -> tuple[Task, ...]:
    """One task or several, as a tuple.

    Raises:
        ValueError: the list is empty.
        TypeError: something is not a task.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Iterable | Task):
        raise TypeError(
            f"A task is needed, but this is {type(tasks).__name__} {tasks!r:.40}; "
            "make one by `Task.from_text(model, …)`."
        )
    task_list = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    if not task_list:
        raise ValueError("No tasks: the list is empty; give at least one.")
    for index, task in enumerate(task_list):
        if not isinstance(task, Task):
            raise TypeError(
                f"Task {index} is {type(task).__name__} {str(task)[:40]!r}; "
                "make one by `Task.from_text(model, …)`."
            )
    return task_list


def require_fitting(model: Model, task: Task) -> None:
    """Refuse a task that the model cannot read.

    Raises:
        ValueError: the model does not have a token id, or its context holds fewer tokens.
    """
    require_model(model)
    if not isinstance(task, Task):
        raise TypeError(
            f"One task is needed, but this is {type(task).__name__}; "
            "make one by `Task.from_text(model, …)`."
        )
    if len(task.tokens) > model.cfg.n_ctx:
        raise ValueError(
            f"The task has {len(task.tokens)} tokens, "
            f"but the model's context holds {model.cfg.n_ctx}; shorten it."
        )
    require_known(model, task.tokens)
    require_known(model, task.continuation, as_outputs=True)
    warn_unusual_start(model, task.tokens[:2].tolist(), task.text()[0])


def require_known(model: Model, tokens: Int[Tensor, " pos"], as_outputs: bool = False) -> None:
    """Refuse token ids that the model does not have, or does not predict.

    Raises:
        ValueError: naming the range that it has.
    """
    low, high = int(tokens.min()), int(tokens.max())
    count = model.cfg.d_vocab
    if as_outputs and getattr(model.cfg, "d_vocab_out", -1) > 0:
        count = min(count, model.cfg.d_vocab_out)
    if low < 0 or high >= count:
        verb = "has" if count == model.cfg.d_vocab else "predicts"
        raise ValueError(
            f"Token ids run from {low} to {high}, but the model {verb} 0 to {count - 1}."
        )


def _require_ids(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"`{name}` must be a tensor of token ids, but is {type(ids).__name__}; "
            "wrap it in torch.tensor."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must be token ids (whole numbers), but their dtype is {ids.dtype}."
        )
    if ids.ndim != 1:
        raise ValueError(
            f"`{name}` must have one axis, [pos], but their shape is {list(ids.shape)}; "
            "pass one row."
        )


def _greedy(model: Model, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    if max_new_tokens < 1:
        raise ValueError(
            f"Nothing to score: `max_new_tokens` is {max_new_tokens}, but must be at least 1."
        )
    with evaluation(model):
        return continue_tokens(model, torch.tensor([prompt_ids]), max_new_tokens)[0][
            len(prompt_ids) :
        ].tolist()
