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
    pairs = [
        overlap([random_subspace(12, 5, 2 * seed), random_subspace(12, 4, 2 * seed + 1)])
        for seed in range(4000)
    ]
    values = torch.stack([pair.values[0, 1] for pair in pairs])
    assert float(pairs[0].expected[0, 1]) == pytest.approx(5 * 4 / 12)
    assert float(values.mean()) == pytest.approx(
        5 * 4 / 12, abs=4 * float(values.std()) / math.sqrt(4000)
    )
    assert float(values.std()) == pytest.approx(float(pairs[0].deviation[0, 1]), rel=0.05)


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
    chance = pool([random_subspace(60, 20, 100), random_subspace(60, 30, 101)], draws=40)
    inside = (chance.singular_values >= chance.random_low) & (
        chance.singular_values <= chance.random_high
    )
    assert inside.float().mean() > 0.8
    assert (chance.random_low <= chance.random_mean).all()
    assert (chance.random_mean <= chance.random_high).all()
    assert torch.equal(
        pool([random_subspace(60, 20, 100), random_subspace(60, 30, 101)], draws=40).random_mean,
        chance.random_mean,
    )


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
