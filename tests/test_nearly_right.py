"""Types that are nearly right, machines that are not ours: they work, or the error says what to do."""

import os
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.consoles import any_console, printable
from mechsvd.experiments import statistics

from .conftest import tiny, tiny_task

NUMBERS = {
    "numpy": np.int64(3),
    "numpy, small": np.uint8(3),
    "an array without axes": np.array(3),
    "a tensor without axes": torch.tensor(3),
}


@pytest.fixture(scope="module")
def small():
    model, task = tiny("Llama"), tiny_task()
    return model, task, ms.decompose(ms.collect_writes(model, task))


WAYS = {  # with a number, and what must be equal to what 3 gives
    "layers": lambda m, t, svd, n: ms.collect_writes(m, t, layers=n - 2).values,
    "a list of layers": lambda m, t, svd, n: ms.collect_writes(m, t, layers=[n - 2, n - 2]).values,
    "heads": lambda m, t, svd, n: (
        ms.collect_writes(m, t, at="blocks.*.attn.hook_z", heads=n).values
    ),
    "positions": lambda m, t, svd, n: ms.collect_writes(m, t, positions=n).values,
    "keep": lambda m, t, svd, n: ms.keep(svd, n).basis,
    "subspace": lambda m, t, svd, n: svd.subspace(n).basis,
    "ranks": lambda m, t, svd, n: ms.sweep_rank(m, t, svd, [0, n]).measurement.log_probs,
    "batch_size": lambda m, t, svd, n: ms.measure(m, t, [ms.keep(svd, 2)], batch_size=n).log_probs,
    "max_new_tokens": lambda m, t, svd, n: ms.Task.from_text(m, "We", max_new_tokens=n).tokens,
    "prompt_length": lambda m, t, svd, n: ms.Task(t.tokens, n).continuation,
    "seed": lambda m, t, svd, n: ms.random_subspace(8, n, seed=n).basis,
    "context": lambda m, t, svd, n: ms.stream_writes(m, [t], context=n).moments.mean,
}


@pytest.mark.fault(59)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_of_numpy_or_without_axes_is_a_number(small, silent, way, kind):
    assert torch.equal(WAYS[way](*small, NUMBERS[kind]), WAYS[way](*small, 3))


@pytest.mark.fault(59)
def test_arrays_and_lists_are_taken_as_tensors():
    columns, gains, x = np.eye(4)[:, :2], np.array([1.0, 0.5]), torch.arange(8.0).view(2, 4)
    right = ms.gate(torch.eye(4)[:, :2], torch.tensor([1.0, 0.5]))(x)
    for way in (columns, np.asfortranarray(columns), np.flip(columns, 0)[::-1]):
        assert torch.equal(ms.span(way).basis.abs(), torch.eye(4, dtype=torch.float64)[:, :2])
        assert torch.equal(ms.gate(way, gains)(x), right)
    assert torch.equal(ms.gate(columns, [1, 0.5])(x), right)
    for rest in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        assert torch.equal(ms.gate(columns, gains, rest)(x), ms.gate(columns, gains, 0.5)(x))
    for vector in (np.ones(4), [1.0] * 4, (1, 1, 1, 1)):
        assert torch.equal(ms.shift(vector)(x), x + 1)


SWITCHES = {
    "center": lambda m, t, svd, v: ms.decompose(torch.rand(1, 9, 3), center=v),
    "per_layer": lambda m, t, svd, v: ms.decompose(ms.collect_writes(m, t), per_layer=v),
    "rows": lambda m, t, svd, v: ms.span(torch.eye(3), rows=v),
    "prepend_bos": lambda m, t, svd, v: ms.Task.from_text(m, "We", " so", prepend_bos=v),
    "skip_bos": lambda m, t, svd, v: ms.collect_writes(m, t, skip_bos=v),
    "fast": lambda m, t, svd, v: ms.measure(m, t, [ms.keep(svd, 2)], fast=v),
    "noise_floor": lambda m, t, svd, v: ms.measure(m, t, [ms.keep(svd, 2)], noise_floor=v),
    "packing": lambda m, t, svd, v: ms.stream_writes(m, [t], packing=v),
    "use_kv_cache": lambda m, t, svd, v: ms.generate(m, "We", max_new_tokens=2, use_kv_cache=v),
    "exhaustive": lambda m, t, svd, v: ms.critical_rank(m, t, svd, exhaustive=v),
    "check": lambda m, t, svd, v: ms.fwd_hooks(m, ms.keep(svd, 2), check=v),
    "widen": lambda m, t, svd, v: statistics.interval(torch.rand(8), widen=v),
    "allow_pickle": lambda m, t, svd, v: ms.load_model(allow_pickle=v),
}


@pytest.mark.fault(59)
@pytest.mark.parametrize("name", SWITCHES)
def test_on_and_off_are_true_and_false_and_no_words(small, silent, name):
    for word in ("no", "False", "yes", 1, [], torch.ones(2)):
        with pytest.raises(TypeError, match=f"`{name}` is .*, but must be True or False"):
            SWITCHES[name](*small, word)
    for good in (False, np.bool_(False), torch.tensor(False)):
        SWITCHES[name](*small, good)


@pytest.mark.fault(58)
def test_a_shift_stays_when_its_vector_changes_but_follows_one_that_is_learned():
    vector, x = torch.ones(4), torch.zeros(1, 4)
    edits = [ms.shift(vector.mul_(2)) for _ in range(3)]
    assert [float(edit(x)[0, 0]) for edit in edits] == [2, 4, 8]
    learned = torch.nn.Parameter(torch.ones(4))
    edit = ms.shift(learned)
    learned.data.mul_(3)
    assert float(edit(x)[0, 0].detach()) == 3


@pytest.mark.fault(59)
@pytest.mark.parametrize("kind", ["gate", "shift", "chain"])
def test_an_edit_refuses_what_is_no_write(kind):
    basis, x = torch.eye(8)[:, :2], torch.rand(1, 3, 8)
    edit = {"gate": ms.keep(ms.span(basis)), "shift": ms.shift(basis[:, 0])}.get(kind)
    edit = edit or ms.chain(ms.keep(ms.span(basis)), ms.shift(basis[:, 0]))
    for other in (x.long(), x > 0, x.to(torch.complex64), x.to_sparse(), (x.long(), None)):
        with pytest.raises(TypeError, match="takes a dense tensor of floats, but this one is"):
            edit(other)
    for other in (x[..., :4], x.view(1, 3, 2, 4), x.mT, (x[..., :4], None)):
        with pytest.raises(ValueError, match="dimensions, but this|d_model"):
            edit(other)


Named = namedtuple("Named", "write weights")


@pytest.mark.fault(59)
def test_an_edit_in_a_hook_of_torch_edits_the_first_of_a_tuple(
    plain, embedded, meaning, meaning_svd
):
    vector = torch.ones(128)
    edits = {
        "gate": ms.keep(meaning_svd, 5),
        "shift": ms.shift(vector),
        "chain": ms.chain(ms.keep(meaning_svd, 9), ms.shift(vector)),
        "a function in a chain": ms.chain(lambda x, hook=None: x * 0.5),
    }
    tokens = meaning.tokens[None]
    for name, edit in edits.items():
        handle = plain.model.layers[2].self_attn.register_forward_hook(lambda m, x, y, e=edit: e(y))
        with torch.no_grad():
            got = plain(tokens).logits
        handle.remove()
        hooks = [("blocks.2.hook_attn_out", edit)]
        with torch.no_grad():
            torch.testing.assert_close(got, embedded.run_with_hooks(tokens, fwd_hooks=hooks))
        x = torch.rand(1, 3, 128)
        first, *rest = edit((x, None, "kept"))
        assert torch.equal(first, edit(x)), name
        assert rest == [None, "kept"]
    assert edits["gate"](Named(x, None))[1] is None
    for other in ([x], {"x": x}, None, (), (None, x)):
        with pytest.raises(TypeError, match="takes a tensor, or a tuple that begins with one"):
            edits["gate"](other)


PRINTS = """
import sys, warnings, torch, mechsvd as ms
warnings.simplefilter("ignore")
model = ms.load_model()
task = ms.Task.from_text(model, "I believe \\u2192 \\u65e5", max_new_tokens=3)
svd = ms.decompose(ms.collect_writes(model, task))
sweep = ms.sweep_rank(model, task, svd, [0, 64, 128])
print(task, [task], (svd,), {"a": sweep}, svd.source, ms.keep(svd, 3), ms.self_check(model), sep="\\n")
print(ms.measure(model, task, ms.keep(svd, 3)), svd.subspace(2), ms.find_sites(model)[0], sep="\\n")
"""


def printed(encoding, *command):
    run = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-2000:]
    return run.stdout.decode(encoding)


@pytest.mark.fault(59)
def test_results_and_commands_print_on_every_console(tmp_path):
    whole = printed("utf-8", "-c", PRINTS)
    assert "→" in whole
    for encoding in ("cp1252", "cp932"):  # others are below
        text = printed(encoding, "-c", PRINTS)
        assert text.count("\n") == whole.count("\n"), encoding
        assert ("→" if encoding == "cp932" else "->") in text
        assert ("日" if encoding == "cp932" else r"\u65e5") in text
    prompt = ["--prompt", "We → 日", "--max-new-tokens", "2", "--out", str(tmp_path / "s.csv")]
    sweep = ["-m", "mechsvd.cli", "sweep", *prompt, "--ranks", "0", "9"]
    assert "RankSweep over 2 ranks" in printed("cp437", *sweep)


@pytest.mark.fault(59)
def test_a_console_that_shows_everything_gets_everything(monkeypatch, capsys):
    class Console:
        encoding = "utf-8"

    text = "σ → 日 “x” ᵀ"
    for encoding, shown in (
        ("utf-8", text),
        ("utf-16", text),
        (None, text),
        ("no such thing", text),
        ("cp437", 'σ -> \\u65e5 "x" ^T'),
        ("latin-1", 'sigma -> \\u65e5 "x" ^T'),
    ):
        monkeypatch.setattr(Console, "encoding", encoding)
        monkeypatch.setattr(sys, "stdout", Console())
        assert printable(text) == shown
    monkeypatch.undo()
    before = sys.stdout.errors
    with any_console():
        print("→")
    assert sys.stdout.errors == before
