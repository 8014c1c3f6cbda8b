"""Load a model. TransformerLens is imported only then, since it takes seconds."""

import os
from pathlib import Path
from typing import Any

import torch

from mechsvd.ambient import plain
from mechsvd.demo import WEIGHTS
from mechsvd.model.checkpoints import (
    CheckpointError,
    only_trusted,
    require_all_weights,
    require_checkpoint,
    safe_weights,
)
from mechsvd.model.identity import installed_version

EMBEDDED = "embedded"
OLDEST, NEWEST = (3, 9), (5, 0)  # of transformer-lens: from the first, below the second
INSTALL = "pip install 'transformer-lens>=3.9,<5'"


@plain
def load_model(
    model: Any = EMBEDDED,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Any:
    """Load a model as a raw `TransformerBridge`: embedded, from a directory, or from the hub.

    A TransformerLens model that you already have is returned unchanged; every call that takes a
    model takes it too.

    Args:
        model: "embedded", a Hugging Face directory, a hub name such as "gpt2", or a model.
        device: by default TransformerLens's choice, which is CUDA if available.
        dtype: of the weights, float32 by default. Projections are always computed in float32 or
            wider.
        allow_pickle: accept weights that are not safetensors.
        options: passed on to `TransformerBridge.boot_transformers` (revision, n_ctx, …). Code of
            the checkpoint runs only with `trust_remote_code=True`, whatever its configuration says.

    Raises:
        ValueError: the directory is no model, the weights are not safetensors or do not fit, or
            the code is not trusted.
        OSError: the hub model is unknown, gated or out of reach.
        ImportError: TransformerLens is missing, or its version is not supported.

    Example:
        >>> ms.load_model().cfg.n_layers
        6
    """
    if hasattr(model, "run_with_hooks"):
        if options or device is not None or dtype is not None:
            raise ValueError(
                "This model is loaded already and is used as it is; "
                "options are for models that are loaded by name."
            )
        return model
    if not isinstance(model, (str, Path)) or not str(model):
        raise TypeError(
            f"`model` must be a name, a directory or a TransformerLens model, but it is {model!r}."
        )
    _require_transformer_lens()
    dtype = torch.float32 if dtype is None else dtype
    _require_placement(device, dtype)
    name = str(
        WEIGHTS
        if model == EMBEDDED
        else Path(model).expanduser()
        if str(model).startswith("~")
        else model
    )
    is_local = Path(name).is_dir()
    if is_local:
        name = os.path.abspath(name)  # a relative one may be an alias for a hub model
    elif isinstance(model, Path) or name.startswith((".", "/", "~")) or Path(name).exists():
        raise ValueError(f"There is no directory {name}.")
    from safetensors import SafetensorError

    try:
        return _load(name, {"device": device, "dtype": dtype, **options}, allow_pickle)
    except CheckpointError:  # our own message
        raise
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        if not is_local and not isinstance(error, OSError):
            raise
        raise (_damaged(name, error) if is_local else _unreachable(name, error)) from error


def _load(name: str, options: dict[str, Any], allow_pickle: bool) -> Any:
    """Load a directory or a hub model; all checks of trust are made here."""
    from transformer_lens.model_bridge import TransformerBridge

    is_local, trusted = Path(name).is_dir(), bool(options.get("trust_remote_code"))
    if is_local:
        require_checkpoint(Path(name), allow_pickle)
    with only_trusted(name, pickles=allow_pickle, code=trusted):
        if not allow_pickle:
            shards = safe_weights(name, options.get("revision"))
            has_weights = options.get("hf_model") is None and options.get("load_weights", True)
            if is_local and has_weights and not trusted:
                require_all_weights(Path(name), shards)
        return TransformerBridge.boot_transformers(name, **options)


def _require_transformer_lens() -> None:
    installed = installed_version()
    if installed == "not installed":
        raise ImportError(f"TransformerLens is not installed; run: {INSTALL}")
    numbers = tuple(int(part) for part in installed.split(".")[:2])
    if not OLDEST <= numbers < NEWEST:
        raise ImportError(
            f"TransformerLens {installed} is installed, but mechsvd supports 3.9 to below 5; "
            f"run: {INSTALL}"
        )


def _require_placement(device: str | torch.device | None, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"`dtype` must be a floating torch.dtype such as torch.float32, but is {dtype!r}."
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(":")[0].splitlines()[0]
        raise ValueError(
            f"Device {str(device)!r} cannot be used here ({reason}); 'cpu' always can."
        ) from error


def _damaged(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"The checkpoint in {name} cannot be loaded; "
        f"is its model.safetensors or config.json damaged? {reason}"
    )


def _unreachable(name: str, error: Exception) -> OSError:
    reason = str(error).strip().splitlines()[0][:200]
    return OSError(
        f"Cannot load {name!r} from the hub: {reason} Set HF_TOKEN for a gated model, pass a local "
        "directory, or use the embedded model (`mechsvd.load_model()`)."
    )
