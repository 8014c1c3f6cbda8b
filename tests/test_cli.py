import json
import math
import re
import warnings
from contextlib import nullcontext
from itertools import chain

import pandas as pd
import pytest

import mechsvd as ms
from mechsvd.cli import main
from mechsvd.demo import WEIGHTS
from mechsvd.report.build import _kinds, reproduce

from .conftest import tiny_task

PROMPTS = {
    "meaning": ms.SHORTFORM_PROMPTS["meaning"],
    "relativity": ms.SHORTFORM_PROMPTS["relativity"],
    "words": "Translate English to French:\n\nsea => mer\ncheese =>",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory, embedded):
    out = tmp_path_factory.mktemp("report")
    (out / "prompts.json").write_text(json.dumps(PROMPTS))
    warnings.simplefilter(
        "ignore"
    )  # short texts have fewer writes a layer than dimensions; pytest restores the filters
    options = ["--prompts", str(out / "prompts.json"), "--max-new-tokens", "8", "--step", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
        assert main(["reproduce", "--out", str(out), *options]) == 0
    return out


def data(out):
    """The folder that the page names."""
    return out / re.search(r'href="(report-data/[^"]+)/"', (out / "report.html").read_text())[1]


def test_reproduce_writes_a_page_that_needs_no_network(report):
    page = (report / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert page.count('class="figure"') == 3 * 20 + 17  # of each prompt; of all together
    for name, prompt in PROMPTS.items():
        assert f'id="{name}"' in page
        assert prompt.split("\n")[0].split(" => ")[0] in page


def test_figures_are_data_that_the_script_draws_and_one_text_is_chosen(report):
    page = (report / "report.html").read_text()
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert len(figures) == page.count('class="figure"')
    for content in figures:
        assert "<" not in content
        figure = json.loads(content)
        assert figure["data"]
        assert not figure["layout"]["template"]  # the page has it once
    assert page.count("const TEMPLATE") == 1
    options = re.findall(r'<option value="([^"]+)">', page)
    assert options == [*PROMPTS]
    for name in PROMPTS:
        assert page.count(f'data-prompt="{name}"') == 20 + 1  # its figures, and its cards
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_the_page_says_when_where_and_by_which_command_it_was_made(report):
    page = (report / "report.html").read_text()
    for part in (r"<th>date</th><td>20\d\d-", r"<th>device</th><td>", r"<th>command</th><td>\S"):
        assert re.search(part, page)
    assert "The embedded model is a Llama of six layers" in page
    assert 'href="https://www.lesswrong.com/users/tailcalled"' in page


def test_the_page_names_the_model_and_its_self_check(report):
    page = (report / "report.html").read_text()
    for part in ("mechsvd embedded", "SelfCheck: passed", "clean probability", "float32", "nats"):
        assert part in page


def test_tables_and_results_lie_beside_it(report):
    for name in PROMPTS:
        table = pd.read_csv(data(report) / name / "sweep.csv")
        assert list(table.columns) == [
            "rank",
            "log_prob",
            "probability",
            "surprise",
            "orig_delta",
            "kept_delta",
            "kl_divergence",
            "absolute_change",
        ]
        sweep = ms.RankSweep.load(data(report) / name / "sweep.safetensors")
        assert table["log_prob"].tolist() == pytest.approx(
            sweep.measurement.log_prob.tolist(), rel=1e-6
        )
        assert len(pd.read_csv(data(report) / name / "singular_values.csv")) == len(sweep.order)


def test_a_prompt_a_continuation_a_directory_and_attention_only(tmp_path, capsys, silent):
    arguments = [
        "--model",
        str(WEIGHTS),
        "--prompt",
        "I believe <b>",
        "--continuation",
        " it & him",
        "--components",
        "attn",
        "--cdn",
        "--step",
        "16",
        "--skip",
        "attribution",
        "cards",
        "texts",
    ]
    assert (
        main(
            [
                "reproduce",
                *arguments,
                "--out",
                str(tmp_path),
                "--dtype",
                "float64",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    page = (tmp_path / "report.html").read_text()
    assert "I believe &lt;b&gt;<b> it &amp; him</b>" in page
    assert "float64" in page
    assert len(page) < 500_000
    assert re.search(r'<script src="https://cdn.plot.ly/plotly-[\d.]+.min.js"', page)
    table = pd.read_csv(data(tmp_path) / "prompt-1" / "sweep_by_site.csv")
    assert set(table["component"]) == {"attn"}
    said = capsys.readouterr().out
    assert re.search(
        r"1 prompt: [\d,]+ rows in about [\d,]+ forward passes of [\d,]+ MiB, about \d+ (s|min)\n"
        r"prompt-1, prompt 1 of 1: \d+ tokens of the prompt, \d+ scored",
        said,
    )
    assert re.search(r"report.html after \d+ s", said)


def test_every_section_says_what_the_shortform_saw_and_what_was_measured_here(report):
    page = (report / "report.html").read_text()
    anchors = ("spectrum", "clipping", "directions", "orders", "critical", "cards", "texts")
    for anchor in (*anchors, "held-out", "prompts", "told"):
        assert page.count(f'href="#{anchor}"') == page.count(f'<h2 id="{anchor}">') == 1
    assert page.count('<p class="measured">') == 11  # and how the tests at the top were made
    assert page.count('<p class="original">') == 11 + 1
    assert "1886, 3329, 2696 and 2518 of 4096" in page
    critical = {
        name: ms.CriticalRank.load(data(report) / name / "critical_rank.safetensors").rank
        for name in PROMPTS
    }
    assert (
        f"Here it is {critical['meaning']} (meaning), {critical['relativity']} (relativity)" in page
    )


def test_the_tables_of_directions_orders_and_texts_and_of_all_prompts(report):
    folder = data(report)
    for name in PROMPTS:
        effects = pd.read_csv(folder / name / "directions.csv")
        assert effects["effect"].tolist() == pytest.approx(
            ms.Ranking.load(folder / name / "ranking.safetensors").effect.tolist(), rel=1e-6
        )
        orders = pd.read_csv(folder / name / "orders.csv")
        assert set(orders["order"]) == {
            "singular value",
            "KL divergence",
            "compromise",
            "the shortform's signed effect",
            "random",
            "reversed",
        }
        full = orders[orders["rank"] == orders["rank"].max()]["log_prob"]
        assert full.max() - full.min() < 1e-3  # with everything kept, the order is no matter
        texts = pd.read_csv(folder / name / "texts.csv")
        assert len(texts) == 3 * 5
        assert texts["rank"].isna().sum() == 3
    overlaps = pd.read_csv(folder / "_all" / "overlap.csv")
    assert overlaps[["first", "second"]].iloc[0].tolist() == ["meaning", "relativity"]
    angles = pd.read_csv(folder / "_all" / "principal_angles.csv")
    shared = (
        angles.assign(shared=angles["radians"].map(math.cos) ** 2)
        .groupby(["first", "second"], sort=False)["shared"]
        .sum()
    )
    assert shared.tolist() == pytest.approx(overlaps["overlap"].tolist(), rel=1e-6)


def test_without_prompts_those_of_the_shortform_are_asked_for(tmp_path, embedded, monkeypatch):
    asked = []
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
    monkeypatch.setattr("mechsvd.report.build.reproduce", lambda *given, **_: asked.append(given))
    options = ["--out", str(tmp_path), "--device", "cpu", "--max-new-tokens", "2"]
    assert main(["reproduce", *options]) == 0
    ((_, tasks, _),) = asked
    assert list(tasks) == ["meaning", "relativity", "launch", "translation"]
    for name, task in tasks.items():
        prompt, continuation = task().text()
        assert prompt == f"<s>{ms.SHORTFORM_PROMPTS[name]}"
        assert continuation


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("prompts.txt", "I believe\n\nI think that\n", {"prompt-1": None, "prompt-2": None}),
        ("list.json", '["I", ["I think", " that"]]', {"prompt-1": None, "prompt-2": " that"}),
        ("p.json", '{"a": "I", "b-2": ["I think", " that"]}', {"a": None, "b-2": " that"}),
    ],
)
def test_prompts_from_a_file_are_those_of_the_report(
    tmp_path, embedded, monkeypatch, name, content, prompts
):
    """The report itself, with a folder for each name, is made in full by other tests."""
    asked = []
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
    monkeypatch.setattr("mechsvd.report.build.reproduce", lambda *given, **_: asked.append(given))
    (tmp_path / name).write_text(content)
    options = ["--out", str(tmp_path), "--device", "cpu", "--max-new-tokens", "2"]
    assert main(["reproduce", "--prompts", str(tmp_path / name), *options]) == 0
    ((model, tasks, out),) = asked
    assert (model, out) == (embedded, tmp_path)
    assert list(tasks) == list(prompts)
    for key, continuation in prompts.items():
        task = tasks[key]()
        assert task.text()[0].startswith("<s>I")
        if continuation is None:
            assert len(task.continuation) == 2
        else:
            assert task.text() == ("<s>I think", continuation)


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n", "p.txt holds no prompts"),
        ("p.json", "[]", "p.json holds no prompts"),
        ("p.json", '{"a": "x", "a": "y"}', "names ['a'] more than once"),
        ("p.json", "{", "is not JSON: "),
        ("p.json", '{"../x": "hi"}', "the name '../x' must be letters"),
        ("p.json", '{"a": ["hi", ""]}', "text 0 (a): `continuation` is empty"),
        ("p.json", '{"a": 5}', "text 0 (a) must be a prompt, a pair"),
        ("p.jsonl", '{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "x"}', "as text 0"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    assert main(["reproduce", "--prompts", str(tmp_path / name), "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "kinds", "warned"),
    [
        ((4, 5), ["a", "b"], None),
        ((4, 3), [], "there are {'a': 4, 'b': 3}; left out"),
        ((6,), [], "there are {'a': 6}; left out"),
    ],
)
def test_groups_in_a_file_are_contrasted(tmp_path, embedded, monkeypatch, sizes, kinds, warned):
    asked = []
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
    monkeypatch.setattr("mechsvd.report.build.reproduce", lambda *_, **given: asked.append(given))
    lines = [
        json.dumps({"prompt": f"I {kind} {i}", "group": kind})
        for kind, size in zip("ab", sizes, strict=False)
        for i in range(size)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    arguments = ["reproduce", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    groups = asked[0]["groups"]
    assert groups["a"] == [f"prompt-{i}" for i in range(1, 1 + sizes[0])]
    made = {name: tiny_task(8, 4, i) for i, name in enumerate(chain(*groups.values()))}
    with pytest.warns(UserWarning, match=re.escape(warned)) if warned else nullcontext():
        assert [*_kinds(groups, made)] == kinds
    if kinds:
        with pytest.warns(UserWarning, match="of kind 'a' is there twice"):
            twice = _kinds(groups | {"a": [*groups["a"], groups["a"][0]]}, made)
        assert [len(tasks) for tasks in twice.values()] == list(sizes)


def test_without_prompts_the_embedded_models_kinds_are_contrasted(tmp_path, embedded, monkeypatch):
    asked = []
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
    monkeypatch.setattr("mechsvd.report.build.reproduce", lambda *_, **given: asked.append(given))
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    groups = asked[0]["groups"]
    assert list(groups) == ["reflection", "explanation", "message", "translation"]
    assert {len(task.tokens) for tasks in groups.values() for task in tasks} == {28}
    assert all(len(tasks) >= 4 for tasks in groups.values())
    assert len(_kinds(groups, {})) == 4


def test_doctor_says_versions_device_and_the_self_check(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for part in (
        f"mechsvd {ms.__version__}",
        "transformer-lens",
        "device cpu",
        "d_model 128",
        "SelfCheck: passed",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--continuation", "x"], "`--continuation` needs a `--prompt`"),
        (
            ["reproduce", "--prompt", "a", "--prompt", "b", "--continuation", "c"],
            "2 --prompt but 1 --continuation",
        ),
        (["reproduce", "--prompt", "good", "--prompt", ""], "--continuation is empty"),
        (["reproduce", "--prompts", "no such file"], "There is no file of texts no such file"),
        (["reproduce", "--prompts", "x", "--prompt", "y"], "`--prompts` stands alone"),
        (["doctor", "nobody/nothing"], "mechsvd: Cannot load 'nobody/nothing' from the hub"),
    ],
)
def test_an_error_is_one_line_and_status_one(arguments, message, capsys, tmp_path):
    out = ["--out", str(tmp_path)] if arguments[0] == "reproduce" else []
    assert main([*arguments, *out, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.fault(30)
def test_a_folder_that_cannot_be_written_fails_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("mechsvd.commands.options.load_model", load)
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "--out", str(tmp_path / "file"), "--device", "cpu"]) == 1
    assert "The report cannot be written to" in capsys.readouterr().err


@pytest.mark.fault(30)
def test_a_folder_that_cannot_be_written_fails_before_anything_is_computed(tmp_path, embedded):
    def make():
        raise AssertionError("a task was made first")

    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"The report cannot be written to .*file: .*; choose another folder"
    ):
        reproduce(embedded, {"a": make}, tmp_path / "file", say=lambda _: None)
