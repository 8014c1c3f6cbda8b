"""What the notebooks look like when saved; that they run is seen by pytest's nbmake, which executes them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_clean_with_a_badge_and_one_line_that_installs(path):
    notebook = json.loads(path.read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    assert f"/notebooks/{path.name})" in cells[0][1].splitlines()[0]
    assert "colab-badge.svg" in cells[0][1]
    assert [source for _, source in cells if "pip" in source] == ["%pip install -q mechsvd"]
    assert sum("change this line" in source for _, source in cells) == 1


def test_there_are_notebooks_and_pytest_runs_them(pytestconfig):
    assert [path.name for path in NOTEBOOKS] == ["1_shortform.ipynb", "3_hessian_attribution.ipynb"]
    assert pytestconfig.getoption("nbmake")
    assert "notebooks" in pytestconfig.getini("testpaths")


def test_the_images_of_the_readme_are_those_that_are_drawn():
    shown = set(re.findall(r"\(notebooks/images/(\w+)\.png\)", (ROOT / "README.md").read_text()))
    drawn = set(re.findall(r'save\("(\w+)"', (ROOT / "notebooks" / "images.py").read_text()))
    assert shown == drawn == {path.stem for path in (ROOT / "notebooks" / "images").glob("*.png")}
