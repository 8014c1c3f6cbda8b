"""An edited model that runs without mechsvd: the edit folded into a Hugging Face checkpoint."""

import ctypes
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import file_path
from mechsvd.edits.maps import Edit
from mechsvd.engine.checkpoint import locked
from mechsvd.engine.folds import FoldedWeights, fold_weights
from mechsvd.engine.metrics import divergences
from mechsvd.engine.processes import this_process
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, Session, open_session
from mechsvd.fields import (
    ROUNDED,
    require_between,
    require_declared,
    require_finite,
    require_length,
)
from mechsvd.model.exporting import (
    checkpoint_logits,
    in_single_precision,
    whole_logits,
    write_checkpoint,
)
from mechsvd.model.finite import require_finite_logits
from mechsvd.model.sites import Model, Site, require_model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.results import UNFINISHED, Provenance, Result, result

EARLIER = ".earlier"  # suffix of a checkpoint while the new one takes its place
REPORT = "fold.mechsvd"  # no .safetensors, which some servers would take for weights
TEXT = (
    "The old house stood at the end of the road. In the morning the light came through the windows,"
    " and the children went out to look for their friends. They talked about what they had seen."
)


@result
class FoldReport(Result):
    """How well an edited checkpoint does what the hooks do, measured on some texts.

    Attributes:
        sites: where the edit was folded: all that were asked for.
        weights: names of the changed weights in the checkpoint.
        difference: largest difference of a logit between hooks and folded weights per text, both
            in float32 (or wider, if the model is), over all positions and tokens.
        saved_difference: the same between hooks in float32 and the saved checkpoint, which
            transformers alone loads and runs in the dtype it is saved in.
        dtype_difference: the same between the unedited model in float32 and in that dtype: what the
            dtype alone does. 0 for float32.
        largest_logit: size of the largest logit under the hooks, for comparison.
        kl_divergence: mean over the scored positions of the KL divergence of hooks ‖ saved
            checkpoint, in nats per token.
        edit_divergence: the same of unedited model ‖ hooks: what the edit itself does.
        files: names of the files of the checkpoint.
        sha256: of each.
        source: the unedited model and the texts.

    Example:
        >>> report.to_pandas().columns.tolist()[:3]
        ['task', 'difference', 'saved_difference']
    """

    sites: tuple[Site, ...]
    weights: tuple[str, ...]
    difference: Float[Tensor, " task"]
    saved_difference: Float[Tensor, " task"]
    dtype_difference: Float[Tensor, " task"]
    largest_logit: Float[Tensor, " task"]
    kl_divergence: Float[Tensor, " task"]
    edit_divergence: Float[Tensor, " task"]
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    source: Provenance | None = None

    def __post_init__(self) -> None:
        require_declared(self)
        require_length(self, "sha256", len(self.files), "file")

    def _require_values(self) -> None:
        sizes = ["difference", "saved_difference", "dtype_difference", "largest_logit"]
        require_finite(self, *sizes, "kl_divergence", "edit_divergence")
        require_between(self, sizes, 0)
        require_between(self, ["kl_divergence", "edit_divergence"], ROUNDED)

    def to_pandas(self) -> Any:
        """One row per text: task, and the numbers that `FoldReport` explains."""
        import pandas as pd

        names = ("difference", "saved_difference", "dtype_difference", "largest_logit")
        columns = {name: getattr(self, name) for name in names}
        columns |= {n: getattr(self, n) for n in ("kl_divergence", "edit_divergence")}
        table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        return table.rename_axis("task").reset_index()

    def __repr__(self) -> str:
        worst = (float(x.max()) for x in (self.difference, self.saved_difference))
        return (
            f"FoldReport: {len(self.weights)} weights changed for {len(self.sites)} sites, "
            f"{len(self.files)} files\n"
            f"  logits differ from the hooks' by {next(worst):.1e} in memory and by {next(worst):.1e} "
            f"as loaded from the folder; the edit costs {float(self.edit_divergence.mean()):.3g} nats per token\n"
            f"  on {self._origin()}"
        )


@runs_model(RunOptions)
def fold(
    model: Model,
    edit: Edit,
    out: str | os.PathLike[str],
    tasks: Task | Sequence[Task] | None = None,
    **options: Unpack[RunOptions],
) -> FoldReport:
    """Write a Hugging Face checkpoint whose weights contain an edit, and test it.

    `AutoModelForCausalLM.from_pretrained(out)` loads it without mechsvd. An edit x ↦ Ax + b of what
    a map y ↦ Wy + c writes is the map y ↦ AWy + (Ac + b), so W_O, W_out and their biases change,
    and no other weight; embeddings stay as they are. The new weights are computed in float64 from
    the Hugging Face weights, and saved in the dtype of the model.

    Every chosen site is folded, or nothing is. The checkpoint is compared with the hooks before it
    is put in place; with another result than theirs it is not.

    Args:
        edit: `keep`, `ablate`, `gate`, `shrink`, and chains of them, over one basis or one per
            site. A baseline must be by site, and needs biases (GPT-2 has them, Llama has none).
        out: a folder that is new, empty, or written by an earlier `fold` and unchanged since.
        tasks: texts on which checkpoint and hooks are compared; an English one by default.
        options: `layers`, `components`, `missing`, `check` of `RunOptions`; the others have no
            effect here.

    Returns:
        A `FoldReport`, which is in the folder as well: `FoldReport.load(out / "fold.mechsvd")`.

    Raises:
        TypeError: the edit is a function, or anything else but gates.
        ValueError: a stack; `positions`, `at` or `heads`; a baseline by position or text, or one
            where there is no bias; a model with a norm after W_O, with experts, processed weights
            or hooks of yours; a checkpoint that differs from the hooks.
        FileExistsError: the folder holds other files.
        RuntimeError: another process folds into it.
        OSError: its parent is missing, read-only or full.

    Reference: Arditi et al., Refusal in language models is mediated by a single direction, 2024,
        arXiv:2406.11717 (appendix E: weight orthogonalisation).

    Example:
        >>> report = ms.fold(model, ms.keep(mine), "edited-model", task)
        >>> bool(report.saved_difference < 1e-2)
        True
    """
    require_model(model)
    target = _folder(out)
    if this_process()[1] > 1:
        raise ValueError("Several processes would write one checkpoint; fold in one process.")
    with _held(target):
        texts = (_default_task(model),) if tasks is None else as_tasks(tasks)
        with open_session(model, texts, **options) as session:
            weights = fold_weights(session, edit)
            return _replace_folder(target, lambda folder: _write(session, weights, folder))


def _write(session: Session, folded: FoldedWeights, folder: Path) -> FoldReport:
    """Write the checkpoint and its report into a folder.

    Raises:
        OSError: the disk is full.
        ValueError: the folded weights differ from the hooks by more than rounding.
    """
    try:
        write_checkpoint(session.model, folded.by_name, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Cannot write a checkpoint to {folder.parent}: {error}. What was there stays as it "
            "was; free some space, or choose another folder."
        ) from error
    numbers = _compare(session, folded, folder)
    files = sorted(path.name for path in folder.iterdir())
    report = FoldReport(
        folded.sites,
        tuple(folded.by_name),
        **numbers,
        files=tuple(files),
        sha256=tuple(_sha256(folder / name) for name in files),
        source=session.provenance(session.sites),
    )
    report.save(folder / REPORT)
    return report


def _compare(session: Session, folded: FoldedWeights, folder: Path) -> dict[str, Tensor]:
    """The fields of a report that are measured, one number per text."""
    model, tasks = session.model, session.tasks
    device = next(model.parameters()).device
    saved = checkpoint_logits(folder, [task.tokens for task in tasks], device)
    rows = []
    for task, as_saved in zip(tasks, saved, strict=True):
        own = whole_logits(model, task.tokens, [])
        require_finite_logits(model, task.tokens[None], own[None])
        with in_single_precision(model):
            clean = whole_logits(model, task.tokens, [])
            hooked = whole_logits(model, task.tokens, folded.hooks)
            with folded.in_place():
                inside = whole_logits(model, task.tokens, [])
        _require_equal(inside, hooked, session)
        predictions = [x[task.scored].double().log_softmax(-1) for x in (clean, hooked, as_saved)]
        rows.append(
            {
                "difference": _largest(inside, hooked),
                "saved_difference": _largest(as_saved, hooked),
                "dtype_difference": _largest(own, clean),
                "largest_logit": hooked[hooked.isfinite()].abs().max().double(),
                "kl_divergence": divergences(predictions[2][None], predictions[1]).mean(),
                "edit_divergence": divergences(predictions[1][None], predictions[0]).mean(),
            }
        )
        _require_equal(as_saved, hooked, session)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _largest(first: Tensor, second: Tensor) -> Tensor:
    difference = (first.double() - second.double()).abs()
    return difference.masked_fill(first == second, 0.0).max()  # −inf is a masked token


def _require_equal(measured: Tensor, hooked: Tensor, session: Session) -> None:
    """Refuse logits that differ by more than ten times what the self-check allows a block."""
    tolerance = 10 * (4 * torch.finfo(measured.dtype).eps + 1e-5)
    error = float(_largest(measured, hooked) / hooked[hooked.isfinite()].abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"The folded model is not the hooked one: its logits differ by {error:.1e} of the "
            f"largest (allowed: {tolerance:.0e}). Nothing was written; run this edit by its hooks."
        )


def _default_task(model: Model) -> Task:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            "The model has no tokenizer to read the default text with; give `tasks` of token ids."
        )
    return Task.from_text(model, TEXT[:43], TEXT[43:])


def _folder(out: str | os.PathLike[str]) -> Path:
    folder = file_path("out", out).absolute()
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {folder}: the folder {folder.parent} does not exist; create it first."
        )
    return folder


@contextmanager
def _held(target: Path) -> Iterator[None]:
    """Hold a folder against other processes, once it is seen that a checkpoint may be put there."""
    with locked(target):
        _clear_unfinished(target)
        if target.exists() and not (target.is_dir() and (_is_empty(target) or _is_fold(target))):
            raise FileExistsError(
                f"{target} holds files that `fold` did not write, or that changed since; "
                "choose a new or an empty folder."
            )
        yield


def _clear_unfinished(target: Path) -> None:
    """Remove what killed runs left, after an earlier checkpoint that one took away is back."""
    rest = sorted(target.parent.glob(f".{glob.escape(target.name)}.*{UNFINISHED}*"))
    for folder in rest:
        if folder.name.endswith(EARLIER) and not target.exists():
            folder.rename(target)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _is_fold(folder: Path) -> bool:
    """Whether a folder holds an earlier fold and nothing else."""
    try:
        report = FoldReport.load(folder / REPORT)
    except (ValueError, OSError):
        return False
    if {path.name for path in folder.iterdir()} != {*report.files, REPORT}:
        return False
    pairs = zip(report.files, report.sha256, strict=True)
    return all(_sha256(folder / name) == digest for name, digest in pairs)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _replace_folder(target: Path, write: Callable[[Path], FoldReport]) -> FoldReport:
    """Write a folder next to its place, then put it there; an earlier one stays whole till then."""
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
    earlier = unfinished.with_name(f"{unfinished.name}{EARLIER}")
    unfinished.mkdir()
    try:
        report = write(unfinished)
        if not target.exists():
            unfinished.rename(target)
        elif not _exchange(unfinished, target):
            target.rename(earlier)  # killed in between, the next fold puts it back
            unfinished.rename(target)
    finally:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)
    return report


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux, glibc 2.28
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
