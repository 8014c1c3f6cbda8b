"""Text to tokens and back: BOS, prompt boundary, context, text of each token."""

import re
from collections.abc import Sequence
from typing import Any

from mechsvd.checks import warn
from mechsvd.model.sites import Model, require_model


def require_text(name: str, text: Any) -> None:
    """Refuse anything but a non-empty string.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty.
    """
    if not isinstance(text, str):
        several = " A list of texts makes tasks by `tasks_from`." if type(text) is list else ""
        raise TypeError(
            f"`{name}` must be a string, but is {type(text).__name__} {text!r:.80}.{several}"
        )
    if not text:
        raise ValueError(f"`{name}` is empty; give some text.")
    if broken := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"`{name}` holds half of a character ({broken[0]!a} at {broken.start()}), as text read in "
            "a wrong encoding does; read it as what it is, such as UTF-8."
        )


def prompt_tokens(
    model: Model, prompt: str, prepend_bos: bool | None = None, *, may_be_empty: bool = False
) -> list[int]:
    """The tokens of a prompt after BOS; BOS alone for "", if that is allowed.

    Raises:
        TypeError: the prompt is not a string.
        ValueError: the prompt is empty, or the tokenizer or a needed BOS token is missing.
    """
    require_model(model)
    if not may_be_empty or not isinstance(prompt, str):
        require_text("prompt", prompt)
    if model.tokenizer is None:
        raise ValueError(
            "The model has no tokenizer: make the task from token ids, "
            "`Task(tokens=…, prompt_length=…)`."
        )
    has_bos = expected_bos(model) is not None if prepend_bos is None else prepend_bos
    start = [model.tokenizer.bos_token_id] if has_bos or not prompt else []
    if start == [None]:
        way_out = (
            "leave `prepend_bos` out" if prompt else "there is no bare start, so give a prompt"
        )
        raise ValueError(f"The model's tokenizer has no BOS token; {way_out}.")
    ids = start + (_encode(model, prompt) if prompt else [])
    warn_unusual_start(model, ids, prompt)
    return ids


def continuation_tokens(model: Model, prompt: str, continuation: str) -> list[int]:
    """The tokens of a continuation, tokenised to follow the prompt's own tokens.

    Raises:
        ValueError: no tokens after the prompt's own read as the continuation.
    """
    joint = _encode(model, prompt + continuation)
    own = _encode(model, prompt)
    if joint[: len(own)] == own:
        return joint[len(own) :]
    warn(
        f"Tokens merge across the boundary {prompt[-8:]!r} + {continuation[:8]!r}: the prompt "
        "keeps its own tokens, and the continuation is tokenised to follow them. "
        "The whole text would be tokenised differently.",
    )
    # SentencePiece puts a space before the first word of a text, but not after other text
    for anchor in ("", "\n", "a", "0", "."):
        start = _encode(model, anchor)
        ids = _encode(model, anchor + continuation)
        if ids[: len(start)] == start and model.tokenizer.decode(own + ids[len(start) :]).endswith(
            prompt[-8:] + continuation
        ):
            return ids[len(start) :]
    raise ValueError(
        f"The continuation {continuation!r} has no tokens that follow the prompt's own; "
        "move the boundary."
    )


def one_token(model: Model, prompt_ids: Sequence[int], text: str, name: str) -> int:
    """The token of a text that follows a prompt.

    Raises:
        ValueError: it has several tokens, or none.
    """
    require_text(name, text)
    if model.tokenizer is None:
        raise ValueError(
            f"The model has no tokenizer to read `{name}` = {text!r}; give the token id."
        )
    prompt = model.tokenizer.decode(prompt_ids, skip_special_tokens=True)
    ids = continuation_tokens(model, prompt, text)
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(
            f"`{name}` must be one token, but {text!r} has {len(ids)}: {pieces}; choose a text of "
            f"one token (mind its space), or give the id of the first that differs, such as "
            f"{ids[0]}."
        )
    return ids[0]


def fit_context(
    model: Model, prompt_ids: list[int], new_tokens: int, truncate: str | None
) -> list[int]:
    """The prompt, cut from the left if asked, so that the new tokens fit the context.

    Raises:
        ValueError: they do not fit, or `truncate` is neither "left" nor None.
    """
    if truncate not in (None, "left"):
        raise ValueError(f"`truncate` is {truncate!r}, but must be 'left' or None.")
    excess = len(prompt_ids) + new_tokens - model.cfg.n_ctx
    if excess <= 0:
        return prompt_ids
    kept_start = int(prompt_ids[0] == getattr(model.tokenizer, "bos_token_id", None))
    if truncate != "left" or excess >= len(prompt_ids) - kept_start:
        raise ValueError(
            f"The prompt has {len(prompt_ids)} tokens and the continuation {new_tokens}, "
            f"but the context holds {model.cfg.n_ctx}; "
            "shorten one, or pass `truncate='left'` to drop the oldest prompt tokens."
        )
    warn(
        f"The {excess} oldest tokens of the prompt were dropped "
        f"to fit the context of {model.cfg.n_ctx}."
    )
    return prompt_ids[:kept_start] + prompt_ids[kept_start + excess :]


def pieces_of(model: Model, ids: list[int]) -> tuple[str, ...]:
    """The text that each token adds.

    SentencePiece shows spaces only after other text. A character of several tokens belongs to the
    last of them.
    """
    pieces: list[str] = []
    # tokens from `context` on are decoded again; those before `done` have given their text
    context, done = 0, 0
    for end in range(1, len(ids) + 1):
        before = model.tokenizer.decode(ids[context:done])
        through = model.tokenizer.decode(ids[context:end])
        if through.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(through[len(before) :])
        context, done = done, end
    return tuple(pieces)


def vocabulary_of(model: Model) -> tuple[str, ...]:
    """The text that each token of the vocabulary adds to other text; `[id]` where it is unknown."""
    tokenizer, count = model.tokenizer, int(model.cfg.d_vocab)
    if tokenizer is None:
        return tuple(f"[{i}]" for i in range(count))
    known = min(count, len(tokenizer))
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    length = len(tokenizer.decode(before))
    texts = tokenizer.batch_decode([[*before, i] for i in range(known)])
    pieces = [text[length:] for text in texts]
    for i, piece in enumerate(pieces):
        if not piece or "\ufffd" in piece:  # a part of a character, or a special token
            pieces[i] = str(tokenizer.convert_ids_to_tokens(i))
    return (*pieces, *(f"[{i}]" for i in range(known, count)))


def warn_unusual_start(model: Model, ids: Sequence[int], text: str) -> None:
    """Warn of a text that starts with two BOS tokens, or lacks an expected one."""
    bos = expected_bos(model)
    if bos is None or (ids[0] == bos and bos not in ids[1:2]):
        return
    start = "BOS twice" if ids[0] == bos else "no BOS token, though the model has one"
    warn(f"The text starts with {start}: {text[:40]!r}; models are trained with one.")


def expected_bos(model: Model) -> int | None:
    """The token that the model's texts start with, by TransformerLens, or None."""
    has_bos = getattr(model.cfg, "default_prepend_bos", True)
    return getattr(model.tokenizer, "bos_token_id", None) if has_bos else None


def _encode(model: Model, text: str) -> list[int]:
    try:
        return model.tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # of any kind, by tokenizer
        raise ValueError(f"The tokenizer cannot read {text!r:.40}: {error}") from error
