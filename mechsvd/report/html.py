"""A self-contained HTML page: headings, figures in a grid, tables."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mechsvd.figures.cards import STYLE
from mechsvd.figures.display import escape, file_name, label


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
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width">
<style>{_part("page.css")}{STYLE}</style>{plotly}</head><body>
{body}
<script>const TEMPLATE = {_looks()};
{_part("page.js")}</script>
</body></html>
"""


def _part(name: str) -> str:
    """The style or the script of all pages."""
    return files("mechsvd.report").joinpath(name).read_text(encoding="utf-8")


def _looks() -> str:
    """The template of all figures, which a page holds once."""
    import plotly.io as pio

    from mechsvd.figures.style import TEMPLATE

    return _in_script(json.dumps(pio.templates[TEMPLATE].to_plotly_json()))


def _in_script(text: str) -> str:
    """JSON that cannot end the script that it stands in."""
    return text.replace("<", "\\u003c")


def heading(name: str, title: str, what: str, original: str, measured: str) -> str:
    """Top of a section: its topic, what the shortform saw, and what was measured here."""
    return (
        f'<h2 id="{name}">{title}</h2><p>{what}</p><p class="original">{original}</p>'
        f'<p class="measured">{escape(measured)}</p>\n'
    )


def grid(plots: Sequence[str]) -> str:
    """Figures side by side."""
    return f'<div class="grid">{"".join(plots)}</div>\n'


def plot(name: str, prompt: str, figure: Any, *, wide: bool = False) -> str:
    """One figure, which the page's script draws when it comes into view.

    Args:
        prompt: its name begins the title and the id, and the figure is shown when it is chosen.
        wide: over the whole width.
    """
    if prompt:
        figure.update_layout(title_text=f"{label(prompt)}: {figure.layout.title.text}")
        name = f"{file_name(prompt)}-{name}"
    figure.update_layout(template=None)
    kind = "plot wide" if wide else "plot"
    marks = f' data-prompt="{file_name(prompt)}"' if prompt else ""
    marks += " data-scale" if _has_both_scales(figure) else ""
    height = figure.layout.height
    marks += f' style="height:{height}px"' if height else ""
    return (
        f'<div class="{kind}"{marks}><div class="figure" id="{name}"></div>'
        f'<script type="application/json">{_in_script(figure.to_json())}</script></div>'
    )


def _has_both_scales(figure: Any) -> bool:
    """Whether the curves of a figure can be drawn on a linear and on a logarithmic axis."""
    if "yaxis2" in figure.layout or not all(t.type.startswith("scatter") for t in figure.data):
        return False
    values = [value for trace in figure.data for value in trace.y]
    return any(value > 0 for value in values) and not any(value < 0 for value in values)


def chooser(names: Sequence[str]) -> str:
    """The bar that chooses whose figures are shown; nothing for one text."""
    if len(names) < 2:
        return ""
    options = "".join(
        f'<option value="{file_name(name)}">{escape(name)}</option>' for name in names
    )
    return f'<div class="bar"><label>Figures of one text: <select id="choice">{options}</select></label></div>'


def write_plotly(path: Path) -> None:
    """Write plotly's script to a file, for pages that load it from there."""
    from plotly.offline import get_plotlyjs

    path.write_text(get_plotlyjs(), encoding="utf-8")


def table(rows: Mapping[str, Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table whose rows begin with a heading.

    Args:
        head: of the columns, the first one included; it stays in view.
    """
    body = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for key, values in rows.items()
    )
    if not head:
        return f"<table>{body}</table>"
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
