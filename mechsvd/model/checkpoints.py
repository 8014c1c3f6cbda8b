"""Checkpoints load from safetensors of their own only.

Pickles and code need the user's consent.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

# transformers takes the first of these files that exists
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
_LOADING = threading.RLock()
Door = Callable[..., Any]


class CheckpointError(ValueError):
    """A checkpoint that mechsvd does not open, with the reason and the way out."""


def require_checkpoint(directory: Path, allow_pickle: bool) -> None:
    """Refuse a directory without a configuration or trusted weights.

    Raises:
        ValueError: naming the file that is missing, or the pickle.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a Hugging Face model: config.json is missing there."
        )
    if any((directory / name).is_file() for name in SAFETENSORS):
        return
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if not pickles:
        raise CheckpointError(f"{directory} has no weights: model.safetensors is missing there.")
    if not allow_pickle:
        raise CheckpointError(_pickles(str(directory), pickles[0]))


def safe_weights(name: str, revision: str | None = None) -> list[str]:
    """List the weight files that a checkpoint's configuration and index name.

    Args:
        name: a directory or a hub name. Of a hub model only small files are fetched. If it cannot
            be reached, the list is empty, and loading says why.

    Raises:
        ValueError: a pickle, a file elsewhere, or an adapter (its base model would be opened too).
    """
    files, read = _in_directory(Path(name)) if Path(name).is_dir() else _on_hub(name, revision)
    if ADAPTER in files:
        raise CheckpointError(
            f"{name} holds an adapter ({ADAPTER}), whose weights and base model may be pickles; "
            "merge it into its base model, or pass `allow_pickle=True` if you trust both."
        )
    config = read("config.json") if "config.json" in files else {}
    weights_file = config.get("transformers_weights")
    weights_file = weights_file or next((file for file in SAFETENSORS if file in files), None)
    if weights_file is None:
        if pickles := sorted(file for file in files if file.endswith((".bin", ".bin.index.json"))):
            raise CheckpointError(_pickles(name, pickles[0]))
        return []
    if not str(weights_file).endswith(SAFETENSORS[1].removeprefix("model")):
        return [_own_safetensors(name, weights_file)]
    _require_own(name, weights_file)
    return [_own_safetensors(name, shard) for shard in _shards(read(weights_file))]


def config_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a directory or a hub model; empty if it cannot be reached."""
    files, read = _in_directory(Path(name)) if Path(name).is_dir() else _on_hub(name, revision)
    return read("config.json") if "config.json" in files else {}


def require_all_weights(directory: Path, shards: list[str]) -> None:
    """Refuse a checkpoint with fewer weights than its model.

    transformers would fill the rest with random numbers.

    Raises:
        ValueError: with both numbers, and the names of some missing weights.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config._attn_implementation = "eager"  # a configuration may name a kernel to download
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sizes: dict[str, int] = {}
    for shard in shards:
        with safe_open(directory / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                sizes[name] = math.prod(file.get_slice(name).get_shape())
    stored, expected = sum(sizes.values()), sum(needed.values())
    if stored < expected:
        missing = sorted(needed.keys() - sizes.keys())[:3] or "some"
        raise CheckpointError(
            f"{directory} holds {stored:,} weights, but its model has {expected:,}; "
            f"missing: {missing}."
        )


@contextmanager
def only_trusted(name: str, *, pickles: bool, code: bool) -> Iterator[None]:
    """Block untrusted pickles and code while a checkpoint is loaded.

    `safe_weights` says in advance what transformers will open. This guards the rest:
    TransformerLens opens pickles for some architectures, and imports `modeling_*.py` for others,
    without asking.

    Raises:
        ValueError: on leaving, if anything was refused, even if a caller caught the refusal.
    """
    from transformers import dynamic_module_utils

    refused: list[str] = []
    trust = f"{name} needs code of its own; pass `trust_remote_code=True` if you trust it."
    doors = [] if pickles else [(torch, "load", _pickles(name, "torch.load"))]
    doors += [] if code else [(dynamic_module_utils, "get_class_in_module", trust)]
    with _LOADING:
        originals = [getattr(module, door) for module, door, _ in doors]
        timeout = dynamic_module_utils.TIME_OUT_REMOTE_CODE
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # never ask on the terminal
        try:
            for original, (module, door, sentence) in zip(originals, doors, strict=True):
                setattr(module, door, _refusing(original, sentence, refused))
            yield
        except Exception as error:
            if not refused and not code and "trust_remote_code" in str(error):
                refused.append(trust)
            if not refused:
                raise
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = timeout
            for original, (module, door, _) in zip(originals, doors, strict=True):
                setattr(module, door, original)
    if refused:
        raise CheckpointError(refused[0])


def _refusing(original: Door, sentence: str, refused: list[str]) -> Door:
    """A refusal for this thread, and the original function for all others."""
    owner = threading.get_ident()

    def door(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return original(*arguments, **options)
        refused.append(sentence)
        raise CheckpointError(sentence)

    return door


def _in_directory(directory: Path) -> tuple[set[str], Callable[[str], dict[str, Any]]]:
    return {path.name for path in directory.iterdir()}, lambda file: _object(directory / file)


def _on_hub(name: str, revision: str | None) -> tuple[set[str], Callable[[str], dict[str, Any]]]:
    from huggingface_hub import hf_hub_download, list_repo_files, try_to_load_from_cache

    try:
        files = set(list_repo_files(name, revision=revision))
    except Exception:  # offline, gated or unknown: loading says which, and the cache still works
        known = ("config.json", ADAPTER, *SAFETENSORS, *PICKLES)
        paths = {file: try_to_load_from_cache(name, file, revision=revision) for file in known}
        files = {file for file, path in paths.items() if isinstance(path, str)}
    return files, lambda file: _object(Path(hf_hub_download(name, file, revision=revision)))


def _object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold an object, but holds a {type(content).__name__}.")
    return content


def _shards(index: dict[str, Any]) -> list[str]:
    places = index.get("weight_map")
    files = list(places.values()) if isinstance(places, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise ValueError("The index must hold a `weight_map` from weights to names of files.")
    return sorted(set(files))


def _own_safetensors(name: str, file: Any) -> str:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise CheckpointError(_pickles(name, str(file)))
    _require_own(name, file)
    return file


def _require_own(name: str, file: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or set(file) & set("\\:"):
        raise CheckpointError(
            f"{name} names weights outside of its folder ({file}); put them into it."
        )


def _pickles(name: str, found: str) -> str:
    return (
        f"{name} holds its weights as pickles ({found}), which can run code when opened; "
        "convert them to safetensors, or pass `allow_pickle=True` if you trust them."
    )
