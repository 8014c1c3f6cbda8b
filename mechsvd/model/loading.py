"""Load a model. TransformerLens is imported only then, since it takes seconds."""

import os
import subprocess
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mechsvd.checks import with_plain_arguments
from mechsvd.demo import WEIGHTS
from mechsvd.model.cache import warn_dropped
from mechsvd.model.checkpoints import (
    CheckpointError,
    config_of,
    only_trusted,
    require_all_weights,
    require_checkpoint,
    safe_weights,
)
from mechsvd.model.identity import installed_version

EMBEDDED = "embedded"
OLDEST, NEWEST = (3, 9), (5, 0)  # of transformer-lens: from the first, below the second
INSTALL = "pip install 'transformer-lens>=3.9,<5'"


@with_plain_arguments
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
        ValueError: the directory is no model, the weights are not safetensors or do not fit, the
            code is not trusted, or TransformerLens or transformers cannot build the model.
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
    if not isinstance(model, (str, Path)) or not str(model) or "\0" in str(model):
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
    try:
        loaded = _load(name, {"device": device, "dtype": dtype, **options}, allow_pickle)
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):  # said as well as can be
        raise
    except Exception as error:
        raise _reason(name, is_local, error) from error
    warn_dropped(loaded)
    return loaded


def _load(name: str, options: dict[str, Any], allow_pickle: bool) -> Any:
    """Load a directory or a hub model; all checks of trust are made here."""
    from transformer_lens.model_bridge import TransformerBridge

    is_local, trusted = Path(name).is_dir(), bool(options.get("trust_remote_code"))
    if is_local:
        require_checkpoint(Path(name), allow_pickle)
    with only_trusted(name, pickles=allow_pickle, code=trusted):
        if not options.keys() & {"hf_model", "model_class", "hf_config_overrides"}:
            _require_adapter(config_of(name, options.get("revision")))
        if not allow_pickle:
            shards = safe_weights(name, options.get("revision"))
            has_weights = options.get("hf_model") is None and options.get("load_weights", True)
            if is_local and has_weights and not trusted:
                require_all_weights(Path(name), shards)
        with _nothing_installed():
            return TransformerBridge.boot_transformers(name, **options)


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """Keep TransformerLens from installing packages while it loads a model.

    It runs `pip install torchvision` for a model that also reads images, which may replace torch.
    It catches the error, and the text part loads without.
    """
    original: Any = subprocess.check_call
    owner = threading.get_ident()

    def check_call(command: Any, *arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == owner and "install" in command:
            raise RuntimeError(f"mechsvd installs nothing, but TransformerLens ran {command}.")
        return original(command, *arguments, **options)

    vars(subprocess)["check_call"] = check_call
    try:
        yield
    finally:
        vars(subprocess)["check_call"] = original


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
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(":")[0].splitlines()[0]
        raise ValueError(
            f"Device {str(device)!r} cannot be used here ({reason}); 'cpu' always can."
        ) from error


def _require_adapter(config: dict[str, Any]) -> None:
    """Refuse a model that TransformerLens does not know.

    Of a decoder that it does not know, it takes another class of the same model type, and fills
    what the checkpoint lacks with random numbers.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = [*(config.get("architectures") or [])]
    if not config or {*named} & SUPPORTED_ARCHITECTURES.keys():
        return
    if not {*named} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        try:
            determine_architecture_from_hf_config(SimpleNamespace(**config))
            return
        except ValueError:
            pass
    architecture = " or ".join(named) or f"of model type {config.get('model_type')!r}"
    raise CheckpointError(
        f"TransformerLens {installed_version()} has no adapter for the architecture {architecture} "
        "of this model, so mechsvd cannot read it."
    )


def _reason(name: str, is_local: bool, error: Exception) -> Exception:
    """The error that says who failed: the hub, transformers, TransformerLens, or the files."""
    if isinstance(error, OSError) and not is_local:
        return _unreachable(name, error)
    frames = traceback.extract_tb(error.__traceback__)
    calls = {frame.name for frame in frames}
    said = " ".join(str(error).split())[:300] or frames[-1].line  # of a bare assertion, the line
    text = f"{type(error).__name__}: {said}"
    if isinstance(error, TypeError) and frames[-1].name == "_load":  # an option it does not have
        return TypeError(f"`TransformerBridge.boot_transformers` refuses the options: {said}")
    transformers = f"transformers {version('transformers')}"
    if "from_config" in calls:
        return ValueError(f"{transformers} cannot build the model that {name} describes: {text}")
    if "from_pretrained" not in calls and any("transformer_lens" in f.filename for f in frames):
        lens = f"TransformerLens {installed_version()}"
        return ValueError(f"{lens} cannot read the model in {name}: {text}")
    if is_local:
        return ValueError(
            f"The checkpoint in {name} cannot be loaded; "
            f"is its model.safetensors or config.json damaged? {text}"
        )
    return ValueError(f"{transformers} cannot load {name!r} from the hub: {text}")


def _unreachable(name: str, error: Exception) -> OSError:
    reason = str(error).strip().splitlines()[0][:200]
    return OSError(
        f"Cannot load {name!r} from the hub: {reason} Set HF_TOKEN for a gated model, pass a local "
        "directory, or use the embedded model (`mechsvd.load_model()`)."
    )
