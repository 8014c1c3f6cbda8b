"""A list of texts gives the tables of single calls, in shared forward passes; and texts from files."""

import json
from dataclasses import replace

import pytest
import torch

import mechsvd as ms
from mechsvd.engine.passes import _Setup

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (9, 12, 9, 7, 12, 9)


@pytest.fixture(scope="module")
def texts(real):
    """Six texts of three lengths, with continuations of several lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 400, (6, 12), generator=generator)
    ids[:, 0] = real.task.tokens[0]
    return [
        ms.Task(row[:n], 2 + i % 4) for i, (row, n) in enumerate(zip(ids, LENGTHS, strict=True))
    ]


@pytest.fixture(scope="module")
def svd(real, texts):
    """The first forty directions of all texts."""
    svd = ms.decompose(ms.collect_writes(real.model, texts))
    return replace(
        svd,
        singular_values=svd.singular_values[:40],
        directions=svd.directions[:, :40],
        left=svd.left[..., :40],
    )


CALLS = {
    "measure": lambda m, t, svd, **o: ms.measure(m, t, [ms.keep(svd, 5), ms.chain()], **o),
    "sweep_rank": lambda m, t, svd, **o: ms.sweep_rank(m, t, svd, range(0, svd.rank, 7), **o),
    "rank_directions": lambda m, t, svd, **o: ms.rank_directions(m, t, svd, **o),
    "sweep_ridge": lambda m, t, svd, **o: ms.sweep_ridge(m, t, svd, [0.5, 9.0], **o),
    "critical_rank": lambda m, t, svd, **o: ms.critical_rank(m, t, svd, 1.0, **o),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, None) for name in CALLS), ("measure", 1), ("sweep_rank", 5)]
)
def test_the_table_is_that_of_single_calls(name, batch_size, real, texts, svd):
    call = CALLS[name]
    many = call(real.model, texts, svd, batch_size=batch_size)
    table = many.to_pandas()
    assert table.columns[0] == "task"
    assert table["task"].tolist() == sorted(table["task"])
    for number, task in enumerate(texts):
        alone = call(real.model, task, svd).to_pandas()
        rows = table[table["task"] == number].drop(columns="task").reset_index(drop=True)
        assert list(rows.columns) == list(alone.columns)
        for column in rows.columns:
            if rows[column].dtype.kind == "f":
                assert rows[column].to_numpy() == pytest.approx(
                    alone[column].to_numpy(), rel=1e-4, abs=2e-4
                ), column
    assert len(many) == 6
    assert many[3].source.tokens == (tuple(texts[3].tokens.tolist()),)


def test_metrics_and_baselines_of_each_text_are_its_own(real, texts, svd):
    def metric(logits, clean, task):
        return logits[:, -1, int(task.tokens[-1])]

    same = [task for task in texts if len(task.tokens) == 9]
    baseline = ms.resample_baseline(ms.collect_writes(real.model, same), seed=1)
    edits = [ms.ablate(svd, 6, baseline=baseline), ms.keep(svd, 9)]
    many = ms.measure(real.model, same, edits, metric=metric, noise_floor=True)
    for part, task in zip(many.parts, same, strict=True):
        alone = ms.measure(real.model, task, edits, metric=metric, noise_floor=True)
        torch.testing.assert_close(part.value, alone.value, rtol=0, atol=1e-4)
        assert part.source.notes == alone.source.notes
        # itself rounding noise, in batches of another composition: the same order of magnitude
        assert alone.noise_floor / 4 < part.noise_floor < 4 * alone.noise_floor + 1e-6
    assert many.effect.shape == (3, 2)


def test_texts_of_one_length_share_forward_passes(real, texts, svd, monkeypatch):
    passes, forward = [], _Setup.forward

    def counted(self, stacks, numbers, rows):
        passes.append(len(numbers.unique()))
        return forward(self, stacks, numbers, rows)

    monkeypatch.setattr(_Setup, "forward", counted)
    ms.measure(real.model, texts, [ms.keep(svd, 3)] * 4)
    assert sorted(passes) == [1, 2, 3]  # one pass a length


@pytest.mark.fault(41)
def test_beside_a_users_hook_each_row_of_each_text_runs_alone(real, texts, svd):
    seen = []
    real.model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(len(x)))
    try:
        ms.measure(real.model, texts[:2], [ms.keep(svd, 3)] * 2)
    finally:
        real.model.reset_hooks()
    assert seen == [1] * 6


def test_a_summary_is_the_mean_over_texts_with_an_interval(real, texts, svd):
    many = ms.sweep_rank(real.model, texts, svd, [0, 20, svd.rank], metric=ms.kl_divergence)
    table, values = many.summary(), torch.stack([p.measurement.value for p in many.parts])
    assert table["mean"].tolist() == pytest.approx(values.mean(dim=0).tolist())
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()
    assert table["n"].tolist() == [6] * 3
    ranking = ms.rank_directions(real.model, texts, svd)
    found = ranking.summary()
    assert found["mean"].tolist() == pytest.approx(ranking.effect.mean(dim=0).tolist())
    assert {"p_value", "p_family", "q_value"} <= set(found.columns)
    assert (found["p_family"] >= found["p_value"] - 1e-12).all()
    halves = ranking.agreement_of_halves()
    assert -1 <= halves.low <= halves.mean <= halves.high <= 1
    order = ms.order_by_effect(ranking, by="kl_divergence")
    assert (ranking.mean("kl_divergence")[order].diff() <= 0).all()
    ranks = ms.critical_rank(real.model, texts, svd, 1.0).summary()
    assert ranks["which"].tolist() == ["critical", "lasting"]
    with pytest.raises(ValueError, match="at least two texts"):
        ms.sweep_rank(real.model, texts[:1], svd, [0]).summary()
    with pytest.raises(ValueError, match="`column` is 'loss', but must be one of"):
        many.summary("loss")


def test_results_of_many_texts_save_and_load(real, texts, svd, tmp_path):
    many = ms.sweep_rank(real.model, texts, svd, [0, 9])
    many.save(tmp_path / "many.safetensors")
    loaded = ms.RankSweeps.load(tmp_path / "many.safetensors")
    assert loaded.to_pandas().equals(many.to_pandas())


def test_several_prompts_are_continued_as_each_alone(real, svd):
    prompts, edits = ["Once", "One day"], [None, ms.keep(svd, 30)]
    both = ms.generate(real.model, prompts, edits, max_new_tokens=4)
    assert both == [ms.generate(real.model, p, edits, max_new_tokens=4) for p in prompts]


SOURCES = {
    "lines": ("a.txt", "I believe\n\nWe think\n"),
    "json lines": (
        "a.jsonl",
        '{"prompt": "I believe"}\n{"prompt": "We think", "continuation": " that", "name": "b"}\n',
    ),
    "json list": ("a.json", json.dumps(["I believe", ["We think", " that"]])),
    "json object": ("a.json", json.dumps({"a": "I believe", "b": {"prompt": "We think"}})),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_texts_come_from_files(kind, embedded, tmp_path):
    name, content = SOURCES[kind]
    (tmp_path / name).write_text(content)
    found = ms.tasks_from(embedded, tmp_path / name, max_new_tokens=4)
    first = ms.Task.from_text(embedded, "I believe", max_new_tokens=4)
    assert found[0].tokens.tolist() == first.tokens.tolist()
    assert found[1].text()[0].endswith("We think")
    assert found[1].name in ("", "b")
    if " that" in content:
        assert found[1].text()[1] == " that"


def test_texts_come_from_lists_rows_and_choices(embedded):
    rows = ({"prompt": "I believe", "continuation": c, "wrong": " a"} for c in (" the",))
    (choice,) = ms.tasks_from(embedded, rows)
    assert choice.right
    assert choice.wrong
    mixed = ms.tasks_from(embedded, ["I believe", ("We think", " that")], max_new_tokens=2)
    assert [len(task.continuation) for task in mixed] == [2, 1]


BAD = [
    (["ok", ""], "text 1 has no `prompt`: it is empty"),
    (["ok", 3], "text 1 must be a prompt, a pair"),
    ([{"prompt": "ok", "continuation": 4}], "text 0: `continuation` must be text, but is 4"),
    ([{"prompt": "ok", "wrong": " a"}], "text 0: `wrong` needs `continuation`"),
    (
        [{"messages": [{"role": "user", "content": "hi"}]}],
        "text 0: the model's tokenizer has no chat",
    ),
    ([], "There are no texts"),
    (["ok", "long " * 600], "text 1: The prompt has"),
]


@pytest.mark.parametrize(("source", "message"), BAD)
def test_a_bad_text_is_named(embedded, source, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ms.tasks_from(embedded, source, max_new_tokens=2)


@pytest.mark.fault(6)
def test_a_bad_text_is_named_by_its_line_or_skipped(embedded, tmp_path, recwarn):
    (tmp_path / "a.jsonl").write_text('{"prompt": "I believe"}\n\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"text 1 \(line 3 of a\.jsonl\) has no `prompt`"):
        ms.tasks_from(embedded, tmp_path / "a.jsonl", max_new_tokens=2)
    recwarn.clear()
    assert len(ms.tasks_from(embedded, tmp_path / "a.jsonl", on_bad="skip", max_new_tokens=2)) == 1
    assert any("1 texts are left out: text 1 (line 3" in str(w.message) for w in recwarn)
    recwarn.clear()
    ms.tasks_from(embedded, ["I believe", "I believe"], max_new_tokens=2)
    assert any("text 1 has the same tokens as text 0" in str(w.message) for w in recwarn)
    with pytest.raises(FileNotFoundError, match="There is no file of texts"):
        ms.tasks_from(embedded, tmp_path / "b.txt")


def test_held_out_directions_come_from_other_folds(real, texts):
    found = ms.fit_and_measure(real.model, texts, 3, ranks=[0, 10, 30], orders=("singular value",))
    for fold in range(3):
        own = [i for i in range(6) if found.fold[i] == fold]
        others = [texts[i] for i in range(6) if found.fold[i] != fold]
        fitted = ms.decompose(ms.collect_writes(real.model, others))
        for i in own:
            sweep = ms.sweep_rank(real.model, texts[i], fitted, [0, 10, 30])
            part = found.fit("other texts").sweeps[i]
            expected = sweep.to_pandas()["kl_divergence"].to_numpy()
            assert part.to_pandas()["kl_divergence"].to_numpy() == pytest.approx(expected, abs=1e-3)
    own = ms.decompose(ms.collect_writes(real.model, texts[2]))
    sweep = ms.sweep_rank(real.model, texts[2], own, [0, 10, 30])
    part = found.fit("own text").sweeps[2].to_pandas()["kl_divergence"].to_numpy()
    assert part == pytest.approx(sweep.to_pandas()["kl_divergence"].to_numpy(), abs=1e-3)
    table = found.summary()
    assert set(table["fitted"]) == {
        "own text",
        "one other text",
        "other texts",
        "random directions",
    }
    assert (table["n"] == 6).all()


def test_groups_stay_in_one_fold_and_too_few_are_refused(real, texts):
    labels = ["a", "a", "b", "b", "c", "c"]
    few = {"ranks": [0, 5], "orders": ["singular value"]}
    found = ms.fit_and_measure(real.model, texts, 2, groups=labels, **few)
    assert all(found.fold[i] == found.fold[i + 1] for i in (0, 2, 4))
    with pytest.raises(ValueError, match="with one, the curve is fitted on what it measures"):
        ms.fit_and_measure(real.model, texts[:1])
    with pytest.raises(
        ValueError, match="`folds` is 5, but must be from 2 to the 3 texts or groups"
    ):
        ms.fit_and_measure(real.model, texts, groups=labels)
    with pytest.raises(ValueError, match="`orders` holds 'size', but must be of"):
        ms.fit_and_measure(real.model, texts, 2, orders=["size"])
    with pytest.raises(KeyError, match="No fit"):
        found.fit("nothing")


def test_each_text_has_its_own_donor(real):
    tokens = real.task.tokens
    texts = [ms.Task(tokens[:14], 7), ms.Task(tokens[1:12], 6)]
    donors = [ms.Task(tokens[2:16], 7), ms.Task(tokens[3:17], 7)]
    patch = lambda baseline: ms.ablate(real.svd.subspace(6), baseline=baseline)
    together = ms.measure(
        real.model, texts, patch(ms.donor_baseline(real.model, donors, texts=texts))
    )
    for text, donor, part in zip(texts, donors, together, strict=True):
        alone = ms.measure(real.model, text, patch(ms.donor_baseline(real.model, donor)))
        torch.testing.assert_close(part.log_prob, alone.log_prob, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="one per donor; give them with a list of donors"):
        ms.donor_baseline(real.model, donors)
    with pytest.raises(ValueError, match="2 donors for 1 different texts"):
        ms.donor_baseline(real.model, donors, texts=[texts[0]] * 2)
    with pytest.raises(ValueError, match="Donor 0 has 11 tokens, but its text has 14"):
        ms.donor_baseline(real.model, texts[::-1], texts=texts)
