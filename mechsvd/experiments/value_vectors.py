"""The value vectors of MLPs that lie nearest to a direction, and whether they tell what comes next."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsvd.experiments.writer_pass import WriterPass
from mechsvd.fields import require_between, require_declared, require_finite, require_length
from mechsvd.linalg.subspace import at_least_single
from mechsvd.model.readout import Readout
from mechsvd.results import Provenance, Result, result

NEAREST = 6  # value vectors of each direction, over all layers
PER_LAYER = 6  # of each layer and direction, whose top token is compared with the text
TOP = 5  # tokens


@result
class ValueVectors(Result):
    """The value vectors (rows of W_out) with the largest cosine, in size, to some directions.

    Attributes:
        directions: their numbers in the decomposition.
        near_directions, near_layers, near_neurons: which value vectors are near to which direction,
            by its place in `directions`.
        cosines: of these with the direction; negative if the neuron writes the opposite.
        top_tokens: that the value vector supports most, as in `TokenColumns.read`.
        texts: these as text.
        layers: the layers that are compared.
        agreement: of each direction's nearest value vectors of a layer: the share whose top token is
            the one that really came next where the neuron was largest. Where it was negative, the
            top token of the opposite vector counts.
        chance: the same for a place in the texts drawn at random.
        compared: how many value vectors that are, per layer and direction.
    """

    directions: Int[Tensor, " direction"]
    near_directions: Int[Tensor, " near"]
    near_layers: Int[Tensor, " near"]
    near_neurons: Int[Tensor, " near"]
    cosines: Float[Tensor, " near"]
    top_tokens: Int[Tensor, "near top"]
    texts: tuple[tuple[str, ...], ...]
    layers: Int[Tensor, " layer"]
    agreement: Float[Tensor, "direction layer"]
    chance: Float[Tensor, "direction layer"]
    compared: int
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "texts", len(self.cosines), "value vector")

    def _require_values(self) -> None:
        require_between(self, ["agreement", "chance"], 0, 1)
        require_finite(self, "cosines")
        require_between(self, ["cosines"], -1 - 1e-6, 1 + 1e-6)

    def to_pandas(self) -> Any:
        """One row per direction and near value vector: layer, neuron, cosine, top tokens."""
        import pandas as pd

        return pd.DataFrame(
            {
                "direction": self.directions[self.near_directions].numpy(),
                "layer": self.near_layers.numpy(),
                "neuron": self.near_neurons.numpy(),
                "cosine": self.cosines.numpy(),
                "top_tokens": ["|".join(texts) for texts in self.texts],
            }
        )

    def layers_to_pandas(self) -> Any:
        """One row per direction and layer: agreement with the actual next token, and chance."""
        import pandas as pd

        count, layers = self.agreement.shape
        return pd.DataFrame(
            {
                "direction": self.directions.repeat_interleave(layers).numpy(),
                "layer": self.layers.repeat(count).numpy(),
                "agreement": self.agreement.flatten().numpy(),
                "chance": self.chance.flatten().numpy(),
            }
        )

    def __repr__(self) -> str:
        own, chance = (
            float(values.mean()) if values.numel() else torch.nan
            for values in (self.agreement, self.chance)
        )
        return (
            f"ValueVectors near {len(self.directions)} directions, of {len(self.layers)} layers\n"
            f"  top token comes next where the neuron is largest: {own:.1%}, by chance {chance:.1%}"
            f"\n  on {self._origin()}"
        )


def value_vectors(
    directions: Int[Tensor, " direction"],
    basis: Float[Tensor, "d_model direction"],
    written: WriterPass,
    readout: Readout,
    vocabulary: Sequence[str],
    source: Provenance | None,
) -> ValueVectors:
    """Compare the value vectors of all split MLPs with some directions.

    Reference: Geva et al., Transformer Feed-Forward Layers Are Key-Value Memories, 2021,
        arXiv:2012.14913.
    """
    layers = [*written.triggers]
    numbers = [int(written.sites[index].layer or 0) for index in layers]
    splits = [written.splits[written.sites[index].name] for index in layers]
    followed = torch.cat([task.tokens[1:] for task in written.tasks]).cpu()
    cosines = [_cosines(split.vectors, basis) for split in splits]
    agreement, chance = (torch.zeros(len(directions), len(layers)) for _ in range(2))
    for place, (index, split) in enumerate(zip(layers, splits, strict=True)):
        trigger = written.triggers[index]
        for own in range(len(directions)):
            near = cosines[place][:, own].abs().topk(min(PER_LAYER, split.n_parts)).indices
            signs = torch.where(trigger.inputs[near] < 0, -1.0, 1.0)[:, None]
            tops = _top_tokens(readout, split.vectors[near.to(split.vectors.device)], signs, 1)[
                :, 0
            ]
            agreement[own, place] = (tops == trigger.next_tokens[near]).double().mean()
            chance[own, place] = (tops[:, None] == followed).double().mean()
    rows = [(own, *pair) for own in range(len(directions)) for pair in _nearest(own, cosines)]
    vectors = [splits[place].vectors[neuron].to(readout.gain.device) for _, place, neuron in rows]
    one = torch.ones(len(rows), 1)
    tops = _top_tokens(readout, torch.stack(vectors), one, TOP) if rows else torch.zeros(0, TOP)
    return ValueVectors(
        directions,
        torch.tensor([own for own, _, _ in rows], dtype=torch.long),
        torch.tensor([numbers[place] for _, place, _ in rows], dtype=torch.long),
        torch.tensor([neuron for _, _, neuron in rows], dtype=torch.long),
        torch.tensor([float(cosines[place][neuron, own]) for own, place, neuron in rows]),
        tops.long(),
        tuple(tuple(vocabulary[t] for t in row) for row in tops.long().tolist()),
        torch.tensor(numbers, dtype=torch.long),
        agreement,
        chance,
        PER_LAYER,
        source,
    )


def _cosines(vectors: Tensor, basis: Tensor) -> Float[Tensor, "neuron direction"]:
    wide = at_least_single(vectors.dtype)
    lengths = vectors.to(wide).norm(dim=1, keepdim=True)
    products = vectors.to(wide) @ basis.to(vectors.device, wide)
    lengths = torch.where(lengths > 0, lengths, 1.0) * basis.to(products).norm(dim=0)
    return (products / lengths).cpu()


def _nearest(own: int, cosines: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The layer's place and the neuron of the value vectors nearest to a direction."""
    candidates = [
        (abs(float(values[i, own])), place, i)
        for place, values in enumerate(cosines)
        for i in values[:, own].abs().topk(min(NEAREST, len(values))).indices.tolist()
    ]
    return [(place, i) for _, place, i in sorted(candidates, key=lambda c: -c[0])[:NEAREST]]


def _top_tokens(
    readout: Readout, vectors: Float[Tensor, "vector d_model"], signs: Tensor, count: int
) -> Int[Tensor, "vector count"]:
    wide = at_least_single(vectors.dtype)
    rows = vectors.to(readout.gain.device, wide) * signs.to(readout.gain.device, wide)
    return readout.read(rows.mT).topk(count, dim=1).indices.cpu()
