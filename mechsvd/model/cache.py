"""The cache of keys and values, through which a model reads a text in chunks.

transformers 5.24 passes it as `cache` where it was `past_key_values`. A bridge that reads the old
name goes on without a cache, and without a word: each token then sees nothing before it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from typing import Any, cast

from torch import nn

from mechsvd.checks import warn
from mechsvd.model.fused import Swap, swapped
from mechsvd.model.sites import Model

OLD, NEW = "past_key_values", "cache"  # transformers' names for the argument
WORKING = "pip install 'transformers<5.24'"
_WARNED: set[str] = set()  # what was said in this process


def empty_cache(model: Model, rows: int) -> Any:
    """A cache of some rows before their first token, as the model's own `generate` makes it."""
    if (hf_model := wrapped(model)) is not None:
        from transformers import DynamicCache

        return DynamicCache(config=hf_model.config.get_text_config(decoder=True))
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    device = next(model.parameters()).device
    return TransformerLensKeyValueCache.init_cache(model.cfg, device, rows)


def wrapped(model: Any) -> Any:
    """The Hugging Face model in a bridge; None in a HookedTransformer."""
    hf_model = getattr(model, "original_model", None)
    return hf_model if isinstance(hf_model, nn.Module) else None


def with_cache(model: Model, keys_and_values: Any) -> dict[str, Any]:
    """The options by which a run takes a cache, and extends it."""
    hf_model = wrapped(model)
    if hf_model is None:
        return {"past_kv_cache": keys_and_values}
    return {NEW if _takes(hf_model, NEW) else OLD: keys_and_values, "use_cache": True}


@contextmanager
def taking_cache(model: Model) -> Iterator[None]:
    """Let a bridge's attention take a cache under the name that transformers gives it today.

    Whether it then reads a text in chunks as it does at once is for the self-check to measure.
    """
    with swapped(_renames(model)):
        yield


def drops_cache(model: Model) -> bool:
    """Whether the bridge's own `generate` and `forward` lose the cache, under these versions."""
    return bool(_renames(model))


def warn_dropped(model: Model) -> None:
    """Warn once that TransformerLens drops the cache in calls that are not mechsvd's."""
    if "dropped" not in _WARNED and drops_cache(model):
        _WARNED.add("dropped")
        warn(
            f"{versions()} lose the cache of keys and values: this model's own `generate` and "
            f"`{OLD}` give wrong text and logits, with `use_past_kv_cache=False` right ones. "
            f"mechsvd's calls are right. Or use versions that work together: {WORKING}, or those of "
            "tests/constraints.txt."
        )


def warn_uncached(error: float, length: int) -> None:
    """Warn that text is written without a cache."""
    warn(
        f"A text of {length} tokens read in chunks through the model's cache has other logits than "
        f"read at once (error {error:.1e}; {versions()}). So no cache is used: the results are "
        "those of the plain loop, but each new token costs a pass over the whole text. Versions "
        "that worked together are in tests/constraints.txt."
    )


def versions() -> str:
    """TransformerLens and transformers, with their versions."""
    return " with ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers"))


def _takes(hf_model: Any, name: str) -> bool:
    return name in inspect.signature(hf_model.forward).parameters


def _renames(model: Model) -> list[Swap]:
    """Methods of the bridge that read the old name only, where transformers gives the new one."""
    hf_model = wrapped(model)
    if hf_model is None or not _takes(hf_model, NEW):
        return []
    modules: list[Any] = list(nn.Module.modules(hf_model))
    return [
        (vars(module), name, partial(_renamed, getattr(module, name)))
        for module in modules
        for name in _outdated(cast(Any, type(module)))
        if name not in vars(module)  # else it is patched already
    ]


@cache
def _outdated(kind: Any) -> tuple[str, ...]:
    if not kind.__module__.startswith("transformer_lens."):
        return ()
    names = ("_update_kv_cache", "forward")
    return tuple(name for name in names if _reads_old_name(getattr(kind, name, None)))


def _reads_old_name(method: Any) -> bool:
    constants = getattr(getattr(method, "__code__", None), "co_consts", ())
    return OLD in constants and NEW not in constants


def _renamed(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if options.get(OLD) is None:
        options[OLD] = options.get(NEW)
    return method(*args, **options)
