"""Gradient vectors of many tokens, and the eigenvectors of their second moment: a basis that competes with the Hessian's."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.attribution.curvature import Function, backward
from mechsvd.attribution.objective import Objective, Over, Part, objective_over, require_parts
from mechsvd.checks import with_options
from mechsvd.engine.batches import run_batches
from mechsvd.engine.session import RunOptions, open_session
from mechsvd.fields import require_between, require_declared, require_falling, require_finite
from mechsvd.linalg.decomposition import decompose_groups
from mechsvd.linalg.subspace import require_orthonormal, rounding
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import Provenance, Result, require_kind, result


@result
class Gradients(Result):
    """The gradient of every continuation token's log-probability with respect to w.

    Attributes:
        values: one row a scored token.
        task_index: which task each row belongs to.
        tokens: the token that each row scores.
        over: what w is, in a line.
        parts: what the entries of w are, in their order.
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
        """One row a gradient: task, token, norm."""
        import pandas as pd

        norms = self.values.double().norm(dim=1)
        return pd.DataFrame(
            {"task": self.task_index.numpy(), "token": self.tokens.numpy(), "norm": norms.numpy()}
        )

    def __repr__(self) -> str:
        return (
            f"Gradients of the log-probabilities of {len(self)} tokens in {int(self.task_index.max()) + 1} task(s)\n"
            f"  with respect to {self.values.shape[1]:,} entries: {self.over[:80]}\n"
            f"  on {self._origin()}"
        )


@with_options(RunOptions)
def collect_gradients(
    model: Model,
    tasks: Task | Sequence[Task],
    over: Over,
    **options: Unpack[RunOptions],
) -> Gradients:
    """Collect the gradient of every continuation token's log-probability, with one backward graph a task.

    Args:
        over: what w is; see `hessian_attribution`. Of sites, tasks of several lengths need `positions`, so that all have the
            same w.
        options: see `RunOptions` (layers, components, positions, check, …). With a decomposition of another checkpoint of the
            same model, pass `check=False`.

    Raises:
        TypeError, KeyError, ValueError: as `hessian_attribution`; tasks with a w of different shapes.
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
                    f"The tasks' w differ in shape: {parts[0][0]} and {f.parts[0]}; pass `positions` that all tasks have."
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
    """The eigenvectors of the gradients' second moment, by falling eigenvalue: a basis of w.

    Attributes:
        singular_values: of all gradients together; see `eigenvalues`.
        directions: the eigenvectors as columns.
        left: what each gradient holds of them; its columns are orthonormal.
        over, parts: what w is, as in `Gradients`.
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
        """Of the second moment, the empirical Fisher information: the squared singular values over the number of gradients."""
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
            f"GradientBasis of {self.rank} directions from {len(self.left)} gradients, eigenvalues {top}, …\n"
            f"  of {len(self.directions):,} entries: {self.over[:80]}\n"
            f"  on {self._origin()}"
        )


def gradient_basis(gradients: Gradients | Sequence[Gradients]) -> GradientBasis:
    """The eigenvectors of the gradients' second moment, the empirical Fisher information, by falling eigenvalue.

    Args:
        gradients: of one model, or one for each of several training checkpoints.

    Returns:
        `.directions` are the eigenvectors, as one of the `bases` of `hessian_attribution`; `.eigenvalues` fall.

    Raises:
        TypeError: something else.
        ValueError: gradients with respect to different w, or none.
    """
    several = (
        [gradients]
        if isinstance(gradients, Gradients) or not isinstance(gradients, Sequence)
        else list(gradients)
    )
    if not several:
        raise ValueError(
            "There are no gradients: the list is empty; give those of at least one model."
        )
    for each in several:
        require_kind(each, Gradients)
        if (each.over, each.parts) != (several[0].over, several[0].parts):
            raise ValueError(
                f"The gradients are with respect to different w: {several[0].over[:60]}, and {each.over[:60]}; collect them "
                "with the same `over`, sites and positions."
            )
    if not any(each.values.any() for each in several):
        raise ValueError(
            f"The gradients are all zero, so they have no directions: nothing depends on {several[0].over[:60]}."
        )
    svd = decompose_groups(torch.cat([each.values for each in several])[None, None])[0]
    first = several[0]
    return GradientBasis(
        svd.singular_values, svd.directions, svd.left[0], first.over, first.parts, first.source
    )


def _jacobian(f: Objective, function: Function) -> Float[Tensor, "scored entry"]:
    w = f.point.clone().requires_grad_()
    log_probs = f.log_probs(w[None])[0]
    if not log_probs.requires_grad:
        return w.new_zeros(len(log_probs), len(w))
    each = torch.eye(len(log_probs), dtype=log_probs.dtype, device=log_probs.device)
    order, size = torch.arange(len(each)), function.backward_size
    return torch.cat(
        run_batches(
            lambda some: backward(log_probs, w, each[some]), order, size, function.halve, False
        )
    )
