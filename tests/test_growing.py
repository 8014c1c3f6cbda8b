"""A report that is stopped: the earlier one stays, the page of what is done is there, and the same command goes on."""

import shlex

import pytest

from mechsvd.cli import main
from mechsvd.engine import resuming
from mechsvd.model.selfcheck import self_check
from mechsvd.report.build import reproduce
from mechsvd.report.choices import Choices
from mechsvd.report.pages import GROWING

from .conftest import tiny, tiny_task

FEW = Choices(parts=("spectrum", "clipping", "ridge", "held-out", "prompts", "special"), step=8)
pytestmark = pytest.mark.filterwarnings("ignore")


class Stop(BaseException):
    pass


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


def run(model, out, said=None, seeds=(0, 1)):
    tasks = {f"text-{seed}": lambda seed=seed: tiny_task(12, 6, seed) for seed in seeds}
    kinds = {
        kind: [tiny_task(10, 5, seed + i) for i in range(4)]
        for kind, seed in (("a", 10), ("b", 20))
    }
    return reproduce(
        model,
        tasks,
        out,
        groups=kinds,
        choices=FEW,
        cdn=True,
        replace=True,
        say=[].append if said is None else said.append,
    )


def tables(out):
    (folder,) = [path for path in (out / "report-data").iterdir() if path.is_dir()]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.csv"))
    }


def stopping(monkeypatch, batches):
    counted, add = [], resuming.Kept.add

    def stop(self, count, part):
        add(self, count, part)
        counted.append(count)
        if len(counted) == batches:
            raise Stop

    monkeypatch.setattr(resuming.Kept, "add", stop)
    return counted


def test_the_page_tells_of_special_directions_and_says_so_in_tables(whole):
    page = (whole[0] / "report.html").read_text()
    assert page.count('href="#special"') == page.count('<h2 id="special">') == 1
    assert 'id="contrast_special"' in page
    assert any(name.endswith("_all/contrast_ratios.csv") for name in tables(whole[0]))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        counted = stopping(patch, -1)
        run(model, out)
    return out, len(counted)


@pytest.mark.fault(27)
def test_a_stopped_report_goes_on_and_has_the_tables_of_one_that_was_not(
    model, whole, tmp_path, monkeypatch
):
    expected, batches = whole
    (tmp_path / "report.html").write_text("an earlier report")
    stop, said = int(0.8 * batches), []
    with monkeypatch.context() as patch:
        stopping(patch, stop)
        with pytest.raises(Stop):
            run(model, tmp_path)
    assert (tmp_path / "report.html").read_text() == "an earlier report"
    assert len([*tmp_path.glob("report-*.unfinished")]) == 1
    growing = (tmp_path / GROWING).read_text()
    assert "1 of 2 prompts so far" in growing
    assert "report-data/" not in growing
    with monkeypatch.context() as patch:
        rest = stopping(patch, -1)
        run(model, tmp_path, said)
    assert len(rest) == batches - stop
    assert said[0].startswith("Going on from ")
    assert tables(tmp_path) == tables(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report-data"}
    assert "earlier" not in (tmp_path / "report.html").read_text()


@pytest.mark.fault(28)
def test_another_command_begins_anew_and_leaves_the_first_ones_work(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, 3)
        with pytest.raises(Stop):
            run(model, tmp_path)
    (kept,) = tmp_path.glob("report-*.unfinished")
    said = []
    run(model, tmp_path, said, seeds=(0, 4))
    assert not said[0].startswith("Going on")
    assert kept.exists()
    assert (tmp_path / "report.html").exists()


@pytest.mark.fault(27)
def test_ctrl_c_ends_in_two_lines_what_is_kept_and_how_to_go_on(
    embedded, monkeypatch, capsys, tmp_path
):
    typed = ["reproduce", "--prompt", "I think", "--max-new-tokens", "2", "--only", "spectrum"]
    typed += ["--ranks", "0", "--cdn", "--replace", "--out", str(tmp_path)]
    (tmp_path / "report.html").write_text("an earlier page")
    add = resuming.Kept.add

    def stopped(*_, **__):
        raise KeyboardInterrupt

    def stop_after(self, count, part):
        add(self, count, part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mechsvd.commands.options.load_model", stopped)
        assert main(typed) == 130
    assert capsys.readouterr().err.splitlines() == [
        "mechsvd: stopped. Nothing is kept.",
        f"Begin again with: mechsvd {shlex.join(typed)}",
    ]
    monkeypatch.setattr("mechsvd.commands.options.load_model", lambda *_, **__: embedded)
    with monkeypatch.context() as patch:
        patch.setattr(resuming.Kept, "add", stop_after)
        assert main(typed) == 130
    (kept,) = tmp_path.glob("report-*.unfinished")
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith(f"mechsvd: stopped. What is done is kept in {kept} (")
    assert said[-1] == f"Go on with: mechsvd {shlex.join(typed)}"
    assert not [line for line in said[:-2] if not line.startswith("mechsvd: note: ")]
    assert (tmp_path / "report.html").read_text() == "an earlier page"
    assert main(typed) == 0
    assert "Going on from" in capsys.readouterr().out
    assert "earlier page" not in (tmp_path / "report.html").read_text()
    assert not kept.exists()


def test_a_page_that_another_run_has_put_there_meanwhile_is_not_replaced(
    model, tmp_path, monkeypatch
):
    from mechsvd.report import build

    def meanwhile(model):
        (tmp_path / "report.html").write_text("of another run")
        return self_check(model)

    monkeypatch.setattr(build, "self_check", meanwhile)
    given = {"choices": Choices(parts=("spectrum",), ranks=(0,)), "cdn": True, "say": [].append}
    tasks = {"one": lambda: tiny_task(12, 6)}
    with pytest.raises(FileExistsError, match=r"meanwhile\. What was computed is kept in .*\.unf"):
        reproduce(model, tasks, tmp_path, **given)
    assert (tmp_path / "report.html").read_text() == "of another run"
    assert len([*tmp_path.glob("report-*.unfinished")]) == 1
    reproduce(model, tasks, tmp_path, replace=True, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report-data"}
