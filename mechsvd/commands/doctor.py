"""`mechsvd doctor`: what one pastes into a bug report."""

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mechsvd.commands.options import MODEL, OPTIONS, add, load
from mechsvd.engine.memory import container_limit, free_bytes, total_bytes
from mechsvd.model.cache import WORKING, drops_cache, versions
from mechsvd.model.identity import provenance_of
from mechsvd.model.selfcheck import SelfCheck, self_check
from mechsvd.model.sites import COMPONENTS, Model, find_sites
from mechsvd.version import __version__

PACKAGES = ("torch", "transformer-lens", "transformers", "plotly", "kaleido", "numpy")


def add_doctor(commands: Any) -> None:
    """Add `mechsvd doctor`."""
    run = commands.add_parser(
        "doctor",
        help="versions, device, memory, Chrome, and the self-check of a model: for a bug report",
    )
    run.set_defaults(run=_doctor)
    run.add_argument("model", nargs="?", **OPTIONS["model"])
    add(run, *(name for name in MODEL if name != "model"))


def _doctor(options: argparse.Namespace) -> None:
    """Print the machine first, so that it is there if the model cannot be loaded.

    Raises:
        ValueError: the model fails its self-check.
    """
    for line in _machine():
        print(line, flush=True)
    model = load(options)
    source = provenance_of(model)
    print(f"device {next(model.parameters()).device}, CPU threads: {torch.get_num_threads()}")
    print(
        f"model {source.model} ({type(model).__name__}): {model.cfg.n_layers} layers, "
        f"d_model {model.cfg.d_model}, context {model.cfg.n_ctx}, {source.dtype}, "
        f"{source.processing}"
    )
    print(f"weights {source.weights}", flush=True)
    check = self_check(model)
    print(check)
    if drops_cache(model):
        print(
            f"  TransformerLens's own cache: LOST under {versions()}; `generate` of the model "
            f"itself is wrong with it, and right with use_past_kv_cache=False ({WORKING})"
        )
    for line in _blocks(model, check):
        print(line)
    if check.failure:
        raise ValueError(f"this model cannot be used: {check.failure}.")


def _machine() -> Iterator[str]:
    numbers = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield f"mechsvd {__version__}, {numbers}, Python {platform.python_version()}"
    yield f"system {platform.platform()}"
    limit = container_limit()
    bound = "" if limit is None else f"; this container's limit is {_size(limit)}"
    free = free_bytes(torch.device("cpu"))
    yield f"memory {_size(free)} of {_size(total_bytes())} free{bound}"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield f"GPU {number} {name}: {_size(free)} of {_size(total)} free"
    else:
        yield f"GPU none (torch {torch.__version__} sees no CUDA)"
    yield f"static images {_images()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _images() -> str:
    """Whether figures can be saved as images, and with which Chrome."""
    from mechsvd.figures.style import INSTALL_IMAGES, find_chrome

    chrome = find_chrome()
    return f"by kaleido with {chrome}" if chrome else f"cannot be made: {INSTALL_IMAGES}"


def _blocks(model: Model, check: SelfCheck) -> Iterator[str]:
    """One line per block: its error, the hooks of its writes, and what is wrong with it."""
    sites = find_sites(model, missing="skip")
    for layer, error in enumerate(check.block_error.tolist()):
        own = {site.component: site.hook_name for site in sites if site.layer == layer}
        lacking = [name for name in COMPONENTS if name not in own]
        problem = ""
        if lacking:
            problem = f"; no hook of its {' and '.join(lacking)} write"
        elif not error <= check.tolerance:
            problem = f"; FAILS: allowed is {check.tolerance:.0e}, so another write goes unseen"
        yield f"  block {layer}: error {error:.1e} with {', '.join(own.values())}{problem}"
