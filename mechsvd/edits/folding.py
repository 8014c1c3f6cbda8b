"""Folding: an edit of what a linear map writes, as new weights of the map."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechsvd.edits.gates import Gate
from mechsvd.edits.hooks import SitePoint
from mechsvd.edits.maps import Chain, Edit
from mechsvd.edits.stacks import SiteGates
from mechsvd.linalg.subspace import widest
from mechsvd.model.sites import Site


def require_foldable(edit: Any) -> None:
    """Refuse an edit that is not one affine map for each site.

    Raises:
        TypeError: a function, or anything else that is not made of gates.
        ValueError: a stack; a gate about points that differ between positions or texts.
    """
    if isinstance(edit, Chain):
        for part in edit.edits:
            require_foldable(part)
        return
    if not isinstance(edit, Gate | SiteGates):
        name = getattr(edit, "__name__", type(edit).__name__)
        raise TypeError(
            f"Only gates and chains of them can be folded into weights, but this is {name}; "
            "build the edit by `keep`, `ablate`, `gate` or `shrink`, or run it by hooks."
        )
    if edit.is_stack:
        raise ValueError(
            f"This is a stack of {len(edit)} edits, but weights hold one: fold `stack[i]`."
        )
    for gate in [edit] if isinstance(edit, Gate) else edit.gates:
        baseline = gate.baseline
        if baseline is not None and (baseline.by_position or baseline.texts):
            raise ValueError(
                f"The {baseline.kind} differs between positions or texts, but a bias does not; "
                "give a baseline by site, `mean_baseline(writes)`."
            )


def fold_map(
    edit: Edit,
    site: Site,
    columns: Float[Tensor, "column d_model"],
    bias: Float[Tensor, " d_model"] | None,
) -> tuple[Float[Tensor, "column d_model"], Float[Tensor, " d_model"] | None]:
    """The weights of a map y ↦ Σ yᵢ columnᵢ + bias followed by an affine edit.

    The edit x ↦ Ax + b maps each column by A, and the bias by the whole edit. It is the edit itself
    that does so, in the widest dtype of the device.

    Returns:
        The new columns and the new bias, in that dtype; None where there is none.

    Raises:
        ValueError: the edit adds a point, but the map has no bias that could hold it.
    """
    point, wide = SitePoint(site, None), widest(columns.device)
    new = _linear(edit)(columns.to(wide), hook=point)
    given = columns.new_zeros(columns.shape[1]) if bias is None else bias
    offset = edit(given.to(wide)[None], hook=point)[0]
    if bias is not None:
        return new, offset
    if offset.any():
        raise ValueError(
            f"The edit's baseline adds a point at {site.place}, but the map that writes there has "
            "no bias to hold it, as in Llama; fold an edit without a baseline (zero ablation)."
        )
    return new, None


def _linear(edit: Any) -> Edit:
    """The linear part of an edit made of gates: the same gates about 0."""
    if isinstance(edit, Chain):
        return Chain(tuple(_linear(part) for part in edit.edits))
    if isinstance(edit, SiteGates):
        return replace(edit, gates=tuple(replace(gate, baseline=None) for gate in edit.gates))
    return replace(edit, baseline=None)  # type: ignore[no-any-return]
