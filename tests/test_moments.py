"""Moments summed block by block give the SVD of all vectors at once, for any blocks, order and parts."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mechsvd as ms
from mechsvd.linalg import moments as moments_file
from mechsvd.linalg.decomposition import decompose
from mechsvd.linalg.moments import (
    Accumulator,
    Moments,
    decompose_moments,
    merge_moments,
    moments_of,
    no_moments,
    rms_norms,
    scatter_about,
)
from mechsvd.linalg.svd import numerical_rank

SITES = tuple(
    ms.Site(layer, c, f"blocks.{layer}.hook_{c}_out") for layer in (0, 1) for c in ("attn", "mlp")
)
WAYS = [
    {},
    {"center": True},
    {"per": "site"},
    {"per_layer": True},
    {"per": "layer", "center": True},
    {"per": "site", "center": True},
    {"scale": "site"},
    {"scale": "site", "center": True},
]


def sample(seed, positions=90, d_model=12, spread=3.0):
    """Writes of four sites with falling sizes, a mean and a site that is larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, -spread, d_model, dtype=torch.float64)
    turned = (draw(4, positions, d_model) * sizes) @ torch.linalg.qr(draw(d_model, d_model))[0]
    return turned * torch.tensor([1.0, 9.0, 0.2, 1.0])[:, None, None] + draw(d_model)


def in_parts(values, seed):
    """The moments of some values, by blocks of random size in random order, in several merged parts."""
    rng = random.Random(seed)
    columns = list(range(values.shape[1]))
    rng.shuffle(columns)
    count = rng.randint(1, 5)
    parts = []
    for own in (columns[part::count] for part in range(count)):
        accumulator = Accumulator(no_moments(*values.shape[::2], values.dtype), values.device)
        while own:
            size = rng.randint(1, len(own))
            chosen, own = own[:size], own[size:]
            for site in rng.sample(range(len(values)), len(values)):
                accumulator.add(site, values[site, chosen])
        parts.append(accumulator.moments())
    while len(parts) > 1:
        rng.shuffle(parts)
        parts = [merge_moments(parts[:2]), *parts[2:]]
    return parts[0]


def assert_same(streamed, at_once, rtol=1e-6, above=1e-4):
    """One decomposition, or one per layer or site, by σ, projectors, and shares of the sites."""
    pairs = zip(
        *((s,) if isinstance(s, ms.Decomposition) else s for s in (streamed, at_once)), strict=True
    )
    for mine, theirs in pairs:
        assert (mine.layer, mine.component) == (theirs.layer, theirs.component)
        assert (mine.rank, mine.n_writes) == (theirs.rank, theirs.n_writes)
        sizes = theirs.singular_values
        clear = sizes > above * sizes[0]
        torch.testing.assert_close(
            mine.singular_values[clear], sizes[clear], rtol=rtol, atol=0, check_dtype=False
        )
        gaps = (sizes[:-1] / sizes[1:] > 1.05) & clear[1:]
        for k in [i + 1 for i in gaps.nonzero().flatten().tolist()][:6]:
            ours, other = (s.directions[:, :k].double() for s in (mine, theirs))
            torch.testing.assert_close(ours @ ours.T, other @ other.T, rtol=0, atol=1e-4)
            shares = [sum(s.writer_map(j).sum(dim=1) for j in range(k)) for s in (mine, theirs)]
            torch.testing.assert_close(*shares, rtol=0, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_for_any_blocks_order_and_parts_it_is_the_svd_of_all_at_once(way, monkeypatch):
    for seed in range(5):
        monkeypatch.setattr(moments_file, "PANEL", (5, 6, 256)[seed % 3])
        values = sample(seed, positions=random.Random(seed).choice([40, 90, 200]))
        writes = SimpleNamespace(values=values, sites=SITES, source=None)
        streamed = decompose_moments(in_parts(values, seed), SITES, **way)
        assert_same(streamed, decompose(writes, **way))


def test_it_is_what_a_loop_over_the_vectors_gives():
    values = sample(3, positions=25, d_model=5)
    found = in_parts(values, 3)
    for site, vectors in enumerate(values):
        mean = sum(x for x in vectors) / 25
        scatter = torch.zeros(5, 5, dtype=torch.float64)
        for x in vectors:
            scatter += torch.outer(x - mean, x - mean)
        assert found.count[site] == 25
        torch.testing.assert_close(found.mean[site], mean)
        torch.testing.assert_close(found.scatter[site], scatter)
        torch.testing.assert_close(
            rms_norms(found)[site], vectors.square().sum(dim=1).mean().sqrt()
        )
    gram = scatter_about(found, torch.zeros(4, 5, dtype=torch.float64))
    torch.testing.assert_close(gram, values.mT @ values)


def test_singular_values_are_right_to_1e_6_down_to_a_ten_thousandth_of_the_largest():
    for dtype in (torch.float32, torch.float64):
        values = sample(0, positions=4000, d_model=24, spread=4.3).to(dtype)
        exact = torch.linalg.svdvals(values.double().flatten(0, 1))
        mine = decompose_moments(in_parts(values.double(), 1), SITES).singular_values
        clear = exact > 1e-4 * exact[0]
        assert 12 < clear.sum() < 24
        torch.testing.assert_close(mine[clear], exact[clear], rtol=1e-6, atol=0)


def test_what_is_small_next_to_the_mean_is_not_lost():
    """A Gram matrix about zero would know σ of the centred writes to a hundredth only."""
    values = sample(0, positions=300) / 3 + 1e5
    exact = torch.linalg.svdvals(values[0] - values[0].mean(dim=0))
    mine = decompose_moments(in_parts(values, 5), SITES, per="site", center=True)[0]
    torch.testing.assert_close(mine.singular_values[:8], exact[:8], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_in_float32_within_a_block_and_summed_in_float64(
    dtype, monkeypatch
):
    values = sample(2, positions=6000, d_model=16, spread=2.0).to(dtype)
    streamed = decompose_moments(in_parts(values, 2), SITES)
    assert streamed.directions.dtype == torch.float32
    assert_same(streamed, decompose(values), rtol=1e-4, above=1e-2)
    monkeypatch.setattr(moments_file, "BLOCK", 16)  # whose sums float32 holds exactly
    signs = torch.tensor([1.0, -1.0]).repeat(25_000)[None, :, None].expand(1, 50_000, 2)
    scatter = moments_of((1.0078125 * signs).to(dtype)).scatter
    torch.testing.assert_close(
        scatter, torch.full_like(scatter, 50_000 * 1.0078125**2), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rank_does_not_depend_on_the_blocks(dtype, monkeypatch, silent):
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, 7, 32, generator=generator).to(dtype)
    values = few[:, torch.randint(7, (900,), generator=generator)]  # 7 vectors, again and again
    for block, panel in ((3, 5), (64, 32), (2048, 20)):
        monkeypatch.setattr(moments_file, "BLOCK", block)
        monkeypatch.setattr(moments_file, "PANEL", panel)
        for seed in range(3):
            assert decompose_moments(in_parts(values, seed), SITES[:1]).rank == 7
    assert decompose(values).rank == 7


def test_in_half_precision_a_huge_coordinate_does_not_hide_the_others():
    """As of a BOS token whose writes are a thousand times as large as all others."""
    values = sample(1, positions=3000, d_model=12, spread=0.0).to(torch.bfloat16)
    values[:, ::500, 3] += 3e5
    streamed = decompose_moments(moments_of(values), SITES)
    assert streamed.rank == 12
    exact = torch.linalg.svdvals(values.double().flatten(0, 1))
    assert exact[-1] < 1e-3 * exact[0]
    torch.testing.assert_close(streamed.singular_values.double(), exact, rtol=1e-3, atol=0)


def test_float32_vectors_of_a_model_in_half_precision_lose_nothing():
    values = sample(5, positions=400).float()
    accumulator = Accumulator(no_moments(4, 12, torch.bfloat16), values.device)
    for site, vectors in enumerate(values):
        accumulator.add(site, vectors)
    torch.testing.assert_close(accumulator.moments().scatter, moments_of(values.double()).scatter)


def test_a_very_long_stream_keeps_directions_that_are_well_above_rounding():
    sizes = torch.tensor([1.0, 1e-4, 1e-12])
    assert numerical_rank(sizes, torch.Size((10**10, 3))) == 2


@pytest.mark.fault(4)
def test_few_vectors_one_and_zeros_are_never_nan(recwarn):
    one = decompose_moments(moments_of(torch.tensor([[[3.0, 4.0, 0.0]]])), SITES[:1])
    assert (one.rank, one.n_writes) == (1, 1)
    torch.testing.assert_close(one.singular_values, torch.tensor([5.0]))
    torch.testing.assert_close(one.directions[:, 0], torch.tensor([0.6, 0.8, 0.0]))
    assert "1 writes for 3 dimensions" in str(recwarn.pop(UserWarning).message)
    for way in WAYS:
        svds = decompose_moments(moments_of(torch.zeros(4, 9, 3)), SITES, **way)
        for svd in [svds] if isinstance(svds, ms.Decomposition) else svds:
            assert svd.rank == 0
            assert svd.directions.shape == (3, 0)
    assert "all writes are zero" in str(recwarn.pop(UserWarning).message)
    constant = torch.ones(4, 50, 3, dtype=torch.bfloat16)
    assert decompose_moments(moments_of(constant), SITES).rank == 1


def test_adding_leaves_what_it_began_with_as_it_was():
    values = sample(0)
    first = moments_of(values[:, :20])
    before = first.scatter.clone()
    accumulator = Accumulator(first, values.device)
    middle = accumulator.moments()
    accumulator.add(0, values[0, 20:])
    assert torch.equal(first.scatter, before)
    assert torch.equal(middle.scatter, before)
    accumulator.add(0, values[0, :0])
    assert accumulator.moments().count.tolist() == [90, 20, 20, 20]


@pytest.mark.fault(3)
def test_a_second_driver_takes_over_where_the_first_does_not_converge(monkeypatch):
    values = sample(4)
    expected = decompose_moments(moments_of(values), SITES).singular_values

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    torch.testing.assert_close(
        decompose_moments(moments_of(values), SITES).singular_values, expected
    )


def test_what_needs_the_writes_themselves_is_refused():
    found = moments_of(sample(0))
    with pytest.raises(ValueError, match="`scale='norm'` divides each write by its own norm"):
        decompose_moments(found, SITES, scale="norm")
    with pytest.raises(ValueError, match="`scale` is 'all', but must be 'site' or None"):
        decompose_moments(found, SITES, scale="all")
    with pytest.raises(ValueError, match="`per` is 'head', but must be"):
        decompose_moments(found, SITES, per="head")


def test_a_decomposition_of_streamed_writes_says_what_it_does_not_know(tmp_path):
    svd = decompose_moments(moments_of(sample(0)), SITES)
    assert svd.is_streamed
    assert svd.left.shape == (4, 0, 12)
    assert svd.writer_map(0).shape == (4, 1)
    assert float(svd.writer_map(3).sum()) == pytest.approx(1)
    assert "4 sites × 90 streamed positions" in repr(svd)
    svd.save(tmp_path / "svd.safetensors")
    loaded = ms.Decomposition.load(tmp_path / "svd.safetensors")
    assert torch.equal(loaded.site_shares, svd.site_shares)
    assert not decompose(sample(0)).is_streamed
    with pytest.raises(ValueError, match="and no positions in `left`"):
        replace(svd, left=torch.zeros(4, 2, 12))
    with pytest.raises(ValueError, match="other decompositions have neither"):
        replace(svd, site_shares=None)
    with pytest.raises(ValueError, match="`site_shares` must sum to 1"):
        replace(svd, site_shares=svd.site_shares / 2)._require_values()


def test_moments_save_and_load_to_the_last_bit_and_wrong_ones_are_refused(tmp_path):
    found = in_parts(sample(1).bfloat16(), 1)
    found.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    for name in ("count", "mean", "scatter"):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    assert len(repr(found).splitlines()) == 3
    assert found.to_pandas()["count"].tolist() == [90] * 4
    wrong = {
        "`scatter` of Moments must be symmetric": {"scatter": found.scatter.triu()},
        "must be symmetric and not negative": {"scatter": -found.scatter},
        "`mean` of a Moments holds NaN": {"mean": found.mean * float("nan")},
        "`count` of a Moments holds -1": {"count": found.count * 0 - 1},
    }
    for message, change in wrong.items():
        replace(found, **change).save(tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            Moments.load(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="`dtype` of Moments is 'float31'"):
        replace(found, dtype="float31")
