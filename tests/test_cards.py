"""Cards as HTML: small, without scripts, with the numbers of the result, and text that stays text."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.token_columns import COLUMNS
from mechsvd.figures.card_drawings import dose_curve, heat_map, strip
from mechsvd.figures.cards import card_html, cards_html
from mechsvd.figures.display import escape
from tests.conftest import tiny, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")
VOID = {"rect", "line", "path", "polyline", "meta", "br"}
LIMIT = 25_000  # bytes of a card


class Balance(HTMLParser):
    """The open tags of a page, all tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def cards(real):
    return ms.describe(real.model, real.svd, [0, 3], [real.task])


def test_a_card_is_small_balanced_and_runs_nothing(cards):
    for place in range(2):
        card = card_html(cards, place)
        assert len(card.encode()) <= LIMIT
        found = Balance(card)
        assert found.open == []
        assert {tag for tag, _ in found.tags} & {"script", "iframe", "img", "link", "a"} == set()
        assert not any(name.startswith("on") for _, names in found.tags for name in names)
        assert any(tag == "svg" for tag, _ in found.tags)
    page = cards.to_html()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"<script|https?:|url\(|@import", page)
    assert cards._repr_html_() in page
    assert "prefers-color-scheme:dark" in page


def test_a_card_of_a_long_text_many_sites_and_long_tokens_is_small_too(cards):
    generator = torch.Generator().manual_seed(0)
    writers, positions = cards.writers, 4000
    own = torch.zeros(positions, dtype=torch.long)
    sites = tuple(ms.Site(i // 2, c, f"blocks.{i // 2}.hook_{c}_out")
                  for i, c in enumerate(("attn", "mlp") * 64))  # fmt: skip
    for token in ("a", "&" * 40, "字" * 30):
        longer = dataclasses.replace(
            writers,
            coefficients=torch.randn(2, 128, positions, generator=generator, dtype=torch.float64),
            sites=sites, is_split=torch.ones(128) > 0, tokens=own, positions=own.clone(),
            task_index=own.clone(), pieces=(token,) * positions,
        )  # fmt: skip
        found = dataclasses.replace(
            cards,
            writers=longer,
            tokens=dataclasses.replace(
                cards.tokens, vocabulary=(token,) * len(cards.tokens.vocabulary)
            ),
            values=dataclasses.replace(
                cards.values, texts=tuple((token,) * len(row) for row in cards.values.texts)
            ),
        )
        card = card_html(found, 0)
        assert len(card.encode()) <= LIMIT
        assert Balance(card).open == []


def test_the_numbers_and_tokens_of_the_result_are_on_the_card(cards):
    for place in range(2):
        text = Balance(card_html(cards, place)).text
        assert f"Direction {int(cards.directions[place])}" in text
        assert f"singular value {float(cards.singular_values[place]):.4g}" in text
        for column in COLUMNS:
            token = int(cards.tokens.top(place, column, 1))
            value = float(cards.tokens.as_written(place, column)[token])
            assert f"{cards.tokens.vocabulary[token]}{value:+.3g}" in text
        parts = cards.writers.parts_to_pandas()
        own = parts[parts.direction == int(cards.directions[place])].iloc[0]
        assert f"{own.part} {own.number}{own.coefficient:+.4g}" in text
        assert f"{own.write:+.4g}" in text


def test_the_verdict_follows_the_agreement_and_its_null(cards):
    for own, p, word in (
        (-0.9, 0.002, "the opposite of"),
        (0.3, 0.002, "little of"),
        (-0.3, 0.002, "little of"),
        (0.9, 0.2, "nothing of"),
        (0.04, 0.002, "nothing of"),
    ):
        tokens = dataclasses.replace(
            cards.tokens,
            agreement=torch.full((3, 2, 2), own).double(),
            bounds=torch.full((3, 2), 0.06).double(),
            p_values=torch.full((3, 2), p).double(),
        )
        card = card_html(dataclasses.replace(cards, tokens=tokens), 0)
        assert f"<b>Reading this direction tells {word} what it does here.</b>" in card
    away = -cards.tokens.measured * cards.tokens.signs[:, None]
    apart = dataclasses.replace(
        tokens, read=away, local=away, agreement=torch.full((3, 2, 2), 0.9).double(),
        p_values=torch.full((3, 2), 0.002).double(),
    )  # fmt: skip
    shared = apart.shared_top(0, "read", "measured")
    assert shared < 5
    card = card_html(dataclasses.replace(cards, tokens=apart), 0)
    assert "orders most tokens as it does here, but not those on top.</b>" in card
    alike = dataclasses.replace(apart, read=apart.measured * apart.signs[:, None])
    same_top = card_html(dataclasses.replace(cards, tokens=alike), 0)
    assert "<b>Reading this direction tells much of what it does here.</b>" in same_top
    assert f"on top, measured shares {shared} with read" in card
    assert "on top, measured shares 10 with read" in same_top


@pytest.mark.fault(50)
def test_texts_from_outside_stay_text():
    model, task = tiny("Llama"), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    plain = ms.describe(model, svd, [0], task)
    bad = '"><script>x</script><img src=x onerror=1>\u202e'
    hostile = dataclasses.replace(
        plain,
        tokens=dataclasses.replace(plain.tokens, vocabulary=(bad,) * len(plain.tokens.vocabulary)),
        writers=dataclasses.replace(plain.writers, pieces=(bad,) * len(plain.writers.pieces)),
        values=dataclasses.replace(
            plain.values, texts=tuple((bad,) * len(row) for row in plain.values.texts)
        ),
        metric=bad,
        unit=bad,
        source=dataclasses.replace(plain.source, model=bad),
    )
    first, second = Balance(cards_html(plain)), Balance(cards_html(hostile))
    assert first.tags == second.tags
    assert "\u202e" not in cards_html(hostile)
    assert "&lt;script&gt;" in cards_html(hostile)
    assert escape(bad) in cards_html(hostile)


def test_a_cell_of_the_map_is_the_largest_of_those_that_share_it():
    values = torch.zeros(50, 100)
    values[49, 99], values[0, 0], values[3, 3] = -4.0, 2.0, 0.1
    drawing = heat_map(values, [f"{i} attn" for i in range(50)], 500)
    cells = re.findall(r'class=f(.) opacity="([\d.]+)" d="([^"]+)"', drawing)
    # 50 sites in 17 rows of 3, 100 positions in 34 columns of 3
    assert ("n", "1.00", "M33 16h1v1h-1z") in cells
    assert ("p", "0.50", "M0 0h1v1h-1z") in cells
    assert len(cells) == 2  # what is below a twelfth of the largest is not drawn
    assert "darkest: 4" in drawing
    one = re.findall(r' d="([^"]+)"', heat_map(values, ["0 attn", "0 mlp"], 1))
    assert one == ["M33 16h1v1h-1z"]  # only the largest


def test_a_curve_has_its_points_and_a_strip_its_colours():
    drawing = dose_curve([0.0, 1.0, 2.0], [4.0, 0.0, 2.0], [1.0, 0.0, float("nan")], "nats")
    random, own = (
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'points="([^"]*)"', drawing)
    )
    assert len(own) == 3
    assert len(random) == 2  # a gain that is not finite has no point
    heights = [y for _, y in own]
    assert heights[0] < heights[2] < heights[1]  # down the page
    assert (heights[1] - heights[2]) == pytest.approx((heights[1] - heights[0]) / 2, abs=0.1)
    row = strip(["a", "⏎", ""], [1.0, -0.5, 0.0], 1)
    assert [*re.findall(r'class="(.*?)" style="--a:(.*?)">(.*?)<', row)] == [
        ("p", "0.75", "a"),
        ("n o", "0.38", "⏎"),
        ("p", "0.00", "∅"),
    ]


def test_measured_tokens_stand_out_from_all_others_and_the_largest_head_is_named(cards):
    for place in range(len(cards)):
        values = cards.tokens.as_written(place, "measured")
        assert float(values.mean()) == pytest.approx(0, abs=1e-6)
    table = cards.to_pandas()
    shares = cards.writers.shares_to_pandas()
    for row in table.itertuples():
        own = shares[(shares.direction == row.direction) & (shares.part == "head")]
        assert row.head_share == pytest.approx(own.share.max())
        largest = own.loc[own.share.idxmax()]
        assert row.head == f"layer {largest.layer} head {largest.number}"
        assert f"head {largest.number}" in re.sub("<[^>]*>", "", card_html(cards, 0)) or row.Index
        lowest = cards.tokens.as_written(row.Index, "measured").argsort(stable=True)[:5]
        assert row.held_down == "|".join(cards.tokens.vocabulary[t] for t in lowest.tolist())
