"""What is left of a task under each edit of a stack, compared with the clean run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsvd.engine.metrics import (
    READY,
    log_prob,
)
from mechsvd.fields import ROUNDED, require_between, require_declared, require_length
from mechsvd.model.sites import Site
from mechsvd.model.tasks import APART
from mechsvd.results import OverTexts, Provenance, Result, result

_BY_EDIT = ("log_probs", "is_greedy", "orig_deltas", "kept_deltas")


@result
class Measurement(Result):
    """What is left of a task under each edit of a stack.

    Attributes:
        log_probs: natural-log probability of each continuation token, in nats.
        is_greedy: whether each continuation token is the most probable one; if all are, greedy
            text would be the same. Where there is no probability, none is.
        orig_deltas, kept_deltas: root-mean-square L2 norm over positions of the attempted write
            and of the kept write (what the edit let through), at each site, in the units of the
            residual stream.
        clean: the same for the model without an edit; None in the clean measurement itself.
        noise_floor: how much the clean metric changes by rounding noise, in its unit; None if not
            measured. It says what is reproducible, not what is significant.
        kl_divergences: of clean ‖ edited at each scored position, in nats; None in files of
            older versions.
        scores: the metric of each edit; None where it is a column that is there anyway.
        metric, unit: the metric's name and its unit.
        better: whether "more" or "less" of the metric is better.
        profiles: further numbers of each edit, where the metric has a `profile`.

    Example:
        >>> measured.to_pandas().columns.tolist()[:5]
        ['log_prob', 'probability', 'surprise', 'orig_delta', 'kept_delta']
    """

    log_probs: Float[Tensor, "edit scored"]
    is_greedy: Bool[Tensor, "edit scored"]
    orig_deltas: Float[Tensor, "edit site"]
    kept_deltas: Float[Tensor, "edit site"]
    sites: tuple[Site, ...]
    clean: "Measurement | None" = None
    source: Provenance | None = None
    noise_floor: float | None = None
    kl_divergences: Float[Tensor, "edit scored"] | None = None
    scores: Float[Tensor, " edit"] | None = None
    metric: str = log_prob.name
    unit: str = log_prob.unit
    better: str = log_prob.better
    profiles: Float[Tensor, "edit item"] | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sites", self.orig_deltas.shape[1], "site of `orig_deltas`")
        if self.clean is not None and self.clean.log_probs.shape != (1, self.log_probs.shape[1]):
            raise ValueError(
                f"`clean` must have one edit and the {self.log_probs.shape[1]} scored tokens "
                f"of the others, but its `log_probs` have shape {list(self.clean.log_probs.shape)}."
            )

    def _require_values(self) -> None:
        if self.better not in ("more", "less"):
            raise ValueError(f"`better` is {self.better!r:.40}, but must be 'more' or 'less'.")
        if self.scores is None and self.metric not in READY:
            raise ValueError(f"`scores` are missing for the metric {self.metric!r:.40}.")
        # NaN where an edit made the model overflow
        require_between(self, ["log_probs"], -float("inf"), 0)
        require_between(self, ["orig_deltas", "kept_deltas", "noise_floor"], 0)
        require_between(self, ["kl_divergences"], ROUNDED)

    def __getitem__(self, edits: slice | Tensor) -> "Measurement":
        """Some of the edits, in the order of `edits`, with the same clean run."""
        columns: dict[str, Any] = {name: getattr(self, name)[edits] for name in self._columns}
        return replace(self, **columns)

    @property
    def _columns(self) -> tuple[str, ...]:
        optional = ("kl_divergences", "scores", "profiles")
        return (*_BY_EDIT, *(name for name in optional if getattr(self, name) is not None))

    def __len__(self) -> int:
        """Number of edits."""
        return len(self.log_probs)

    @property
    def clean_run(self) -> "Measurement":
        """The clean run that the edits are compared with.

        Raises:
            ValueError: the measurement has none.
        """
        if self.clean is None:
            raise ValueError(
                "This measurement holds no clean run, so there is nothing to compare with; "
                "make it by `measure`."
            )
        return self.clean

    @property
    def log_prob(self) -> Float[Tensor, " edit"]:
        """Natural-log probability of the whole continuation, in nats."""
        # a float32 sum rounds by more than most effects
        return self.log_probs.sum(dim=-1, dtype=torch.float64)

    @property
    def kl_divergence(self) -> Float[Tensor, " edit"]:
        """Mean over the scored positions of the KL divergence of clean ‖ edited, in nats per token.

        NaN where the measurement does not know it, as in files of older versions.
        """
        if self.kl_divergences is None:
            return torch.full((len(self),), torch.nan, dtype=torch.float64)
        return self.kl_divergences.mean(dim=-1, dtype=torch.float64)

    @property
    def absolute_change(self) -> Float[Tensor, " edit"]:
        """Sum over tokens of the size of the change of their log-probability, in nats.

        Unlike the change of `log_prob`, it does not cancel between tokens.
        """
        clean = self if self.clean is None else self.clean
        return (self.log_probs - clean.log_probs).abs().sum(dim=-1, dtype=torch.float64)

    @property
    def cross_entropy(self) -> Float[Tensor, " edit"]:
        """Mean surprise of the continuation's tokens, in nats per token."""
        return -self.log_prob / self.log_probs.shape[1]

    @property
    def greedy_share(self) -> Float[Tensor, " edit"]:
        """Share of the continuation's tokens that are the most probable ones; NaN if one is NaN."""
        share = self.is_greedy.double().mean(dim=-1)
        return share.masked_fill(self.log_probs.isnan().any(dim=-1), torch.nan)

    @property
    def value(self) -> Float[Tensor, " edit"]:
        """The metric of each edit, in its unit; the log-probability by default."""
        if self.scores is not None:
            return self.scores.double()
        values: Tensor = getattr(self, READY[self.metric].column or "")
        return values

    @property
    def effect(self) -> Float[Tensor, " edit"]:
        """How much each edit costs in the metric, in its unit; damage is positive.

        It is clean − edited where more of the metric is better, and edited − clean where less is.
        A divergence is 0 in the clean run, so its effect is its value.
        """
        sign = 1 if self.better == "more" else -1
        return sign * (self.clean_run.value - self.value)

    @property
    def orig_delta(self) -> Float[Tensor, " edit"]:
        """Root-mean-square norm of an attempted write over sites and positions."""
        return self.orig_deltas.square().mean(dim=-1).sqrt()

    @property
    def kept_delta(self) -> Float[Tensor, " edit"]:
        """Root-mean-square norm of a kept write over sites and positions."""
        return self.kept_deltas.square().mean(dim=-1).sqrt()

    def to_pandas(self) -> Any:
        """One row per edit: log_prob, probability, surprise, orig_delta, kept_delta, …

        The last columns are `kl_divergence` (nats per token), `absolute_change` (nats), and the
        metric under its own name if it is another one.
        """
        import pandas as pd

        columns = {
            "log_prob": self.log_prob,
            "probability": self.log_prob.exp(),
            "surprise": -self.log_prob,
            "orig_delta": self.orig_delta,
            "kept_delta": self.kept_delta,
            "kl_divergence": self.kl_divergence,
            "absolute_change": self.absolute_change,
            self.metric: self.value,
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def tokens_to_pandas(self) -> Any:
        """One row per edit and scored token.

        Columns: edit, position, token, log_prob, clean_log_prob, is_greedy, kl_divergence. The
        position is that of the token in the text, one after its prediction; token is NaN where it
        is not known: without a source, or for targets apart from the tokens.
        """
        import pandas as pd

        edits, scored = self.log_probs.shape
        tokens = self.source.tokens[0] if self.source and self.source.tokens else ()
        is_apart = self.source is not None and APART in self.source.notes
        end = len(tokens) + is_apart if tokens else scored
        places = range(end - scored, end)
        names = [tokens[p] if tokens and not is_apart else torch.nan for p in places]
        clean = (self if self.clean is None else self.clean).log_probs.expand(edits, -1)
        unknown = torch.full_like(self.log_probs, torch.nan)
        divergences = unknown if self.kl_divergences is None else self.kl_divergences
        return pd.DataFrame(
            {
                "edit": [i for i in range(edits) for _ in range(scored)],
                "position": [*places] * edits,
                "token": names * edits,
                "log_prob": self.log_probs.flatten().numpy(),
                "clean_log_prob": clean.flatten().numpy(),
                "is_greedy": self.is_greedy.flatten().numpy(),
                "kl_divergence": divergences.flatten().numpy(),
            }
        )

    def sites_to_pandas(self) -> Any:
        """One row per edit and site: layer, component, orig_delta, kept_delta."""
        import pandas as pd

        edits = len(self)
        return pd.DataFrame(
            {
                "edit": [i for i in range(edits) for _ in self.sites],
                "layer": [s.layer for s in self.sites] * edits,
                "component": [s.component for s in self.sites] * edits,
                "orig_delta": self.orig_deltas.flatten().numpy(),
                "kept_delta": self.kept_deltas.flatten().numpy(),
            }
        )

    def __repr__(self) -> str:
        low, high = float(self.value.min()), float(self.value.max())
        clean = f"{float(self.clean.value):.4f} {self.unit} clean, " if self.clean else ""
        what = "log-probability" if self.metric == log_prob.name else f"`{self.metric}`"
        return (
            f"Measurement of {len(self)} edits at {len(self.sites)} sites\n"
            f"  {what} of {self.log_probs.shape[1]} tokens: "
            f"{clean}{low:.4f} to {high:.4f} edited\n"
            f"  on {self._origin()}"
        )


def concatenate(parts: Sequence[Measurement]) -> Measurement:
    """Join measurements of one task at the same sites, in order; the first gives the clean run."""
    columns: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._columns
    }
    return replace(parts[0], **columns)


@result
class Measurements(OverTexts):
    """Measurements of several texts under the same edits.

    Attributes:
        parts: one per text, in the order given.

    Example:
        >>> of_texts = ms.measure(model, tasks[:2], [ms.keep(mine), ms.ablate(mine)])
        >>> of_texts.effect.shape, of_texts[0].log_probs.shape
        (torch.Size([2, 2]), torch.Size([2, 3]))
    """

    parts: tuple[Measurement, ...]

    @property
    def value(self) -> Float[Tensor, "task edit"]:
        """The metric of each text and edit, in its unit."""
        return torch.stack([part.value for part in self.parts])

    @property
    def effect(self) -> Float[Tensor, "task edit"]:
        """What each edit costs each text in the metric; see `Measurement.effect`."""
        return torch.stack([part.effect for part in self.parts])
