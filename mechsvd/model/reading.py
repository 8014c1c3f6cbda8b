"""The position in a text where a run begins: a KV cache lets a model read in chunks."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechsvd.model.sites import Hook, Model, Site, stream_names


class Reading:
    """How much of the text a model has read before a run.

    It is seen anew in each run, in the cache that the attention receives.

    Attributes:
        rows, length: of the current run.
        hook: starts to watch, at the first edited block.
    """

    def __init__(self, model: Model, layer: int):
        """Watch the attention of one layer.

        Raises:
            ValueError: the layer has none.
        """
        attention = getattr(model.blocks[layer], "attn", None)  # type: ignore[attr-defined]
        if not isinstance(attention, nn.Module):
            raise ValueError(
                "`positions` need attention, whose cache tells where a text goes on, "
                f"but layer {layer} has none; begin with a layer that has it, edit all positions, "
                "or edit whole texts by `measure(positions=…)`."
            )
        self.rows = self.length = 0
        self.hook: Hook = (stream_names(model)[layer][0], self._begin)
        self._attention, self._layer = attention, layer
        self._handle: RemovableHandle | None = None
        self._start: int | None = None
        self._served: set[Site] = set()  # sites that have asked in this run

    def start(self, site: Site) -> int:
        """The absolute position at which the current run begins.

        Raises:
            RuntimeError: the position was not seen in this run.
        """
        if self._start is None or site in self._served:
            raise RuntimeError(
                f"The `positions` of {site.place} cannot be told: "
                f"the hook at `{self.hook[0]}` or the attention after it did not come first; "
                "pass all hooks that `fwd_hooks` gives."
            )
        self._served.add(site)
        return self._start

    def _begin(self, x: Tensor, hook: Any = None) -> None:
        self.rows, self.length = x.shape[:2]
        self._start, self._served = None, set()
        self._forget()
        self._handle = self._attention.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._forget()
        lengths = [_cached(value, self._layer) for value in (*args, *options.values())]
        self._start = max(length for length in (0, *lengths) if length is not None)

    def _forget(self) -> None:
        if self._handle:
            self._handle.remove()
            self._handle = None


def _cached(value: Any, layer: int) -> int | None:
    """How many positions a cache of keys and values holds; None for anything else.

    The cache is that of transformers or of HookedTransformer.
    """
    if hasattr(value, "get_seq_length"):
        return int(value.get_seq_length(layer))
    keys = getattr(value, "past_keys", None)
    return keys.shape[1] if isinstance(keys, Tensor) else None
