"""Let a model continue tokens, with hooks at every step.

Where a text ends and which tokens are barred stands in the model's own generation settings; both
are here as in transformers' `generate`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsvd.checks import single
from mechsvd.model.cache import empty_cache, wrapped
from mechsvd.model.finite import require_finite_logits
from mechsvd.model.runs import run_model
from mechsvd.model.selfcheck import keeps_cache
from mechsvd.model.sites import Hook, Model


@dataclass(frozen=True)
class _Text:
    """What a generation setting may depend on: lengths in tokens, end tokens, the device."""

    prompt: int
    longest: int
    ends: list[int]
    device: Any


def _suppressed_at_begin(made: Any, tokens: Any, text: _Text, config: Any) -> Any:
    is_forced = text.prompt == 1 and config.forced_bos_token_id is not None
    return made(tokens, text.prompt + is_forced, device=text.device)


# Settings that change the logits of a step, in transformers' order: the class that does it there,
# and how it is made of the setting.
_HONOURED: dict[str, tuple[str, Callable[[Any, Any, _Text, Any], Any]]] = {
    "sequence_bias": ("SequenceBiasLogitsProcessor", lambda made, v, t, c: made(v)),
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", lambda made, v, t, c: made(v)),
    "no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", lambda made, v, t, c: made(v)),
    "bad_words_ids": (
        "NoBadWordsLogitsProcessor",
        lambda made, v, t, c: made(v, t.ends or None),
    ),
    "min_length": (
        "MinLengthLogitsProcessor",
        lambda made, v, t, c: t.ends and made(v, t.ends, device=t.device),
    ),
    "min_new_tokens": (
        "MinNewTokensLengthLogitsProcessor",
        lambda made, v, t, c: t.ends and made(t.prompt, v, t.ends, device=t.device),
    ),
    "forced_bos_token_id": ("ForcedBOSTokenLogitsProcessor", lambda made, v, t, c: made(v)),
    "forced_eos_token_id": (
        "ForcedEOSTokenLogitsProcessor",
        lambda made, v, t, c: made(t.longest, v, device=t.device),
    ),
    "exponential_decay_length_penalty": (
        "ExponentialDecayLengthPenalty",
        lambda made, v, t, c: t.ends and made(v, t.ends, t.prompt),
    ),
    "suppress_tokens": (
        "SuppressTokensLogitsProcessor",
        lambda made, v, t, c: made(v, device=t.device),
    ),
    "begin_suppress_tokens": ("SuppressTokensAtBeginLogitsProcessor", _suppressed_at_begin),
}
# Settings by which `generate` is no plain greedy loop. All others, such as `temperature`, `top_k`
# or `cache_implementation`, change no greedy text.
_REFUSED = {  # with the value, next to None, that asks for nothing
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
    "max_time": None,
}
_NEUTRAL = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}


_SEEDING = threading.RLock()  # the generators are those of the whole process


@torch.no_grad()
def continue_tokens(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    max_new_tokens: int,
    hooks: Sequence[Hook] = (),
    *,
    temperature: float = 0.0,
    seed: int = 0,
    use_kv_cache: bool = True,
) -> list[Int[Tensor, " longer"]]:
    """Continue tokens, with hooks at every step.

    The generation settings of the model are honoured: all its end tokens, forced and suppressed
    tokens, penalties. Drawn text takes these too, but no `top_k` or `top_p`: tokens are drawn from
    all that are allowed.

    Args:
        temperature: 0 takes the most probable token. Above 0, tokens are drawn with `seed`; the
            global generators do not change.
        use_kv_cache: read each token once, where the self-check finds the same logits that way.

    Returns:
        The tokens of each row, the given ones included, up to and with its first end token.

    Raises:
        KeyError: the model has no hook point of a given name.
        RuntimeError: a hook did not fire once per step.
        ValueError: a generation setting that is not honoured, or logits that are not finite.
    """
    device, ends = next(model.parameters()).device, end_tokens(model)
    rows, start = tokens.to(device), tokens.shape[1]
    longest = start + max_new_tokens
    adjust, stops = _settings(model, _Text(start, longest, ends, device))
    is_cached = use_kv_cache and keeps_cache(model, longest)
    cache = empty_cache(model, len(rows)) if is_cached else None
    read, lengths = 0, rows.new_full((len(rows),), longest)
    with _seeded(seed, device) if temperature > 0 else nullcontext():
        while rows.shape[1] < lengths.max():  # an ended row waits for the others
            unread = rows[:, read:]
            last = slice(unread.shape[1] - 1, unread.shape[1])
            logits = run_model(model, unread, hooks, scored=last, beginning=cache)
            require_finite_logits(model, rows, logits, slice(rows.shape[1] - 1, None), hooks)
            logits = adjust(rows, logits[:, 0].to(device, torch.float32, copy=True))
            new = _next_tokens(logits, temperature)
            rows = torch.cat([rows, new[:, None]], dim=1)
            read = rows.shape[1] - 1 if is_cached else 0
            has_ended = torch.isin(new, rows.new_tensor(ends)) | stops(rows)
            lengths = lengths.clamp(max=torch.where(has_ended, rows.shape[1], longest))
    return [row[:length] for row, length in zip(rows.cpu(), lengths.tolist(), strict=True)]


def end_tokens(model: Model) -> list[int]:
    """The tokens that end a text; none if neither the model's settings nor its tokenizer name any."""
    config = getattr(wrapped(model), "generation_config", None)
    end = single(getattr(model.tokenizer if config is None else config, "eos_token_id", None))
    return [] if end is None else [end] if isinstance(end, int) else [int(one) for one in end]


def _settings(
    model: Model, text: _Text
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Bool[Tensor, " row"]]]:
    """What a model's generation settings do to the logits of a step, and which rows they end.

    Raises:
        ValueError: a setting that is not honoured.
    """
    import transformers

    config = getattr(wrapped(model), "generation_config", None)
    for name, neutral in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"The model's generation settings ask for `{name}` = {value!r:.60}, which greedy "
                f"text here does not honour; set `model.original_model.generation_config.{name} = "
                "None` to go on without it, or give the continuation."
            )
    made = [
        make(getattr(transformers, kind), value, text, config)
        for name, (kind, make) in _HONOURED.items()
        if (value := getattr(config, name, None)) is not None and value != _NEUTRAL.get(name)
    ]
    adjust = transformers.LogitsProcessorList([one for one in made if one])
    strings = getattr(config, "stop_strings", None)
    if strings:
        stop = transformers.StopStringCriteria(model.tokenizer, strings)
        return adjust, lambda rows: stop(rows, None)
    return adjust, lambda rows: rows.new_zeros(len(rows), dtype=torch.bool)


def _next_tokens(logits: Float[Tensor, "row d_vocab"], temperature: float) -> Int[Tensor, " row"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1)[:, 0]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that `torch.manual_seed` reaches, and restore them at the end."""
    other = {"device_type": device.type} if device.type not in ("cpu", "cuda") else {}
    devices = [device] if other else [*range(torch.cuda.device_count())]
    with _SEEDING, torch.random.fork_rng(devices, **other):
        torch.manual_seed(seed)
        yield
