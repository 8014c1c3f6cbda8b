"""Measure a model on a text that begins with BOS and is as long as what depends on length."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mechsvd.model.beginnings import read_beginning
from mechsvd.model.cache import empty_cache, versions, wrapped
from mechsvd.model.finite import not_finite
from mechsvd.model.reference import NoReferenceError, plain_logits
from mechsvd.model.runs import run_model
from mechsvd.model.sites import Hook, Model, Site
from mechsvd.model.tokenization import expected_bos

SHORTEST, USUAL = 12, 128  # tokens: of the text, and of the longest one that none asked for
SCORED = 4  # the last positions, whose logits are compared, and how far a length is crossed
_BY_LENGTH = ("window", "original_max_position", "max_position_embeddings", "chunk_size")


class LongRun(NamedTuple):
    """The errors of other ways to compute what a plain pass over a text gives.

    Each is relative to the largest entry at its position, and infinite if a way cannot run.
    """

    not_finite: str
    fused: float
    beginning: float
    cache: float
    reference: float | None
    unreferenced: str


def probe_length(model: Model, longest: int | None = None) -> int:
    """The tokens of the text: past each length from which the model computes otherwise.

    Args:
        longest: tokens of the longest text that is to run.
    """
    limit = min(longest or USUAL, model.cfg.n_ctx)
    beyond = (point + SCORED for point in turning_points(model) if point < limit)
    return min(max(SHORTEST, *beyond, 0), model.cfg.n_ctx)


def turning_points(model: Model) -> list[int]:
    """The lengths in a model's configuration beyond which a text may be computed otherwise."""
    hf_model = wrapped(model)
    options = vars(model.cfg) if hf_model is None else hf_model.config.to_dict()
    return sorted({p for p in _lengths(options) if 1 < p < model.cfg.n_ctx})


def _lengths(options: dict[Any, Any]) -> Iterator[int]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _lengths(value)
        elif type(value) is int and any(word in str(name) for word in _BY_LENGTH):
            yield value


def run_long(model: Model, length: int, sites: tuple[Site, ...], fused_tolerance: float) -> LongRun:
    """Measure the other ways on a text: two rows of one, or one of a long one, which takes long."""
    rows = probe_tokens(model, length, rows=2 if length <= USUAL else 1)
    plain = _values(model, rows, sites)
    fused = _fused_error(model, rows, sites, plain)
    reference, unreferenced = _reference_error(model, rows, plain[0])
    tops = plain[0].amax(dim=-1)  # a logit of −inf is a probability of 0
    is_finite = all(value.isfinite().all() for value in (tops, *plain[1:]))
    return LongRun(
        "" if is_finite else not_finite(model, rows, f"the logits of {length} tokens"),
        fused,
        _beginning_error(model, rows, sites, plain, fused <= fused_tolerance),
        cache_error(model, length, plain[0]),
        reference,
        unreferenced,
    )


def first_run(
    model: Model, tokens: Tensor, hooks: Sequence[Hook] = (), scored: slice | None = None
) -> Tensor:
    """The first pass over a model, which TransformerLens may not be able to run at all.

    Raises:
        ValueError: saying so.
    """
    try:
        return run_model(model, tokens, hooks, scored)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        try:
            run_model(model, tokens)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{versions()} cannot run this model, with or without mechsvd "
                f"({type(error).__name__}: {reason})."
            ) from error
        raise


def cache_error(model: Model, length: int, logits: Tensor | None = None) -> float:
    """The error of the last logits of a text that is read in chunks through the model's cache.

    Args:
        logits: those of a pass over the whole text, if it was run already.
    """
    rows = probe_tokens(model, length, rows=2 if logits is None else len(logits))
    if logits is None:
        logits = first_run(model, rows, scored=_last(length))
    ends = sorted({_first_chunk(model, length), length // 2, length - 1, length})
    try:
        cache, read = empty_cache(model, len(rows)), []
        for begin, end in zip([0, *ends], ends, strict=False):
            scored = slice(max(begin, length - SCORED) - begin, end - begin)
            chunk = rows[:, begin:end]
            read.append(run_model(model, chunk, scored=scored, beginning=cache))
    except Exception:  # a model without a cache, or with another kind of one
        return float("inf")
    return worst([torch.cat(read, dim=1)[:, -SCORED:]], [logits])


def _first_chunk(model: Model, length: int) -> int:
    """A length before all that depends on it, and at most the first half."""
    return min([length // 2, *(point - 1 for point in turning_points(model) if point > 2)])


def _last(length: int) -> slice:
    return slice(max(0, length - SCORED), length)


def _fused_error(model: Model, rows: Tensor, sites: tuple[Site, ...], plain: list[Tensor]) -> float:
    """The largest error on fused kernels."""
    try:
        return worst(_values(model, rows, sites, fused=True), plain)
    except Exception:  # no bridge, or a version of one in which something is otherwise
        return float("inf")


def _beginning_error(
    model: Model, rows: Tensor, sites: tuple[Site, ...], plain: list[Tensor], is_fused: bool
) -> float:
    """The largest error of the ends of texts, after the keys and values of their beginnings."""
    start, order = _first_chunk(model, rows.shape[1]), torch.arange(len(rows)).flip(0)
    try:
        cache = read_beginning(model, rows[:, :start]).of(order)
        after = _values(model, rows.flip(0)[:, start:], sites, is_fused, cache)
    except Exception:  # as above, or a model that keeps something else
        return float("inf")
    logits, *writes = (value.flip(0) for value in plain)
    return worst(after, [logits, *(write[:, start:] for write in writes)])


def _reference_error(model: Model, rows: Tensor, logits: Tensor) -> tuple[float | None, str]:
    """The error of the logits, compared with the plain model's, or why there is none."""
    try:
        plain = plain_logits(model, rows[:1], logits.shape[1])
    except NoReferenceError as error:
        return None, str(error)
    except Exception as error:
        return None, f"it cannot be built again ({type(error).__name__})"
    return worst([logits[:1]], [plain]), ""


def _values(
    model: Model, rows: Tensor, sites: tuple[Site, ...], fused: bool = False, beginning: Any = None
) -> list[Tensor]:
    """The last logits and all writes of one pass."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        return name, lambda x, hook=None: seen.__setitem__(name, x.detach())

    hooks = [see(site.hook_name) for site in sites]
    scored = _last(rows.shape[1])
    logits = run_model(model, rows, hooks, scored, fused=fused, beginning=beginning)
    writes = (seen[site.hook_name] for site in sites)
    return [logits, *(write.reshape(*rows.shape, write.shape[-1]) for write in writes)]


def worst(measured: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of any position; NaN if any is."""
    pairs = zip(measured, expected, strict=True)
    return float(torch.stack([_worst_position(*pair) for pair in pairs]).max())


def _worst_position(measured: Tensor, expected: Tensor) -> Tensor:
    """The largest error, relative to the largest entry at its position.

    Entries below a thousandth of the largest of all count as that; they may be rounding alone.
    """
    error, size = (values.amax(dim=-1) for values in errors_and_sizes(measured, expected))
    least = 1e-3 * size.max() + torch.finfo(torch.float64).tiny
    return (error / size.clamp(min=least)).max()


def errors_and_sizes(measured: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The error and the size of each entry; both are 0 where both entries are −inf.

    That is the logit of a masked token, as of a padded vocabulary.
    """
    measured, expected = measured.cpu().double(), expected.cpu().double()
    is_masked = measured.eq(-torch.inf) & expected.eq(-torch.inf)
    error = torch.where(is_masked, 0, (measured - expected).abs())
    return error, torch.where(is_masked, 0, expected.abs())


def probe_tokens(model: Model, length: int = 6, rows: int = 0) -> Int[Tensor, "row pos"]:
    """Tokens, none of them special, for a short run that checks a model.

    Args:
        rows: that begin with BOS, if the model has one; 0 for one row that does not.
    """
    generator = torch.Generator().manual_seed(0)
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    order = torch.randperm(model.cfg.d_vocab, generator=generator)[: 2 * length + 64].tolist()
    ordinary = torch.tensor([token for token in order if token not in special])
    draws = torch.arange(max(1, rows) * min(length, model.cfg.n_ctx)) % len(ordinary)
    tokens = ordinary[draws].reshape(max(1, rows), -1)
    if rows and (bos := expected_bos(model)) is not None:
        tokens[:, 0] = bos
    return tokens.to(next(model.parameters()).device)
