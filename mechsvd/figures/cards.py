"""Cards of directions as HTML with inline SVG, without scripts: light and dark, small to send."""

from typing import NamedTuple

from torch import Tensor

from mechsvd.experiments.direction_cards import EXAMPLE_KINDS, DirectionCards
from mechsvd.experiments.token_columns import COLUMNS, PAIRS, TOP
from mechsvd.figures.card_drawings import dose_curve, heat_map, strip
from mechsvd.figures.display import escape, visible
from mechsvd.results import require_kind

STYLE = """
.msc{--ink:#222;--soft:#6a6a6a;--line:#ddd;--page:#fff;--up:31 95 168;--down:209 102 42;
color:var(--ink);background:var(--page);font:14px/1.45 system-ui,sans-serif;
border:1px solid var(--line);border-radius:8px;padding:.9rem 1.1rem;margin:1rem 0;
max-width:1080px}
@media(prefers-color-scheme:dark){:root:not(.light) .msc{--ink:#e4e4e4;--soft:#a2a2a2;--line:#3d3d3d;--page:#1b1c1e;
--up:96 165 240;--down:240 146 82}}.msc h3{font-size:1.1rem;margin:0}
.msc h4{font-size:.85rem;margin:.9rem 0 .25rem;color:var(--soft);font-weight:600}
.msc .g{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:0 1.6rem}
.msc table{border-collapse:collapse;width:100%;margin:0;font-size:13px}.msc tr{background:none}
.msc td,.msc th{padding:.06rem .5rem .06rem 0;text-align:left;vertical-align:top;border:0;
font-weight:400;font-variant-numeric:tabular-nums}.msc th{color:var(--soft)}
.msc td.r{text-align:right;width:1%;white-space:nowrap}.msc p{margin:.2rem 0}
.msc .s{color:var(--soft);font-size:12.5px}
.msc code,.msc .w{font:12.5px/1.7 ui-monospace,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;background:none;color:inherit;padding:0}
.msc code{border:1px solid var(--line);border-radius:3px;padding:0 .15rem}
.msc .p,.msc .n{border-radius:2px}.msc .p{background:rgb(var(--up)/var(--a))}
.msc .n{background:rgb(var(--down)/var(--a))}
.msc code{white-space:pre;display:inline-block;line-height:1.35}
.msc .o{outline:1.5px solid var(--ink)}.msc svg{display:block;overflow:visible}
.msc svg text{font:11px system-ui,sans-serif;fill:var(--soft)}.msc .fp{fill:rgb(var(--up))}
.msc .fn{fill:rgb(var(--down))}.msc td svg{display:inline-block}
"""
SUPPORTED, UNSUPPORTED, WIDEST = 8, 3, 56  # tokens of a column, and the longest bar in pixels
BYTES = 25_000  # of a card, at most
PARTS = 7  # of the list of writers
STRIPS = 2  # of each kind of example
MUCH = 0.5  # a rank correlation of this size
LAYERS = 8  # of the table of value vectors


class Detail(NamedTuple):
    """How much a card shows: cells of the map, tokens beside an example, characters of a token."""

    cells: int
    window: int
    longest: int


DETAILS = (Detail(500, 9, 24), Detail(300, 6, 12), Detail(120, 3, 5))  # the first that is small


def cards_page(cards: DirectionCards) -> str:
    """A whole page of cards."""
    title = f"Directions of {escape(cards._origin())}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
        f'content="light dark"><title>{title}</title><style>body{{margin:1.5rem auto;'
        f"max-width:1110px;padding:0 1rem;font:15px system-ui,sans-serif}}</style></head><body>"
        f"<h1>{title}</h1>{cards_html(cards)}</body></html>"
    )


def cards_html(cards: DirectionCards) -> str:
    """All cards with their style, for a notebook or a part of a page."""
    return f"<style>{STYLE}</style>{all_cards(cards)}"


def all_cards(cards: DirectionCards) -> str:
    """All cards, for a page that has `STYLE`."""
    require_kind(cards, DirectionCards)
    return "".join(card_html(cards, place) for place in range(len(cards)))


def card_html(cards: DirectionCards, place: int) -> str:
    """One card; the style comes with `cards_html`. It shows less where it would be large.

    Args:
        place: of the direction in `cards.directions`.
    """
    for detail in DETAILS:
        card = _card(cards, place, detail)
        if len(card.encode()) <= BYTES:
            break
    return card


def _card(cards: DirectionCards, place: int, detail: Detail) -> str:
    blocks = [
        ("Where it is written", _writes(cards, place, detail)),
        ("Who writes it", _writers(cards, place)),
        ("Its largest write, taken apart", _apart(cards, place, detail)),
        ("Dose and response", _dose(cards, place)),
        ("Value vectors near to it", _values(cards, place, detail)),
        ("Does their top token come next?", _layers(cards, place)),
    ]
    grid = "".join(f"<div><h4>{title}</h4>{body}</div>" for title, body in blocks)
    return (
        f'<section class="msc">{_head(cards, place)}<h4>Tokens that it supports, as the texts write '
        f'it</h4>{_tokens(cards, place, detail)}<div class="g">{grid}</div>'
        f"<h4>Examples</h4>{_examples(cards, place, detail)}</section>\n"
    )


def _head(cards: DirectionCards, place: int) -> str:
    sign = "" if cards.tokens.signs[place] > 0 else ", mostly with a negative sign"
    return (
        f"<h3>Direction {int(cards.directions[place])}</h3>"
        f'<p class="s">singular value {float(cards.singular_values[place]):.4g} · without it: '
        f"{escape(cards.metric)} {float(-cards.effects[:, place].mean()):+.3g} {escape(cards.unit)}, "
        f"KL divergence {float(cards.kl_divergences[:, place].mean()):.3g} nats per token · mean "
        f"coefficient at the scored positions {float(cards.tokens.coefficients[place]):.3g}{sign} · "
        f"{escape(cards._origin())}</p>"
    )


def _tokens(cards: DirectionCards, place: int, detail: Detail) -> str:
    what = {
        "read": "read off the weights",
        "local": "local, by the derivative here",
        "measured": "measured, logits lost without it",
    }
    columns = "".join(
        f"<div><table><tr><th colspan=3>{what[name]}</th></tr>"
        f"{_token_rows(cards, place, name, detail)}</table></div>"
        for name in COLUMNS
    )
    return f'<div class="g">{columns}</div><p>{_agreement(cards, place)}</p>'


def _token_rows(cards: DirectionCards, place: int, column: str, detail: Detail) -> str:
    values = cards.tokens.as_written(place, column).double()
    tops = [
        *cards.tokens.top(place, column, SUPPORTED).tolist(),
        *cards.tokens.top(place, column, -UNSUPPORTED).flip(0).tolist(),
    ]
    largest = max(float(values[tops].abs().max()), 1e-300)
    return "".join(
        f"<tr><td>{_token(cards.tokens.vocabulary[t], detail)}</td>"
        f"<td class=r>{float(values[t]):+.3g}</td><td class=r>{_bar(float(values[t]) / largest)}</td></tr>"
        for t in tops
    )


def _agreement(cards: DirectionCards, place: int) -> str:
    """What the rank agreement of the columns says of this direction."""
    tokens = cards.tokens
    own, bounds, p = (
        values[:, place].tolist()
        for values in (tokens.agreement.diagonal(dim1=1, dim2=2), tokens.bounds, tokens.p_values)
    )
    shown = ", ".join(
        f"{first}–{second} {value:.2f}" for (first, second), value in zip(PAIRS, own, strict=True)
    )
    best = max(own[1:], key=abs)
    shared = [tokens.shared_top(place, name, "measured") for name in ("read", "local")]
    chance = TOP**2 / len(tokens.vocabulary)
    if min(p[1:]) > 0.05 or abs(best) <= max(bounds[1:]):
        verdict = "Reading this direction tells nothing of what it does here"
    elif abs(best) < MUCH:
        verdict = "Reading this direction tells little of what it does here"
    elif best < 0:
        verdict = "Reading this direction tells the opposite of what it does here"
    elif max(shared) < TOP // 2:
        verdict = "Reading this direction orders most tokens as it does here, but not those on top"
    else:
        verdict = "Reading this direction tells much of what it does here"
    return (
        f"<b>{verdict}.</b> <span class=s>Rank agreement over {len(tokens.vocabulary)} tokens: "
        f"{shown}; 95 % of random orders are within ±{max(bounds):.2f}. Of the {TOP} tokens "
        f"on top, measured shares {shared[0]} with read and {shared[1]} with local (by chance "
        f"{chance:.2g}).</span>"
    )


def _writes(cards: DirectionCards, place: int, detail: Detail) -> str:
    writers = cards.writers
    return heat_map(
        writers.coefficients[place], [str(site) for site in writers.sites], detail.cells
    )


def _dose(cards: DirectionCards, place: int) -> str:
    dose = cards.dose
    return dose_curve(
        dose.gains.tolist(),
        dose.effects[:, place].double().mean(dim=0).tolist(),
        dose.random_effects[:, place].double().mean(dim=0).tolist(),
        dose.unit,
    )


def _writers(cards: DirectionCards, place: int) -> str:
    writers = cards.writers
    own = (writers.share_directions == place).nonzero().flatten()
    order = own[writers.shares[own].abs().argsort(descending=True, stable=True)]
    rows, left, chance = [], 1.0, writers.induction_chance
    first = order[:PARTS].tolist()
    heads = [i for i in order.tolist() if writers.share_kinds[i] == "head"]
    for i in first + [i for i in heads[:1] if i not in first]:
        site, number, share = (
            writers.sites[int(writers.share_sites[i])],
            int(writers.share_numbers[i]),
            float(writers.shares[i]),
        )
        kind, left, note = writers.share_kinds[i], left - share, ""
        if kind == "head":
            score = float(writers.induction[site.layer or 0, number])
            note = "" if score != score else f"induction {score:.2f} (even {chance:.2f})"
        rows.append(
            f"<tr><td>{site}{f' {kind}' if kind != 'not split' else ', not split'}"
            f"{f' {number}' if number >= 0 else ''}</td><td class=r>{100 * share:.2g} %</td>"
            f"<td class=r>{_bar(share)}</td></tr>"
            + (f"<tr><td colspan=3 class=s>{note}</td></tr>" if note else "")
        )
    rest = sum(
        float(writers.shares[i]) for i in own.tolist() if writers.share_kinds[i] == "remainder"
    )
    return (
        f"<table>{''.join(rows)}<tr><td>all {len(order) - len(rows)} others</td>"
        f"<td class=r>{100 * left:.2g} %</td><td class=r>{_bar(left)}</td></tr></table>"
        f"<p class=s>Shares of the squared size of all its writes; they add up to 100 %, and "
        f"{abs(rest):.1g} of that is in no part.</p>"
    )


def _apart(cards: DirectionCards, place: int, detail: Detail) -> str:
    writers = cards.writers
    first = int((writers.place_directions == place).nonzero()[0])
    site = writers.sites[int(writers.place_sites[first])]
    where = int(writers.place_positions[first])
    rows = "".join(
        f"<tr><td>{writers.part_kinds[i]}"
        f"{f' {number}' if (number := int(writers.part_numbers[i])) >= 0 else ''}</td>"
        f"<td class=r>{float(writers.parts[i]):+.4g}</td></tr>"
        for i in (writers.part_places == first).nonzero().flatten().tolist()
    )
    total = float(writers.coefficients[place, int(writers.place_sites[first]), where])
    return (
        f"<table>{rows}<tr><th>coefficient of {site} at {_token(writers.pieces[where], detail)}, "
        f"position {int(writers.positions[where])}</th><td class=r><b>{total:+.4g}</b></td></tr></table>"
    )


def _values(cards: DirectionCards, place: int, detail: Detail) -> str:
    values = cards.values
    own = (values.near_directions == place).nonzero().flatten().tolist()
    if not own:
        return "<p class=s>No MLP of this model is split into neurons.</p>"
    rows = "".join(
        f"<tr><td class=r>{int(values.near_layers[i])} mlp {int(values.near_neurons[i])}</td>"
        f"<td class=r>{float(values.cosines[i]):+.2f}</td>"
        f"<td>{' '.join(_token(text, detail) for text in values.texts[i])}</td></tr>"
        for i in own
    )
    return f"<table><tr><th>neuron</th><th>cosine</th><th>its top tokens</th></tr>{rows}</table>"


def _layers(cards: DirectionCards, place: int) -> str:
    """The layers whose value vectors tell most, next to chance, in the order of layers."""
    values = cards.values
    if not len(values.layers):
        return "<p class=s>No MLP of this model is split into neurons.</p>"
    gains = (values.agreement[place] - values.chance[place]).argsort(descending=True, stable=True)
    rows = "".join(
        f"<tr><td>layer {int(values.layers[i])}</td><td class=r>{share:.0%}</td>"
        f"<td class=r>{_bar(share)}</td><td class=r>chance {float(values.chance[place, i]):.1%}</td></tr>"
        for i in sorted(gains[:LAYERS].tolist())
        for share in [float(values.agreement[place, i])]
    )
    return (
        f"<table>{rows}</table><p class=s>Of the {values.compared} value vectors of a layer that are "
        "nearest to the direction: the share whose top token is the actual next one where the neuron "
        "is largest.</p>"
    )


def _examples(cards: DirectionCards, place: int, detail: Detail) -> str:
    writers, shown = cards.writers, []
    each = cards.examples.shape[1] // len(EXAMPLE_KINDS)
    net = writers.net[place]
    for i, kind in enumerate(EXAMPLE_KINDS):
        for where in cards.examples[place, i * each : i * each + STRIPS].tolist():
            shown.append(
                f"<tr><td class=r>{kind}</td><td class=r>{float(net[where]):+.3g}</td>"
                f"<td>{_strip(cards, net, where, detail)}</td></tr>"
            )
    return (
        f"<table>{''.join(shown)}</table><p class=s>Colour: what all sites together write of it at a "
        "token; blue with its sign, orange the opposite. The outlined token is the example.</p>"
    )


def _strip(cards: DirectionCards, net: Tensor, where: int, detail: Detail) -> str:
    """The tokens around an example, of the same text."""
    texts, pieces = cards.writers.task_index, cards.writers.pieces
    same = (texts == texts[where]).nonzero().flatten()
    near = same[(same - where).abs() <= detail.window].tolist()
    largest = float(net.abs().max()) or 1.0
    shown = [_shown(pieces[i], detail) for i in near]
    return strip(shown, [float(net[i]) / largest for i in near], near.index(where))


def _token(text: str, detail: Detail) -> str:
    return f"<code>{_shown(text, detail)}</code>"


def _shown(text: str, detail: Detail) -> str:
    """A token's text as HTML, cut where it is long."""
    shown = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    return escape(shown if len(shown) <= detail.longest else f"{shown[: detail.longest - 1]}…")


def _bar(share: float) -> str:
    width = round(WIDEST * min(1.0, abs(share)), 1)
    side = "p" if share >= 0 else "n"
    return f"<svg width={WIDEST} height=8><rect class=f{side} width={width} height=8 /></svg>"
