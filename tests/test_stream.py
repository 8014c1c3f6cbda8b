"""A stream of writes decomposes as the collected writes do, for any cuts, shards, passes and order."""

import json
import random
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mechsvd as ms
from mechsvd.demo.language import SHAPES, write
from mechsvd.engine import stream as stream_file
from tests.conftest import REAL, STORIES, tiny, tiny_task
from tests.test_moments import assert_same

WAYS = [
    {},
    {"center": True},
    {"per": "site"},
    {"per_layer": True},
    {"per": "site", "center": True},
    {"scale": "site"},
]


def texts(count, seed=0):
    """Texts of the embedded model's language."""
    rng = random.Random(seed)
    return [write(rng.choice(SHAPES), rng)[0] for _ in range(count)]


@pytest.fixture(scope="module", params=REAL)
def exact(request):
    """A trained model in float64, so that results can be compared to the last digits, and texts."""
    from mechsvd.demo import WEIGHTS

    directory = {"embedded": WEIGHTS, "stories260k": STORIES}[request.param]
    model = ms.load_model(directory, device="cpu", dtype=torch.float64)
    return SimpleNamespace(model=model, texts=texts(6))


def cut_tasks(model, documents, context):
    """The oracle: rows cut by hand, each with BOS, as tasks."""
    bos, tasks = model.tokenizer.bos_token_id, []
    for text in documents:
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        cuts = [ids[i : i + context - 1] for i in range(0, len(ids), context - 1)]
        tasks += [ms.Task(torch.tensor([bos, *cut]), 1) for cut in cuts]
    return tasks


@pytest.fixture(scope="module")
def collected(exact):
    """The writes of the texts, collected at once."""
    return ms.collect_writes(exact.model, cut_tasks(exact.model, exact.texts, 32))


@pytest.fixture(scope="module")
def whole(exact):
    return ms.stream_writes(exact.model, exact.texts, context=32)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_decomposes_as_the_collected_writes_do(whole, collected, way):
    assert_same(whole.decompose(**way), ms.decompose(collected, **way), rtol=1e-8, above=1e-4)


def test_it_is_what_a_plain_loop_over_hooks_sums(exact, whole):
    """One `run_with_cache` per row, and outer products, with nothing of mechsvd."""
    site = whole.sites[3]
    gram, total, count = 0.0, 0.0, 0
    for task in cut_tasks(exact.model, exact.texts[:2], 32):
        _, cache = exact.model.run_with_cache(task.tokens[None])
        for vector in cache[site.hook_name][0].detach():
            gram, total, count = gram + torch.outer(vector, vector), total + vector, count + 1
    few = ms.stream_writes(exact.model, exact.texts[:2], context=32).moments
    assert few.count[3] == count
    torch.testing.assert_close(few.mean[3], total / count)
    scatter = few.scatter[3] + count * torch.outer(few.mean[3], few.mean[3])
    torch.testing.assert_close(scatter, gram)


def test_windows_batches_order_and_shards_change_nothing_but_the_last_digits(
    exact, whole, monkeypatch
):
    monkeypatch.setattr(stream_file, "WINDOW", 60)
    rng = random.Random(0)
    shuffled = rng.sample(exact.texts, len(exact.texts))
    shards = [
        ms.stream_writes(exact.model, iter(shuffled), context=32, shard=(i, 3), batch_size=2)
        for i in rng.sample(range(3), 3)
    ]
    merged = ms.merge(shards)
    assert (merged.documents, merged.tokens) == (whole.documents, whole.tokens)
    for name in ("mean", "scatter"):
        torch.testing.assert_close(
            getattr(merged.moments, name), getattr(whole.moments, name), rtol=1e-9, atol=1e-9
        )
    assert_same(merged.decompose(), whole.decompose(), rtol=1e-9)


def test_in_the_models_own_dtype_it_is_right_to_rounding(real, silent):
    documents = texts(6)
    collected = ms.collect_writes(real.model, cut_tasks(real.model, documents, 64))
    streamed = ms.stream_writes(real.model, documents, context=64).decompose()
    assert streamed.directions.dtype == torch.float32
    assert_same(streamed, ms.decompose(collected), rtol=1e-4, above=1e-3)


@pytest.mark.fault(2)
def test_half_precision_streams(silent):
    model = tiny("Llama").to(torch.bfloat16)
    tasks = [tiny_task(length, seed=length) for length in (9, 12, 17, 9, 30)]
    streamed = ms.stream_writes(model, tasks)
    assert streamed.moments.dtype == "bfloat16"
    collected = ms.collect_writes(model, tasks)
    assert_same(streamed.decompose(), ms.decompose(collected), rtol=2e-2, above=1e-1)


def test_sites_positions_and_bos_are_chosen_as_in_collecting(exact, silent):
    tasks = cut_tasks(exact.model, exact.texts[:3], 24)
    options = [
        {"components": ("attn",), "positions": [1, 0], "layers": [0, 1]},
        {"at": "blocks.1.attn.hook_z", "heads": [1, 2], "skip_bos": True},
    ]
    for chosen in options:
        collected = ms.collect_writes(exact.model, tasks, **chosen)
        streamed = ms.stream_writes(exact.model, exact.texts[:3], context=24, **chosen)
        assert streamed.sites == collected.sites
        assert len(streamed) == len(collected)
        at_once = ms.decompose(collected, per="site")
        assert_same(streamed.decompose(per="site"), at_once, rtol=1e-6)


def test_positions_that_a_row_does_not_have_are_left_out(embedded):
    tasks = [tiny_task(9, seed=1), tiny_task(5, 3, seed=2)]
    streamed = ms.stream_writes(embedded, tasks, positions=[4, 7])
    assert streamed.moments.count.tolist() == [3] * 12


def test_packing_joins_documents_and_is_recorded(exact):
    model, bos = exact.model, exact.model.tokenizer.bos_token_id
    packed = ms.stream_writes(model, exact.texts[:4], context=40, packing=True)
    ids = [
        i
        for t in exact.texts[:4]
        for i in [bos, *model.tokenizer.encode(t, add_special_tokens=False)]
    ]
    rows = []
    while ids:
        ids = ids if ids[0] == bos else [bos, *ids]
        rows, ids = [*rows, ids[:40]], ids[40:]
    collected = ms.collect_writes(model, [ms.Task(torch.tensor(row), 1) for row in rows])
    assert_same(packed.decompose(), ms.decompose(collected), rtol=1e-8)
    assert packed.tokens == sum(map(len, rows))
    assert "in rows of up to 40, packed" in repr(packed)
    assert any("packed" in note for note in packed.decompose().source.notes)
    alone = ms.stream_writes(model, exact.texts[:4], context=40)
    assert "packed" not in repr(alone)
    assert not torch.allclose(alone.moments.mean, packed.moments.mean, rtol=1e-3)
    with pytest.raises(ValueError, match="The streams differ: `packing` is False and True"):
        ms.merge([alone, packed])


def test_files_of_lines_and_of_json_lines_are_the_same_as_a_list(embedded, tmp_path):
    documents = ["I believe the meaning", "We think that", "A rocket"]
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + "\n")
    keys = ["prompt", "text", "text"]
    lines = [json.dumps({k: d}) for k, d in zip(keys, documents, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(json.dumps(documents))
    expected = ms.stream_writes(embedded, documents)
    for source in ("a.txt", "a.jsonl", "a.json"):
        streamed = ms.stream_writes(embedded, tmp_path / source)
        assert torch.equal(streamed.moments.scatter, expected.moments.scatter)
        assert streamed.places[0].fingerprint == expected.places[0].fingerprint


@pytest.mark.fault(45)
def test_documents_are_taken_as_they_are_needed_and_once(embedded, monkeypatch):
    monkeypatch.setattr(stream_file, "WINDOW", 60)
    events, run = [], type(embedded).run_with_hooks
    ms.self_check(embedded)
    monkeypatch.setattr(
        type(embedded),
        "run_with_hooks",
        lambda self, *args, **kw: events.append("run") or run(self, *args, **kw),
    )

    def generator():
        for number, text in enumerate(texts(5)):
            events.append(number)
            yield text

    ms.stream_writes(embedded, generator(), context=32)
    assert [event for event in events if event != "run"] == list(range(5))
    assert events.index("run") < events.index(3)  # it runs before it has read everything


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "There are no texts: 0 documents were read"),
        (["", ""], "There are no texts: 2 documents were read, which are all empty"),
        (["ok", 3], "text 1 must be a prompt"),
        ("no such file.txt", "There is no file of texts no such file.txt; give a text itself in"),
        ("A text. " * 999, "There is no file of texts A text"),
    ],
)
def test_a_source_that_cannot_be_is_named(embedded, source, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        ms.stream_writes(embedded, source)


def test_what_cannot_be_asked_is_refused(embedded):
    for options, message in [
        ({"positions": [200]}, "No writes are left: `positions` and `skip_bos` exclude all 3"),
        ({"positions": []}, "nothing is left"),
        ({"context": 300}, "`context` is 300, but must be a whole number from 2 to 256"),
        ({"shard": (2, 2)}, "`shard` is"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ms.stream_writes(embedded, [ms.Task(torch.tensor([0, 5, 6]), 1)], **options)
    with pytest.raises(KeyError, match="No layers"):
        ms.stream_writes(embedded, ["I"], layers=[77])
    with pytest.raises(TypeError, match="`stream_writes` has no option `contxt`: did you mean"):
        ms.stream_writes(embedded, ["I"], contxt=8)


@pytest.mark.fault(7)
def test_empty_documents_are_counted_and_long_ones_cut(embedded):
    streamed = ms.stream_writes(embedded, ["I believe", "", *texts(2)], context=16)
    assert (streamed.documents, streamed.places[0].empty, streamed.places[0].split) == (4, 1, 2)
    assert "2 of them cut into several rows; 1 of them empty" in repr(streamed)
    assert len(repr(streamed).splitlines()) == 3


@pytest.mark.fault(1)
def test_nan_in_the_writes_is_an_error_with_its_place_and_leaves_no_hooks():
    model = tiny("Llama")
    ms.self_check(model)
    points = len([f for p in model.hook_dict.values() for f in p.fwd_hooks])
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.fill_(float("inf"))
    with pytest.raises(
        ValueError,
        match=r"NaN or inf, first at layer 1 mlp, position 0 of a row of text 0 \(torch.float32\)",
    ):
        ms.stream_writes(model, [tiny_task()])
    assert len([f for p in model.hook_dict.values() for f in p.fwd_hooks]) == points
    half = tiny("Llama").to(torch.float16)
    ms.self_check(half)
    with torch.no_grad():
        half.blocks[0].mlp.out.weight.fill_(6e4)
    with pytest.raises(ValueError, match="layer 0 mlp.*dtype=torch.float32"):
        ms.stream_writes(half, [tiny_task()])


@pytest.mark.fault(26)
def test_when_memory_runs_out_in_the_middle_of_a_pass_no_write_counts_twice(
    exact, whole, monkeypatch
):
    run, failures = type(exact.model).run_with_hooks, []
    ms.self_check(exact.model)

    def short_of_memory(self, tokens, fwd_hooks, **options):
        if len(tokens) < 4:
            return run(self, tokens, fwd_hooks=fwd_hooks, **options)

        def fail(x, hook=None):
            failures.append(len(tokens))
            raise torch.OutOfMemoryError("out of memory")

        middle = (fwd_hooks[len(fwd_hooks) // 2][0], fail)
        return run(self, tokens, fwd_hooks=[*fwd_hooks, middle], **options)

    monkeypatch.setattr(type(exact.model), "run_with_hooks", short_of_memory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        streamed = ms.stream_writes(exact.model, exact.texts, context=32)
    assert failures
    assert any("Out of memory" in str(w.message) for w in caught)
    assert torch.equal(streamed.moments.count, whole.moments.count)
    torch.testing.assert_close(streamed.moments.scatter, whole.moments.scatter)
    assert len(failures) < 6  # what ran out once is remembered for the rows that follow


@pytest.mark.fault(41)
def test_hooks_of_the_user_take_part_one_row_at_a_time(embedded, silent):
    documents, seen = texts(5), []
    expected = ms.stream_writes(embedded, documents)
    embedded.add_hook("blocks.0.hook_mlp_out", lambda x, hook: seen.append(len(x)) or 0 * x)
    try:
        streamed = ms.stream_writes(embedded, documents)
    finally:
        embedded.reset_hooks()
    assert set(seen) == {1}
    assert streamed.moments.scatter[2].sum() != expected.moments.scatter[2].sum()
    assert any("hooks of the user" in note for note in streamed.source.notes)


@pytest.mark.fault(25)
def test_merging_refuses_what_does_not_belong_together(embedded):
    documents = texts(2)
    halves = [ms.stream_writes(embedded, documents, shard=(i, 2)) for i in range(2)]
    assert "shard 0 of 2" in repr(halves[0])
    merged = ms.merge(halves)
    assert [place.shard for place in merged.places] == [(0, 2), (1, 2)]
    assert merged.places[0].fingerprint == halves[0].places[0].fingerprint
    with pytest.raises(ValueError, match="Streams 0 and 2 are of the same documents .shard 0 of 2"):
        ms.merge([merged, halves[0]])
    other = replace(halves[1], source=replace(halves[1].source, processing="centred"))
    with pytest.raises(ValueError, match="The streams come from different models"):
        ms.merge([halves[0], other])
    for options, message in [
        ({"layers": [0]}, "there are 12 and 2 sites"),
        ({"skip_bos": True}, "`skip_bos` is False and True"),
        ({"context": 99}, "`context` is 256 and 99"),
        ({"positions": [1]}, "`positions` is None and"),
    ]:
        with pytest.raises(ValueError, match=message):
            ms.merge([halves[0], ms.stream_writes(embedded, documents, **options)])
    with pytest.raises(ValueError, match="There are no streams to merge"):
        ms.merge([])
    assert ms.merge(halves[:1]).moments.count.tolist() == halves[0].moments.count.tolist()


def test_a_stream_saves_and_loads_to_the_last_bit(embedded, tmp_path):
    streamed = ms.stream_writes(embedded, texts(4), positions=range(9), shard=(1, 2))
    streamed.save(tmp_path / "stream.safetensors")
    loaded = ms.WriteStream.load(tmp_path / "stream.safetensors")
    assert torch.equal(loaded.moments.scatter, streamed.moments.scatter)
    assert repr(loaded) == repr(streamed)
    assert loaded.layout.positions == tuple(range(9))
    table = loaded.to_pandas()
    assert list(table.columns) == ["layer", "component", "count", "mean_norm", "rms_norm"]
    one, two = loaded.decompose(), streamed.decompose()
    assert torch.equal(one.directions, two.directions)


def test_streamed_directions_work_where_collected_ones_do_or_are_refused(embedded, meaning):
    svd = ms.stream_writes(embedded, texts(8)).decompose()
    sweep = ms.sweep_rank(embedded, meaning, svd, [128])
    assert float(sweep.measurement.log_prob[-1]) == pytest.approx(
        float(sweep.measurement.clean_run.log_prob), abs=1e-3
    )
    ms.figures.singular_values(svd)
    writes = ms.collect_writes(embedded, meaning)
    with pytest.raises(ValueError, match=r"were streamed, so nothing is known of single positions"):
        ms.figures.writer_map(svd, writes)
    matched = ms.covariance_matched(svd, 3, 1).basis
    doubled = replace(svd, singular_values=2 * svd.singular_values, n_positions=4 * svd.n_positions)
    torch.testing.assert_close(ms.covariance_matched(doubled, 3, 1).basis, matched)
    other = replace(svd, source=replace(svd.source, weights="others"))
    with pytest.raises(ValueError, match="different models"):
        ms.measure(embedded, meaning, [ms.keep(other.subspace(2))])
