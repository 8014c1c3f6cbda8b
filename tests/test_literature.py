"""Claims of the literature: each number against a loop, a closed form or a planted truth."""

import pandas as pd
import pytest
import torch

import mechsvd as ms
from mechsvd.cli import main
from mechsvd.experiments import literature
from mechsvd.experiments.literature import CLAIMS
from mechsvd.linalg.decomposition import decompose_groups
from tests.conftest import tiny, tiny_task


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


@pytest.fixture(scope="module")
def texts():
    return [tiny_task(seed=i) for i in range(6)]


@pytest.fixture(scope="module")
def found(model, texts):
    return ms.compare_with_literature(model, texts)


def test_every_claim_has_a_row_with_a_null_and_a_difference(found, tmp_path):
    table = found.to_pandas()
    assert [*table["name"]] == [*CLAIMS]
    assert (table["low"] <= table["ours"] + 1e-9).all()
    assert (table["ours"] <= table["high"] + 1e-9).all()
    torch.testing.assert_close(found.difference[:, 0], found.ours[:, 0] - found.null[:, 0])
    assert [*table["n"]] == [6, 6, 6, 3, 3, 6, 6]
    found.save(tmp_path / "literature")
    assert ms.Literature.load(tmp_path / "literature").to_pandas().equals(table)


def test_one_claim_is_what_it_is_among_all(found, model, texts):
    alone = ms.compare_with_literature(model, texts, "complement")
    torch.testing.assert_close(alone.ours[0], found.ours[[*CLAIMS].index("complement")])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_variance_of_a_planted_rank(rank):
    torch.manual_seed(0)
    planted = (
        torch.randn(2, 400, rank, dtype=torch.float64)
        @ torch.linalg.qr(torch.randn(16, rank, dtype=torch.float64))[0].T
    )
    noise = 1e-3 * torch.randn(2, 400, 16, dtype=torch.float64)
    share = literature._share_of_variance(5 + planted + noise)  # the mean is no variance
    assert share == rank / 16


def test_equal_subspaces_share_d_over_k_and_random_ones_one():
    same = decompose_groups(torch.randn(1, 1, 40, 16))[0]
    assert literature._ratios([same, same], [4, 4])[0, 1] == pytest.approx(4)
    random = [decompose_groups(torch.randn(1, 1, 200, 64))[0] for _ in range(12)]
    ratios = literature._ratios(random, [8] * 12)
    assert literature.mean_of_pairs(ratios)(torch.arange(12)) == pytest.approx(1, abs=0.1)


def test_patching_against_a_loop(model, texts):
    clean, corrupt = literature._pairs(texts[:6])[0]
    basis = torch.linalg.qr(torch.randn(32, 5))[0]
    ids = int(clean.tokens[-1]), int(corrupt.tokens[-1])
    first, second = clean.tokens[None, :-1], corrupt.tokens[None, :-1]
    names = [site.hook_name for site in ms.find_sites(model)]
    _, cache = model.run_with_cache(first)

    def difference(tokens, projector):
        def patch(x, hook):
            return x + (cache[hook.name] - x) @ projector

        hooks = [(name, patch) for name in names] if projector is not None else []
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        return float(logits[ids[0]] - logits[ids[1]])

    start, goal = difference(second, None), difference(first, None)
    own, rest = basis @ basis.T, torch.eye(32) - basis @ basis.T
    expected = [(difference(second, p) - start) / (goal - start) for p in (own, rest)]
    measured = literature._patched(model, clean, corrupt, [ms.span(basis)], {})
    assert measured == pytest.approx(expected, abs=1e-4)
    everything = ms.span(torch.eye(32))
    _, nothing = literature._patched(model, clean, corrupt, [everything], {})
    assert nothing == pytest.approx(0, abs=1e-5)


def test_pairs_go_on_differently_after_different_texts(texts):
    same = [texts[0], texts[0]]
    pairs = literature._pairs([*same, *texts])
    assert len(pairs) == 3
    for clean, corrupt in pairs:
        assert len(clean.tokens) == len(corrupt.tokens)
        assert clean.tokens[-1] != corrupt.tokens[-1]
        assert (clean.tokens[:-1] != corrupt.tokens[:-1]).any()
    with pytest.raises(ValueError, match="0 pairs of texts differ"):
        literature._pairs(same * 3)


def test_removing_together_against_single_removals(model, texts, monkeypatch):
    monkeypatch.setattr(literature, "SETS", 2)
    monkeypatch.setattr(literature, "SET", 1)  # sets of one: they add exactly
    alone = ms.compare_with_literature(model, texts, "together")
    torch.testing.assert_close(alone.ours[0], torch.ones(3).double(), rtol=1e-3, atol=1e-3)


def test_the_best_rank_is_chosen_on_other_texts(model, texts, monkeypatch):
    """With folds of one text, against sweeps by hand."""
    monkeypatch.setattr(literature, "FOLDS", 6)
    found = ms.compare_with_literature(model, texts, "below")
    writes = ms.collect_writes(model, texts)
    changes = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        svd = ms.decompose(writes.at(writes.task_index != i))
        ranks = range(svd.rank)
        losses = torch.stack(
            [
                ms.sweep_rank(model, task, svd, ranks).measurement.effect / len(task.continuation)
                for task in texts
            ]
        )
        changes.append(float(losses[i, losses[others].mean(dim=0).argmin()]))
    assert float(found.ours[0, 0]) == pytest.approx(sum(changes) / 6, abs=1e-4)


def test_refusals(model, texts):
    with pytest.raises(ValueError, match="5 texts given, but claims of texts need at least 6"):
        ms.compare_with_literature(model, texts[:5])
    with pytest.raises(KeyError, match="No claim 'overlaps'"):
        ms.compare_with_literature(model, texts, "overlaps")


def test_the_command_line_prints_theirs_and_ours_and_writes_a_table(tmp_path, capsys):
    file = tmp_path / "table.csv"
    assert main(["literature", "attention", "--device", "cpu", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "theirs (arXiv:2508.16929): about 0.6" in printed
    table = pd.read_csv(file)
    assert f"ours: {table['ours'][0]:.3g} (" in printed
    assert table["n"][0] == 16
    assert main(["literature", "--prompt", "One text", "--device", "cpu"]) == 1
    assert "need at least 6" in capsys.readouterr().err
