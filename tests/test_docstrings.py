"""Each public name has an example in its docstring, and all examples give what they say."""

import doctest
import inspect
import re
import textwrap
from io import StringIO

import pytest

import mechsvd as ms

from .reference import (
    ROOT,
    docstring,
    docstrings_of_values,
    llms,
    modules,
    public,
    stages,
    write_page,
)

NAMES = [name for names in stages().values() for name in names]
NEEDS_CHROME = {"figures.save_image"}  # the one example that is not run


def example(name):
    return doctest.DocTestParser().get_examples(docstring(name))


def run(name, text, names):
    """Run the examples of a docstring in a namespace, which they change."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    test.globs = names
    report = StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.write, clear_globs=False)
    assert not report.getvalue(), report.getvalue()


def test_the_examples_in_the_order_of_the_pipeline(embedded, silent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with monkeypatch.context() as patch:  # loaded once for all tests
        patch.setattr(ms, "load_model", lambda: embedded)
        exec(textwrap.dedent(re.split(r":\n\n(?=    )", ms.__doc__, maxsplit=1)[1]), names)
    for name in NAMES:
        run(name, docstring(name), names)


def test_the_examples_of_methods_and_of_what_is_not_public():
    known = {public(name).__doc__ for name in NAMES}
    finder, count = doctest.DocTestFinder(exclude_empty=True), 0
    for module in modules():
        for test in finder.find(module):
            if test.examples and test.docstring not in known:
                run(test.name, test.docstring, vars(module) | {"ms": ms})
                count += 1
    assert count > 5


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_a_sentence_and_a_short_example(name):
    text = docstring(name)
    sentence = text.split("\n\n")[0]
    assert sentence.endswith((".", "…"))
    assert text.count("Example:") == 1
    examples = example(name)
    assert 1 <= len(examples) <= 4
    assert sum(one.source.count("\n") for one in examples) <= 5
    assert examples[-1].want or name in NEEDS_CHROME
    assert any(doctest.SKIP in one.options for one in examples) == (name in NEEDS_CHROME)
    if inspect.isfunction(public(name)):  # a result's example goes on from that of its call
        assert f"ms.{name}(" in text


def test_the_text_for_language_models_is_that_of_the_docstrings():
    stored = (ROOT / "llms.txt").read_text(encoding="utf-8")
    assert stored == llms(), "run `python -m tests.reference`"


def test_the_stages_are_all_public_names_in_their_order():
    assert [*ms.__all__, *(f"figures.{name}" for name in ms.figures.__all__)] == NAMES
    assert set(docstrings_of_values()) >= {"log_prob", "same_greedy_text", "SHORTFORM_PROMPTS"}


def test_the_api_page_has_all_public_names_in_their_order(tmp_path):
    pytest.importorskip("pdoc")
    write_page(tmp_path)
    page = (tmp_path / "mechsvd.html").read_text(encoding="utf-8")
    functions = [name for name in ms.__all__ if name != "figures"]
    assert re.findall(r'<section id="(\w+)">', page) == functions
    assert "The natural-log probability of the whole continuation" in page
    assert 'id="surprise"' in (tmp_path / "mechsvd" / "figures.html").read_text(encoding="utf-8")
