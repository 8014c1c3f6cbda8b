"""The directions of weights: what attention and MLPs could write, whatever the text."""

from collections.abc import Sequence

import torch

from mechsvd.ambient import plain
from mechsvd.linalg.decomposition import Decomposition, decompose_groups
from mechsvd.model.identity import provenance_of
from mechsvd.model.sites import Model
from mechsvd.model.weights import written_vectors


@plain
def weight_svd(model: Model, pattern: str | Sequence[str]) -> Decomposition:
    """Take the SVD of weights that write to the residual stream (W_O, W_out).

    The directions are left singular vectors of the weight as a map to the residual stream, so
    `overlap` compares them with those of the writes. Several weights are put side by side, as if
    every neuron's and every head dimension's output vector were one write. Biases have no part.

    A post-norm model (Gemma-2, Gemma-3, OLMo-2) normalises and scales what these weights give
    before it is added to the residual stream. Its writes need not lie in the span of the
    directions.

    Args:
        model: its weights are taken as they are, so folding or centring changes the directions.
        pattern: shell-like, on TransformerLens's names; or a list of patterns. In a bridge
            "blocks.*.attn.o.weight" or "blocks.2.mlp.out.weight", in a HookedTransformer
            "blocks.*.attn.W_O" or "blocks.2.mlp.W_out".

    Returns:
        A decomposition like that of `decompose`, its singular values in the units of the weights.
        `left` is "site pos rank" with one site per weight and one position per column if all
        weights have equally many columns. Otherwise it has one site with all columns. The weights
        follow the order of the model's modules; `source.notes` names them, and there are no hooks.

    Raises:
        KeyError: a pattern matches nothing; the closest names are given.
        ValueError: a weight does not write to the residual stream (a bias, a query, an embedding,
            the unembedding), its output axis is not known or not `d_model`, or it is quantised or
            not finite.

    Reference: Millidge and Black, The Singular Value Decompositions of Transformer Weight Matrices
        are Highly Interpretable, Alignment Forum (2022).

    Example:
        >>> ms.weight_svd(model, "blocks.*.mlp.out.weight").rank
        128
    """
    weights = written_vectors(model, pattern)
    device = next(iter(weights.values())).device  # of a model on several devices, the first
    vectors = [rows.to(device) for rows in weights.values()]
    is_even = len({len(rows) for rows in vectors}) == 1
    values = torch.stack(vectors) if is_even else torch.cat(vectors)[None]
    source = provenance_of(model, notes=(f"weights {', '.join(weights)}",))
    return decompose_groups(values[None], source=source)[0]
