"""The identity of a model: its name, its weights, and what was done to them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mechsvd.demo import WEIGHTS
from mechsvd.model.sites import Model, Site
from mechsvd.results import Provenance
from mechsvd.version import __version__

# fingerprint and processing state of the models that are in a session
_READ: "WeakKeyDictionary[Any, tuple[str, str] | None]" = WeakKeyDictionary()


def provenance_of(
    model: Model,
    tokens: tuple[tuple[int, ...], ...] = (),
    sites: tuple[Site, ...] = (),
    notes: tuple[str, ...] = (),
) -> Provenance:
    """Describe the model and its state, for the results that it gives."""
    weights, processing = _identity(model)
    return Provenance(
        model=model_name(model),
        weights=weights,
        processing=processing,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        transformer_lens=installed_version(),
        mechsvd=__version__,
        tokens=tokens,
        hooks=tuple(site.name for site in sites),
        notes=notes,
    )


def model_name(model: Model) -> str:
    """The model's name; for a local directory, the last part of its path only.

    Results are shared, and should not show the paths of a machine.
    """
    name = str(getattr(model.cfg, "model_name", None) or type(model).__name__)
    if name == os.path.abspath(WEIGHTS):
        return "mechsvd embedded"
    return Path(name).name if Path(name).is_dir() else name


@contextmanager
def weights_read_once(model: Model) -> Iterator[None]:
    """Read a model's weights at most once in this block; they must not change in it."""
    is_outermost = model not in _READ
    if is_outermost:
        _READ[model] = None
    try:
        yield
    finally:
        if is_outermost:
            del _READ[model]


def fingerprint(model: Model) -> str:
    """Identify weights by shape, exact sum of bits and a sample of each parameter.

    Every weight is read, again in each session. So a model that was trained further between two
    calls counts as another model.
    """
    return _identity(model)[0]


def _identity(model: Model) -> tuple[str, str]:
    """The fingerprint and the processing state; read once in a session."""
    found = _READ.get(model)
    if found is None:
        found = _digest(model), processing_state(model)
        if model in _READ:
            _READ[model] = found
    return found


@torch.no_grad()
def _digest(model: Model) -> str:
    digests = []
    for parameter in model.parameters():
        flat = parameter.detach().reshape(-1)
        bits = flat.view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
        if bits.storage_offset() * bits.element_size() % 8:  # a slice of a larger tensor
            bits = bits.clone()
        whole = len(bits) * bits.element_size() // 8 * (8 // bits.element_size())
        # sums of eight bytes each, modulo 2⁶⁴: thirty times as fast as sums of fewer
        total = int(bits[:whole].view(torch.int64).sum() + bits[whole:].sum(dtype=torch.int64))
        if total == 0 and not bits.any():
            continue  # some versions of TransformerLens add a bias of zeros to the unembedding
        sample = bits[:: max(1, len(bits) // 512)].cpu().numpy().tobytes()
        digests.append(
            hashlib.sha256(f"{tuple(parameter.shape)} {total}".encode() + sample).digest()
        )
    # sorted, since names and order differ between versions
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def processing_state(model: Model) -> str:
    """What was done to the weights after training.

    It changes the SVD, but not the log-probabilities.
    """
    state = []
    if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre"):
        state.append("normalization folded")
    if getattr(model, "compatibility_mode", False):
        state.append("compatibility mode")
    embedding = _embedding(model)
    if embedding is not None and embedding.mean(dim=-1).abs().max() < 1e-5 * embedding.abs().max():
        state.append("writing weights centred")
    return ", ".join(state) or "raw"


def _embedding(model: Any) -> Tensor | None:
    try:
        return model.W_E.detach().float()
    except (AttributeError, NotImplementedError):
        return None


@cache
def installed_version() -> str:
    """The version of TransformerLens."""
    try:
        return version("transformer-lens")
    except PackageNotFoundError:
        return "not installed"
