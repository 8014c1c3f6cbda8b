"""The commands of the command line, in this process: each gives what its public call gives."""

import json
import re
import shlex
import warnings
from argparse import Namespace

import pandas as pd
import pytest
import torch

import mechsvd as ms
from mechsvd.cli import _parser, main
from mechsvd.commands.options import METRICS, OPTIONS, positions
from mechsvd.commands.wording import in_flags
from mechsvd.engine import memory, progress, stream
from mechsvd.engine.session import MeasureOptions
from mechsvd.report.choices import PARTS, Choices, parts_without
from mechsvd.report.plan import study_steps
from mechsvd.report.study import study_task

from .conftest import tiny, tiny_task
from .test_selfcheck import third_write

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = ["--prompt", "I believe the meaning", "--max-new-tokens", "4"]
CALLS = {
    "sweep": ms.sweep_rank,
    "describe": ms.describe,
    "fold": ms.fold,
    "stream": ms.stream_writes,
    "literature": ms.compare_with_literature,
}


@pytest.fixture
def loaded(embedded, monkeypatch):
    """The embedded model, which is not loaded again."""
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
    return embedded


@pytest.fixture(scope="module")
def task(embedded):
    return ms.Task.from_text(embedded, TEXT[1], max_new_tokens=4)


@pytest.fixture(scope="module")
def svd(embedded, task):
    return ms.decompose(ms.collect_writes(embedded, task))


@pytest.mark.parametrize("name", CALLS)
def test_an_option_of_a_command_is_one_of_its_call_under_the_same_name(name):
    command = _parser()._subparsers._group_actions[0].choices[name]
    # of loading, of making tasks and directions, and of the command itself
    others = "help model device dtype allow_pickle trust_remote_code prompt prompts continuation "
    others += "max_new_tokens truncate svd step out replace"
    own = {action.dest for action in command._actions} - {*others.split()}
    takes = {*CALLS[name].__wrapped__.__annotations__, *MeasureOptions.__optional_keys__}
    assert own - takes <= {"keep", "ablate", "claim"}
    for action in command._actions:
        for flag in action.option_strings:
            assert flag.removeprefix("--no-").strip("-").replace("-", "_") in (action.dest, "h")


def test_a_sweep_is_that_of_the_library_and_is_written_in_three_forms(
    loaded, task, svd, tmp_path, capsys
):
    given = ["sweep", *TEXT, "--ranks", "0", "64", "120", "--metric", "kl_divergence"]
    assert main([*given, "--out", str(tmp_path / "swept")]) == 0
    expected = ms.sweep_rank(loaded, task, svd, [0, 64, 120], metric=ms.kl_divergence)
    found = ms.RankSweep.load(tmp_path / "swept" / "sweep.safetensors")
    assert torch.equal(found.measurement.log_probs, expected.measurement.log_probs)
    assert found.measurement.metric == "kl_divergence"
    table = pd.read_csv(tmp_path / "swept" / "sweep.csv")
    assert table["kl_divergence"].tolist() == pytest.approx(
        expected.measurement.kl_divergence.tolist(), rel=1e-6, abs=1e-9
    )
    assert "plotly" in (tmp_path / "swept" / "sweep.html").read_text()
    assert "RankSweep over 3 ranks, 0 to 120 of 120 directions" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"swept"}  # nothing unfinished


def test_several_prompts_share_directions_and_a_step_ends_at_full_rank(loaded, tmp_path, capsys):
    (tmp_path / "p.json").write_text(
        json.dumps({"a": ["I believe", " that"], "b": ["We", " think"]})
    )
    given = ["sweep", "--prompts", str(tmp_path / "p.json"), "--step", "50"]
    assert main([*given, "--out", str(tmp_path / "s.csv")]) == 0
    table = pd.read_csv(tmp_path / "s.csv")
    assert sorted(set(table["rank"])) == [0, 50, table["rank"].max()]
    assert sorted(set(table["task"])) == [0, 1]
    said = capsys.readouterr()
    assert "mean" in said.out
    assert main([*given, "--out", str(tmp_path / "s.csv")]) == 1
    assert "s.csv is there already; give another --out, or --replace" in capsys.readouterr().err
    assert main([*given, "--ranks", "3", "--replace", "--out", str(tmp_path / "s.csv")]) == 1
    assert main([*given, "--out", str(tmp_path / "s.png")]) == 1
    assert "must end in .csv, .html, .safetensors" in capsys.readouterr().err


def test_cards_are_those_of_describe(loaded, task, svd, tmp_path, capsys):
    svd.save(tmp_path / "svd.safetensors")
    given = ["describe", "0", "5", *TEXT, "--svd", str(tmp_path / "svd.safetensors")]
    assert main([*given, "--seed", "3", "--out", str(tmp_path / "cards.html")]) == 0
    expected = ms.describe(loaded, svd, [0, 5], task, seed=3)
    assert (tmp_path / "cards.html").read_text() == expected.to_html()
    row = expected.to_pandas().iloc[1]
    said = capsys.readouterr().out
    assert f"direction 5: σ {row['singular_value']:.4g}" in said
    assert f"measured {row['measured']!r}" in said


def test_a_folded_checkpoint_keeps_or_lacks_directions(tmp_path, embedded, loaded, svd):
    out = tmp_path / "folded"
    given = ["fold", *TEXT, "--out", str(out), "--layers", "0", "--components", "mlp"]
    assert main([*given, "--ablate", "3", "5"]) == 0
    report = ms.FoldReport.load(out / "fold.mechsvd")
    assert [str(site) for site in report.sites] == ["0 mlp"]
    weight = ms.load_model(out, device="cpu").blocks[0].mlp.out.weight
    own = embedded.blocks[0].mlp.out.weight
    own, weight = (w if w.shape[0] == 128 else w.mT for w in (own, weight))
    basis = ms.decompose(
        ms.collect_writes(embedded, [_task(embedded)], layers=0, components=["mlp"])
    )
    v = basis.directions[:, [3, 5]]
    assert torch.allclose(weight, own - v @ (v.T @ own), atol=1e-5)


def _task(model):
    return ms.Task.from_text(model, TEXT[1], max_new_tokens=4)


def test_a_stream_is_decomposed_and_goes_on_after_ctrl_c(loaded, tmp_path, capsys, monkeypatch):
    (tmp_path / "corpus.txt").write_text("\n".join(["I believe it.", "We think so.", "I am"]))
    given = ["stream", str(tmp_path / "corpus.txt"), "--skip-bos"]
    given += ["--out", str(tmp_path / "svd.safetensors")]
    monkeypatch.setattr(stream, "WINDOW", 4)
    add, calls = stream._add, []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_add", stop_at_the_second)
        assert main(given) == 130
    kept = tmp_path / "svd.safetensors.unfinished"
    assert kept.exists()
    assert f"is kept in {kept}" in capsys.readouterr().err
    assert main(given) == 0
    assert f"Going on from {kept}" in capsys.readouterr().out
    assert not kept.exists()
    expected = ms.stream_writes(loaded, ["I believe it.", "We think so.", "I am"], skip_bos=True)
    found = ms.Decomposition.load(tmp_path / "svd.safetensors")
    assert torch.allclose(
        found.singular_values, expected.decompose().singular_values, rtol=1e-5, atol=1e-5
    )


def test_some_parts_of_a_report_are_neither_computed_nor_drawn(
    loaded, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "_is_seen", lambda: True)
    given = ["reproduce", *TEXT, "--ranks", "0", "64", "999", "--seed", "3", "--cdn"]
    given += ["--only", "spectrum", "directions", "--metric", "greedy_share"]
    given += ["--out", str(tmp_path)]
    assert main(given) == 0
    page, said = (tmp_path / "report.html").read_text(), capsys.readouterr()
    assert re.findall(r'<h2 id="([\w-]+)">', page) == ["spectrum", "directions"]
    assert "Left out, neither computed nor drawn: told, clipping, orders, critical, ridge" in page
    assert "The sweeps visit the ranks 0, 64, 999." in page
    assert "The seed is 3." in page
    assert 'metric_effects"' in page
    (folder,) = (tmp_path / "report-data").glob("*/prompt-1")
    written = {path.stem for path in folder.iterdir()}
    assert {"ranking", "directions_of_metric", "sweep"} <= written
    assert not written & {"ridge", "attribution", "cards", "texts", "orders", "sweep_of_metric"}
    assert pd.read_csv(folder / "sweep.csv")["rank"].tolist() == [0, 64, 120]
    assert "prompt-1, prompt 1 of 1: ranking" in said.err  # one bar, with the step's name
    assert "prompt-1, prompt 1 of 1: 100%" in said.err
    assert "edits" not in said.err
    assert "attribution" not in said.err
    before = page
    assert main(given) == 1  # a second run does not replace the page, unless it is told to
    assert "is the page of an earlier run; give another folder by --out, or --replace" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "report.html").read_text() == before


def test_choices_of_a_report():
    assert parts_without(["told"], None) == PARTS[1:]
    assert parts_without(None, ["texts", "told"]) == ("told", "texts")
    with pytest.raises(ValueError, match="exclude each other"):
        parts_without(["told"], ["texts"])
    with pytest.raises(ValueError, match="leaves no part"):
        parts_without(PARTS, None)
    assert Choices(step=10).visited(25) == [0, 10, 20, 25]
    assert Choices(ranks=(30, 2, 40)).visited(25) == [2, 25]
    assert Choices(quick=True).visited(25) is None
    assert [Choices(quick=q).count(99, 33) for q in (False, True)] == [100, 33]
    assert str(Choices()) == ""
    for wrong in ({"step": 0}, {"ranks": (-1,)}, {"ranks": (1,), "step": 2}, {"parts": ("x",)}):
        with pytest.raises(ValueError, match="step|ranks|no part"):
            Choices(**wrong)


def test_the_bar_of_a_study_names_its_steps_and_ends_full(monkeypatch, capsys):
    model, task = tiny("Llama"), tiny_task(12, 6)
    choices = Choices(parts=("directions", "ridge"), options={"progress": True})
    shown, show = [], progress.Steps._show

    def showing(self):
        shown.append(_place(self))
        show(self)

    monkeypatch.setattr(progress.Steps, "_show", showing)
    with progress.steps("a, prompt 2 of 4", study_steps(model, task, choices), True):
        study_task(model, "a", task, {"own": task.tokens[:4]}, choices)
    assert shown == sorted(shown)
    assert len({*shown}) >= 4
    assert shown[-1] <= sum(step.cost for step in study_steps(model, task, choices).values())
    said = capsys.readouterr().err
    assert "a, prompt 2 of 4: 100%" in said
    assert {*re.findall(r"prompt 2 of 4: ([a-z ]+):", said)} <= {
        "writes",
        "ranking",
        "ranks",
        "ridge",
    }


def _place(steps):
    return steps._done + steps._within


def test_a_step_takes_no_more_of_the_bar_than_it_was_given(capsys):
    costs = {"a": progress.Step(10), "b": progress.Step(30, 10), "c": progress.Step(0)}
    with progress.steps("all", costs, True):
        progress.begin_step("a")
        with progress.progress_bar(25, "rows", None) as bar:
            bar.update(25)
            own = bar.steps
        assert (bar.n, _place(own)) == (25, 10)
        with progress.progress_bar(5, "silent", False) as silent:
            silent.update(5)
        progress.begin_step("b")
        with progress.progress_bar(4, "rows", True) as bar:
            bar.update(4)
        assert _place(own) == 10 + 4 * 3
        progress.begin_step("c")
        assert _place(own) == 40
    said = capsys.readouterr().err
    assert "all: b:  25%" in said
    assert "all: c" not in said
    assert "all: 100%" in said


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, t, s: ms.sweep_rank(m, t, s, [0, 1], progress=True), "ranks"),
        (lambda m, t, s: ms.rank_directions(m, t, s, progress=True), "directions"),
        (lambda m, t, s: ms.sweep_ridge(m, t, s, [1.0], progress=True), "strengths"),
        (lambda m, t, s: ms.dose_response(m, t, s, [0], [0.0], progress=True), "doses"),
        (lambda m, t, s: ms.measure(m, t, [ms.keep(s, 3)], progress=True), "edited runs"),
    ],
)
def test_a_bar_says_what_its_rows_are(call, name, capsys):
    task = tiny_task()
    call(tiny("Llama"), task, ms.decompose(ms.collect_writes(tiny("Llama"), task)))
    said = capsys.readouterr().err
    assert f"{name}: 100%" in said
    assert "edits" not in said


@pytest.mark.parametrize(
    ("command", "message", "said"),
    [
        ("sweep", "`check=False` goes on all the same", "--no-check goes on all the same"),
        ("sweep", "pass `truncate='left'` to drop", "pass --truncate left to drop"),
        (
            "sweep",
            "pass the same `layers` and `components`",
            "pass the same --layers and --components",
        ),
        ("sweep", "a model in dtype=torch.float64 rounds", "a model in --dtype float64 rounds"),
        ("sweep", "or pass `allow_pickle=True` if", "or pass --allow-pickle if"),
        ("doctor", "`positions` must be", "`positions` must be (`positions`: in Python.)"),
        (
            "reproduce",
            "More steps (`path_steps`).",
            "More steps (`path_steps`). (`path_steps`: in Python.)",
        ),
        (
            "doctor",
            "the embedded model (`mechsvd.load_model()`).",
            "the embedded model (name no model).",
        ),
        (
            "reproduce",
            'or attribute the logarithm by `objective="log_prob"`.',
            "or leave it out by --skip attribution.",
        ),
        ("sweep", "text 0: `continuation` is empty", "text 0: `continuation` is empty"),
    ],
)
def test_a_note_advises_flags_that_the_command_has(command, message, said):
    assert in_flags(message, _parser().parse_args([command])) == said


def test_a_note_names_its_prompt(loaded, capsys):
    given = ["sweep", "--prompt", "I believe " * 150, "--max-new-tokens", "2", "--ranks", "0"]
    assert main(given) == 1
    assert "or pass --truncate left to drop the oldest" in capsys.readouterr().err
    warnings.simplefilter("always")  # pytest restores the filters
    assert main([*given, "--truncate", "left"]) == 0
    assert re.search(
        r"mechsvd: note: prompt-1: The \d+ oldest tokens of the prompt were dropped",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("text", "value"), [("last", "last"), ("3", [3]), ("1,-1", [1, -1]), (":9", slice(None, 9))]
)
def test_positions_are_typed(text, value):
    assert positions(text) == value


def test_the_metrics_are_those_that_are_ready():
    assert {*METRICS} == {
        name for name in ms.__all__ if isinstance(getattr(ms, name), ms.Metric)
    } | {"logit_difference"}
    assert OPTIONS["metric"]["choices"] is METRICS


def test_doctor_says_which_blocks_fail_and_why(capsys, monkeypatch):
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: third_write(0.05))
    assert main(["doctor", "tiny"]) == 1
    said = capsys.readouterr()
    assert re.search(r"block 0: error \d\.\de-\d\d with blocks\.0\.hook_attn_out", said.out)
    assert re.search(r"block 1: error \S+ with .*; FAILS: allowed is", said.out)
    assert "this model cannot be used: in block 1" in said.err
    assert re.search(r"memory [\d.]+ GiB of [\d.]+ GiB free", said.out)
    assert "static images " in said.out


def test_doctor_prints_the_machine_even_if_the_model_cannot_be_loaded(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "nothing")]) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"mechsvd {ms.__version__}, torch {torch.__version__}")
    assert "transformer-lens" in said.out
    assert "There is no directory" in said.err


def test_the_limit_of_a_container_is_the_smallest_around_the_process(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    assert memory.container_limit(tmp_path) is None
    for folder, limit in (("a/b", "max"), ("a", "4096"), ("", "8192")):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "memory.max").write_text(f"{limit}\n")
    assert memory.container_limit(tmp_path) == 4096
    assert memory.total_bytes() is None or memory.total_bytes() > 2**28


def test_a_command_that_is_typed_again_is_the_same_command(loaded, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mechsvd.commands.directions.tasks_of", stop)
    typed = ["sweep", "--prompt", "I'm sure", "--ranks", "0"]
    assert main(typed) == 130
    line = capsys.readouterr().err.splitlines()[1]
    assert shlex.split(line.removeprefix("Begin again with: mechsvd ")) == typed
    assert isinstance(_parser().parse_args(typed), Namespace)


@pytest.mark.fault(30)
@pytest.mark.parametrize("way", ["itself", "a link", "a hard link", "another spelling"])
def test_no_command_writes_over_what_it_reads(loaded, svd, tmp_path, capsys, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "same.csv"
    texts.write_text("text\nWe think so\n", encoding="utf-8")
    svd.save("svd.safetensors")

    def out(path):
        other = tmp_path / f"other{path.suffix}"
        other.unlink(missing_ok=True)
        if way == "a link":
            other.symlink_to(path)
        elif way == "a hard link":
            other.hardlink_to(path)
        return str({"itself": path, "another spelling": tmp_path / "." / path.name}.get(way, other))

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "svd.csv").write_bytes(texts.read_bytes())
    for command in (
        ["stream", "same.csv", "--out", out(texts)],
        ["sweep", "--prompts", "same.csv", "--out", out(texts)],
        ["describe", "--prompts", "same.csv", "--out", out(texts)],
        ["literature", "--prompts", "same.csv", "--out", out(texts)],
        ["sweep", *TEXT, "--svd", "svd.safetensors", "--out", out(tmp_path / "svd.safetensors")],
        ["stream", "folder/svd.csv", "--out", "folder"],
    ):
        assert main([*command, "--replace"]) == 1
        assert "is what the command reads" in capsys.readouterr().err
    assert texts.read_text(encoding="utf-8") == "text\nWe think so\n"


@pytest.mark.fault(30)
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: 1 / 0)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder.csv").mkdir()
    for command in (["sweep", *TEXT], ["describe", *TEXT], ["stream", str(tmp_path / "file")]):
        assert main([*command, "--replace", "--out", str(tmp_path / "file")]) == 1
        assert "file, a file, but must be a folder" in capsys.readouterr().err
        assert main([*command, "--replace", "--out", str(tmp_path / "folder.csv")]) == 1
        assert "folder.csv, a folder, but must be a file" in capsys.readouterr().err
    for name in ("table", "table.html"):
        assert main(["literature", *TEXT, "--out", str(tmp_path / name)]) == 1
        assert "but must end in .csv." in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.fault(28)
def test_the_corrected_command_goes_on_after_one_that_failed(loaded, tmp_path, capsys, monkeypatch):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "svd.csv"
    given = ["stream", str(corpus), "--out", str(out), "--layers", "0"]
    corpus.write_text("", encoding="utf-8")
    assert main(given) == 1
    assert "There are no texts" in capsys.readouterr().err
    corpus.write_text("We think so\n", encoding="utf-8")
    assert main(given) == 0
    assert "1 documents" in capsys.readouterr().out
    monkeypatch.setattr(stream, "WINDOW", 4)
    corpus.write_bytes(b"We think so\n" * 4 + b"\xe9\n")
    assert main([*given, "--replace"]) == 1
    assert "is not UTF-8" in capsys.readouterr().err
    corpus.write_bytes(b"We think so\n" * 4 + b"I believe it\n")
    assert main([*given, "--replace"]) == 0
    assert "5 documents" in capsys.readouterr().out
    sweep = ["sweep", *TEXT, "--out", str(tmp_path / "s.csv"), "--ranks", "0", "9"]
    monkeypatch.setattr("mechsvd.commands.directions.write", lambda *_: int("no number"))
    assert main(sweep) == 1
    monkeypatch.undo()
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: loaded)
    assert main([*sweep, "--batch-size", "2"]) == 0
    assert not [*tmp_path.glob("*.unfinished")]
