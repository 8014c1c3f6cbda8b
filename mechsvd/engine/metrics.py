"""Metrics: how much of a run is left, from the log-probabilities of its tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def kl_divergence(
    edited: Float[Tensor, "edit scored d_vocab"], clean: Float[Tensor, "scored d_vocab"]
) -> Float[Tensor, "edit scored"]:
    """The KL divergence of clean ‖ edited at each scored position, in nats.

    It is 0 where the predictions are the same, and never cancels over tokens.

    Args:
        edited, clean: log-probabilities of all tokens.
    """
    probabilities = clean.exp()
    terms = probabilities * (clean - edited)
    return torch.where(probabilities > 0, terms, 0.0).sum(dim=-1)  # a masked token has p = 0
