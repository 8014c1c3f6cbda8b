"""The README's Python runs as it stands, and prints what it says."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    said = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    printed = capsys.readouterr().out
    numbers = r"-?\d+\.\d{4}"  # nats, which differ in the last digits from machine to machine
    assert re.sub(numbers, "#", said) == re.sub(numbers, "#", printed[-len(said) :])
    for mine, theirs in zip(re.findall(numbers, said), re.findall(numbers, printed), strict=True):
        assert abs(float(mine) - float(theirs)) < 2e-3
    assert names["logits"].shape[1] == len(names["task"].tokens)
    assert isinstance(names["text"], str)


def test_the_readme_holds_the_two_commands():
    assert "\npip install . && mechsvd reproduce\n" in README
    assert "\npip install '.[test]' && pytest\n" in README
