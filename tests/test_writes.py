import pytest
import torch

import mechsvd as ms
from tests.conftest import tiny, tiny_task


def test_writes_are_what_the_models_own_cache_holds(embedded, meaning):
    writes = ms.collect_writes(embedded, meaning)
    with torch.no_grad():
        _, cache = embedded.run_with_cache(meaning.tokens[None])
    assert writes.values.shape == (12, len(meaning.tokens), 128)
    for site, value in zip(writes.sites, writes.values, strict=True):
        torch.testing.assert_close(value, cache[site.hook_name][0])


def test_one_forward_pass_and_one_hook_a_site(embedded, meaning, monkeypatch):
    calls = []
    run = type(embedded).run_with_hooks
    monkeypatch.setattr(
        type(embedded),
        "run_with_hooks",
        lambda self, tokens, **kw: calls.append(kw["fwd_hooks"]) or run(self, tokens, **kw),
    )
    ms.self_check(embedded)
    calls.clear()
    ms.collect_writes(embedded, meaning)
    assert len(calls) == 1
    assert len(calls[0]) == 12 + 1  # and the one that spares the unembedding


def test_tokens_of_a_task_without_text_are_named_by_their_ids(embedded, meaning):
    bare = ms.Task(meaning.tokens[:5], 2)
    assert ms.collect_writes(embedded, bare).pieces == ()
    mixed = ms.collect_writes(embedded, [meaning, bare])
    assert mixed.pieces == meaning.pieces + tuple(f"[{i}]" for i in bare.tokens.tolist())
    assert len(mixed.to_pandas()) == len(mixed)
    ms.figures.writer_map(ms.decompose(mixed), mixed)


@pytest.mark.fault(12)
def test_several_tasks_of_different_lengths_equal_each_alone(embedded):
    tasks = [tiny_task(9, seed=1), tiny_task(7, seed=2), tiny_task(9, seed=3)]
    together = ms.collect_writes(embedded, tasks)
    for index, task in enumerate(tasks):
        alone = ms.collect_writes(embedded, task)
        mine = together.task_index == index
        torch.testing.assert_close(together.values[:, mine], alone.values, rtol=1e-4, atol=1e-4)
        assert together.tokens[mine].tolist() == task.tokens.tolist()
        assert together.positions[mine].tolist() == list(range(len(task.tokens)))


def test_attention_only_gives_the_shortforms_first_diagrams(embedded, meaning):
    writes = ms.collect_writes(embedded, meaning, components=("attn",))
    assert (
        len(writes) == len(meaning.tokens) * embedded.cfg.n_layers
    )  # there: 71 tokens × 32 layers = 2272
    everything = ms.collect_writes(embedded, meaning)
    torch.testing.assert_close(writes.values, everything.values[0::2])
    assert {site.component for site in writes.sites} == {"attn"}


def test_positions_and_bos_can_be_left_out(embedded, meaning):
    everything = ms.collect_writes(embedded, meaning)
    torch.testing.assert_close(
        ms.collect_writes(embedded, meaning, skip_bos=True).values, everything.values[:, 1:]
    )
    some = ms.collect_writes(embedded, meaning, positions=[5, 2], layers=[3])
    torch.testing.assert_close(some.values, everything.values[6:8][:, [2, 5]])
    assert some.positions.tolist() == [2, 5]
    assert [p.strip() for p in some.pieces] == [
        meaning.pieces[2].strip(),
        meaning.pieces[5].strip(),
    ]


@pytest.mark.fault(5)
def test_nothing_left_is_an_error(embedded, meaning):
    with pytest.raises(ValueError, match="nothing is left"):
        ms.collect_writes(embedded, meaning, positions=[])
    with pytest.raises(ValueError, match="No writes are left"):
        ms.collect_writes(embedded, meaning, positions=[0], skip_bos=True)
    with pytest.raises(ValueError, match=r"No positions \[99\]: the text has 0 to"):
        ms.collect_writes(embedded, meaning, positions=[99])
    with pytest.raises(ValueError, match="No sites are left"):
        ms.collect_writes(embedded, meaning, layers=[])
    with pytest.raises(ValueError, match="the list is empty"):
        ms.collect_writes(embedded, [])


@pytest.mark.fault(1)
def test_nan_in_the_writes_is_an_error_with_its_place(meaning):
    model = tiny("Llama")
    ms.self_check(model)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.fill_(float("inf"))
    with pytest.raises(
        ValueError,
        match=r"NaN or inf, first at layer 1 mlp, position 0 of prompt 0 \(torch.float32\)",
    ):
        ms.collect_writes(model, tiny_task())
    half = tiny("Llama").to(torch.float16)
    ms.self_check(half)
    with torch.no_grad():
        half.blocks[0].mlp.out.weight.fill_(6e4)
    with pytest.raises(ValueError, match="layer 0 mlp.*dtype=torch.float32"):
        ms.collect_writes(half, tiny_task())


def test_provenance_names_model_tokens_and_hooks(embedded, meaning):
    source = ms.collect_writes(embedded, meaning, layers=[0]).source
    assert source.model == "mechsvd embedded"
    assert source.tokens == (tuple(meaning.tokens.tolist()),)
    assert source.hooks == ("blocks.0.hook_attn_out", "blocks.0.hook_mlp_out")
    assert source.processing == "raw"
    assert source.dtype == "float32"


def test_the_table_and_the_printed_form(embedded, meaning):
    writes = ms.collect_writes(embedded, meaning)
    table = writes.to_pandas()
    assert len(table) == len(writes)
    row = table[(table.layer == 2) & (table.component == "mlp") & (table.position == 3)].iloc[0]
    assert row.norm == pytest.approx(float(writes.values[5, 3].norm()), rel=1e-5)
    assert len(repr(writes).splitlines()) == 3


def test_writes_are_kept_as_the_hook_saw_them_though_the_tensor_changes_afterwards(silent):
    """A module may add the residual stream to its output in place, as some architectures do."""
    model, task = tiny("Llama"), tiny_task()
    expected = ms.collect_writes(model, task, layers=[0], components=["attn"]).values

    def double_in_place(module, inputs, output):
        (output[0] if isinstance(output, tuple) else output).mul_(2)

    handle = model.blocks[0].attn.register_forward_hook(double_in_place)
    writes = ms.collect_writes(model, task, layers=[0], components=["attn"], check=False)
    handle.remove()
    torch.testing.assert_close(writes.values, expected)
