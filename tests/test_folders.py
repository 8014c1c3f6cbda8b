"""Whenever a report is killed, its page is there with every file of its folder; what a run did not write stays."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import mechsvd as ms
from mechsvd.report.folders import _alone, replace_run
from mechsvd.report.pages import write_report
from mechsvd.report.study import study_task
from tests.conftest import tiny, tiny_task

FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
KILLS = 12
forks = pytest.mark.skipif(FORK is None, reason="takes a fork, and locks of files")


@pytest.fixture(scope="module")
def studies(model):
    """One study under two names, so that the runs differ in every file's place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = tiny_task()
        study = study_task(model, "old", task, {"own": task.tokens[:2]})
    return {name: dataclasses.replace(study, name=name) for name in ("old", "new")}


@pytest.fixture(scope="module")
def model():
    return tiny("Llama")


@pytest.fixture(scope="module")
def check(model):
    return ms.self_check(model)


def run_of(out):
    """The page's run: its folder and its prompt, after comparing every file with the listing."""
    page = (out / "report.html").read_text()
    assert page.endswith("</html>\n")
    folder = out / re.search(r'href="(report-data/[^"]+)/"', page)[1]
    listing = json.loads((folder / ".written.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".written.json"]
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert found == listing["sha256"]
    assert len(found) > 15
    (prompt,) = {path.split("/")[0] for path in found}
    assert f'<p class="text" id="{prompt}">' in page
    return folder, prompt


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_at(event):
    """Kill this process before it has moved, made or removed more files and folders than so many."""
    seen = iter(range(event))
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

    def count(name, _):
        if name in changes and next(seen, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def write(study, check, out, event=None):
    torch.set_num_threads(1)  # threads do not survive a fork
    if event is not None:
        stop_at(event)
    write_report([study], check, out, cdn=True)
    os._exit(0)


@pytest.mark.fault(49)
@forks
def test_a_report_killed_at_any_moment_leaves_the_old_run_whole_or_the_new_one(
    studies, check, tmp_path
):
    write_report([studies["old"]], check, tmp_path, cdn=True)
    started = time.perf_counter()
    write_report([studies["new"]], check, tmp_path, cdn=True)
    longest, seed = time.perf_counter() - started, random.Random(0)
    prompts = set()
    for kill in range(KILLS):
        prompt = (
            "old" if run_of(tmp_path)[1] == "new" else "new"
        )  # the one that the page does not show
        if kill % 2:
            child = FORK.Process(target=write, args=(studies[prompt], check, tmp_path))
            child.start()
            child.join(seed.uniform(0, longest))
            child.kill()
        else:
            child = FORK.Process(
                target=write, args=(studies[prompt], check, tmp_path, seed.randrange(90))
            )
            child.start()
        child.join()
        prompts.add(run_of(tmp_path)[1])
    assert prompts == {"old", "new"}
    write_report([studies["new"]], check, tmp_path, cdn=True)
    folder, prompt = run_of(tmp_path)
    assert prompt == "new"
    assert names(tmp_path) == ["report-data", "report.html"]
    assert names(tmp_path / "report-data") == [folder.name]


@pytest.mark.fault(49)
@forks
def test_every_step_of_taking_over_can_be_the_last(tmp_path):
    """The same with small files, killed before every single step; the next run clears up."""
    base = tmp_path / "base"
    replace_run(base, fill)
    for event in range(30):
        out = shutil.copytree(base, tmp_path / str(event))
        child = FORK.Process(target=take_over, args=(out, event))
        child.start()
        child.join()
        is_whole(out)
        replace_run(out, fill)
        assert names(out / "report-data") == [(out / "report.html").read_text()]
        assert names(out) == ["report-data", "report.html"]
        if child.exitcode == 0:
            break
    assert 10 < event < 29


@forks
@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN], ids=["killed", "disk full"])
def test_a_page_cut_off_half_way_is_not_the_page(tmp_path, action):
    replace_run(tmp_path, fill)
    before = (tmp_path / "report.html").read_text()
    child = FORK.Process(target=cut_off, args=(tmp_path, action))
    child.start()
    child.join()
    assert child.exitcode != 0
    is_whole(tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def cut_off(out, action):
    import resource

    os.close(2)  # nobody needs the traceback
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    replace_run(out, lambda folder, name: fill(folder, name) + " " * 100_000)


def is_whole(out):
    name = (out / "report.html").read_text()
    run = out / "report-data" / name
    assert [*json.loads((run / ".written.json").read_text())["sha256"]] == ["a/x", "b/y"]
    assert (run / "a" / "x").read_text() == (run / "b" / "y").read_text() == name


def fill(folder, name):
    for file in ("a/x", "b/y"):
        (folder / file).parent.mkdir()
        (folder / file).write_text(name)
    return name


def take_over(out, event):
    stop_at(event)
    replace_run(out, fill)
    os._exit(0)


@pytest.mark.fault(29)
@forks
def test_a_second_run_waits_for_one_that_is_alive_and_then_takes_its_place(tmp_path):
    (tmp_path / "report-data").mkdir()
    first = FORK.Process(target=linger, args=(tmp_path,))
    first.start()
    hidden = wait_for(lambda: list((tmp_path / "report-data").glob(".*.mechsvd")))
    second = FORK.Process(target=replace_run, args=(tmp_path, fill))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert hidden[0].is_dir()
    first.kill()
    second.join(10)
    assert second.exitcode == 0
    assert not hidden[0].exists()
    assert names(tmp_path / "report-data") == [(tmp_path / "report.html").read_text()]


def linger(out):
    def write(folder, name):
        (folder / "half").write_text("")
        time.sleep(60)

    replace_run(out, write)


def wait_for(condition):
    for _ in range(500):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@pytest.mark.fault(30)
def test_a_run_that_fails_leaves_nothing_and_the_earlier_one(tmp_path):
    replace_run(tmp_path, fill)
    before = names(tmp_path / "report-data")

    def fail(folder, name):
        fill(folder, name)
        raise RuntimeError("no figure")

    with pytest.raises(RuntimeError, match="no figure"):
        replace_run(tmp_path, fail)
    assert names(tmp_path / "report-data") == before == [(tmp_path / "report.html").read_text()]


@pytest.mark.fault(49)
def test_only_what_a_run_wrote_is_removed(tmp_path):
    data = tmp_path / "report-data"
    replace_run(tmp_path, fill)
    run = next(data.iterdir())
    shutil.copytree(run, data / "backup")  # with the listing of another run
    shutil.copytree(run, data / "2001-01-01-000000")
    (run / "a" / "notes.txt").write_text("kept")
    for mine in ("mine", "empty", ".hidden", ".2001.mechsvd"):
        (data / mine).mkdir()
    (data / "mine" / "notes.txt").write_text("kept")
    (tmp_path / ".report.html.swp").write_text("kept")
    replace_run(tmp_path, fill)
    now = (tmp_path / "report.html").read_text()
    kept = [
        "backup",
        "2001-01-01-000000",
        "mine",
        "empty",
        ".hidden",
        ".2001.mechsvd",
        run.name,
        now,
    ]
    assert names(data) == sorted(kept)
    assert [path.relative_to(run).as_posix() for path in run.rglob("*")] == ["a", "a/notes.txt"]
    assert names(data / "backup") == [".written.json", "a", "b"]
    assert (tmp_path / ".report.html.swp").exists()


def test_a_listing_removes_nothing_elsewhere(tmp_path):
    data = tmp_path / "report-data"
    run = data / "2001-01-01-000000"
    (run / "a").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("one", "two", "three", ".three.12345678"):
        (elsewhere / name).write_text("kept")
    (run / "link").symlink_to(elsewhere)
    files = ["../../elsewhere/one", str(elsewhere / "two"), "link/three"]
    (run / ".written.json").write_text(
        json.dumps({"run": run.name, "sha256": dict.fromkeys(files, "")})
    )
    (data / ".written.json").write_text(
        json.dumps({"../elsewhere": ["one", "two"], str(elsewhere): ["three"]})
    )
    replace_run(tmp_path, fill)
    assert names(elsewhere) == [".three.12345678", "one", "three", "two"]


@pytest.mark.parametrize("listing", ["", "{", "[]", '{"run": 3}', '{"a": "b"}', '{"a": {"b": 1}}'])
def test_a_damaged_listing_stops_no_run(tmp_path, listing):
    data = tmp_path / "report-data"
    run = data / "2001-01-01-000000"
    run.mkdir(parents=True)
    for folder in (data, run):
        (folder / ".written.json").write_text(listing)
    replace_run(tmp_path, fill)
    assert run.is_dir()


def test_the_layout_of_the_first_release_is_cleared(tmp_path):
    data = tmp_path / "report-data"
    written = {"prompt-1": ["sweep.csv", "task.safetensors"], "_all": ["overlap.csv"]}
    files = [data / name / file for name, listed in written.items() for file in listed]
    unfinished = [
        data / "prompt-1" / ".sweep.csv.ab3_9xyz",
        data / ".writable",
        data / "..written.json.ab3_9xyz",
        tmp_path / ".report.html.k2j4h5_a",
    ]
    mine = [data / "_all" / "notes.txt", data / "_all" / ".notes.original"]
    for file in [*files, *unfinished, *mine]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (data / ".written.json").write_text(json.dumps(written))
    replace_run(tmp_path, fill)
    assert names(data) == sorted([(tmp_path / "report.html").read_text(), "_all"])
    assert names(data / "_all") == sorted(path.name for path in mine)
    assert names(tmp_path) == ["report-data", "report.html"]


def test_where_the_system_has_no_locks_nothing_unfinished_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr("mechsvd.report.folders.fcntl", None)
    alive = tmp_path / "report-data" / ".2001-01-01-000000.mechsvd"
    alive.mkdir(parents=True)
    replace_run(tmp_path, fill)
    replace_run(tmp_path, fill)
    assert names(tmp_path / "report-data") == [alive.name, (tmp_path / "report.html").read_text()]
    with _alone(Path(tmp_path)) as is_alone:
        assert not is_alone
