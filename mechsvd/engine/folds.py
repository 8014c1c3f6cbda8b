"""Edits folded into the weights: which weights, and a model that has them for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import with_options
from mechsvd.edits.folding import fold_map, require_foldable
from mechsvd.edits.hooks import hooks_at
from mechsvd.edits.maps import Edit
from mechsvd.engine.session import Session, open_session
from mechsvd.model.exporting import with_weights
from mechsvd.model.output_weights import Writer, find_writers
from mechsvd.model.sites import Hook, Model, Site, SiteOptions


@dataclass(frozen=True)
class FoldedWeights:
    """An edit and the weights that do the same.

    Attributes:
        weights: new values of each writer's parameters, in the widest dtype of the device.
    """

    model: Model
    edit: Edit
    sites: tuple[Site, ...]
    writers: tuple[Writer, ...]
    weights: tuple[tuple[Tensor, ...], ...]

    @property
    def hooks(self) -> list[Hook]:
        """The edit as hooks."""
        return hooks_at(self.model, self.edit, self.sites, None)

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The new weights by their names in the Hugging Face checkpoint."""
        pairs = zip(self.writers, self.weights, strict=True)
        return {n: v for writer, own in pairs for n, v in zip(writer.names, own, strict=True)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the new weights in a block, in the dtype of its own."""
        pairs = zip(self.writers, self.weights, strict=True)
        with with_weights(
            {
                p: v.to(p)
                for writer, own in pairs
                for p, v in zip(writer.parameters, own, strict=True)
            }
        ):
            yield


def fold_weights(session: Session, edit: Any) -> FoldedWeights:
    """Compute the weights that do what an edit does at the sites of a session.

    Raises:
        TypeError, KeyError, ValueError: as `mechsvd.fold`.
    """
    where, places = session.where, session.other_hooks.places
    require_foldable(edit)
    for name in ("positions", "at", "heads"):
        if getattr(where, name) is not None:
            raise ValueError(
                f"`{name}` cannot be folded: weights act at all positions, on whole writes; "
                "run this edit by its hooks, `mechsvd.fwd_hooks`."
            )
    if places:
        raise ValueError(
            f"The model has hooks of yours at {', '.join(places)}, which weights cannot hold; "
            "remove them first."
        )
    session.stack([edit])  # refuses what does not fit the model
    writers = find_writers(session.model, session.sites)
    weights = tuple(
        writer.weights_from(*fold_map(edit, writer.site, writer.columns, writer.bias))
        for writer in writers
    )
    return FoldedWeights(session.model, edit, session.sites, writers, weights)


@with_options(SiteOptions)
@contextmanager
def folded(
    model: Model, edit: Edit, *, check: bool = True, **options: Unpack[SiteOptions]
) -> Iterator[Model]:
    """Give the model's own weights an edit for a block: `with ms.folded(model, edit): …`.

    In the block the model needs no hooks for the edit, and is another model: its fingerprint
    differs, so directions of the unedited one are refused there unless `check=False`. At the end
    the own weights are back, bit for bit, also after an exception.

    Args:
        edit: gates, and chains of them, alike at all positions; see `fold`.
        check: refuse a model whose hooks are not its writes, and a basis of another model.
        options: `layers`, `components` and `missing` of `SiteOptions`; all sites by default.

    Yields:
        The model.

    Raises:
        TypeError, KeyError, ValueError: as `fold`, before any weight is changed.

    Example:
        >>> hooks = ms.fwd_hooks(model, ms.keep(mine))
        >>> with ms.folded(model, ms.keep(mine)):
        ...     logits = model(task.tokens[None])
        >>> hooked = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)
        >>> torch.allclose(logits, hooked, atol=1e-3)
        True
    """
    with open_session(model, check=check, **options) as session:
        weights = fold_weights(session, edit)
    with weights.in_place():
        yield model
