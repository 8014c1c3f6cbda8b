"""What the notebooks look like as stored, and that their exercises tell wrong answers from right ones.

That they run is seen by pytest's nbmake, which executes them.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

import mechsvd as ms

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["1_shortform", "2_composing_hooks", "3_hessian_attribution", "4_many_texts_and_models"]
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
FIGURE = re.compile(r"\bms\.figures\.\w+\(|\bgo\.Figure\(")


def cells_of(path, kind=None):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        cell | {"source": "".join(cell["source"])}
        for cell in cells
        if kind in (None, cell["cell_type"])
    ]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_are_four_notebooks_and_pytest_runs_them(pytestconfig):
    assert [path.stem for path in NOTEBOOKS] == NAMES
    assert pytestconfig.getoption("nbmake")
    assert "notebooks" in pytestconfig.getini("testpaths")


def test_a_notebook_is_short_and_begins_with_prose_and_takes_another_model_by_one_line(path):
    cells = cells_of(path)
    assert len(cells) < 20
    assert cells[0]["cell_type"] == "markdown"
    assert sum("# change this line" in cell["source"] for cell in cells) == 1
    assert sum("load_model(MODEL)" in cell["source"] for cell in cells) == 1


def test_every_figure_is_announced_by_what_to_look_for(path):
    cells = cells_of(path)
    figures = [i for i, cell in enumerate(cells) if is_code(cell) and FIGURE.search(cell["source"])]
    assert len(figures) >= 5
    for i in figures:
        assert cells[i - 1]["cell_type"] == "markdown"
        assert re.search(r"\bLook (in|for|at)\b|look (in|for|at)\b", cells[i - 1]["source"])


def is_code(cell):
    return cell["cell_type"] == "code"


def test_stored_figures_are_plotly_and_small_images_for_pages_that_show_no_plotly(path):
    for cell in cells_of(path, "code"):
        shown = [output["data"] for output in cell["outputs"] if PLOTLY in output.get("data", {})]
        assert len(shown) == len(FIGURE.findall(cell["source"]))
        for data in shown:
            image = base64.b64decode(data[PNG])
            assert image.startswith(b"\x89PNG")
            assert len(image) <= 30_000
    assert path.stat().st_size <= 500_000


def test_a_notebook_is_stored_as_it_ran_without_errors_warnings_or_paths(path):
    cells = cells_of(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [one for one in outputs if one["output_type"] == "error" or "ename" in one]
    assert not [one for one in outputs if one.get("name") == "stderr"]
    for output in outputs:
        text = {kind: data for kind, data in output.get("data", {}).items() if kind != PNG}
        assert not re.search(
            r"/(root|home|tmp|Users|work)/|site-packages", json.dumps([output.get("text"), text])
        )


def test_the_stored_outputs_are_those_of_the_cells_as_they_are(path):
    joined = "\0".join(cell["source"] for cell in cells_of(path, "code"))
    stored = json.loads(path.read_text(encoding="utf-8"))["metadata"]["sources"]
    assert stored == hashlib.sha256(joined.encode()).hexdigest(), "run python notebooks/images.py"


def test_the_claims_of_a_notebook_can_fail(path):
    code = "\n".join(cell["source"] for cell in cells_of(path, "code"))
    assert code.count("    seen(") + code.count("\nseen(") >= 4
    assert not re.search(r"seen\([^)]*,\s*True,?\s*\)", code)


def install(path, address, is_missing, monkeypatch):
    """Run the cell that installs, with another address; returns the lines given to pip."""
    cell = cells_of(path, "code")[0]["source"]
    lines: list[str] = []
    python = re.sub(r"(?m)^(\s*)%pip (.*)$", r"\1pip(f'\2')", cell)
    python = re.sub(r'(?m)^REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', python)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if is_missing else name)
    exec(python, {"pip": lines.append})
    return lines


def test_a_notebook_installs_from_the_repository_only_where_mechsvd_is_missing(path, monkeypatch):
    address = "https://github.com/someone/mechsvd"
    assert install(path, address, False, monkeypatch) == []
    assert install(path, address, True, monkeypatch) == [f"install -q git+{address}"]
    with pytest.raises(ModuleNotFoundError, match="REPOSITORY"):
        install(path, "", True, monkeypatch)


def test_address_and_badge_are_those_of_the_project_and_there_is_no_badge_without_one(path):
    found = re.search(r'(?m)^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text())
    address = found[1] if found else ""
    title, install_cell = (cell["source"] for cell in cells_of(path)[:2])
    assert f'REPOSITORY = "{address}"' in install_cell
    if address:
        place = address.removeprefix("https://").removesuffix(".git")
        assert f"/{place.removesuffix('/')}/blob/main/notebooks/{path.name})" in title
    else:
        assert "colab-badge" not in title


def test_the_images_of_the_readme_are_those_that_are_drawn():
    shown = set(re.findall(r"\(notebooks/images/(\w+)\.png\)", (ROOT / "README.md").read_text()))
    drawn = set(re.findall(r'save\("(\w+)"', (ROOT / "notebooks" / "images.py").read_text()))
    assert shown == drawn == {path.stem for path in (ROOT / "notebooks" / "images").glob("*.png")}


@pytest.fixture(scope="module")
def notebook_names(embedded, meaning, meaning_svd):
    """The names that the exercises of the first notebook use, of a shorter text."""
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd)
    within = ms.kl_at_most(1 / len(meaning.continuation))
    ranks = [40, 70]
    return {
        "ms": ms,
        "torch": torch,
        "model": embedded,
        "task": meaning,
        "svd": meaning_svd,
        "sweep": sweep,
        "found": ms.critical_rank_of(sweep),
        "lasting": ms.critical_rank_of(sweep, criterion=within).lasting_rank,
        "ranks": ranks,
        "overlap": ms.overlap([meaning_svd.subspace(rank) for rank in ranks]),
    }


WRONG = [
    (1, "x - x @ basis @ basis.T"),
    (1, "x @ basis"),
    (1, "x"),
    (2, "next((k for k, d in enumerate(divergences) if d <= limit), None)"),
    (2, "max((k + 1 for k, d in enumerate(divergences) if d > limit), default=0)"),
    (2, "max((k + 1 for k, d in enumerate(divergences) if d >= limit), default=0)"),
    (3, "min(p, q)"),
    (3, "p * q / d**2"),
    (3, "(p * q / d) ** 0.5"),
]


@pytest.mark.parametrize(("number", "answer"), [*WRONG, (1, ""), (2, ""), (3, "")])
def test_an_exercise_fails_for_a_wrong_answer_and_passes_for_the_solution(
    number, answer, notebook_names, capsys
):
    cells = [cell["source"] for cell in cells_of(NOTEBOOKS[0], "code")]
    solutions, *exercises = cells[-4:]
    names = dict(notebook_names)
    exec(solutions, names)
    exercise, count = re.subn(
        rf"return solution_{number}\(.*\)", f"return {answer}", exercises[number - 1]
    )
    assert count == 1
    if answer:
        with pytest.raises(AssertionError):
            exec(exercise, names)
    else:
        exec(exercises[number - 1], names)
        assert f"{number} is right" in capsys.readouterr().out
