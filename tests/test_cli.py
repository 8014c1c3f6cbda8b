import re
import warnings

import pandas as pd
import pytest

import mechsvd as ms
from mechsvd.cli import main
from mechsvd.demo import WEIGHTS


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    warnings.simplefilter("ignore")  # short texts have fewer writes a layer than dimensions; pytest restores the filters
    assert main(["reproduce", "--out", str(out), "--device", "cpu", "--max-new-tokens", "12"]) == 0
    return out


def test_reproduce_writes_a_page_that_needs_no_network(report):
    page = (report / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert page.count('class="plotly-graph-div"') == 4 * 10
    for name, prompt in ms.SHORTFORM_PROMPTS.items():
        assert f'id="{name}"' in page
        assert prompt.split("\n")[0].split(" => ")[0] in page


def test_the_page_names_the_model_and_its_self_check(report):
    page = (report / "report.html").read_text()
    for part in ("mechsvd embedded", "SelfCheck: passed", "clean probability", "float32", "nats"):
        assert part in page


def test_tables_and_results_lie_beside_it(report):
    for name in ms.SHORTFORM_PROMPTS:
        table = pd.read_csv(report / "report-data" / name / "sweep.csv")
        assert list(table.columns) == ["rank", "log_prob", "probability", "surprise", "orig_delta", "kept_delta"]
        sweep = ms.RankSweep.load(report / "report-data" / name / "sweep.safetensors")
        assert table["log_prob"].tolist() == pytest.approx(sweep.measurement.log_prob.tolist(), rel=1e-6)
        assert len(pd.read_csv(report / "report-data" / name / "singular_values.csv")) == len(sweep.order)


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
    ]
    assert main(["reproduce", *arguments, "--out", str(tmp_path), "--dtype", "float64", "--device", "cpu"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "I believe &lt;b&gt;<b> it &amp; him</b>" in page
    assert "float64" in page
    assert len(page) < 500_000
    assert re.search(r'<script src="https://cdn.plot.ly/plotly-[\d.]+.min.js"', page)
    table = pd.read_csv(tmp_path / "report-data" / "prompt-1" / "sweep_by_site.csv")
    assert set(table["component"]) == {"attn"}
    said = capsys.readouterr().out
    assert re.search(r"prompt-1: \d+ tokens of the prompt, \d+ scored; at most 129 ranks, about \d+ s", said)
    assert re.search(r"report.html after \d+ s", said)


def test_doctor_says_versions_device_and_the_self_check(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for part in (f"mechsvd {ms.__version__}", "transformer-lens", "device cpu", "d_model 128", "SelfCheck: passed"):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--continuation", "x"], "`--continuation` needs a `--prompt`"),
        (["reproduce", "--prompt", "a", "--prompt", "b", "--continuation", "c"], "2 --prompt but 1 --continuation"),
        (["reproduce", "--prompt", "good", "--prompt", ""], "--continuation is empty"),
        (["doctor", "nobody/nothing"], "mechsvd: Cannot load 'nobody/nothing' from the hub"),
    ],
)
def test_an_error_is_one_line_and_status_one(arguments, message, capsys, tmp_path):
    out = ["--out", str(tmp_path)] if arguments[0] == "reproduce" else []
    assert main([*arguments, *out, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_fails_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "--out", str(tmp_path / "file"), "--device", "cpu"]) == 1
    output = capsys.readouterr()
    assert "The report cannot be written to" in output.err
    assert not output.out


def test_a_run_removes_what_an_earlier_one_left_for_other_prompts_and_nothing_else(tmp_path, silent):
    options = ["--out", str(tmp_path), "--device", "cpu", "--max-new-tokens", "2"]
    (tmp_path / "report-data" / "mine").mkdir(parents=True)
    (tmp_path / "report-data" / "mine" / "notes.txt").write_text("kept")
    assert main(["reproduce", "--prompt", "I believe", "--prompt", "I think", *options]) == 0
    assert main(["reproduce", "--prompt", "We believe", *options]) == 0
    assert sorted(path.name for path in (tmp_path / "report-data").iterdir()) == ["mine", "prompt-1"]
