"""The rooms of the house: what each may import, and what importing them costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mechsvd as ms

PACKAGE = Path(ms.__file__).parent
GROUND = {
    "ambient",
    "results",
    "checks",
    "fields",
    "packing",
    "version",
    "consoles",
}  # files beside the rooms
ROOMS = {  # a room, and the rooms that it may import besides the ground and itself
    "demo": set(),
    "linalg": set(),
    "model": {"demo"},
    "edits": {"linalg", "model"},
    "engine": {"linalg", "model", "edits"},
    "experiments": {"linalg", "model", "edits", "engine"},
    "attribution": {"linalg", "model", "edits", "engine"},
    "figures": {"linalg", "model", "edits", "engine", "experiments", "attribution"},
    "report": {"linalg", "model", "edits", "engine", "experiments", "attribution", "figures"},
    "commands": {
        *("demo", "linalg", "model", "edits", "engine", "experiments", "attribution", "figures"),
        "report",
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path):
    """The rooms that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.split(".")[0] == "mechsvd")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(path):
    room = room_of(path)
    if room in ("__init__", "cli"):
        return
    allowed = GROUND if room in GROUND else ROOMS[room] | GROUND | {room}
    assert set(imported(path)) <= allowed


def test_every_folder_is_a_room_with_one_docstring_and_every_file_beside_them_is_ground():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == GROUND | {"__init__", "cli"}
    for room in set(ROOMS) - {
        "figures",
        "demo",
    }:  # the figures are re-exported, the demo is one file
        (docstring,) = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
        assert isinstance(docstring.value, ast.Constant)


def test_only_the_model_room_imports_transformer_lens():
    for path in FILES:
        tree = ast.walk(ast.parse(path.read_text()))
        imports = [n.module or "" for n in tree if isinstance(n, ast.ImportFrom)]
        if any(name.split(".")[0] in ("transformer_lens", "transformers") for name in imports):
            assert room_of(path) in ("model", "demo"), path


def test_a_file_and_a_public_name_never_share_a_name():
    assert not set(ms.__all__) & {path.stem for path in FILES}


def test_everything_public_is_there_and_has_a_docstring():
    for name in ms.__all__:
        value = getattr(ms, name)
        own = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        # a dataclass without a docstring is given its own signature as one
        assert name.isupper() or (own and not own.startswith(f"{name}(")), name


def test_importing_leaves_the_heavy_libraries_alone():
    heavy = ["transformer_lens", "transformers", "plotly", "pandas", "scipy", "matplotlib"]
    code = f"import mechsvd, sys; print([n for n in {heavy} if n in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
