"""A decoder of plain transformers in float64: what modules add to its stream, and runs and texts with those outputs edited.

The modules are found by arithmetic, not by name: in each layer, output − input is a sum of multiples of two modules' outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


class Plain:
    """The model in a directory, with eager attention and without a cache."""

    def __init__(self, directory: str, tokens: Tensor) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",  # the default one has no float64
        ).eval()
        self.precision = 1e-7  # norms within a model may compute in float32
        try:
            self.logits(tokens)
        except RuntimeError:  # XGLM clamps by a constant that float32 does not hold
            self.model, self.precision = self.model.float(), 1e-5
        self.writes = [self._writes_of(layer, tokens) for layer in self._layers()]

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=tokens[None], use_cache=False).logits[0].double()

    def _layers(self) -> list[nn.Module]:
        count = self.model.config.get_text_config().num_hidden_layers
        lists = [
            m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count
        ]
        return [*max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))] if lists else []

    def _writes_of(self, layer: nn.Module, tokens: Tensor) -> list[tuple[nn.Module, float]]:
        """The modules whose outputs make up what a layer adds, each with its factor; none if no two do."""
        seen: dict[nn.Module, Tensor] = {}
        ends: list[Tensor] = []

        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            value = _tensor(output)
            if value is not None and module not in seen:
                seen[module] = value.detach().clone().double()

        def start(module: nn.Module, inputs: Any, named: Any) -> None:
            ends.append((inputs[0] if inputs else named["hidden_states"]).detach().clone().double())

        inner = [m for m in layer.modules() if m is not layer]
        handles = [m.register_forward_hook(see) for m in [*inner, layer]]
        handles.append(layer.register_forward_pre_hook(start, with_kwargs=True))
        self.logits(tokens)
        for handle in handles:
            handle.remove()
        if len(ends) != 1 or layer not in seen or seen[layer].numel() != ends[0].numel():
            return []
        added = (seen.pop(layer).reshape(ends[0].shape) - ends[0]).flatten()
        outputs = [(m, v.flatten()) for m, v in seen.items() if v.numel() == added.numel()]
        return _summands(outputs, added, self.precision)

    @contextmanager
    def edited(self, edit: Edit | None) -> Iterator[None]:
        """Edit every write, of shape [pos, width]."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            value = _tensor(output)
            rows = value.reshape(-1, value.shape[-1]).double()
            new = edit(rows).reshape(value.shape).to(value.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        modules = [m for writes in self.writes for m, _ in writes] if edit else []
        handles = [m.register_forward_hook(hook) for m in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def written(self, tokens: Tensor) -> Tensor:
        """All writes, [site · pos, width]."""
        found = []
        handles = [
            m.register_forward_hook(
                lambda _, __, out, f=factor: found.append(
                    f * _tensor(out).double().reshape(len(tokens), -1)
                )
            )
            for writes in self.writes
            for m, factor in writes
        ]
        self.logits(tokens)
        for handle in handles:
            handle.remove()
        return torch.cat(found)

    def log_prob(self, tokens: Tensor, prompt_length: int, edit: Edit | None = None) -> float:
        """Of the tokens after the prompt, in nats."""
        with self.edited(edit):
            log_probs = self.logits(tokens)[prompt_length - 1 : -1].log_softmax(-1)
        return log_probs.gather(-1, tokens[prompt_length:, None]).sum().item()

    def text(self, prompt: Tensor, count: int, end: int, edit: Edit | None = None) -> list[int]:
        """Greedy text, one whole pass for each token."""
        tokens = prompt
        with self.edited(edit):
            while len(tokens) < len(prompt) + count and (
                len(tokens) == len(prompt) or tokens[-1] != end
            ):
                tokens = torch.cat([tokens, self.logits(tokens)[-1:].argmax(-1)])
        return tokens.tolist()


def _tensor(output: Any) -> Any:
    value = output[0] if isinstance(output, tuple) and output else output
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _summands(
    outputs: list[tuple[nn.Module, Tensor]], added: Tensor, precision: float
) -> list[tuple[nn.Module, float]]:
    for count in (1, 2):
        for chosen in combinations(outputs, count):
            values = torch.stack([value for _, value in chosen], dim=1)
            factors = torch.linalg.lstsq(values.T @ values, values.T @ added[:, None]).solution[
                :, 0
            ]
            if (
                values @ factors - added
            ).norm() <= precision * added.norm() and factors.abs().min() > 0:
                return [(m, f.item()) for (m, _), f in zip(chosen, factors, strict=True)]
    return []
