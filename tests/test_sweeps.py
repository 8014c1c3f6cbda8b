import warnings

import pytest
import torch

import mechsvd as ms
from tests.conftest import loop_log_prob


def test_every_rank_from_none_to_all_by_default(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd)
    table = sweep.to_pandas()
    assert list(table.columns) == [
        "rank",
        "log_prob",
        "probability",
        "surprise",
        "orig_delta",
        "kept_delta",
        "kl_divergence",
        "absolute_change",
    ]
    assert table["rank"].tolist() == list(range(meaning_svd.rank + 1))
    assert table["kept_delta"].iloc[0] == 0
    assert len(repr(sweep).splitlines()) == 3


def test_at_full_rank_the_model_is_as_it_was(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[meaning_svd.rank])
    torch.testing.assert_close(
        sweep.measurement.log_probs, sweep.measurement.clean.log_probs, rtol=0, atol=1e-4
    )


def test_the_sweep_equals_the_loop(real):
    model, task, svd = real.model, real.task, real.svd
    ranks = list(range(0, svd.rank + 1, 9))
    sweep = ms.sweep_rank(model, task, svd, ranks=ranks)
    for rank, log_probs in zip(ranks, sweep.measurement.log_probs, strict=True):
        projector = svd.directions[:, :rank] @ svd.directions[:, :rank].T
        expected = loop_log_prob(
            model, task, lambda x, hook, p=projector: x @ p, range(model.cfg.n_layers)
        )
        torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-3)


def test_fewer_directions_than_dimensions_clip_what_was_not_seen_too(embedded, silent):
    """The shortform's case (2272 writes of 4096 dimensions), with few and with many directions seen."""
    task = ms.Task.from_text(embedded, "I believe", " the meaning of life is to find joy")
    other = ms.Task.from_text(embedded, "Simply put,", " the theory")
    for layers in ([0, 1], range(6)):
        svd = ms.decompose(ms.collect_writes(embedded, other, layers=layers))
        assert svd.rank < 128
        sweep = ms.sweep_rank(embedded, task, svd, ranks=[svd.rank - 1, svd.rank])
        projector = svd.directions @ svd.directions.T
        expected = loop_log_prob(embedded, task, lambda x, hook, p=projector: x @ p, range(6))
        torch.testing.assert_close(
            sweep.measurement.log_probs[1].double(), expected, rtol=0, atol=1e-3
        )
        assert (sweep.measurement.log_prob[1] - sweep.measurement.clean.log_prob).abs() > 1


def test_any_order_keeps_the_first_of_its_directions(embedded, meaning, meaning_svd):
    order = torch.randperm(meaning_svd.rank, generator=torch.Generator().manual_seed(0))
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[40, 5], order=order)
    for rank, log_probs in zip((40, 5), sweep.measurement.log_probs, strict=True):
        kept = meaning_svd.directions[:, order[:rank]]
        expected = loop_log_prob(
            embedded, meaning, lambda x, hook, kept=kept: x @ kept @ kept.T, range(6)
        )
        torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-3)


def test_attention_only_sweeps_clip_attention_only(embedded, meaning, silent):
    svd = ms.decompose(ms.collect_writes(embedded, meaning, components=("attn",)))
    sweep = ms.sweep_rank(embedded, meaning, svd, ranks=[0, 10], components=("attn",))
    kept = svd.directions[:, :10] @ svd.directions[:, :10].T
    expected = loop_log_prob(embedded, meaning, lambda x, hook: x @ kept, range(6), ("attn",))
    torch.testing.assert_close(sweep.measurement.log_probs[1].double(), expected, rtol=0, atol=1e-3)
    assert len(sweep.measurement.sites) == 6


def test_directions_of_other_sites_than_are_swept_warn(embedded, meaning, silent):
    layer = ms.decompose(ms.collect_writes(embedded, meaning), per_layer=True)[3]
    assert layer.source.hooks == ("blocks.3.hook_attn_out", "blocks.3.hook_mlp_out")
    with pytest.warns(
        UserWarning,
        match="12 sites are edited, but the directions were computed from 2 sites",
    ):
        ms.sweep_rank(embedded, meaning, layer, ranks=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms.sweep_rank(embedded, meaning, layer, ranks=[1], layers=3)


def test_what_is_kept_and_what_is_dropped_obey_pythagoras(embedded, meaning, meaning_svd):
    for rank in (1, 40, 127):
        subspace = meaning_svd.subspace(rank)
        for layer in range(6):
            for component in ("attn", "mlp"):  # alone, so that both edits meet the same write
                measured = ms.measure(
                    embedded,
                    meaning,
                    [ms.keep(subspace), ms.ablate(subspace)],
                    layers=layer,
                    components=component,
                )
                attempted, written = measured.orig_deltas[:, 0], measured.kept_deltas[:, 0]
                torch.testing.assert_close(attempted[0], attempted[1], rtol=1e-6, atol=0)
                torch.testing.assert_close(
                    written.square().sum(), attempted[0].square(), rtol=1e-5, atol=0
                )


def test_nothing_kept_is_larger_than_what_was_attempted(embedded, meaning, meaning_svd):
    measured = ms.sweep_rank(embedded, meaning, meaning_svd).measurement
    assert (measured.kept_deltas <= measured.orig_deltas * (1 + 1e-5)).all()


@pytest.mark.fault(19)
def test_ranks_and_orders_that_do_not_exist_are_refused(embedded, meaning, meaning_svd):
    full = meaning_svd.rank
    for ranks in ([-1], [full + 1]):
        with pytest.raises(
            ValueError,
            match=rf"`ranks` holds \[{ranks[0]}\], but the decomposition has {full} directions",
        ):
            ms.sweep_rank(embedded, meaning, meaning_svd, ranks=ranks)
    for ranks in ([], [True], [1.5]):
        with pytest.raises((ValueError, TypeError), match="ranks"):
            ms.sweep_rank(embedded, meaning, meaning_svd, ranks=ranks)
    for order in ([0, 0, 1], [*range(full - 1), full]):
        with pytest.raises(ValueError, match=f"each of the {full} directions once"):
            ms.sweep_rank(embedded, meaning, meaning_svd, order=order)


def test_the_table_by_site(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[7, 3])
    table = sweep.sites_to_pandas()
    assert table["rank"].tolist() == [7] * 12 + [3] * 12
    assert table["kept_delta"].iloc[13] == pytest.approx(float(sweep.measurement.kept_deltas[1, 1]))
