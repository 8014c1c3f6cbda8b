"""A write as a sum over heads or neurons, whose output weight is found by its name and then measured.

`output_weights` finds the Hugging Face modules behind writes, of which a folded checkpoint is made.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.model.evaluation import evaluation, without_hook_points
from mechsvd.model.probing import probe_tokens
from mechsvd.model.runs import run_model
from mechsvd.model.sites import Hook, Model, Site
from mechsvd.model.weights import written_vectors

# of a component: the hook point of what goes into its output weight, the names of that weight in a
# bridge and in a HookedTransformer, and what its parts are called
_PARTS = {
    "attn": ("attn.hook_z", ("attn.o.weight", "attn.W_O"), "head"),
    "mlp": ("mlp.hook_post", ("mlp.out.weight", "mlp.W_out"), "neuron"),
}


@dataclass(frozen=True)
class Split:
    """A write as a sum: inputs times what each writes, by head or neuron, and a constant.

    Attributes:
        site: the write.
        point: the hook point of the inputs, "pos column" or "pos head d_head".
        kind: "head" or "neuron".
        width: inputs of each part: d_head, or 1.
        vectors: what each input writes per unit.
        constant: the rest, such as biases; the same at every position.
    """

    site: Site
    point: Site
    kind: str
    width: int
    vectors: Float[Tensor, "column d_model"]
    constant: Float[Tensor, " d_model"]

    @property
    def n_parts(self) -> int:
        """Number of heads or neurons."""
        return len(self.vectors) // self.width

    def by_part(self, columns: Float[Tensor, " column *item"]) -> Float[Tensor, " part *item"]:
        """Sum what belongs to single inputs over those of each head; neurons have one each."""
        return columns.unflatten(0, (self.n_parts, self.width)).sum(dim=1)


@torch.no_grad()
def splits_of(model: Model, sites: Sequence[Site]) -> dict[str, Split]:
    """Find how the writes of some sites are made, and measure on a few tokens that they are.

    Returns:
        By the site's name. A site is left out if its output weight or inputs cannot be reached, or
        if the write is not their product and a constant, as with a norm after the output weight.
    """
    found = [split for site in sites if (split := _named(model, site)) is not None]
    with without_hook_points(model), evaluation(model, quiet=True):
        try:
            values = _values(model, found)
        except RuntimeError:  # of some, the hook does not fire once
            values = {}
            for split in found:
                with suppress(RuntimeError):
                    values |= _values(model, [split])
    measured = (_measured(split, values) for split in found if split.site.name in values)
    return {split.site.name: split for split in measured if split is not None}


def _values(model: Model, splits: Sequence[Split]) -> dict[str, Tensor]:
    """The writes and the inputs of some splits in a short run, "pos column"."""
    stored: dict[str, Tensor] = {}
    tokens = probe_tokens(model)

    def store(site: Site) -> Hook:
        def keep(x: Tensor, hook: Any = None) -> None:
            stored[site.name] = x.detach().reshape(tokens.shape[1], -1)

        return site.hook_name, keep

    points = [point for split in splits for point in (split.site, split.point)]
    run_model(model, tokens, [store(point) for point in points], scored=slice(0, 1))
    return stored


def _measured(split: Split, values: dict[str, Tensor]) -> Split | None:
    """The split with its constant; None if what is left is not the same at every position."""
    inputs, write = values[split.point.name], values[split.site.name]
    wide = torch.promote_types(write.dtype, torch.float32)
    if inputs.shape[1] != len(split.vectors):
        return None
    product = inputs.to(write.device, wide) @ split.vectors.to(write.device, wide)
    rest = write.to(wide) - product
    constant = rest.mean(dim=0)
    tolerance = 1e-5 + 4 * torch.finfo(write.dtype).eps
    size = write.abs().max() + product.abs().max()
    is_constant = float((rest - constant).abs().max() / size) <= tolerance
    return replace(split, constant=constant) if is_constant else None


def _named(model: Model, site: Site) -> Split | None:
    """The weight and the inputs of a site by their names; None if they are not there."""
    if not site.is_write:
        return None
    point, weights, kind = _PARTS[site.component]
    name = f"blocks.{site.layer}.{point}"
    if name not in model.hook_dict:
        return None
    for weight in weights:
        try:
            ((_, vectors),) = written_vectors(model, f"blocks.{site.layer}.{weight}").items()
        except (KeyError, ValueError):
            continue
        heads = int(getattr(model.cfg, "n_heads", 0) or 0)
        width = len(vectors) // heads if kind == "head" and heads else 1
        if kind == "head" and (not heads or len(vectors) % heads):
            return None
        constant = vectors.new_zeros(vectors.shape[1])
        return Split(site, Site(site.layer, point, name), kind, width, vectors, constant)
    return None
