"""Nulls that are run: random texts, a model with redrawn weights, random subspaces."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.ambient import plain
from mechsvd.checks import require_whole
from mechsvd.experiments.ranking import order_at_random
from mechsvd.linalg.comparison import random_subspace
from mechsvd.linalg.decomposition import (
    Decomposition,
    Sample,
    decompose,
    require_decomposition,
)
from mechsvd.linalg.subspace import Subspace
from mechsvd.model.identity import model_name
from mechsvd.model.sites import Model, require_model
from mechsvd.model.tasks import Task, require_fitting
from mechsvd.model.tokenization import pieces_of
from mechsvd.results import require_kind

RUN = ("random tokens", "reinitialised")  # nulls that need the model


@plain
def random_tokens(model: Model, task: Task, seed: int = 0) -> Task:
    """Make a task of uniformly random tokens, as long as another.

    Its overlaps are those of text without content. A BOS token at the start stays. Special tokens,
    and padding rows of the vocabulary beyond the tokenizer's, are left out.

    Returns:
        A task of the same length, `prompt_length`, targets and name, without a choice.

    Raises:
        TypeError, ValueError: a task that does not fit the model, or no tokens to draw from.

    Example:
        >>> len(ms.random_tokens(model, task).tokens) == len(task.tokens)
        True
    """
    require_fitting(model, task)
    allowed = _ordinary_tokens(model)
    tokens = _draw(allowed, len(task.tokens), seed)
    if int(task.tokens[0]) == getattr(model.tokenizer, "bos_token_id", None):
        tokens[0] = task.tokens[0]
    pieces = () if model.tokenizer is None else pieces_of(model, tokens.tolist())
    return Task(tokens, task.prompt_length, pieces, name=task.name, targets=task.targets)


def _ordinary_tokens(model: Model) -> Int[Tensor, " token"]:
    tokenizer = model.tokenizer
    count = model.cfg.d_vocab if tokenizer is None else min(model.cfg.d_vocab, len(tokenizer))
    special = {*getattr(tokenizer, "all_special_ids", ())}
    allowed = torch.tensor([i for i in range(count) if i not in special], dtype=torch.long)
    if len(allowed) == 0:
        raise ValueError(
            f"All {count} tokens of the vocabulary are special, so there are none to draw from."
        )
    return allowed


def _draw(allowed: Int[Tensor, " token"], count: int, seed: int) -> Int[Tensor, " pos"]:
    generator = _generator(seed)
    return allowed[torch.randint(len(allowed), (count,), generator=generator)]


@plain
def reinitialised(model: Model, seed: int = 0) -> Model:
    """Copy a model and redraw its weight matrices, each with its own mean and deviation.

    The copy keeps the architecture, the sizes of the weights, and everything with one axis (gains
    of norms, biases), but nothing that was learnt between the entries of a matrix. Embeddings
    count as matrices. Tied weights stay tied. The model itself is not changed.

    Returns:
        A model of the same class, dtype and device, in as much memory again.

    Raises:
        ValueError: quantised weights, which have no normal distribution to draw from.

    Example:
        >>> redrawn = ms.reinitialised(model)
        >>> ms.collect_writes(redrawn, task).source.weights == writes.source.weights
        False
    """
    require_model(model)
    generator, modules = _generator(seed), torch.nn.Module.modules(cast(torch.nn.Module, model))
    # attention patterns that an earlier run with gradients left there cannot be copied otherwise
    left_there = {
        id(value): value.detach().clone()
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    twin = copy.deepcopy(model, left_there)
    twin.cfg.model_name = f"{model_name(model)} (re-initialised, seed {seed})"
    with torch.no_grad():
        for name, weight in torch.nn.Module.named_parameters(cast(torch.nn.Module, twin)):
            if weight.ndim < 2 or name.rpartition(".")[2].startswith("b_"):
                continue  # HookedTransformer's biases of heads have two axes
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(
                    f"`{name}` is {weight.dtype}, but must be a float of 16 bits or more; "
                    "load the model without quantisation."
                )
            deviation, mean = torch.std_mean(weight.float(), correction=0)
            fresh = torch.randn(weight.shape, generator=generator)
            weight.copy_(mean.cpu() + deviation.cpu() * fresh)
    return twin


@plain
def another_text(svds: Sequence[Decomposition], i: int, seed: int = 0) -> Decomposition:
    """Draw the decomposition of another text than number `i`.

    Raises:
        TypeError, ValueError: no list of at least two decompositions, or no text `i`.

    Example:
        >>> svds = [ms.decompose(ms.collect_writes(model, one)) for one in tasks[:2]]
        >>> ms.another_text(svds, 0) is svds[1]
        True
    """
    if not isinstance(svds, Sequence):
        raise TypeError(
            f"`svds` must be a list of decompositions, but is {type(svds).__name__}; "
            "decompose each text."
        )
    if len(svds) < 2:
        raise ValueError(
            f"{len(svds)} decomposition(s) given, but another text needs at least two; "
            "decompose more texts."
        )
    i = require_whole("i", i, 0, len(svds) - 1)
    others = torch.tensor([number for number in range(len(svds)) if number != i])
    other = svds[int(_draw(others, 1, seed))]
    require_decomposition(other)
    return other


@plain
def covariance_matched(
    writes_or_svd: Decomposition | Sample | Tensor, rank: int, seed: int = 0
) -> Subspace:
    """The span of `rank` Gaussian vectors with the covariance of the writes.

    The covariance is about zero, as `decompose` takes it; about the mean if the decomposition is
    centred. Large directions are in the span almost surely, and small ones hardly at all.

    Raises:
        ValueError: `rank` is not from 0 to the rank of the writes.

    Example:
        >>> ms.covariance_matched(svd, 8, seed=1).rank
        8
    """
    svd = _svd_of(writes_or_svd)
    return Subspace(_basis(_gaussian(svd, _rank_of(svd, rank), seed)), svd.source)


def _gaussian(svd: Decomposition, count: int, seed: int) -> Float[Tensor, "d_model n"]:
    """Gaussian vectors whose covariance is that of the writes, in double precision.

    Singular values are divided by the root of the number of writes, so sizes match too.
    """
    generator = _generator(seed)
    parts = torch.randn(svd.rank, count, generator=generator, dtype=torch.float64)
    sizes = svd.singular_values.cpu().double() / svd.n_writes**0.5
    return svd.directions.cpu().double() @ (sizes[:, None] * parts)


@plain
def equal_energy(
    writes_or_svd: Decomposition | Sample | Tensor, rank: int, seed: int = 0
) -> Subspace:
    """A uniformly random subspace that carries as much energy as the first `rank` directions.

    The first k directions carry the share s = Σ_{j ≤ k} σⱼ² / Σ σⱼ² of the summed squares of the
    writes. A random subspace of rank r carries r / d_model of it in the mean. So r is s · d_model,
    rounded: the energies are equal in the mean over seeds up to half of 1 / d_model, and differ for
    each seed.

    Raises:
        ValueError: `rank` is not from 0 to the rank of the writes.

    Example:
        >>> ms.equal_energy(svd, 1).rank > 1
        True
    """
    svd = _svd_of(writes_or_svd)
    squares = svd.singular_values.cpu().double().square()
    share = float(squares[: _rank_of(svd, rank)].sum() / squares.sum())
    drawn = random_subspace(svd.d_model, min(svd.d_model, round(share * svd.d_model)), seed)
    return replace(drawn, source=svd.source)


def _haar(subspace: Any, seed: int) -> Subspace:
    require_kind(subspace, Subspace)
    return replace(random_subspace(subspace.d_model, subspace.rank, seed), source=subspace.source)


class _Null(NamedTuple):
    draw: Callable[..., Any]
    takes: tuple[str, ...]


NULLS = {
    "haar": _Null(_haar, ("subspace",)),
    "covariance": _Null(covariance_matched, ("writes or svd", "rank")),
    "equal energy": _Null(equal_energy, ("writes or svd", "rank")),
    "another text": _Null(another_text, ("svds", "i")),
    "order": _Null(order_at_random, ("svd",)),
    "random tokens": _Null(random_tokens, ("model", "task")),
    "reinitialised": _Null(reinitialised, ("model",)),
}


@plain
def null(kind: str, *, like: Any, seed: int = 0) -> Any:
    """Draw one null of a kind: what takes the place of the real thing by chance.

    Args:
        kind: "haar" (uniformly random, for a subspace), "covariance" and "equal energy" (for
            writes or their decomposition, and a rank), "another text" (for decompositions and the
            number of the text), "order" (for a decomposition), "random tokens" (for a model and a
            task) or "reinitialised" (for a model).
        like: what the null replaces. Where it takes two things, a tuple of them.

    Returns:
        What the function of this kind gives: a subspace, a decomposition, an order of directions,
        a task or a model.

    Raises:
        KeyError: an unknown kind; the message lists them.
        TypeError: `like` does not have as many parts as the kind takes.

    Example:
        >>> ms.null("haar", like=svd.subspace(8), seed=1).rank
        8
    """
    chosen = require_null(kind, tuple(NULLS))
    draw, takes = NULLS[chosen]
    parts = (like,) if len(takes) == 1 else like
    if not isinstance(parts, tuple) or len(parts) != len(takes):
        raise TypeError(
            f"`like` must be ({', '.join(takes)}) for {kind!r}, but is {type(like).__name__}"
            f"{f' of {len(parts)}' if isinstance(parts, tuple) else ''}."
        )
    return draw(*parts, require_whole("seed", seed))


def require_null(kind: Any, known: tuple[str, ...]) -> str:
    """Refuse the name of a null that is not known.

    Raises:
        KeyError: naming those that are.
    """
    if not isinstance(kind, str) or kind not in known:
        raise KeyError(f"No null {kind!r:.60}: choose {', '.join(map(repr, known))}.")
    return kind


def _svd_of(writes_or_svd: Decomposition | Sample | Tensor) -> Decomposition:
    given = isinstance(writes_or_svd, Decomposition | list | tuple)
    svd: Any = writes_or_svd if given else decompose(writes_or_svd)  # type: ignore[arg-type]
    require_decomposition(svd)
    chosen: Decomposition = svd
    return chosen


def _rank_of(svd: Decomposition, rank: int) -> int:
    return svd.subspace(rank).rank  # refuses a rank that the writes do not have


def _basis(vectors: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
    # columns of equal length, and no cut at a numerical rank: the rank is prescribed
    return torch.linalg.qr(vectors / vectors.norm(dim=0).clamp(min=1e-300))[0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(require_whole("seed", seed))
