"""Nulls that are run: laws, planted spectra, and overlaps by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.anchors import OverlapAnchors, overlap_anchors
from mechsvd.experiments.nulls import (
    NULLS,
    another_text,
    covariance_matched,
    equal_energy,
    null,
    random_tokens,
    reinitialised,
)
from mechsvd.experiments.statistics import jackknife, spread
from mechsvd.figures import subspaces as figures
from mechsvd.model.identity import fingerprint
from tests.conftest import tiny, tiny_task


def planted(sizes, d_model=12, samples=40, seed=0):
    """A decomposition of prescribed singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(sizes), generator=generator).double())[0]
        for n in (samples, d_model)
    )
    return ms.decompose((left * torch.tensor(sizes).double() @ right.T)[None])


def energy(svd, subspace):
    squares = svd.singular_values.double().square()
    inside = (svd.directions.double().T @ subspace.basis.double()).square().sum(dim=1)
    return float((squares * inside).sum() / squares.sum())


@pytest.fixture(scope="module")
def texts(embedded):
    return [
        ms.Task.from_text(embedded, prompt, max_new_tokens=12)
        for prompt in list(ms.SHORTFORM_PROMPTS.values())[:3]
    ]


@pytest.fixture(scope="module")
def anchors(embedded, texts):
    return overlap_anchors(embedded, texts, (4, 8), seed=3)


def test_random_tokens_keep_length_prompt_and_bos_and_leave_out_special_tokens(embedded, meaning):
    task = random_tokens(embedded, meaning, seed=1)
    special = set(embedded.tokenizer.all_special_ids)
    assert len(task.tokens) == len(meaning.tokens)
    assert task.prompt_length == meaning.prompt_length
    assert task.tokens[0] == meaning.tokens[0] == embedded.tokenizer.bos_token_id
    assert not special & set(task.tokens[1:].tolist())
    assert torch.equal(task.tokens, random_tokens(embedded, meaning, seed=1).tokens)
    assert not torch.equal(task.tokens, random_tokens(embedded, meaning, seed=2).tokens)
    assert len(task.pieces) == len(task.tokens)


def test_random_tokens_are_uniform_over_the_rest_of_the_vocabulary(embedded, meaning):
    drawn = torch.cat([random_tokens(embedded, meaning, seed).tokens[1:] for seed in range(400)])
    allowed = embedded.cfg.d_vocab - len(embedded.tokenizer.all_special_ids)
    counts = torch.bincount(drawn, minlength=embedded.cfg.d_vocab)
    expected = len(drawn) / allowed
    chi = float(((counts - expected).square() / expected)[counts > 0].sum())
    chi += expected * (allowed - int((counts > 0).sum()))
    assert abs(chi - allowed) < 5 * math.sqrt(2 * allowed)
    assert int(drawn.min()) == 2
    assert int(drawn.max()) == embedded.cfg.d_vocab - 1


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "GPT-NeoX"])
def test_a_reinitialised_model_has_other_matrices_of_the_same_moments(architecture, silent):
    model, task = tiny(architecture), tiny_task()
    before, name = fingerprint(model), model.cfg.model_name
    logits = model(task.tokens[None])
    twin = reinitialised(model, seed=1)
    assert fingerprint(model) == before != fingerprint(twin)
    assert model.cfg.model_name == name != twin.cfg.model_name
    torch.testing.assert_close(model(task.tokens[None]), logits, rtol=0, atol=0)
    assert not torch.allclose(twin(task.tokens[None]), logits, atol=0.1)
    pairs = zip(
        torch.nn.Module.named_parameters(model), torch.nn.Module.named_parameters(twin), strict=True
    )
    for (name, old), (_, new) in pairs:
        if old.ndim == 1:
            assert torch.equal(old, new), name
            continue
        assert (old != new).float().mean() > 0.99, name
        error = float(old.std()) / math.sqrt(old.numel())
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=5 * error), name
        assert float(new.std()) == pytest.approx(float(old.std()), abs=5 * error), name
        assert abs(float(torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1])) < (
            5 / math.sqrt(old.numel())
        ), name
    assert fingerprint(reinitialised(model, seed=1)) == fingerprint(twin)
    assert fingerprint(reinitialised(model, seed=2)) != fingerprint(twin)
    assert ms.self_check(twin).failure is None


def test_covariance_matched_directions_have_the_covariance_of_the_writes():
    sizes = [5.0, 3.0, 2.0, 1.0, 0.5]
    svd = planted(sizes)
    drawn = torch.cat([covariance_matched(svd, 1, seed).basis for seed in range(3000)], dim=1)
    shares = (svd.directions.double().T @ drawn).square().mean(dim=1)
    # the oracle: normal vectors from the dense covariance, by numpy
    dense = (svd.directions * svd.singular_values.square() @ svd.directions.T).double().numpy()
    normal = np.random.default_rng(0).multivariate_normal(
        np.zeros(12), dense, 200_000, method="eigh"
    )
    normal = torch.from_numpy(normal / np.linalg.norm(normal, axis=1, keepdims=True))
    expected = (normal @ svd.directions.double()).square().mean(dim=0)
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    assert float(shares.sum()) == pytest.approx(1)


def test_covariance_matched_is_the_first_directions_or_a_random_subspace_in_the_limits():
    steep = planted([1e4, 1e4, 1e4, 1e-2, 1e-2])
    assert float(
        ms.overlap([covariance_matched(steep, 3, 5), steep.subspace(3)]).values[0, 1]
    ) == pytest.approx(3, abs=1e-6)
    flat = planted([1.0] * 12)
    fixed = flat.subspace(4)
    values = torch.stack(
        [ms.overlap([covariance_matched(flat, 3, s), fixed]).values[0, 1] for s in range(400)]
    )
    assert float(values.mean()) == pytest.approx(1.0, abs=4 * float(values.std()) / 20)
    whole = covariance_matched(planted([3.0, 2, 1]), 3, 0)  # all of what the writes span
    assert energy(planted([3.0, 2, 1]), whole) == pytest.approx(1)


def test_an_equal_energy_subspace_carries_the_energy_of_the_first_directions_in_the_mean():
    svd = planted([4.0, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1])
    squares = svd.singular_values.double().square()
    share = float(squares[:2].sum() / squares.sum())
    rank = equal_energy(svd, 2).rank
    assert rank == round(share * 12) == 7
    mean = sum(energy(svd, equal_energy(svd, 2, seed)) for seed in range(600)) / 600
    assert mean == pytest.approx(rank / 12, abs=0.02)
    assert abs(rank / 12 - share) <= 0.5 / 12
    assert (equal_energy(svd, 0).rank, equal_energy(svd, 12).rank) == (0, 12)


def test_another_text_is_never_the_same_one_and_every_other_one_comes():
    svds = [planted([1.0], seed=seed) for seed in range(4)]
    drawn = {svds.index(another_text(svds, 2, seed)) for seed in range(40)}
    assert drawn == {0, 1, 3}


def test_one_door_draws_every_kind_and_seeds_repeat(embedded, meaning, meaning_svd):
    like = {
        "haar": meaning_svd.subspace(5),
        "covariance": (meaning_svd, 5),
        "equal energy": (meaning_svd, 5),
        "another text": ([meaning_svd] * 3, 1),
        "order": meaning_svd,
        "random tokens": (embedded, meaning),
        "reinitialised": embedded,
    }
    assert set(like) == set(NULLS)

    def number(drawn):
        if isinstance(drawn, torch.Tensor):
            return drawn
        for name in ("basis", "tokens", "directions"):
            if hasattr(drawn, name):
                return getattr(drawn, name)
        return fingerprint(drawn)

    for kind, thing in like.items():
        first, again, other = (number(null(kind, like=thing, seed=s)) for s in (4, 4, 5))
        same = torch.equal if isinstance(first, torch.Tensor) else str.__eq__
        assert same(first, again), kind
        if kind == "another text":  # here all are the same
            continue
        assert type(first) is not torch.Tensor or first.shape == other.shape
        assert not same(first, other), kind
    drawn = null("haar", like=meaning_svd.subspace(5))
    assert (drawn.rank, drawn.source) == (5, meaning_svd.source)
    assert torch.equal(
        null("covariance", like=(meaning_svd, 5), seed=2).basis,
        covariance_matched(meaning_svd, 5, 2).basis,
    )


def test_wrong_nulls_are_refused(embedded, meaning, meaning_svd, texts):
    with pytest.raises(KeyError, match="No null 'gauss': choose 'haar', 'covariance', 'equal"):
        null("gauss", like=meaning_svd)
    with pytest.raises(TypeError, match=r"`like` must be \(writes or svd, rank\) for 'covariance'"):
        null("covariance", like=meaning_svd)
    with pytest.raises(TypeError, match="A Subspace is needed here, but this is Decomposition"):
        null("haar", like=meaning_svd)
    with pytest.raises(ValueError, match="`seed` is -1"):
        null("order", like=meaning_svd, seed=-1)
    with pytest.raises(ValueError, match="another text needs at least two"):
        another_text([meaning_svd], 0)
    with pytest.raises(ValueError, match="`i` is 2"):
        another_text([meaning_svd] * 2, 2)
    for draw in (covariance_matched, equal_energy):
        with pytest.raises(ValueError, match="`rank` is 900"):
            draw(meaning_svd, 900)
        with pytest.raises(ValueError, match="no directions"):
            draw(torch.zeros(1, 20, 3), 0)
    with pytest.raises(ValueError, match="Token ids run"):
        random_tokens(embedded, ms.Task(torch.tensor([0, 5000]), 1))
    with pytest.raises(KeyError, match="No null 'haar': choose 'random tokens', 'reinitialised'"):
        overlap_anchors(embedded, texts, (4,), nulls=("haar",))
    with pytest.raises(ValueError, match="it takes two"):
        overlap_anchors(embedded, meaning, (4,))
    with pytest.raises(ValueError, match="`ranks` holds 128, but must be at most 120: below"):
        overlap_anchors(embedded, texts, (128,), nulls=())
    with pytest.raises(ValueError, match="`ranks` is 0"):
        overlap_anchors(embedded, texts, (0,))
    with pytest.raises(TypeError, match="no option `layer`: did you mean `layers`"):
        overlap_anchors(embedded, texts, (4,), layer=[0])


def test_anchors_of_one_pair_are_those_by_hand(embedded, texts, silent):
    """Each number again from the public calls, with `overlap`."""
    pair = texts[:2]
    found = overlap_anchors(embedded, pair, (6,), layers=[0, 1], nulls=("reinitialised",))
    table = found.to_pandas().set_index("kind")
    twin = reinitialised(embedded, 0)

    def basis(model, task, positions=None):
        writes = ms.collect_writes(model, task, layers=[0, 1], positions=positions)
        return ms.decompose(writes).subspace(6)

    def shared(*subspaces):
        compared = ms.overlap(subspaces)
        return float(compared.values[0, 1]), float(compared.chance_corrected[0, 1])

    first, second = (
        [basis(embedded, task, range(start, len(task.tokens), 2)) for start in (0, 1)]
        for task in pair
    )
    halves = np.mean([shared(*first), shared(*second)], axis=0)
    crossed = np.mean([shared(first[0], second[1]), shared(second[0], first[1])], axis=0)
    by_hand = {
        "texts": shared(*(basis(embedded, task) for task in pair)),
        "reinitialised": shared(*(basis(twin, task) for task in pair)),
        "halves of a text": halves,
        "halves of two texts": crossed,
        "haar": (36 / 128, 0.0),
        "forced": (0.0, -36 / 128 / (6 - 36 / 128)),
    }
    assert set(by_hand) == set(table.index)
    for kind, values in by_hand.items():
        assert table.loc[kind, ["shared", "chance_corrected"]].tolist() == pytest.approx(
            values, abs=1e-5
        ), kind
    assert table["pairs"].to_dict() == {
        "texts": 1, "halves of a text": 2, "halves of two texts": 2, "reinitialised": 1,
        "haar": 0, "forced": 0,
    }  # fmt: skip
    assert math.isnan(table.loc["texts", "low"])  # two texts have no interval


def test_random_tokens_of_the_anchors_are_collected_from_tasks_of_the_same_lengths(
    embedded, texts, monkeypatch
):
    from mechsvd.experiments import anchors

    drawn = []

    def kept(*args):
        drawn.append(random_tokens(*args))
        return drawn[-1]

    monkeypatch.setattr(anchors, "random_tokens", kept)
    found = overlap_anchors(embedded, texts, (8,), nulls=("random tokens",), seed=3)
    assert [len(t.tokens) for t in drawn] == [len(t.tokens) for t in texts]
    svds = [ms.decompose(ms.collect_writes(embedded, task)).subspace(8) for task in drawn]
    mean = ms.overlap(svds).to_pandas()["overlap"].mean()
    assert float(found.shared[found.kinds.index("random tokens"), 0]) == pytest.approx(mean)


def test_the_interval_is_a_jackknife_over_whole_texts(embedded, texts, anchors):
    from scipy.stats import t

    svds = [ms.decompose(ms.collect_writes(embedded, task)).subspace(8) for task in texts]
    corrected = ms.overlap(svds).chance_corrected

    def mean(kept):
        pairs = [(i, j) for i in kept.tolist() for j in kept.tolist() if i < j]
        return sum(float(corrected[pair]) for pair in pairs) / len(pairs)

    half = t.ppf(0.975, 2) * spread(jackknife(mean, 3))
    row = anchors.to_pandas().query("kind == 'texts' and rank == 8").iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(
        (row["chance_corrected"] - half, row["chance_corrected"] + half), abs=1e-6
    )


def test_null_texts_and_an_untrained_model_share_more_than_random_subspaces(anchors):
    values = dict(zip(anchors.kinds, anchors.chance_corrected[:, -1].tolist(), strict=True))
    assert values["haar"] == 0
    assert min(values["random tokens"], values["reinitialised"]) > 0.05


def test_without_bos_texts_do_not_share_its_writes(embedded, texts, anchors):
    without = overlap_anchors(embedded, texts, (4, 8), nulls=(), skip_bos=True)
    assert without.kinds[0] == anchors.kinds[0] == "texts"
    assert (without.shared[0] < anchors.shared[0]).all()


def test_anchors_repeat_print_themselves_come_back_and_are_drawn(
    embedded, texts, anchors, tmp_path
):
    again = overlap_anchors(embedded, texts, (4, 8), seed=3)
    assert torch.equal(again.shared, anchors.shared)
    assert len(repr(anchors).splitlines()) == 3
    assert list(anchors.to_pandas()) == [
        "rank", "kind", "shared", "chance_corrected", "low", "high", "pairs",
    ]  # fmt: skip
    assert len(anchors.to_pandas()) == 2 * len(anchors.kinds)
    anchors.save(tmp_path / "a.safetensors")
    loaded = OverlapAnchors.load(tmp_path / "a.safetensors")
    assert repr(loaded) == repr(anchors)
    assert loaded.source.seed == 3
    figure = figures.overlap_anchors(anchors)
    assert [trace.name for trace in figure.data] == list(anchors.kinds)
    assert list(figure.data[0].y) == pytest.approx(anchors.chance_corrected[0].tolist())
    assert figure.layout.xaxis.title.text == "rank k"
    with pytest.raises(ValueError, match="`pairs` of an OverlapAnchors has length 1"):
        dataclasses.replace(anchors, pairs=(1,))
