"""Few ranks against all of them: the same values, the same lasting rank, and an honest error between."""

import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.heldout import lasting_rank_within

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(real):
    return ms.sweep_rank(real.model, real.task, real.svd)


@pytest.fixture(scope="module")
def few(real):
    return ms.sweep_adaptively(real.model, real.task, real.svd, 24, seed=1)


def test_its_ranks_have_the_values_of_the_whole_sweep_and_are_fewer(real, whole, few):
    table, all_ranks = few.to_pandas(), whole.to_pandas().set_index("rank")
    assert table["rank"].is_monotonic_increasing
    assert table["rank"].is_unique
    assert {0, real.svd.rank} <= {*table["rank"]}
    assert len(table) < 24 + 8 + 9
    for column in ("log_prob", "kl_divergence", "kept_delta"):
        expected = all_ranks.loc[table["rank"], column].to_numpy()
        assert table[column].to_numpy() == pytest.approx(expected, abs=2e-3, rel=1e-4)


def test_the_lasting_rank_is_that_of_the_whole_sweep(whole, few):
    assert lasting_rank_within(few.sweep, 1.0) == lasting_rank_within(whole, 1.0)


def test_the_stated_error_is_that_of_ranks_that_were_not_tried(real, whole, few):
    assert len(few.checked) == 8
    measured = whole.measurement.kl_divergence[few.checked].double()
    torch.testing.assert_close(few.measured, measured, atol=1e-5, rtol=1e-3)
    assert (few.errors >= 1).all()
    rest = [k for k in range(real.svd.rank) if k not in {*few.sweep.ranks.tolist()}]
    curve, truth = few.interpolated(rest), whole.measurement.kl_divergence[rest].double()
    errors = torch.exp((curve.clamp(min=1e-7).log() - truth.clamp(min=1e-7).log()).abs())
    assert float(errors.median()) < 2 * float(few.errors.max())
    assert "8 random ranks" in repr(few)


def test_its_worst_error_is_smaller_than_that_of_as_many_evenly_spaced_ranks(real, whole):
    chosen = ms.sweep_adaptively(real.model, real.task, real.svd, 20, checks=0, nats=0.0)
    even = torch.linspace(0, real.svd.rank, len(chosen.sweep.ranks)).round().long().unique()
    evenly = ms.AdaptiveSweep(
        ms.sweep_rank(real.model, real.task, real.svd, even),
        torch.zeros(0).long(), torch.zeros(0).double(), torch.zeros(0).double(),
    )  # fmt: skip
    truth = whole.measurement.kl_divergence.double().clamp(min=1e-7).log()

    def error(sweep):
        return float((sweep.interpolated(range(real.svd.rank + 1)).log() - truth).abs().max())

    assert error(chosen) < 0.9 * error(evenly)


def test_orders_bases_per_site_and_every_rank(real):
    order = ms.order_at_random(real.svd, 1)
    found = ms.sweep_adaptively(real.model, real.task, real.svd, 9, order, checks=2)
    assert torch.equal(found.sweep.order, order)
    every = ms.sweep_adaptively(real.model, real.task, real.svd, 1000)
    assert every.sweep.ranks.tolist() == list(range(real.svd.rank + 1))
    assert len(every.checked) == 0
    assert "no rank was left to check" in repr(every)
    bases = ms.decompose(ms.collect_writes(real.model, real.task), per="site")
    assert ms.sweep_adaptively(real.model, real.task, bases, 9, checks=2).sweep.sizes


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {}, "`count` is 2"),
        (9, {"nats": -1.0}, "`nats` is -1.0"),
        (9, {"checks": -1}, "`checks`"),
    ],
)
def test_what_cannot_be_swept_is_refused(real, count, options, message):
    with pytest.raises(ValueError, match=message):
        ms.sweep_adaptively(real.model, real.task, real.svd, count, **options)
