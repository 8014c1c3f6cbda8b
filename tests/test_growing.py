"""A report that is stopped: the earlier one stays, the page of what is done is there, and the same command goes on."""

import pytest

import mechsvd as ms
from mechsvd.engine import resuming
from mechsvd.report.build import reproduce
from mechsvd.report.pages import GROWING

from .conftest import tiny, tiny_task

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
        model, tasks, out, groups=kinds, cdn=True, say=[].append if said is None else said.append
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
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    from mechsvd import cli

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", stopped)
    assert cli.main(["reproduce", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert ms.__version__
