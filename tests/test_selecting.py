"""Selecting and combining: directions, writes, subspaces, devices, files."""

import dataclasses

import pytest
import torch

import mechsvd as ms
from tests.conftest import tiny, tiny_task


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


@pytest.fixture(scope="module")
def writes(model):
    return ms.collect_writes(model, [tiny_task(seed=1), tiny_task(11, 5, seed=2)])


@pytest.fixture(scope="module")
def svd(writes):
    return ms.decompose(writes)


def projector(subspace):
    return subspace.basis @ subspace.basis.T


def test_a_subspace_of_chosen_directions(svd):
    assert torch.equal(svd.subspace([5, 3]).basis, svd.directions[:, [5, 3]])
    order = ms.order_at_random(svd, 1)
    assert torch.equal(svd.subspace(order[:4]).basis, svd.directions[:, order[:4]])
    for wrong in ([3, 3], [-1], [svd.rank]):
        with pytest.raises(ValueError, match="rank"):
            svd.subspace(wrong)


def test_writes_of_some_layers_components_and_texts(model, writes):
    chosen = writes.select(layers=1, components="mlp", tasks=[1])
    direct = ms.collect_writes(model, tiny_task(11, 5, seed=2), layers=[1], components=["mlp"])
    torch.testing.assert_close(chosen.values, direct.values, rtol=1e-5, atol=1e-6)
    assert chosen.sites == direct.sites
    assert chosen.source.hooks == direct.source.hooks
    assert torch.equal(chosen.positions, direct.positions)
    assert torch.equal(writes.select().values, writes.values)
    with pytest.warns(match="rest of the residual stream is unseen"):
        per_site = ms.decompose(writes.select(layers=range(1)), per="site")
    assert {site for one in per_site for site in one.source.hooks} == {
        site.name for site in writes.sites if site.layer == 0
    }
    with pytest.raises(
        ValueError, match=r"Nothing is left of layers 7.*the writes have layers \[0"
    ):
        writes.select(layers=7)


def test_complements_and_unions():
    torch.manual_seed(0)
    a, b = ms.span(torch.randn(16, 3)), ms.span(torch.randn(16, 4))
    rest = a.complement()
    torch.testing.assert_close(projector(a) + projector(rest), torch.eye(16), atol=1e-5, rtol=0)
    both = ms.union([a, b])
    assert torch.equal(both.basis[:, :3], a.basis)
    assert both.rank == 7
    torch.testing.assert_close(
        projector(both),
        projector(ms.span(torch.cat([a.basis, b.basis], dim=1))),
        atol=1e-5,
        rtol=0,
    )
    assert torch.equal(ms.union([a, a]).basis, a.basis)
    assert ms.union([a, rest]).rank == 16
    assert ms.union([a]).rank == 3
    shared = ms.span(torch.cat([a.basis[:, :2], b.basis[:, :1]], dim=1))
    assert ms.union([a, shared]).rank == 4


@pytest.mark.fault(25)
def test_unions_of_unlike_things_are_refused(svd):
    other = dataclasses.replace(svd.source, weights="another", model="b")
    for wrong, message in (
        ([], "at least one Subspace"),
        ([torch.eye(3)], "Subspace"),
        ([ms.span(torch.eye(3)), ms.span(torch.eye(4))], r"different dimensions: \[3, 4\]"),
        (
            [svd.subspace(2), dataclasses.replace(svd.subspace(3), source=other)],
            "different models",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ms.union(wrong)


@pytest.mark.fault(18)
def test_rows_of_a_square_matrix_are_not_its_columns():
    decoder = torch.eye(4)
    decoder[0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    decoder[2] = decoder[3] = 0
    rows = ms.span(decoder, rows=True)
    assert torch.allclose(projector(rows), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert torch.equal(rows.basis, ms.span(decoder.T).basis)


def test_results_move_between_devices(svd, writes):
    moved = svd.to("meta")
    assert moved.directions.device.type == moved.left.device.type == "meta"
    assert moved.source == svd.source
    assert writes.to("cpu").values.equal(writes.values)
    sweeps = ms.Measurements((ms.measure(tiny("Llama"), tiny_task(), [ms.chain()]),))
    assert sweeps.to("meta")[0].log_probs.device.type == "meta"


def test_any_result_loads_by_its_file_and_a_tilde_is_home(svd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    svd.save("~/svd.safetensors")
    svd.subspace(3).save(tmp_path / "subspace")
    loaded = ms.load("~/svd.safetensors")
    assert type(loaded) is ms.Decomposition
    assert torch.equal(loaded.directions, svd.directions)
    assert type(ms.load(tmp_path / "subspace")) is ms.Subspace
    with pytest.raises(FileNotFoundError):
        ms.load("~/other")


def test_a_bare_basis_is_swept_and_ranked_as_its_decomposition_is(model, svd):
    task = tiny_task()
    for basis in (svd.subspace(svd.rank), svd.directions):
        sweep = ms.sweep_rank(model, task, basis, [0, 2, svd.rank])
        expected = ms.sweep_rank(model, task, svd, [0, 2, svd.rank])
        torch.testing.assert_close(sweep.measurement.log_probs, expected.measurement.log_probs)
        ranking = ms.rank_directions(model, task, basis)
        torch.testing.assert_close(ranking.effect, ms.rank_directions(model, task, svd).effect)
        assert ranking.singular_values.isnan().all()
        assert ranking.correlation() != ranking.correlation()
        ms.figures.direction_effects(ranking)
    own = ms.collect_writes(model, [task, *[tiny_task(seed=i) for i in range(5)]])
    per_site = ms.decompose(own, per="site")
    bare = [one.subspace(one.rank) for one in per_site]
    torch.testing.assert_close(
        ms.sweep_rank(model, task, bare, [3]).measurement.log_probs,
        ms.sweep_rank(model, task, per_site, [3]).measurement.log_probs,
    )
    with pytest.raises(ValueError, match="orthonormal"):
        ms.sweep_rank(model, task, torch.ones(32, 2))


def test_a_ranking_of_a_bare_basis_is_saved(model, svd, tmp_path):
    ranking = ms.rank_directions(model, tiny_task(), svd.subspace(3))
    ranking.save(tmp_path / "ranking")
    assert ms.load(tmp_path / "ranking").singular_values.isnan().all()


def test_directions_of_a_fine_tune_are_let_through_on_request_and_recorded(model, svd):
    other = dataclasses.replace(svd.source, weights="another", model="its fine-tune")
    foreign = dataclasses.replace(svd, source=other)
    edit = ms.keep(foreign, 3)
    with pytest.raises(ValueError, match="same_model=False"):
        ms.measure(model, tiny_task(), [edit])
    with pytest.raises(ValueError, match="same_model=False"):
        ms.fwd_hooks(model, edit)
    found = ms.measure(model, tiny_task(), [edit], same_model=False)
    torch.testing.assert_close(
        found.log_probs, ms.measure(model, tiny_task(), [ms.keep(svd, 3)]).log_probs
    )
    assert any("same_model=False" in note for note in found.source.notes)
    assert not any("self-check skipped" in note for note in found.source.notes)
    assert ms.fwd_hooks(model, edit, same_model=False)


def test_the_table_of_tokens(model, svd):
    task = tiny_task()
    found = ms.measure(model, task, [ms.keep(svd, 3), ms.chain()])
    table = found.tokens_to_pandas()
    assert [*table["position"]] == [5, 6, 7, 8] * 2
    assert [*table["token"]] == task.continuation.tolist() * 2
    sums = table.groupby("edit")["log_prob"].sum()
    torch.testing.assert_close(torch.tensor(sums.to_numpy()).double(), found.log_prob)
    own = table[table["edit"] == 1]
    assert (own["log_prob"] - own["clean_log_prob"]).abs().max() < 1e-6


def test_sweeps_and_rankings_have_it_by_rank_and_by_direction(model, svd):
    task = tiny_task()
    sweep = ms.sweep_rank(model, task, svd, [9, 2])
    table = sweep.tokens_to_pandas()
    assert [*table["rank"]] == [9] * 4 + [2] * 4
    sums = table.groupby("rank", sort=False)["log_prob"].sum()
    torch.testing.assert_close(torch.tensor(sums.to_numpy()).double(), sweep.measurement.log_prob)
    ranking = ms.rank_directions(model, task, svd)
    table = ranking.tokens_to_pandas()
    lost = (table["clean_log_prob"] - table["log_prob"]).groupby(table["direction"]).sum()
    assert lost.to_numpy() == pytest.approx(ranking.effect.numpy(), abs=1e-5)
    by_layer = ms.decompose(ms.collect_writes(model, task), per="layer")
    several = ms.rank_directions(model, task, by_layer)
    assert [*several.tokens_to_pandas()["direction"][::4]] == [*several.names]
