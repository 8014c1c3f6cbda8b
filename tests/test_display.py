"""Text from outside stays text: on the page, in the figures, in the tables, in the names of files."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from itertools import cycle, islice

import pytest
import torch

import mechsvd as ms
from mechsvd import figures
from mechsvd.figures.display import escape, file_name, label, visible
from mechsvd.report.pages import write_report
from mechsvd.report.study import compare, study_task
from tests.conftest import tiny, tiny_task
from tests.test_fields import tiny_results

OWNED = "document.documentElement.dataset.owned=1"
HOSTILE = (
    f"<script>{OWNED}</script>",
    f"</script><script>{OWNED}</script>",
    f'"><img src=x onerror="{OWNED}">',
    f"';{OWNED};//",
    f"</title></style><svg onload={OWNED}>",
    f'<a href="javascript:{OWNED}">a link</a>',
    "<!--<script>",
    "<b>bold</b>&lt;&amp;quot;",
    "%{customdata}",
    "\u202eright to left\u2069\u200f",
    "\x00\x07\x1b[31m\x85\u2028",
    '=HYPERLINK("http://127.0.0.1","a")',
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "שלום\n",
)
NAMES = (HOSTILE[0], HOSTILE[2])  # one has quotes, which ended an attribute
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The same two studies under plain names and texts, and under hostile ones."""
    model, out = tiny("Llama"), {}
    for kind, texts, names in (
        ("plain", ("a", "b"), ("one", "two")),
        ("hostile", HOSTILE, NAMES),
    ):
        model.cfg.model_name = texts[1]
        out[kind] = tmp_path_factory.mktemp(kind)
        found = study(model, texts)
        studies = [dataclasses.replace(found, name=name) for name in names]
        write_report(studies, ms.self_check(model), out[kind], comparison=compare(model, studies))
    return out


def study(model, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = tiny_task(length=32, prompt_length=20)
        task = dataclasses.replace(task, pieces=tuple(islice(cycle(texts), len(task.tokens))))
        found = study_task(model, "", task, {"own": torch.tensor([0, 5])})
    # what the model writes is hostile too, and where it goes on from
    written = [
        dataclasses.replace(t, pieces=tuple(islice(cycle(texts), len(t.tokens))))
        for t in found.texts[0].tasks
    ]
    return dataclasses.replace(
        found, texts=(dataclasses.replace(found.texts[0], start=texts[0], tasks=tuple(written)),)
    )


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and its text outside of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.links += [value for name, value in attributes if name.endswith("href")]

    def handle_data(self, data):
        if not self.tags or self.tags[-1][0] not in ("script", "style"):
            self.text += data


@pytest.mark.fault(50)
def test_a_page_of_hostile_texts_has_the_tags_of_a_plain_one(pages):
    plain, hostile = (
        Tags((pages[kind] / "report.html").read_text()) for kind in ("plain", "hostile")
    )
    assert hostile.tags == plain.tags
    assert [tag for tag, _ in hostile.tags].count("script") == 2 + 2 * 20 + 17
    for text in (HOSTILE[0], HOSTILE[5], "<!--<script>", "%{customdata}", "שלום\n"):
        assert text in hostile.text


@pytest.mark.fault(50)
def test_controls_are_shown_and_do_not_work(pages):
    page = (pages["hostile"] / "report.html").read_bytes().decode()
    own = page[page.rindex("</style>") :]
    own = own[own.index("<h1>") :]  # behind plotly, which has characters of its own
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u202a-\u202e\u2066-\u2069]", own
    )
    assert r"\u202eright to left\u2069\u200f" in own
    assert r"\u0000\u0007\u001b[31m\u0085\u2028" in own


@pytest.mark.fault(50)
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_nothing_runs_in_a_browser_and_the_figures_show_the_text(pages, tmp_path):
    dom = re.sub(
        r"<script.*?</script>",
        "",
        opened(pages["hostile"] / "report.html", tmp_path / "one"),
        flags=re.DOTALL,
    )
    assert "data-owned" not in re.search(r"<html[^>]*>", dom)[0]
    assert dom.count('class="main-svg"') >= 2 * (20 + 8)  # of the chosen text, and of all
    ours = ("#", "report-data/", "data:image/png;")  # sections, the run's folder, heat maps
    ours += ("https://www.lesswrong.com/users/tailcalled",)
    assert not [link for link in Tags(dom).links if not link.startswith(ours)]
    titles = re.findall(r'<text class="gtitle"[^>]*>(.*?)</text>', dom)
    shown = f"{HOSTILE[0]}: ".replace("<", "&lt;").replace(">", "&gt;")
    assert sum(re.sub(r"<[^>]*>", "", title).startswith(shown) for title in titles) == 20
    page = (pages["plain"] / "report.html").read_text()
    owned = tmp_path / "owned.html"
    owned.write_text(page.replace("</h1>", f"</h1>{HOSTILE[0]}"))
    assert (
        "data-owned" in re.search(r"<html[^>]*>", opened(owned, tmp_path / "two"))[0]
    )  # the test sees what it looks for


def opened(page, profile):
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.fault(50)
def test_text_in_tables_is_no_formula_and_numbers_stay_numbers(pages):
    (run,) = (pages["hostile"] / "report-data").iterdir()
    minus = 0
    for path in sorted(run.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for cell in (cell for row in csv.reader(file) for cell in row):
                if cell.startswith("-"):
                    assert float(cell) < 0, path
                    minus += 1
                assert not cell.startswith(("=", "+", "@", "\t", "\r")), path
    assert minus > 1000
    folder = run / file_name(HOSTILE[0])
    with (folder / "tokens.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    pieces = ms.Task.load(folder / "task.safetensors").pieces  # where the text is exact
    assert pieces == tuple(islice(cycle(HOSTILE), len(pieces)))
    assert texts == [f"'{piece}" if piece[0] in "=+-@\t\r" else piece for piece in pieces]


@pytest.mark.fault(50)
def test_a_name_is_one_folder_and_another_name_another_folder(pages):
    (run,) = (pages["hostile"] / "report-data").iterdir()
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == sorted(
        ["_all", *(file_name(name) for name in NAMES)]
    )
    names = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "%2E",
        "_all",
        "%5Fall",
        "a",
        "ä",
        "a-b_2",
        "C:",
        *HOSTILE,
    ]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(made)
    assert all(re.fullmatch(r"[\w%-]+", name) and not name.startswith("_") for name in made)
    assert [file_name(name) for name in ("a-b_2", "ä", "prompt-1")] == ["a-b_2", "ä", "prompt-1"]


@pytest.mark.fault(50)
def test_figures_show_names_as_they_are(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[1, 2])
    name = '<a href="x">%{y}</a>\u202e & "it"'
    shown = '&lt;a href="x"&gt;%&#123;y}&lt;/a&gt;\\u202e &amp; "it"'
    (line,) = figures.race_of_orders({name: sweep}).data
    assert line.name == shown
    assert line.hovertemplate.startswith(f"{shown}<br>")
    overlaps = figures.overlap_map(
        ms.overlap([meaning_svd.subspace(2), meaning_svd.subspace(3)]), [name, "b"]
    )
    assert overlaps.data[0].x[0] == f"{shown}<br>(rank 2)"


def test_what_is_written_out_and_what_stays():
    assert visible("a\nb\tc") == "a\nb\tc"
    assert visible("👩\u200d🔬 می\u200cخواهم é 中 שלום") == "👩\u200d🔬 می\u200cخواهم é 中 שלום"
    assert visible("\r\x7f\ufeff\ud800\U000e0067") == r"\u000d\u007f\ufeff\ud800\U000e0067"
    assert escape("<'\"&>") == "&lt;&#x27;&quot;&amp;&gt;"
    assert label("<'\"&>") == "&lt;'\"&amp;&gt;"


HOVER = '<img src=x onerror="1">\u202e%{customdata}'


def hostile(value):
    """A result with every text that it may hold replaced by a hostile one."""
    if isinstance(value, str):
        return HOVER
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            try:  # a text that is one of a few words stays
                changed = {field.name: hostile(getattr(value, field.name))}
                value = dataclasses.replace(value, **changed)
            except (ValueError, TypeError):
                continue
    return value


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


DRAWN = {  # figures of one result, and its class
    "singular_values": "Decomposition", "cumulative_singular_values": "Decomposition",
    "probability": "RankSweep", "surprise": "RankSweep", "deltas": "RankSweep",
    "delta_map": "RankSweep", "margins": "CriticalRank", "dose_response": "DoseResponse",
    "baseline_correlations": "BaselineComparison", "held_out": "HeldOut",
    "contrast_map": "Contrast", "overlap_anchors": "OverlapAnchors",
    "estimated_effects": "RankingEstimate", "hessian_spectrum": "Attribution",
    "estimate_errors": "Attribution", "curvature_ridge": "CurvatureRidge",
    "overlap_map": "Overlap", "pooled_spectrum": "Pool",
}  # fmt: skip
NAMED = {"race_of_orders": "RankSweep", "accumulated_scores": "Attribution", "accumulated_shares": "Attribution"}  # fmt: skip


@pytest.mark.fault(50)
@pytest.mark.parametrize("name", [*DRAWN, *NAMED])
def test_a_figure_of_a_result_holds_no_markup_from_outside(name, silent):
    one = hostile(tiny_results()[(DRAWN | NAMED)[name]])
    figure = getattr(figures, name)({HOVER: one} if name in NAMED else one)
    held = strings(json.loads(figure.to_json()))
    assert not [t for t in held if re.search('<img|\u202e|onerror="1">.*%{custom', t)]
