"""The beginning of a text that no edit reaches: its keys and values, computed once for all rows."""

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechsvd.model.runs import run_model
from mechsvd.model.sites import Model


@dataclass(frozen=True)
class Beginning:
    """What attention keeps of the first positions of some texts.

    Attributes:
        length: number of positions.
        cache: the keys and values of each text, in a cache of transformers.
    """

    length: int
    cache: Any

    def of(self, texts: Int[Tensor, " row"]) -> Any:
        """A cache for a run of rows that go on from there, each from its text; it does not grow.

        The layers before the first edited site may run as one row, if all rows have one text.
        """
        whole = copy(self.cache)
        whole.layers = [copy(layer) for layer in self.cache.layers]
        for layer in whole.layers:
            layer.update = partial(_after, layer, texts.to(layer.keys.device))
        return whole


def read_beginning(model: Model, tokens: Int[Tensor, "text pos"]) -> Beginning:
    """Run the first positions of some texts once.

    Raises:
        NotImplementedError: the model keeps something else than the keys and values of each layer.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not isinstance(getattr(model, "original_model", None), torch.nn.Module):
        raise NotImplementedError("Only a TransformerBridge is known to go on from a beginning.")
    cache: Any = DynamicCache()
    run_model(model, tokens, beginning=cache)
    kept = [layer.keys.shape for layer in cache.layers if type(layer) is DynamicLayer]
    if len(kept) != model.cfg.n_layers or any(shape[-2] != tokens.shape[1] for shape in kept):
        raise NotImplementedError("The model keeps other things than keys and values.")
    return Beginning(tokens.shape[1], cache)


def _after(
    layer: Any, texts: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Stands for a layer's `update`: the new keys and values after those of each row's text."""
    return _joined(layer.keys, texts, keys), _joined(layer.values, texts, values)


def _joined(kept: Tensor, texts: Tensor, new: Tensor) -> Tensor:
    is_one = len(new) == 1 or len(kept) == 1
    own = kept[texts[:1]].expand(len(new), -1, -1, -1) if is_one else kept[texts]
    return torch.cat([own, new], dim=-2)
