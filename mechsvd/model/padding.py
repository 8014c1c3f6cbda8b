"""Tokens as they come from a tokenizer's batch: pads, masks and labels."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from mechsvd.checks import is_whole, warn
from mechsvd.model.sites import Model

NO_LABEL = -100  # the label of a token that is not scored, in PyTorch and transformers


def unpadded(place: str, ids: Any, mask: Any, labels: Any) -> tuple[tuple[int, ...], int]:
    """The tokens of a row without its pads, and how many of them, at the end, are scored.

    Without labels, none is. What comes after the last label is left out, for nothing depends on it.

    Raises:
        TypeError, ValueError: no row of token ids; a mask or labels with holes, of another length,
            or of other tokens.
    """
    tokens = _numbers(place, "input_ids", ids, len(ids) if isinstance(ids, list) else 0)
    attended = (
        [1] * len(tokens) if mask is None else _numbers(place, "attention_mask", mask, len(tokens))
    )
    start, end = _run(place, "attention_mask", [number != 0 for number in attended])
    if labels is None:
        return tuple(tokens[start:end]), 0
    own = _numbers(place, "labels", labels, len(tokens))[start:end]
    first, last = _run(place, "labels", [label != NO_LABEL for label in own])
    tokens = tokens[start:end][:last]
    if wrong := [i for i in range(first, last) if own[i] != tokens[i]]:
        raise ValueError(
            f"{place}: `labels` at position {start + wrong[0]} is {own[wrong[0]]}, but the token there "
            f"is {tokens[wrong[0]]}; labels are the tokens themselves, not shifted, or {NO_LABEL}."
        )
    first = max(first, 1)  # nothing predicts the first token
    if first == last:
        raise ValueError(f"{place}: `labels` has only the first token, which nothing predicts.")
    return tuple(tokens), last - first


def warn_pads(model: Model, ids: Sequence[int]) -> None:
    """Warn of tokens at an end of a text that look like the pads of a batch."""
    tokenizer = model.tokenizer
    pad, eos, bos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos"))
    own = pad if pad not in (eos, bos) else None  # a token for nothing but pads
    for place, tokens in {"begins with": ids, "ends in": ids[::-1]}.items():
        run = len([*takewhile(lambda token: token is not None and token in (pad, eos), tokens)])
        if run > 1 or (run and tokens[0] == own):
            warn(
                f"The text {place} {run} tokens {tokens[0]}, which look like the pads of a batch: the "
                "model reads and scores them as text, and their writes count. Leave them out, or "
                "give `input_ids` with their `attention_mask` to `tasks_from`."
            )


def _numbers(place: str, name: str, values: Any, length: int) -> list[int]:
    listed = values if isinstance(values, list) else None
    if listed is None or not listed or not all(is_whole(v) or isinstance(v, bool) for v in listed):
        raise TypeError(
            f"{place}: `{name}` must be a row of whole numbers, at least one, but is {values!r:.40}."
        )
    if len(listed) != length:
        raise ValueError(f"{place}: `{name}` has {len(listed)} entries for {length} tokens.")
    return [int(value) for value in listed]


def _run(place: str, name: str, is_in: Sequence[bool]) -> tuple[int, int]:
    """The start and the end of the one run of positions that are in.

    Raises:
        ValueError: there is none, or it has holes.
    """
    places = [i for i, value in enumerate(is_in) if value]
    if not places:
        raise ValueError(f"{place}: `{name}` leaves no token; nothing is to be read or scored.")
    start, end = places[0], places[-1] + 1
    if len(places) < end - start:
        hole = next(i for i in range(start, end) if not is_in[i])
        raise ValueError(
            f"{place}: `{name}` has a hole at position {hole}: what counts must be one run of tokens; "
            "give each run as a row of its own."
        )
    return start, end
