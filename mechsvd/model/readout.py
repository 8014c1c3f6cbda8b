"""How a model reads its residual stream: the final norm, and the unembedding."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.model.evaluation import evaluation, without_hook_points
from mechsvd.model.probing import probe_tokens
from mechsvd.model.runs import run_model
from mechsvd.model.sites import Model, require_model, stream_names

LARGE, SMALL = 1e3, 1e-3  # entries of the vectors that the norm is asked about


class UnreadableError(ValueError):
    """The logits of a model are not a final norm and an unembedding that are known."""


@dataclass(frozen=True)
class Readout:
    """The logits that a residual stream x gives: W_Uᵀ (γ ⊙ (x − mean x) / √(var + ε) + β) + b.

    An RMS norm does not subtract the mean. A soft cap c makes c · tanh(logits / c) of them.

    Attributes:
        gain, offset: γ and β of the final norm; 1 and 0 where they are folded into the unembedding.
        is_centred: whether the norm subtracts the mean: LayerNorm does, RMS norm does not.
        epsilon: ε of the norm.
        unembedding: W_U.
    """

    gain: Float[Tensor, " d_model"]
    offset: Float[Tensor, " d_model"]
    is_centred: bool
    epsilon: float
    unembedding: Float[Tensor, "d_model d_vocab"]

    def read(
        self, directions: Float[Tensor, "d_model direction"]
    ) -> Float[Tensor, "direction d_vocab"]:
        """What the gain and the unembedding give for each direction alone, odd in its sign.

        Returns:
            Logits at a norm of scale 1, with mean 0 over the vocabulary.
        """
        return self._logits(self._centred(directions.mT) * self.gain)

    def local(
        self,
        directions: Float[Tensor, "d_model direction"],
        stream: Float[Tensor, "pos d_model"],
    ) -> Float[Tensor, "direction d_vocab"]:
        """The norm's Jacobian at some final residual streams, averaged, and the unembedding.

        Returns:
            The change of the logits (before a soft cap) per unit of the direction in the final
            residual stream, with mean 0 over the vocabulary.
        """
        wide = torch.promote_types(
            torch.promote_types(stream.dtype, torch.float32), directions.dtype
        )
        centred, moved = self._centred(stream.to(wide)), self._centred(directions.mT.to(wide))
        scale = (centred.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt()
        unit = centred / scale
        along = (moved @ unit.mT) / stream.shape[1]  # how much of each step only scales x
        per_unit = (1 / scale).flatten()
        changes = moved * per_unit.mean() - (along * per_unit) @ unit / len(stream)
        return self._logits(changes * self.gain)

    def logits(self, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
        """The logits of some final residual streams, without the unembedding's bias and a cap."""
        centred = self._centred(stream)
        scale = (centred.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt()
        return (centred / scale * self.gain + self.offset) @ self.unembedding.to(centred)

    def _centred(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        return rows - rows.mean(dim=-1, keepdim=True) if self.is_centred else rows

    def _logits(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        logits = rows @ self.unembedding.to(rows)
        return logits - logits.mean(dim=-1, keepdim=True)


@torch.no_grad()
def readout_of(model: Model) -> Readout:
    """Find how a model reads its residual stream, and compare it with the logits of a short run.

    The norm is asked about vectors of ±1, so any parametrisation of its gain is read right.

    Raises:
        UnreadableError: the model has no final norm and unembedding of these names, or they do not
            give its logits; a ValueError.
    """
    require_model(model)
    parts: Any = model
    with without_hook_points(model), evaluation(model, quiet=True):
        try:
            readout = _ask(model, parts.ln_final, parts.W_U.detach())
        except (AttributeError, NotImplementedError) as error:
            raise UnreadableError(
                "What a direction does to the logits cannot be read: the model has no `ln_final` "
                "and `W_U` that TransformerLens names."
            ) from error
        difference = _error(model, readout)
    tolerance = 1e-3 if next(model.parameters()).element_size() >= 4 else 0.1
    if not difference <= tolerance:
        raise UnreadableError(
            "What a direction does to the logits cannot be read: `ln_final` and `W_U` give logits "
            f"that differ from the model's by {difference:.2g} of their size (allowed: {tolerance:g})."
        )
    return readout


def _ask(model: Model, norm: Any, unembedding: Tensor) -> Readout:
    first = next(model.parameters())
    signs = torch.ones(model.cfg.d_model, dtype=first.dtype, device=first.device)
    signs[1::2] = -1

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the norm that is odd in x, and the part that is even."""
        given, turned = norm(torch.stack([x, -x])[None])[0].to(
            torch.promote_types(x.dtype, torch.float32)
        )
        return (given - turned) / 2, (given + turned) / 2

    odd, offset = halves(LARGE * signs)
    small = float(halves(SMALL * signs)[0].norm() / odd.norm())
    constant = halves(LARGE * signs.abs())[0]
    return Readout(
        odd * signs,
        offset,
        bool(constant.norm() < 1e-2 * odd.norm()),
        max(0.0, SMALL**2 * (1 / small**2 - 1)),
        unembedding.to(odd.device),
    )


def _error(model: Model, readout: Readout) -> float:
    """How far the logits of a short run are from the readout's, relative to the largest."""
    stored: list[Tensor] = []
    last = stream_names(model)[-1][1]
    tokens = probe_tokens(model)
    logits = run_model(model, tokens, [(last, lambda x, hook=None: stored.append(x.detach()))])
    bias = getattr(model, "b_U", None)
    expected = readout.logits(stored[0][0].to(readout.gain))
    expected = expected if bias is None else expected + bias.to(expected)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    if cap is not None and cap > 0:
        expected = cap * (expected / cap).tanh()
    measured = logits[0].to(expected)
    return float((measured - expected).abs().max() / measured.abs().max())
