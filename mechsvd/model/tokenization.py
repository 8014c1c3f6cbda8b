"""Text to tokens and back: BOS, the boundary between prompt and continuation, the context, the text of each token."""

from collections.abc import Sequence
from typing import Any

from mechsvd.checks import warn
from mechsvd.model.sites import Model, require_model


def require_text(name: str, text: Any) -> None:
    """Refuse what is no text.

    Raises:
        TypeError, ValueError: something else than a string; an empty one.
    """
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a string, but is {type(text).__name__} {text!r}.")
    if not text:
        raise ValueError(f"`{name}` is empty; give some text.")


def prompt_tokens(
    model: Model, prompt: str, prepend_bos: bool | None = None, *, may_be_empty: bool = False
) -> list[int]:
    """The tokens of a prompt behind BOS; of "", where that is allowed, BOS alone, the bare start.

    Raises:
        TypeError: a prompt that is not a string.
        ValueError: an empty prompt, no tokenizer, or no BOS token where one is needed.
    """
    require_model(model)
    if not may_be_empty or not isinstance(prompt, str):
        require_text("prompt", prompt)
    if model.tokenizer is None:
        raise ValueError(
            "The model has no tokenizer: make the task from token ids, `Task(tokens=…, prompt_length=…)`."
        )
    wanted = _expected_bos(model) is not None if prepend_bos is None else prepend_bos
    start = [model.tokenizer.bos_token_id] if wanted or not prompt else []
    if start == [None]:
        way_out = (
            "leave `prepend_bos` out" if prompt else "there is no bare start, so give a prompt"
        )
        raise ValueError(f"The model's tokenizer has no BOS token; {way_out}.")
    ids = start + (_encode(model, prompt) if prompt else [])
    warn_unusual_start(model, ids, prompt)
    return ids


def continuation_tokens(model: Model, prompt: str, continuation: str) -> list[int]:
    """The tokens of a continuation, tokenised to follow the prompt's own tokens, which stay as they are.

    Raises:
        ValueError: no tokens follow the prompt's own and read as the continuation.
    """
    joint = _encode(model, prompt + continuation)
    own = _encode(model, prompt)
    if joint[: len(own)] == own:
        return joint[len(own) :]
    warn(
        f"Tokens merge across the boundary {prompt[-8:]!r} + {continuation[:8]!r}: the prompt keeps its own tokens, and the "
        "continuation is tokenised to follow them, which is not how the whole text would be tokenised.",
    )
    # SentencePiece puts a space before the first word of a text; behind some other text it does not
    for anchor in ("", "\n", "a", "0", "."):
        start = _encode(model, anchor)
        ids = _encode(model, anchor + continuation)
        if ids[: len(start)] == start and model.tokenizer.decode(own + ids[len(start) :]).endswith(
            prompt[-8:] + continuation
        ):
            return ids[len(start) :]
    raise ValueError(
        f"The continuation {continuation!r} has no tokens that follow the prompt's own; move the boundary."
    )


def fit_context(
    model: Model, prompt_ids: list[int], new_tokens: int, truncate: str | None
) -> list[int]:
    """The prompt, shortened from the left on request (`truncate="left"`), so that the new tokens still fit into the context.

    Raises:
        ValueError: they do not fit, or another wish than "left".
    """
    if truncate not in (None, "left"):
        raise ValueError(f"`truncate` is {truncate!r}, but must be 'left' or None.")
    excess = len(prompt_ids) + new_tokens - model.cfg.n_ctx
    if excess <= 0:
        return prompt_ids
    kept_start = int(prompt_ids[0] == getattr(model.tokenizer, "bos_token_id", None))
    if truncate != "left" or excess >= len(prompt_ids) - kept_start:
        raise ValueError(
            f"The prompt has {len(prompt_ids)} tokens and the continuation {new_tokens}, but the context holds {model.cfg.n_ctx}; "
            "shorten one, or pass `truncate='left'` to drop the oldest prompt tokens."
        )
    warn(
        f"The {excess} oldest tokens of the prompt were dropped to fit the context of {model.cfg.n_ctx}."
    )
    return prompt_ids[:kept_start] + prompt_ids[kept_start + excess :]


def pieces_of(model: Model, ids: list[int]) -> tuple[str, ...]:
    """The text that each token adds: SentencePiece shows spaces only behind other text, and a character of several tokens
    belongs to the last of them."""
    pieces: list[str] = []
    context, done = (
        0,
        0,
    )  # tokens from `context` on are decoded again, those up to `done` have given their text
    for end in range(1, len(ids) + 1):
        before, through = (
            model.tokenizer.decode(ids[context:done]),
            model.tokenizer.decode(ids[context:end]),
        )
        if through.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(through[len(before) :])
        context, done = done, end
    return tuple(pieces)


def warn_unusual_start(model: Model, ids: Sequence[int], text: str) -> None:
    """Warn of a text that starts with two BOS tokens, or with none where the model's texts start with one."""
    bos = _expected_bos(model)
    if bos is None or (ids[0] == bos and bos not in ids[1:2]):
        return
    many = "BOS twice" if ids[0] == bos else "no BOS token, though the model has one"
    warn(f"The text starts with {many}: {text[:40]!r}; models are trained with one.")


def _expected_bos(model: Model) -> int | None:
    """The token that the model's texts start with, as TransformerLens has it; None where they start with none."""
    wanted = getattr(model.cfg, "default_prepend_bos", True)
    return getattr(model.tokenizer, "bos_token_id", None) if wanted else None


def _encode(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)
