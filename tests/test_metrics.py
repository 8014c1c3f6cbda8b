"""Metrics that do not cancel: the KL divergence and the absolute change, in the same pass."""

from dataclasses import replace

import pytest
import torch

import mechsvd as ms
from mechsvd.engine.metrics import divergences


def predictions(model, task, edit=None):
    """Log-probabilities of all tokens at the scored positions, by one plain run, in float64."""
    hooks = [] if edit is None else ms.fwd_hooks(model, edit)
    logits = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)
    return logits[0, task.scored].double().log_softmax(dim=-1)


def test_divergences_and_changes_are_those_of_a_loop(real, silent):
    svd = ms.decompose(ms.collect_writes(real.model, real.task))
    edits = [ms.keep(svd.subspace(k)) for k in (0, 5, svd.rank // 2, svd.rank)]
    edits += [ms.ablate(svd.subspace(1)), ms.chain()]
    found = ms.measure(real.model, real.task, edits)
    with torch.no_grad():
        clean = predictions(real.model, real.task)
        for row, edit in enumerate(edits):
            edited = predictions(real.model, real.task, edit)
            expected = (clean.exp() * (clean - edited)).sum(dim=-1)
            torch.testing.assert_close(
                found.kl_divergences[row].double(), expected, rtol=1e-3, atol=1e-5
            )
            target = real.task.continuation[:, None]
            change = (edited.gather(1, target) - clean.gather(1, target)).abs().sum()
            assert float(found.absolute_change[row]) == pytest.approx(float(change), abs=2e-3)
    assert torch.equal(found.kl_divergence[-1:], torch.zeros(1).double())
    assert found.clean_run.kl_divergence.tolist() == found.clean_run.absolute_change.tolist() == [0]
    signed = (found.log_prob - found.clean_run.log_prob).abs()
    assert (found.absolute_change >= signed - 1e-6).all()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_no_divergence(embedded, meaning, meaning_svd, batch_size):
    ranks = range(0, 129, 9)
    whole = ms.sweep_rank(embedded, meaning, meaning_svd, ranks).measurement
    parts = ms.sweep_rank(embedded, meaning, meaning_svd, ranks, batch_size=batch_size).measurement
    torch.testing.assert_close(parts.kl_divergences, whole.kl_divergences, rtol=1e-3, atol=1e-5)


def test_a_masked_token_has_no_part_in_it():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    clean, edited = logits.log_softmax(-1), (2 * logits).log_softmax(-1)[None]
    expected = (clean.exp() * (clean - edited))[..., :2].sum(-1)
    torch.testing.assert_close(divergences(edited, clean), expected)
    assert float(divergences(clean[None], clean)) == 0


def test_the_tables_have_both(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd, [0, 40, 128])
    table = sweep.to_pandas()
    assert list(table.columns)[-2:] == ["kl_divergence", "absolute_change"]
    assert table["kl_divergence"].tolist() == sweep.measurement.kl_divergence.tolist()
    mean = sweep.measurement.kl_divergences.double().mean(dim=1)
    assert table["kl_divergence"].tolist() == pytest.approx(mean.tolist())
    ranking = ms.rank_directions(embedded, meaning, meaning_svd)
    table = ranking.to_pandas()
    assert table["kl_divergence"].tolist() == ranking.measurement.kl_divergence.tolist()
    assert table["absolute_change"].tolist() == ranking.measurement.absolute_change.tolist()


def test_orders_by_what_does_not_cancel(embedded, meaning, meaning_svd):
    ranking = ms.rank_directions(embedded, meaning, meaning_svd)
    for by in ("kl_divergence", "absolute_change"):
        values = getattr(ranking.measurement, by)[ms.order_by_effect(ranking, by=by)]
        assert (values.diff() <= 0).all()
    assert torch.equal(ms.order_by_effect(ranking), ms.order_by_effect(ranking, by="effect"))
    assert not torch.equal(
        ms.order_by_effect(ranking), ms.order_by_effect(ranking, "kl_divergence")
    )


def test_a_direction_that_helps_one_token_and_harms_another_is_found():
    """Its signed effect cancels to nothing; its absolute change and divergence do not."""
    clean_row, cancels, harms = [-1.0, -1.0], [-0.5, -1.5], [-1.2, -1.2]
    log_probs, ones = torch.tensor([cancels, harms]), torch.ones(2, 1)
    sites = (ms.Site(0, "mlp", "blocks.0.hook_mlp_out"),)
    clean = ms.Measurement(
        torch.tensor([clean_row]), torch.ones(1, 2) > 0, ones[:1], ones[:1], sites
    )
    measurement = ms.Measurement(
        log_probs,
        log_probs > -9,
        ones,
        ones,
        sites,
        clean=clean,
        kl_divergences=torch.tensor([[0.3, 0.3], [0.1, 0.1]]),
    )
    ranking = ms.Ranking(torch.tensor([2.0, 1.0]), measurement)
    assert ranking.effect.tolist() == pytest.approx([0.0, 0.4])
    assert ranking.measurement.absolute_change.tolist() == pytest.approx([1.0, 0.4])
    assert ms.order_by_effect(ranking).tolist() == [1, 0]
    assert ms.order_by_effect(ranking, "absolute_change").tolist() == [0, 1]
    assert ms.order_by_effect(ranking, "kl_divergence").tolist() == [0, 1]


@pytest.mark.fault(33)
def test_files_of_older_versions_know_no_divergence(embedded, meaning, meaning_svd):
    ranking = ms.rank_directions(embedded, meaning, meaning_svd)
    old = replace(ranking, measurement=replace(ranking.measurement, kl_divergences=None))
    assert old.to_pandas()["kl_divergence"].isna().all()
    assert old.measurement[:2].kl_divergence.isnan().all()
    with pytest.raises(ValueError, match="of an older version, without the KL divergence"):
        ms.order_by_effect(old, "kl_divergence")
    assert torch.equal(
        ms.order_by_effect(old, "absolute_change"), ms.order_by_effect(ranking, "absolute_change")
    )
