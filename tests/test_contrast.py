"""Contrasts: planted special directions, held-out texts, the null, and single measurements."""

import random

import pytest
import scipy.linalg
import torch

import mechsvd as ms
from mechsvd.demo.language import write
from mechsvd.experiments import contrast_runs, contrasts
from mechsvd.experiments.contrast_results import METHODS, Contrast, ContrastSweep
from mechsvd.experiments.contrasts import contrast, contrast_sweep
from mechsvd.figures.contrasts import contrast_map
from mechsvd.linalg.contrasts import (
    orthonormal,
    second_moment,
    special_directions,
    top_directions,
)

from .conftest import tiny, tiny_hf

pytestmark = pytest.mark.filterwarnings("ignore")


def texts(model, shape, count, seed=0, length=26):
    rng, found = random.Random(seed), {}
    while len(found) < count:
        ids = model.to_tokens(write(shape, rng)[0])[0, :length].cpu()
        if len(ids) == length:
            found[tuple(ids.tolist())] = ms.Task(ids, 12)
    return list(found.values())


@pytest.fixture(scope="module")
def groups(embedded):
    return {shape: texts(embedded, shape, 4) for shape in ("message", "translation", "reflection")}


@pytest.fixture(scope="module")
def found(embedded, groups):
    return contrast(embedded, groups, 6, seeds=2, seed=3)


def sample(generator, basis, size, count=2000):
    """Vectors of unit variance in 24 dimensions, and larger in a planted subspace."""
    noise = torch.randn(count, 24, generator=generator, dtype=torch.float64)
    planted = torch.randn(count, basis.shape[1], generator=generator, dtype=torch.float64)
    return noise + size * planted @ basis.T


def test_a_planted_subspace_is_found_and_a_larger_shared_one_is_not():
    generator = torch.Generator().manual_seed(0)
    shared, own = ms.random_subspace(24, 6, 1).basis.split([3, 3], dim=1)
    other = sample(generator, shared, 30.0)
    group = torch.cat([sample(generator, shared, 30.0), sample(generator, own, 8.0)])
    moments = [second_moment(x, unit=True) for x in (group, other)]
    special, values = special_directions(moments[0], moments[1][None], 3)
    assert ms.principal_angles(ms.Subspace(special), ms.Subspace(own)).max() < 0.1
    assert values.min() > 5
    top = ms.Subspace(top_directions(second_moment(group), 3))
    assert ms.principal_angles(top, ms.Subspace(shared)).max() < 0.1
    _, none = special_directions(moments[1], moments[1][None], 3)
    assert none.max() <= 1


def kinds_model(planted):
    """Tokens below and above 128 switch on one neuron each, which writes along a direction of its own."""
    hf_model = tiny_hf("Llama")
    sign = torch.where(torch.arange(256) < 128, 4.0, -4.0)
    with torch.no_grad():
        hf_model.model.embed_tokens.weight.mul_(0.3)[:, 0] = sign
        for layer in hf_model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
        block = hf_model.model.layers[1]
        block.post_attention_layernorm.weight.fill_(1.0)
        for neuron, side in enumerate((1.0, -1.0)):
            for projection in (block.mlp.gate_proj, block.mlp.up_proj):
                projection.weight[neuron] = 0.0
                projection.weight[neuron, 0] = side
            block.mlp.down_proj.weight[:, neuron] = planted[:, neuron]
    return tiny("Llama", hf_model)


def kind(low, count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, low + 126, (count, 12), generator=generator)
    return [ms.Task(torch.cat([torch.tensor([0]), row]), 6) for row in ids]


def test_a_planted_subspace_of_a_model_is_found_and_none_between_texts_of_one_kind():
    planted = ms.random_subspace(32, 2, 5).basis.float()
    model = kinds_model(planted)
    at = {"layers": [1], "components": ["mlp"]}
    found = contrast(model, {"low": kind(2, 8, 0), "high": kind(130, 8, 1)}, 1, seeds=1, **at)
    for number, name in enumerate(found.groups):
        angle = ms.principal_angles(found.subspace(name), ms.Subspace(planted[:, [number]]))
        assert float(angle) < 0.1
    own = found.summary(draws=200).set_index(["method", "group"]).loc[("special", "all")]
    assert own.low > 3
    same = contrast(model, {"one": kind(2, 8, 2), "other": kind(2, 8, 3)}, 1, seeds=1, **at)
    none = same.summary(draws=200).set_index(["method", "group"]).loc[("special", "all")]
    assert none.low < 1 < none.high


def test_nothing_is_special_between_two_samples_of_one_kind():
    generator = torch.Generator().manual_seed(1)
    shared = ms.random_subspace(24, 3, 1).basis
    fits = [second_moment(sample(generator, shared, 8.0), unit=True) for _ in range(2)]
    special, values = special_directions(fits[0], fits[1][None], 3)
    assert values.max() < 1.5
    unseen = [sample(generator, shared, 8.0) @ special for _ in range(2)]
    assert float(unseen[0].square().sum() / unseen[1].square().sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_eigenvectors_are_those_of_scipy(damping):
    generator = torch.Generator().manual_seed(2)
    scales = torch.rand(4, 1, 24, generator=generator, dtype=torch.float64) + 0.2
    vectors = scales * torch.randn(4, 50, 24, generator=generator, dtype=torch.float64)
    moments = second_moment(vectors, unit=True)
    special, values = special_directions(moments[0], moments[1:], 5, damping)
    own, others = moments[0] / 50, moments[1:].mean(dim=0) / 50
    damped = others + damping * torch.linalg.eigvalsh(others).mean() * torch.eye(24)
    expected, eigenvectors = scipy.linalg.eigh(own.numpy(), damped.numpy())
    torch.testing.assert_close(values, torch.from_numpy(expected[::-1][:5].copy()))
    for j in range(1, 6):  # every first j span the same
        span = ms.span(torch.from_numpy(eigenvectors[:, ::-1][:, :j].copy()))
        assert ms.principal_angles(span, ms.Subspace(special[:, :j])).max() < 1e-6


def test_a_batch_of_groups_is_a_loop_and_the_scale_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    moments = second_moment(torch.randn(2, 3, 40, 8, generator=generator).double())
    together = special_directions(moments[:, 0], moments[:, 1:], 2)
    for i in range(2):
        alone = special_directions(7 * moments[i, 0], 0.1 * moments[i, 1:], 2)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], other)


def test_unit_writes_count_equally_and_zero_ones_not_at_all():
    vectors = torch.tensor([[3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
    torch.testing.assert_close(second_moment(vectors, unit=True), torch.eye(2).double())
    with pytest.raises(ValueError, match="no vector but zero"):
        special_directions(torch.zeros(2, 2), torch.eye(2)[None], 1)


def test_orthonormal_columns_span_the_first_vectors_in_order():
    vectors = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(4)).double()
    columns = orthonormal(vectors)
    torch.testing.assert_close(columns.mT @ columns, torch.eye(4).double().expand(3, -1, -1))
    inside = columns[1, :, :2] @ (columns[1, :, :2].T @ vectors[1, :, :2])
    torch.testing.assert_close(inside, vectors[1, :, :2])


def test_special_directions_cost_their_own_group_and_halves_of_one_group_do_not(found):
    table = found.summary(draws=200).set_index(["method", "group"])
    special, null = table.loc[("special", "all")], table.loc[("same kind", "all")]
    assert special.ratio > 10 > null.ratio
    assert special.low > 5
    assert null.low < 1 < null.high
    assert table.loc[("random", "all")].ratio < 3
    assert (table.low <= table.ratio).all()
    assert (table.ratio <= table.high).all()
    assert special.own == pytest.approx(float(found.matrix().diagonal().mean()))
    others = float(found.matrix().fill_diagonal_(0).sum()) / 6
    assert special.others == pytest.approx(others)
    assert 0 < found.noise_floor < 1e-3 * special.others


@pytest.mark.parametrize("per", ["pool", "site"])
def test_effects_are_those_of_single_measurements(embedded, groups, per):
    found = contrast(embedded, groups, 2, per=per, seeds=1)
    tasks = [task for one in groups.values() for task in one]
    for i, method in enumerate(METHODS):
        for g, name in enumerate(groups):
            subspace = found.subspace(name, method)
            for text in found.held_out[0].nonzero().flatten().tolist()[::3]:
                edit = ms.ablate(subspace)
                alone = ms.measure(embedded, tasks[text], [edit], metric=ms.kl_divergence)
                expected = float(found.values[0, i, g, text])
                assert float(alone.effect) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_null_removes_the_directions_of_half_a_group(embedded, groups):
    found = contrast(embedded, groups, 2, seeds=1)
    numbers = found.text_group.tolist()
    split = contrast_runs.split_texts(found.groups, found.text_group, 0.5, 0)
    assert torch.equal(split.held_out, found.held_out[0])
    tasks = [task for one in groups.values() for task in one]
    trained = [i for i in range(4) if not split.held_out[i]]
    (half,) = (int(i) for i in trained if split.half[i] == 0)
    (other,) = (int(i) for i in trained if split.half[i] == 1)
    moments = [
        second_moment(ms.collect_writes(embedded, tasks[i]).values.flatten(0, 1), unit=True)
        for i in (half, other)
    ]
    special, _ = special_directions(moments[0], moments[1][None], 2)
    for text in (i for i in range(4) if split.held_out[i]):
        edit = ms.ablate(special.float())
        alone = ms.measure(embedded, tasks[text], [edit], metric=ms.kl_divergence)
        side = int(split.half[text])  # own half is number 0
        expected = float(found.null_values[0, side, text])
        assert numbers[text] == 0
        assert float(alone.effect) == pytest.approx(expected, rel=1e-3)


def test_held_out_texts_are_not_in_the_fit(embedded, groups):
    """The same training texts give the same directions, whatever the held-out ones are."""
    first = contrast(embedded, groups, 2, seeds=1)
    changed, start = {}, 0
    for name, tasks in groups.items():
        fresh = texts(embedded, name, 4, seed=9)
        changed[name] = [
            fresh[i] if first.held_out[0, start + i] else task for i, task in enumerate(tasks)
        ]
        start += len(tasks)
    second = contrast(embedded, changed, 2, seeds=1)
    assert torch.equal(first.held_out, second.held_out)
    torch.testing.assert_close(first.directions, second.directions)
    held = first.held_out[0]
    assert not torch.isclose(first.values[..., held], second.values[..., held]).any(dim=-1).all()
    assert first.values[..., ~held].isnan().all()
    assert first.values[..., held].isfinite().all()
    assert not first.null_values[..., held].isnan().any()


def test_each_seed_splits_every_group_in_two(found):
    assert found.held_out.view(2, 3, 4).sum(dim=-1).tolist() == [[2, 2, 2], [2, 2, 2]]
    assert found.source.seed == 3
    assert len(found.source.tokens) == 12
    again = contrast_runs.split_texts(found.groups, found.text_group, 0.5, 4)
    assert torch.equal(again.held_out, found.held_out[1])


def test_one_call_measures_all_edits_of_a_held_out_group(embedded, groups, monkeypatch):
    counts = []

    def counted(model, tasks, edits, **options):
        counts.append((len(tasks), len(edits)))
        return measure(model, tasks, edits, **options)

    measure = contrast_runs.measure
    monkeypatch.setattr(contrast_runs, "measure", counted)
    sweep = contrast_sweep(embedded, groups, [1, 3], [0.05, 0.5], seeds=1)
    assert counts == [(2, 4 * 3 + 2 * 2 * 3 + 4 * 2)] * 3
    single = contrast(embedded, groups, 3, damping=0.5, seeds=1)
    assert (sweep[3].k, sweep[3].damping) == (3, 0.5)
    for name in ("values", "null_values", "directions"):
        torch.testing.assert_close(
            getattr(sweep[3], name),
            getattr(single, name),
            equal_nan=True,
            rtol=1e-3,
            atol=1e-5,
        )
    table = sweep.to_pandas(draws=50)
    assert list(table.columns[:3]) == ["k", "damping", "method"]
    assert len(table) == 4 * 4
    assert len(repr(sweep).splitlines()) == 3


def test_the_table_has_a_row_per_seed_method_and_pair(found, tmp_path):
    table = found.to_pandas()
    assert len(table) == 2 * (3 * 9 + 6)
    row = table.query(
        "seed == 1 and method == 'singular' and removed == 'message' and measured == 'reflection'"
    )
    own = found.held_out[1] & (found.text_group == 2)
    assert float(row.effect.iloc[0]) == pytest.approx(float(found.values[1, 1, 0, own].mean()))
    assert len(repr(found).splitlines()) == 3
    found.save(tmp_path / "contrast")
    again = Contrast.load(tmp_path / "contrast")
    assert again.summary(draws=20).equals(found.summary(draws=20))
    ContrastSweep((found,)).save(tmp_path / "sweep")
    assert len(ContrastSweep.load(tmp_path / "sweep")) == 1


def test_the_map_shows_removed_by_measured(found):
    figure = contrast_map(found)
    figure.to_json()
    heat = figure.data[0]
    torch.testing.assert_close(torch.tensor(heat.z), found.matrix())
    assert list(heat.y) == list(heat.x) == list(found.groups)
    assert heat.text[0][0] == f"{float(found.matrix()[0, 0]):.2g}"
    assert "nats per token" in heat.colorbar.title.text
    with pytest.raises(ValueError, match="`method` is 'pca'"):
        contrast_map(found, "pca")


def test_errors_name_the_group_and_what_to_do(embedded, groups):
    few = {**groups, "message": groups["message"][:3]}
    for wrong, options, error, match in [
        (few, {}, ValueError, "Group 'message' has 3 texts.*at least four"),
        ({"message": groups["message"]}, {}, ValueError, r"1 group\(s\) given"),
        ({**groups, "more": groups["message"]}, {}, ValueError, "'more' is also a text of 'mess"),
        (groups, {"k": 0}, ValueError, "`k` is 0"),
        (groups, {"k": 128}, ValueError, "`k` is 128"),
        (groups, {"damping": 0.0}, ValueError, "`damping` is 0.0"),
        (groups, {"train_share": 0.9}, ValueError, "of which 4 would be for training"),
        (groups, {"seeds": 0}, ValueError, "`seeds` is 0"),
        (groups, {"k": 60, "per": "site"}, ValueError, "'message' has 52 training writes"),
        (groups, {"positions": [3], "layers": [0], "k": 5}, ValueError, "4 training writes"),
        (groups, {"dampings": 0.1}, TypeError, "no option `dampings`: did you mean `damping`"),
    ]:
        with pytest.raises(error, match=match):
            contrast(embedded, wrong, **options)
    with pytest.raises(TypeError, match="`groups` must be lists of tasks by name"):
        contrasts._valid_groups([groups["message"]])
    with pytest.raises(ValueError, match="`per` is 'layer'"):
        contrasts._contrasts(embedded, groups, [(2, 0.1)], "layer", 0.5, 1, 0, {})
    with pytest.raises(ValueError, match="`dampings` is empty"):
        contrast_sweep(embedded, groups, dampings=[])


def test_results_refuse_other_groups_methods_and_splits(found):
    for arguments, match in [
        (("poem",), "`group` is 'poem'"),
        (("message", "pca"), "`method` is 'pca'"),
        (("message", "special", 2), "`seed` is 2"),
    ]:
        with pytest.raises(ValueError, match=match):
            found.subspace(*arguments)
    with pytest.raises(ValueError, match="`confidence` is 1.0"):
        found.summary(confidence=1.0)
