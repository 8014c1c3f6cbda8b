"""The README's Python runs as it stands, and prints what it says."""

import re
import shlex
import warnings
from pathlib import Path

import torch

import mechsvd as ms
from mechsvd.cli import _parser

from .conftest import tiny_task

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs_and_prints_what_it_says(
    embedded, plain, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ms, "load_model", lambda: embedded)  # loaded once for all tests
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    expected = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    printed = capsys.readouterr().out
    numbers = r"-?\d+\.\d{4}"  # nats, which differ in the last digits from machine to machine
    assert re.sub(numbers, "#", expected) == re.sub(numbers, "#", printed[-len(expected) :])
    pairs = zip(re.findall(numbers, expected), re.findall(numbers, printed), strict=True)
    assert all(abs(float(mine) - float(theirs)) < 2e-3 for mine, theirs in pairs)
    run_the_table(names | {"plain": plain})


# rows that say what to write in other software; see test_elsewhere, test_dictionaries, test_processes
ELSEWHERE = ["nnsight", "a dictionary spliced in by SAELens", "several processes, machines or GPUs"]


def tiny_tasks(seed):
    return [tiny_task(seed=10 * seed + i) for i in range(4)]


def run_the_table(names):
    """Run each line of "I have … → I write …", with what the left column has."""
    names |= {
        "torch": torch,
        "vectors": torch.eye(128)[:, :3],
        "vector": torch.ones(128),
        "kinds": [tiny_tasks(0), tiny_tasks(1)],
        "decoder": torch.eye(128),
        "other": ms.Task(torch.arange(3, 43), 20),
    }
    names |= {
        "gains": torch.linspace(0, 1, 128),
        "my_metric": lambda logits: logits[:, -1, 5],
        "my_hook": ("blocks.0.hook_attn_out", lambda x, hook: x),
    }
    table = README.split("| I have | I write |")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    heads = [row for row in rows if row[0].startswith("**")]
    calls = [code[1] for row in rows if (code := re.fullmatch(r"`([^`]+)`", row[-1]))]
    other = [row[0] for row in rows if len(row) == 2 and not re.fullmatch(r"`[^`]+`", row[1])]
    assert len(heads) == 6
    assert len(calls) > 35
    assert [text.split("(")[0].strip() for text in other] == ELSEWHERE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sweep of some layers, tokens without BOS
        for call in calls:
            exec(call, names)
    assert names["found"].rank is not None
    assert names["mine"].rank == 3


def test_the_readme_is_short_and_holds_the_two_commands():
    assert README.count("\n") <= 230
    assert "\npip install . && mechsvd reproduce\n" in README
    assert "\npip install '.[test]' && pytest\n" in README


def test_every_file_that_the_readme_names_is_there():
    root = Path(__file__).parents[1]
    rooms = re.findall(r"^\| `(\w+)/` \|.*\| (?:.*`(\w+\.py)`)? ?\|$", README, re.MULTILINE)
    assert len(rooms) == 10
    for room, file in rooms:
        assert (root / "mechsvd" / room / file).exists()
    for path in re.findall(r"(?:notebooks|tests)/[\w/]+\.\w+", README):
        assert (root / path).exists(), path


def test_every_command_of_the_readme_is_one():
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    lines = re.findall(r"^(?:pip install \. && )?mechsvd ([^#\n]+)", blocks, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        options = _parser().parse_args(shlex.split(line))
        assert callable(options.run)
