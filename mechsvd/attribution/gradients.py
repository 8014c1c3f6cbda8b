"""Gradients of many tokens, and the eigenvectors of their second moment as a basis of w."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.ambient import plain
from mechsvd.attribution.curvature import Function, backward
from mechsvd.attribution.objective import Objective, Over, Part, objective_over, require_parts
from mechsvd.engine.batches import independent, run_batches
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.fields import require_between, require_declared, require_falling, require_finite
from mechsvd.linalg.decomposition import decompose_groups
from mechsvd.linalg.subspace import require_orthonormal, rounding
from mechsvd.model.finite import overflow_advice
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, require_kind, result


@result
class Gradients(Result):
    """Gradient of every continuation token's log-probability with respect to w.

    Attributes:
        values: one row per scored token.
        task_index: index of each row's task.
        tokens: the token that each row scores.
        over: one line that says what w is.
        parts: name and shape of each piece of w, in order.

    Example:
        >>> gradients.to_pandas().columns.tolist()
        ['task', 'token', 'norm']
    """

    values: Float[Tensor, "sample entry"]
    task_index: Int[Tensor, " sample"]
    tokens: Int[Tensor, " sample"]
    over: str
    parts: tuple[Part, ...]
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_parts(self.parts, self.values.shape[1])

    def _require_values(self) -> None:
        require_finite(self, "values")
        require_between(self, ["task_index", "tokens"], 0)

    def __len__(self) -> int:
        """Number of gradient vectors."""
        return len(self.values)

    def to_pandas(self) -> Any:
        """One row per gradient: task, token, norm."""
        import pandas as pd

        norms = self.values.double().norm(dim=1)
        return pd.DataFrame(
            {"task": self.task_index.numpy(), "token": self.tokens.numpy(), "norm": norms.numpy()}
        )

    def __repr__(self) -> str:
        return (
            f"Gradients of the log-probabilities of {len(self)} tokens "
            f"in {int(self.task_index.max()) + 1} task(s)\n"
            f"  with respect to {self.values.shape[1]:,} entries: {self.over[:80]}\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def collect_gradients(
    model: Model,
    tasks: Task | Sequence[Task],
    over: Over,
    **options: Unpack[RunOptions],
) -> Gradients:
    """Collect the gradient of every continuation token's log-probability.

    Each task needs one backward graph.

    Args:
        over: what w is; see `hessian_attribution`. With sites, tasks of different lengths need
            `positions`, so that all have the same w.
        options: see `RunOptions` (layers, components, positions, check, …). With a decomposition
            of another checkpoint of the same model, pass `check=False`.

    Raises:
        TypeError, KeyError, ValueError: as `hessian_attribution`, or the shapes of w differ
            between tasks.

    Example:
        >>> gradients = ms.collect_gradients(model, task, svd)
        >>> gradients.values.shape
        torch.Size([12, 128])
    """
    chosen = as_tasks(tasks)
    parts: list[tuple[Part, ...]] = []
    rows = []
    with open_session(model, chosen, gradients=True, **options) as session:
        for task in chosen:
            f = objective_over(session, task, over)
            parts.append(f.parts)
            if f.parts != parts[0]:
                raise ValueError(
                    f"The tasks' w differ in shape: {parts[0][0]} and {f.parts[0]}; "
                    "pass `positions` that all tasks have."
                )
            function = Function(
                f.log_prob,
                f.point,
                session.rows_per_pass(task),
                session.halve(task),
                session.progress or False,
            )
            rows.append(_jacobian(f, function))
        source = session.provenance()
    index = torch.cat([torch.full_like(task.continuation, i) for i, task in enumerate(chosen)])
    scored = torch.cat([task.continuation for task in chosen])
    return Gradients(torch.cat(rows).cpu(), index, scored, f.over, parts[0], source)


@result
class GradientBasis(Result):
    """Eigenvectors of the gradients' second moment, by falling eigenvalue.

    Attributes:
        singular_values: of the matrix of all gradients; see `eigenvalues`.
        directions: the eigenvectors as columns.
        left: left singular vectors, with orthonormal columns; one row per gradient.
        over, parts: what w is, as in `Gradients`.

    Example:
        >>> basis.to_pandas().columns.tolist()
        ['direction', 'singular_value', 'eigenvalue']
    """

    singular_values: Float[Tensor, " rank"]
    directions: Float[Tensor, "entry rank"]
    left: Float[Tensor, "sample rank"]
    over: str
    parts: tuple[Part, ...]
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_parts(self.parts, len(self.directions))

    def _require_values(self) -> None:
        require_finite(self, "singular_values", "directions", "left")
        require_between(self, ["singular_values"], 0)
        require_falling(self, "singular_values")
        require_orthonormal(self.directions, rounding(self.directions.dtype), "`directions`")

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.singular_values)

    @property
    def eigenvalues(self) -> Float[Tensor, " rank"]:
        """Eigenvalues of the second moment, which is the empirical Fisher information.

        They are the squared singular values divided by the number of gradients.
        """
        return self.singular_values.square() / len(self.left)

    def to_pandas(self) -> Any:
        """One row per direction: singular_value, eigenvalue."""
        import pandas as pd

        columns = {"singular_value": self.singular_values, "eigenvalue": self.eigenvalues}
        return (
            pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
            .rename_axis("direction")
            .reset_index()
        )

    def __repr__(self) -> str:
        top = ", ".join(f"{value:.3g}" for value in self.eigenvalues[:4].tolist())
        return (
            f"GradientBasis of {self.rank} directions from {len(self.left)} gradients, "
            f"eigenvalues {top}, …\n"
            f"  of {len(self.directions):,} entries: {self.over[:80]}\n"
            f"  on {self._origin()}"
        )


@plain
def gradient_basis(gradients: Gradients | Sequence[Gradients]) -> GradientBasis:
    """Compute the eigenvectors of the gradients' second moment.

    The second moment is the empirical Fisher information.

    Args:
        gradients: of one model, or a list with those of several training checkpoints.

    Returns:
        `.directions` are the eigenvectors, by falling `.eigenvalues`. The result can be one of
        the `bases` of `hessian_attribution`.

    Raises:
        TypeError: `gradients` are no `Gradients`.
        ValueError: the list is empty, all gradients are zero, or they differ in w.

    Example:
        >>> basis = ms.gradient_basis(gradients)
        >>> basis.rank
        12
    """
    collected = (
        [gradients]
        if isinstance(gradients, Gradients) or not isinstance(gradients, Sequence)
        else list(gradients)
    )
    if not collected:
        raise ValueError(
            "There are no gradients: the list is empty; give those of at least one model."
        )
    first = collected[0]
    for other in collected:
        require_kind(other, Gradients)
        if (other.over, other.parts) != (first.over, first.parts):
            raise ValueError(
                f"The gradients are with respect to different w: {first.over[:60]}, and "
                f"{other.over[:60]}; collect them with the same `over`, sites and positions."
            )
    if not any(part.values.any() for part in collected):
        raise ValueError(
            "The gradients are all zero, so they have no directions: nothing depends on "
            f"{first.over[:60]}."
        )
    svd = decompose_groups(torch.cat([part.values for part in collected])[None, None])[0]
    return GradientBasis(
        svd.singular_values, svd.directions, svd.left[0], first.over, first.parts, first.source
    )


def _jacobian(f: Objective, function: Function) -> Float[Tensor, "scored entry"]:
    f.clean_logits()  # refused where they are not finite
    w = f.point.clone().requires_grad_()
    log_probs = f.log_probs(w[None])[0]
    if not log_probs.requires_grad:
        return w.new_zeros(len(log_probs), len(w))
    identity = torch.eye(len(log_probs), dtype=log_probs.dtype, device=log_probs.device)
    order, size = torch.arange(len(identity)), function.backward_size
    slopes = torch.cat(
        run_batches(
            lambda rows: backward(log_probs, w, identity[rows]),
            order,
            size,
            function.halve,
            False,
            restored=independent,
        )
    )
    if not slopes.isfinite().all():
        raise ValueError(
            "The gradients hold NaN or inf, though the logits do not."
            f"{overflow_advice(next(f.model.parameters()).dtype)}"
        )
    return slopes
