"""A self-contained HTML page: headings, figures in a grid, tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechsvd.figures.cards import STYLE
from mechsvd.figures.display import escape, file_name, label

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:3rem;border-bottom:1px solid #ccc;padding-bottom:.3rem}
.text{white-space:pre-wrap;background:#f6f6f4;border-left:4px solid #1f5fa8;padding:.6rem .9rem;border-radius:3px;margin:.6rem 0}
.text b{font-weight:400;background:#dcebfa;unicode-bidi:isolate}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:1rem}
.plot{height:400px;min-width:0;overflow:hidden}.original{color:#555;margin:.3rem 0}.measured{font-weight:600;margin:.3rem 0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
tr+tr{border-top:1px solid #e5e5e5}td{font-variant-numeric:tabular-nums}nav a{margin-right:1rem}
.written{table-layout:fixed;width:100%}.written td{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem}
.written th:first-child{width:9rem}.written div{max-height:10.5rem;overflow:auto}.written .start{color:#777}
.same{background:#e4f2e4}footer{margin-top:3rem;color:#666;font-size:.9rem}
"""


def page(title: str, body: str, *, cdn: bool, plotly_file: str | None = None) -> str:
    """A whole page, which includes plotly or loads it.

    Args:
        cdn: load it from the network.
        plotly_file: load it from this file next to the page, as several pages may.
    """
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    address = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
    source = address if cdn else plotly_file
    plotly = (
        f'<script src="{source}" charset="utf-8"></script>'
        if source
        else f"<script>{get_plotlyjs()}</script>"
    )
    return f"""<!doctype html>
<html lang="en" class="light"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{_STYLE}{STYLE}</style>{plotly}</head><body>
{body}
</body></html>
"""


def heading(name: str, title: str, what: str, original: str, measured: str) -> str:
    """Top of a section: its topic, what the shortform saw, and what was measured here."""
    return (
        f'<h2 id="{name}">{title}</h2><p>{what}</p><p class="original">{original}</p>'
        f'<p class="measured">{escape(measured)}</p>\n'
    )


def grid(plots: Sequence[str]) -> str:
    """Figures side by side."""
    return f'<div class="grid">{"".join(plots)}</div>\n'


def plot(name: str, prompt: str, figure: Any) -> str:
    """One figure; the prompt's name begins its title and its id."""
    from plotly.io import to_html

    if prompt:
        figure.update_layout(title_text=f"{label(prompt)}: {figure.layout.title.text}")
        name = f"{file_name(prompt)}-{name}"
    body = to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True},
    )
    return f'<div class="plot">{body}</div>'


def write_plotly(path: Path) -> None:
    """Write plotly's script to a file, for pages that load it from there."""
    from plotly.offline import get_plotlyjs

    path.write_text(get_plotlyjs(), encoding="utf-8")


def table(rows: Mapping[str, Sequence[str]]) -> str:
    """A table whose rows begin with a heading."""
    body = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for key, values in rows.items()
    )
    return f"<table>{body}</table>"
