"""The reference, from the docstrings: `python -m tests.reference` writes `llms.txt`, and with a folder the API page too.

Both are in the order of the pipeline, which is that of `mechsvd.__all__`. The page needs the extra `docs`.
"""

import ast
import importlib
import inspect
import operator
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import mechsvd as ms

ROOT = Path(__file__).parents[1]


def stages() -> dict[str, list[str]]:
    """The public names by stage of the pipeline: the comments within `__all__`, then the figures."""
    block = re.search(r"__all__ = \[(.*?)\n\]", inspect.getsource(ms), re.DOTALL)[1]
    parts = re.split(r"\n    # (.+)\n", block)[1:]
    found = {
        title: re.findall(r'"(\w+)"', names)
        for title, names in zip(parts[::2], parts[1::2], strict=True)
    }
    return found | {"figures": [f"figures.{name}" for name in ms.figures.__all__]}


def public(name: str) -> Any:
    """What a public name stands for."""
    return operator.attrgetter(name)(ms)


@cache
def docstrings_of_values() -> dict[str, str]:
    """The docstrings under assignments, by name: help() does not show them, but the page does."""
    found = {}
    for file in (ROOT / "mechsvd").rglob("*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for before, after in pairwise(body):
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                target = before.targets[0] if isinstance(before, ast.Assign) else before.target
                found[ast.unparse(target)] = inspect.cleandoc(ast.literal_eval(after.value))
    return found


def modules() -> Iterator[Any]:
    """All modules of the package."""
    for found in pkgutil.walk_packages(ms.__path__, "mechsvd."):
        yield importlib.import_module(found.name)


def docstring(name: str) -> str:
    """The docstring of a public name."""
    return docstrings_of_values().get(name) or inspect.getdoc(public(name)) or ""


def llms() -> str:
    """The package for a language model: what it is, a worked example, and a line per public name."""
    first, example = re.split(r"\n\n", inspect.getdoc(ms), maxsplit=1)
    lines = ["# mechsvd", "", f"> {first}", "", example]
    for title, names in stages().items():
        lines += ["", f"## {title}", "", *map(entry, names)]
    return "\n".join(lines) + "\n"


def entry(name: str) -> str:
    sentence = docstring(name).split("\n\n")[0].replace("\n", " ")
    return f"- `ms.{name}{call(name)}`: {sentence}"


def call(name: str) -> str:
    """The parameters of a function with their defaults; nothing for a class or a value."""
    if not inspect.isfunction(public(name)):
        return ""
    signature = inspect.signature(public(name))
    plain = [
        p.replace(
            annotation=p.empty, default=Named(p.default) if p.default is not p.empty else p.empty
        )
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


class Named:
    """A default, printed by its name where it is a metric."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "name", None) or repr(self.value)


def write_page(folder: Path) -> None:
    """Write the API page: one file for the package and one for its figures."""
    import pdoc.doc
    import pdoc.render

    pdoc.render.configure(docformat="google", show_source=False, search=False)
    pages = {name: pdoc.doc.Module(importlib.import_module(name)) for name in PAGES}
    for page in pages.values():
        for name, text in docstrings_of_values().items():
            if isinstance(page.members.get(name), pdoc.doc.Variable):
                page.members[name].docstring = text
                page.members[name].default_value = inspect.Parameter.empty
    for name, page in pages.items():
        file = folder / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pdoc.render.html_module(page, pages), encoding="utf-8")


PAGES = ("mechsvd", "mechsvd.figures")


if __name__ == "__main__":
    (ROOT / "llms.txt").write_text(llms(), encoding="utf-8")
    if sys.argv[1:]:
        write_page(Path(sys.argv[1]))
