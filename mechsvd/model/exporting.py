"""Writing a Hugging Face checkpoint, and running one by transformers alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechsvd.model.evaluation import evaluation
from mechsvd.model.output_weights import empty_model, hugging_face_weights
from mechsvd.model.runs import run_model
from mechsvd.model.sites import Hook, Model
from mechsvd.results import give_usual_rights


def write_checkpoint(model: Any, replaced: Mapping[str, Tensor], folder: Path) -> None:
    """Write the Hugging Face model, with some weights replaced, and its tokenizer.

    Weights are saved in the dtype of the model, tied ones once.

    Args:
        replaced: new weights by their names in the checkpoint.

    Raises:
        ValueError: the model lacks weights of its architecture.
    """
    empty, weights = empty_model(model), hugging_face_weights(model)
    needed = [name for name, _ in empty.named_parameters()]
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(
            f"{len(missing)} weights of the architecture are not in this model, such as "
            f"{missing[0]}, so no checkpoint can be written; load it by `mechsvd.load_model`."
        )
    state = {name: weights[name].detach() for name in needed}
    state |= {name: value.to(state[name]) for name, value in replaced.items()}
    empty.load_state_dict(state, strict=False, assign=True)
    empty.tie_weights()
    empty.generation_config = model.original_model.generation_config
    with _quiet_transformers():
        empty.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # safetensors writes a file that its owner alone can read
        give_usual_rights(path)


@torch.no_grad()
def checkpoint_logits(
    folder: Path, texts: list[Int[Tensor, " _"]], device: torch.device
) -> list[Float[Tensor, "_ d_vocab"]]:
    """The logits of a checkpoint as transformers alone gives them, in its own dtype."""
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    plain = plain.to(device).eval()
    return [plain(tokens[None].to(device)).logits[0].cpu() for tokens in texts]


def whole_logits(
    model: Model, tokens: Int[Tensor, " pos"], hooks: list[Hook]
) -> Float[Tensor, "pos d_vocab"]:
    """The logits of a text at all positions, on the plain kernels."""
    with evaluation(model, quiet=True):
        device = next(model.parameters()).device
        return run_model(model, tokens[None].to(device), hooks)[0].cpu()


@contextmanager
def with_weights(changes: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters and buffers other values in a block, then their own, also after an error.

    Their own values stay where they are in memory, so they come back bit for bit.
    """
    own = [(tensor, tensor.data) for tensor in changes]
    try:
        for tensor, value in changes.items():
            tensor.data = value
        yield
    finally:
        for tensor, value in own:
            tensor.data = value


@contextmanager
def in_single_precision(model: Any) -> Iterator[None]:
    """Run a model of half precision in float32 in a block; others as they are."""
    roots = (model, model.original_model)
    tensors = {id(t): t for root in roots for t in _tensors(root)}.values()
    halves = [t for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    dtype = model.cfg.dtype
    with with_weights({tensor: tensor.detach().float() for tensor in halves}):
        try:
            if halves:
                model.cfg.dtype = torch.float32
            yield
        finally:
            model.cfg.dtype = dtype


def _tensors(root: nn.Module) -> list[Tensor]:
    return [*nn.Module.parameters(root), *nn.Module.buffers(root)]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers, which it shows outside of terminals too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
