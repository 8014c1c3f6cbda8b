"""Baselines: the points about which a gate acts, by site and position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.fields import require_declared, require_finite, require_length
from mechsvd.model.sites import Site
from mechsvd.model.tasks import Task
from mechsvd.results import Provenance, Result, require_same_model, result


@result
class Baseline(Result):
    """A point for each site, about which a gate acts: what an ablated part is replaced by.

    Attributes:
        values: one per text, site and position, in the units of the residual stream. An axis of
            size 1 means that all texts, or all positions, share it.
        sites: the second axis.
        texts: token ids of the texts that the first axis belongs to; empty if all share it.
        kind: what the baseline is, in words.
        source: the model and texts that it was made from.

    Example:
        >>> baseline.values.shape, baseline.kind
        (torch.Size([1, 12, 1, 128]), 'mean of each site')
    """

    values: Float[Tensor, "text site pos d_model"]
    sites: tuple[Site, ...]
    kind: str
    texts: tuple[tuple[int, ...], ...] = ()
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.values.shape[1], "site of `values`")
        require_length(self, "texts", self.values.shape[0] if self.texts else 0, "text of `values`")
        if not self.texts and self.values.shape[0] != 1:
            raise ValueError(
                f"`values` has {self.values.shape[0]} texts, but `texts` names none of them."
            )

    def _require_values(self) -> None:
        require_finite(self, "values")

    @property
    def d_model(self) -> int:
        """Length of each point."""
        return self.values.shape[-1]

    @property
    def by_position(self) -> bool:
        """Whether each position has a point of its own."""
        return self.values.shape[2] > 1

    def at(self, hook: Any, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "point d_model"]:
        """The points for the vectors `x` at a hook point.

        Raises:
            KeyError: the baseline has no such site.
            ValueError: the text is longer than the baseline, or which text it is is not known.
        """
        if self.texts:
            raise ValueError(
                f"The {self.kind} has one point per text: choose by `baseline.for_task(task)`."
            )
        points = self.values[0, self._site(hook)].to(x)
        if not self.by_position:
            return points
        start = getattr(hook, "start", 0)
        self._require_length(start + x.shape[-2])
        return points[start : start + x.shape[-2]]

    def rows(self, rows: Any) -> "Baseline":
        """The baseline of some edits of a stack; all share it."""
        return self

    def for_task(self, task: Task) -> "Baseline":
        """The baseline of one text.

        Raises:
            ValueError: it has none for the text, or fewer positions than the text.
        """
        chosen = self
        if self.texts:
            tokens = tuple(task.tokens.tolist())
            if tokens not in self.texts:
                raise ValueError(
                    f"The {self.kind} has points for {len(self.texts)} texts, but not for this "
                    "one; collect the writes of all texts that you measure."
                )
            index = self.texts.index(tokens)
            points = self.values[index : index + 1, :, : len(tokens)]
            chosen = replace(self, values=points, texts=())
        chosen._require_length(len(task.tokens))
        return chosen

    def note(self, task: Task) -> str:
        """What the provenance of a measurement with it says."""
        own = self.source is not None and tuple(task.tokens.tolist()) in self.source.tokens
        itself = own and self.kind.startswith(("mean", "optimal"))
        return f"baseline: {self.kind}" + (", of the measured text itself" if itself else "")

    def require_sites(self, sites: Sequence[Site]) -> None:
        """Refuse sites that the baseline lacks.

        Raises:
            KeyError: naming one.
        """
        names = {site.name for site in self.sites}
        if lacking := [site for site in sites if site.name not in names]:
            raise KeyError(
                f"The {self.kind} has no point for {lacking[0].place} ({lacking[0].hook_name}): it "
                f"has those of {len(names)} sites, such as {self.sites[0].hook_name}; make it at "
                "all sites that you edit."
            )

    def to_pandas(self) -> Any:
        """One row per site, with the norm of its mean point and its share of the mean square."""
        import pandas as pd

        points = self.values.double()
        mean = points.mean(dim=(0, 2))
        return pd.DataFrame(
            {
                "layer": [site.layer for site in self.sites],
                "component": [site.component for site in self.sites],
                "norm": mean.norm(dim=-1).cpu().numpy(),
                "rms_norm": points.square().sum(-1).mean(dim=(0, 2)).sqrt().cpu().numpy(),
            }
        )

    def __repr__(self) -> str:
        texts, sites, positions, d_model = self.values.shape
        texts = len(self.source.tokens) if self.source and self.source.tokens else texts
        where = f"{positions} positions" if self.by_position else "all positions alike"
        return (
            f"Baseline: the {self.kind}\n"
            f"  {sites} sites, {where}, {texts} text(s), {d_model} dimensions\n"
            f"  from {self._origin('bare tensors')}"
        )

    def _site(self, hook: Any) -> int:
        if hook is None and len(self.sites) == 1:
            return 0
        name = getattr(hook, "name", None)
        for index, site in enumerate(self.sites):
            if site.name == name:
                return index
        raise KeyError(
            f"The {self.kind} has no point for {name or 'an unnamed site'}; bind the edit by "
            "`mechsvd.fwd_hooks`, or call it with a hook point of the baseline's sites."
        )

    def _require_length(self, length: int) -> None:
        if self.by_position and length > self.values.shape[2]:
            raise ValueError(
                f"The {self.kind} has {self.values.shape[2]} positions, but the text has {length}; "
                "give a text of at least that length, or a baseline by site."
            )


@dataclass(frozen=True, eq=False)
class Shifted:
    """A baseline with another offset for each edit of a stack.

    Attributes:
        directions: of the offset of each edit.
        sizes: of the offset of each edit at each site of the baseline.
    """

    baseline: Baseline
    directions: Float[Tensor, "edit d_model"]
    sizes: Float[Tensor, "edit site"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.baseline, name)

    def at(self, hook: Any, x: Tensor) -> Float[Tensor, "edit point d_model"]:
        """The points for the vectors `x` at a hook point, one set per edit."""
        sizes = self.sizes[:, self.baseline._site(hook), None]
        return self.baseline.at(hook, x) + (sizes * self.directions)[:, None].to(x)

    def rows(self, rows: Any) -> "Shifted":
        """The baselines of some edits."""
        return Shifted(self.baseline, self.directions[rows], self.sizes[rows])

    def to(self, device: torch.device) -> "Shifted":
        """The baseline on another device."""
        baseline = self.baseline.to(device)
        return Shifted(baseline, self.directions.to(device), self.sizes.to(device))

    def for_task(self, task: Task) -> "Shifted":
        """The baseline of one text."""
        return replace(self, baseline=self.baseline.for_task(task))


def require_baseline(
    baseline: Any, d_model: int, source: Provenance | None, what: str = "The basis"
) -> None:
    """Refuse anything but a baseline of the basis's dimension and model.

    Raises:
        TypeError, ValueError: saying what it is.
    """
    if baseline is None or isinstance(baseline, Shifted):
        return
    if not isinstance(baseline, Baseline):
        raise TypeError(
            f"`baseline` must be a Baseline, but is {type(baseline).__name__}; make one by "
            "`mechsvd.mean_baseline`, `resample_baseline`, `donor_baseline` or `optimal_baseline`."
        )
    if baseline.d_model != d_model:
        raise ValueError(
            f"The baseline has points of {baseline.d_model} entries, "
            f"but the directions have {d_model}."
        )
    require_same_model(source, baseline.source, f"{what} and the baseline")
