"""The reading order of the files, and what importing them costs."""

import ast
import subprocess
import sys
from pathlib import Path

import mechsvd as ms

PACKAGE = Path(ms.__file__).parent
ORDER = [
    "checks",
    "fields",
    "packing",
    "results",
    "subspace",
    "comparison",
    "decomposition",
    "eigenpairs",
    "edits",
    "sites",
    "evaluation",
    "runs",
    "selfcheck",
    "demo",
    "checkpoints",
    "models",
    "tokenization",
    "tasks",
    "reading",
    "hooks",
    "memory",
    "batches",
    "writes",
    "noise",
    "measurement",
    "sweeps",
    "ridge",
    "ranking",
    "search",
    "generation",
    "objective",
    "curvature",
    "components",
    "cautions",
    "attribution",
    "gradients",
    "display",
    "drawing",
    "attribution_figures",
    "figures",
    "study",
    "findings",
    "folders",
    "tables",
    "page",
    "sections",
    "report",
    "cli",
]


def imported(path):
    """The files of the package that a file imports at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mechsvd":
            names = node.module.split(".")[1:2]
            yield from names or [alias.name for alias in node.names if not alias.name.startswith("__")]


def test_a_file_imports_only_files_above_it():
    for place, name in enumerate(ORDER):
        path = PACKAGE / f"{name}.py" if (PACKAGE / f"{name}.py").exists() else PACKAGE / name / "__init__.py"
        assert set(imported(path)) <= set(ORDER[:place]), name


def test_every_file_has_its_place_in_the_order():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert files - {"__pycache__"} == set(ORDER)


def test_a_file_and_a_public_name_never_share_a_name():
    assert not set(ms.__all__) & set(ORDER) - {"figures"}


def test_everything_public_is_there_and_has_a_docstring():
    for name in ms.__all__:
        assert getattr(ms, name).__doc__ or name.isupper(), name


def test_importing_leaves_the_heavy_libraries_alone():
    heavy = ["transformer_lens", "transformers", "plotly", "pandas", "scipy", "matplotlib"]
    code = f"import mechsvd, sys; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
