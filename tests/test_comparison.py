import dataclasses
import math

import pytest
import scipy.linalg
import torch

import mechsvd as ms
from mechsvd.linalg.comparison import (
    Overlap,
    Pool,
    overlap,
    pool,
    principal_angles,
    random_subspace,
)
from mechsvd.linalg.subspace import Subspace
from tests.conftest import tiny, tiny_task

E = torch.eye(12, dtype=torch.float64)


def test_random_subspaces_have_a_z_score_below_three_in_99_of_100_draws():
    scores = [
        float(
            overlap([random_subspace(64, 20, seed), random_subspace(64, 9, 1000 + seed)]).z_score[
                0, 1
            ]
        )
        for seed in range(100)
    ]
    assert sum(abs(z) < 3 for z in scores) >= 99


def test_the_expected_overlap_and_its_deviation_are_those_of_many_draws():
    found = overlap([random_subspace(12, 5 if seed < 70 else 4, seed) for seed in range(140)])
    values = found.values[:70, 70:]  # any two of these 4900 overlaps are independent
    assert float(found.expected[0, 70]) == pytest.approx(5 * 4 / 12)
    assert float(values.mean()) == pytest.approx(5 * 4 / 12, abs=4 * float(values.std()) / 70)
    assert float(values.std()) == pytest.approx(float(found.deviation[0, 70]), rel=0.05)


def test_known_overlaps():
    found = overlap([Subspace(E[:, :4]), Subspace(E[:, 2:5]), Subspace(E[:, 6:9])])
    torch.testing.assert_close(
        found.values, torch.tensor([[4.0, 2, 0], [2, 3, 0], [0, 0, 3]], dtype=torch.float64)
    )
    assert float(found.ratio[0, 1]) == pytest.approx(2)
    assert list(found.to_pandas()["overlap"]) == [2, 0, 0]


def test_the_whole_space_leaves_chance_no_choice():
    found = overlap([Subspace(E), Subspace(E[:, :5])])
    assert float(found.values[0, 1]) == float(found.expected[0, 1]) == 5
    assert math.isnan(found.z_score[0, 1])
    assert found.to_pandas()["z_score"].isna().all()


def test_principal_angles_are_scipys_and_their_squared_cosines_sum_to_the_overlap():
    a, b = random_subspace(30, 7, 1), random_subspace(30, 4, 2)
    angles = principal_angles(a, b)
    torch.testing.assert_close(
        angles,
        torch.from_numpy(
            scipy.linalg.subspace_angles(a.basis.numpy(), b.basis.numpy())[::-1].copy()
        ),
    )
    torch.testing.assert_close(principal_angles(b, a), angles)
    assert float(angles.cos().square().sum()) == pytest.approx(float(overlap([a, b]).values[0, 1]))


def test_tiny_and_right_angles_are_exact():
    tilted = E[:, :1] * math.cos(1e-9) + E[:, 3:4] * math.sin(1e-9)
    angles = principal_angles(Subspace(E[:, :2]), Subspace(torch.cat([tilted, E[:, 5:6]], dim=1)))
    assert float(angles[0]) == pytest.approx(1e-9, rel=1e-6)
    assert float(angles[1]) == pytest.approx(math.pi / 2)


def test_pooled_bases_share_what_they_share_and_chance_lies_in_its_own_band():
    shared = pool([Subspace(E[:, :3]), Subspace(E[:, 2:5])])
    torch.testing.assert_close(
        shared.singular_values, torch.tensor([math.sqrt(2), 1, 1, 1, 1, 0], dtype=torch.float64)
    )
    assert shared.outside
    chance = pool([random_subspace(60, 20, 100), random_subspace(60, 30, 101)], draws=40)
    assert not chance.outside
    assert (chance.random_low <= chance.random_mean).all()
    assert (chance.random_mean <= chance.random_high).all()
    assert torch.equal(
        pool([random_subspace(60, 20, 100), random_subspace(60, 30, 101)], draws=40).random_mean,
        chance.random_mean,
    )


@pytest.mark.parametrize(
    ("d_model", "ranks"),
    [
        (24, [6, 5]),  # two, side by side
        (24, [8, 8, 8]),  # as many directions as dimensions: the smallest value is skewed
        (30, [20, 18]),  # more than dimensions: some values are fixed
        (20, [7, 12, 3, 9]),
    ],
)
def test_the_band_holds_95_of_100_fresh_random_spectra_as_a_whole(d_model, ranks):
    def drawn(first):
        return [random_subspace(d_model, rank, first + i) for i, rank in enumerate(ranks)]

    chance, fresh = pool(drawn(0)), 1000
    spectra = torch.linalg.svdvals(
        torch.stack(
            [torch.cat([s.basis for s in drawn(10_000 + 10 * n)], dim=1) for n in range(fresh)]
        )
    )
    inside = ((spectra >= chance.random_low) & (spectra <= chance.random_high)).all(dim=1)
    assert 0.93 <= float(inside.float().mean()) <= 0.97
    torch.testing.assert_close(chance.random_mean, spectra.mean(dim=0), atol=0.02, rtol=0)
    assert chance.draws == 600


def test_a_band_of_few_draws_is_wider_and_holds_95_of_100_in_the_mean_over_seeds():
    ranks, inside = [6, 5], []
    for seed in range(150):
        chance = pool(
            [random_subspace(16, r, 7 + i) for i, r in enumerate(ranks)], draws=39, seed=seed
        )
        for n in range(10):
            first = 10_000 * (seed + 1) + 10 * n
            bases = [random_subspace(16, r, first + i).basis for i, r in enumerate(ranks)]
            values = torch.linalg.svdvals(torch.cat(bases, dim=1))
            inside.append(
                bool(((values >= chance.random_low) & (values <= chance.random_high)).all())
            )
    assert 0.93 <= sum(inside) / len(inside) <= 0.97


def test_values_that_cannot_vary_lie_in_the_band_in_any_precision():
    for dtype in (torch.float64, torch.float32):
        parts = [random_subspace(12, rank, rank).basis.to(dtype) for rank in (12, 5)]
        found = pool([Subspace(part) for part in parts])
        assert not found.outside
        assert float((found.random_high - found.random_low).max()) < 1e-4


def test_a_planted_shared_direction_leaves_the_band():
    one = random_subspace(60, 10, 1).basis
    other = torch.cat([one[:, :1], random_subspace(60, 9, 2).basis], dim=1)
    found = pool([Subspace(one), ms.span(other)])
    assert found.outside
    assert found.singular_values[0] > found.random_high[0]


@pytest.mark.fault(33)
def test_a_pool_of_an_older_version_loads_and_says_what_its_band_is(tmp_path, monkeypatch):
    found, path = pool([random_subspace(12, 3, seed) for seed in range(3)]), tmp_path / "old"

    def older(value):
        return [field for field in dataclasses.fields(value) if field.name != "draws"]

    with monkeypatch.context() as patched:
        patched.setattr("mechsvd.packing.fields", older)
        found.save(path)
    assert b"draws" not in path.read_bytes()
    loaded = Pool.load(path)
    assert loaded.draws == 0
    assert "range of a few random draws" in repr(loaded)
    assert "band that holds 95 % of random spectra" in repr(found)


def test_forced_and_chance_corrected_overlaps():
    found = overlap([Subspace(E[:, :8]), Subspace(E[:, 2:10]), Subspace(E[:, 3:5]), Subspace(E)])
    forced = [[8, 4, 0, 8], [4, 8, 0, 8], [0, 0, 2, 2], [8, 8, 2, 12]]
    assert found.forced[~torch.eye(4, dtype=torch.bool)].tolist() == [
        value for i, row in enumerate(forced) for j, value in enumerate(row) if i != j
    ]
    chance = 64 / 12
    assert float(found.chance_corrected[0, 1]) == pytest.approx((6 - chance) / (8 - chance))
    assert float(found.chance_corrected[0, 2]) == pytest.approx(1)  # nested
    assert found.chance_corrected[:, 3].isnan().all()
    table = found.to_pandas()
    assert list(table) == [
        "first", "second", "overlap", "expected", "deviation", "ratio", "z_score", "forced",
        "chance_corrected",
    ]  # fmt: skip
    assert (table["overlap"] >= table["forced"]).all()
    nothing = overlap([Subspace(E[:, :0]), Subspace(E[:, :5]), Subspace(E[:, :0])])
    assert nothing.forced[0].tolist() == [0, 0, 0]
    assert nothing.chance_corrected[0].isnan().all()
    at_random = [
        float(
            overlap([random_subspace(16, 6, s), random_subspace(16, 4, 999 + s)]).chance_corrected[
                0, 1
            ]
        )
        for s in range(400)
    ]
    assert sum(at_random) / 400 == pytest.approx(0, abs=0.02)


def test_subspaces_that_cannot_be_compared_are_refused(silent):
    with pytest.raises(ValueError, match="it takes two"):
        overlap([Subspace(E)])
    with pytest.raises(ValueError, match="Subspace 1 lies in 5 dimensions, but the first in 12"):
        overlap([Subspace(E), random_subspace(5, 2)])
    with pytest.raises(ValueError, match="`rank` is 6"):
        random_subspace(5, 6)
    two = [
        ms.decompose(ms.collect_writes(tiny(a), tiny_task())).subspace(3)
        for a in ("Llama", "Qwen2")
    ]
    for compare in (overlap, pool):
        with pytest.raises(ValueError, match="Subspaces 0 and 1 come from different models"):
            compare(two)


def test_they_print_themselves_and_come_back_as_saved(tmp_path):
    subspaces = [random_subspace(12, 3, seed) for seed in range(3)]
    for found, kind in ((overlap(subspaces), Overlap), (pool(subspaces), Pool)):
        assert len(repr(found).splitlines()) == 3
        found.save(tmp_path / "r.safetensors")
        pair = (
            getattr(r, next(iter(kind.__dataclass_fields__)))
            for r in (kind.load(tmp_path / "r.safetensors"), found)
        )
        assert torch.equal(*pair)
