"""Cards of directions: their tokens, writers, value vectors, examples and doses."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from mechsvd.checks import require_whole
from mechsvd.edits.baselines import Baseline, require_baseline
from mechsvd.edits.bases import removals
from mechsvd.engine.measurement import Measurements
from mechsvd.engine.metrics import AnyMetric, as_metric, token_drops
from mechsvd.engine.passes import measure
from mechsvd.engine.progress import rows_called
from mechsvd.engine.resuming import runs_model
from mechsvd.engine.session import RunOptions, Session, open_session, warn_other_sites
from mechsvd.experiments.direction_cards import EXAMPLES, DirectionCards
from mechsvd.experiments.direction_writers import DirectionWriters
from mechsvd.experiments.dose import dose_response, valid_directions
from mechsvd.experiments.token_columns import TokenColumns, token_columns
from mechsvd.experiments.value_vectors import value_vectors
from mechsvd.experiments.writer_pass import WriterPass
from mechsvd.linalg.decomposition import Decomposition, require_decomposition
from mechsvd.model.induction import induction_chance, induction_scores
from mechsvd.model.readout import Readout, readout_of
from mechsvd.model.sites import Model
from mechsvd.model.tasks import Task, as_tasks
from mechsvd.model.tokenization import vocabulary_of
from mechsvd.results import Provenance

GAINS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the dose curve


@runs_model(RunOptions)
def describe(
    model: Model,
    svd: Decomposition,
    directions: Iterable[int] | Int[Tensor, " direction"] | None,
    tasks: Task | Sequence[Task],
    *,
    metric: AnyMetric | None = None,
    baseline: Baseline | None = None,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> DirectionCards:
    """Make a card of each direction: what it does to tokens, who writes it, and where.

    Tokens stand in three columns: read off the weights, by the derivative at these texts, and
    measured. They need not agree, and the card says whether they do: a direction can matter and
    still read as nothing. See `TokenColumns`, `DirectionWriters` and `ValueVectors`.

    Args:
        directions: their numbers; the first 16 for None.
        metric: of the effect and of the dose; the log-probability by default.
        baseline: what a direction is removed to; see `gate`.
        seed: of the random orders, examples and directions.
        options: see `RunOptions` (layers, components, positions, batch_size, …). At other hook
            points than writes (`at`) there is nothing to describe.

    Returns:
        Cards that show themselves in a notebook; `cards.to_html()` is a page without scripts.

    Raises:
        TypeError, ValueError: as `measure`; directions out of range or repeated; `at` is given; a
            model whose final norm and unembedding cannot be read.

    Reference: arXiv:2604.02608 (decoding a direction often says nothing of what it does).

    Example:
        >>> cards = ms.describe(model, svd, [0, 1], task)
        >>> cards.to_pandas().columns.tolist()[:4]
        ['direction', 'singular_value', 'effect', 'kl_divergence']
    """
    require_decomposition(svd)
    chosen, tasks = valid_directions(svd, directions), as_tasks(tasks)
    require_baseline(baseline, svd.d_model, svd.source)
    seed = require_whole("seed", seed)
    if options.get("at") is not None:
        raise ValueError(
            f"`at` is {options['at']!r:.40}, but a card tells what writes do; leave it out."
        )
    basis = svd.directions[:, chosen.to(svd.directions.device)]
    with open_session(model, tasks, **options) as session:
        warn_other_sites(svd, session.sites)
        readout = readout_of(model)
        measured = _without_each(model, tasks, svd, chosen, metric, baseline, options)
        dose = dose_response(
            model, tasks, svd, chosen, GAINS, metric=metric, baseline=baseline, seed=seed, **options
        )
        written = WriterPass(session, basis)
        source = session.provenance(session.sites)
        vocabulary = vocabulary_of(model)
        writers = _writers(session, written, chosen, source)
    tokens = _tokens(chosen, basis, readout, measured, written, vocabulary, seed, source)
    values = value_vectors(chosen, basis, written, readout, vocabulary, source)
    divergences = torch.stack([part.kl_divergence for part in measured.parts])
    return DirectionCards(
        chosen,
        svd.singular_values[chosen.to(svd.singular_values.device)].cpu(),
        measured.effect,
        divergences,
        tokens,
        writers,
        values,
        dose,
        _examples(writers.net, seed),
        measured[0].metric,
        measured[0].unit,
        source,
    )


def _without_each(
    model: Model,
    tasks: Sequence[Task],
    svd: Decomposition,
    chosen: Int[Tensor, " direction"],
    metric: AnyMetric | None,
    baseline: Baseline | None,
    options: RunOptions,
) -> Measurements:
    """Measure the removal of each direction, with what it does to every token."""
    profiled = replace(as_metric(metric), profile=token_drops)
    stack = removals(svd, baseline)[chosen]
    with rows_called("directions"):
        measured = measure(model, [*tasks], stack, metric=profiled, **options)  # type: ignore[arg-type]
    assert isinstance(measured, Measurements)
    return measured


def _tokens(
    chosen: Int[Tensor, " direction"],
    basis: Float[Tensor, "d_model direction"],
    readout: Readout,
    measured: Measurements,
    written: WriterPass,
    vocabulary: tuple[str, ...],
    seed: int,
    source: Provenance,
) -> TokenColumns:
    weights = torch.tensor([len(task.continuation) for task in written.tasks], dtype=torch.float64)
    profiles = torch.stack([part.profiles for part in measured.parts if part.profiles is not None])
    drops = torch.einsum("t,tdv->dv", weights / weights.sum(), profiles.double())
    stream = torch.cat([part.to(readout.gain.device) for part in written.streams])
    own = basis.to(readout.gain)
    columns = {
        "read": readout.read(own).cpu(),
        "local": readout.local(own, stream).cpu(),
        "measured": drops.float(),
    }
    return token_columns(chosen, columns, _at_scored(written), vocabulary, seed, source)


def _at_scored(written: WriterPass) -> Float[Tensor, " direction"]:
    """The mean coefficient of all sites together at the scored positions; at all if none count."""
    scored, every = [], []
    for task, kept, values in zip(written.tasks, written.kept, written.coefficients, strict=True):
        is_scored = (kept >= task.scored.start) & (kept < task.scored.stop)
        scored.append(values.sum(dim=0)[is_scored])
        every.append(values.sum(dim=0))
    chosen = torch.cat(scored)
    return (chosen if len(chosen) else torch.cat(every)).mean(dim=0)


def _writers(
    session: Session, written: WriterPass, chosen: Int[Tensor, " direction"], source: Provenance
) -> DirectionWriters:
    tasks, kept = written.tasks, written.kept
    shares = [
        (own, index, part)
        for own in range(len(chosen))
        for index, part in written.listed_shares(own)
    ]
    places = [place for best in written.places for place in best]
    parts = [(number, part) for number, place in enumerate(places) for part in place.parts]
    starts = [sum(len(positions) for positions in kept[:text]) for text in range(len(tasks))]
    return DirectionWriters(
        directions=chosen,
        coefficients=torch.cat(written.coefficients, dim=1).permute(2, 0, 1).contiguous(),
        sites=written.sites,
        tokens=torch.cat([t.tokens.cpu()[k] for t, k in zip(tasks, kept, strict=True)]),
        positions=torch.cat(kept),
        task_index=torch.cat([torch.full_like(k, i) for i, k in enumerate(kept)]),
        pieces=tuple(t.texts[i] for t, k in zip(tasks, kept, strict=True) for i in k.tolist()),
        is_split=torch.tensor([site.name in written.splits for site in written.sites]),
        shares=torch.tensor([part.value for *_, part in shares], dtype=torch.float64),
        share_directions=torch.tensor([own for own, *_ in shares]),
        share_sites=torch.tensor([index for _, index, _ in shares]),
        share_kinds=tuple(part.kind for *_, part in shares),
        share_numbers=torch.tensor([part.number for *_, part in shares]),
        place_directions=torch.tensor([place.direction for place in places]),
        place_sites=torch.tensor([place.site for place in places]),
        place_positions=torch.tensor([starts[p.text] + p.position for p in places]),
        parts=torch.tensor([part.value for _, part in parts], dtype=torch.float64),
        part_places=torch.tensor([number for number, _ in parts]),
        part_kinds=tuple(part.kind for _, part in parts),
        part_numbers=torch.tensor([part.number for _, part in parts]),
        induction=induction_scores(session.model),
        induction_chance=induction_chance(session.model),
        source=source,
    )


def _examples(net: Float[Tensor, "direction pos"], seed: int) -> Int[Tensor, "direction example"]:
    """Positions that write each direction most, least, and at random without repetition."""
    generator = torch.Generator().manual_seed(seed)
    count = min(EXAMPLES, net.shape[1])
    order = net.argsort(dim=1, stable=True)
    random = torch.stack([torch.randperm(net.shape[1], generator=generator) for _ in net])
    return torch.cat([order.flip(1)[:, :count], order[:, :count], random[:, :count]], dim=1)
