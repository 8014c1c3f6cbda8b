"""Drawings of a card: a heat map, a curve and a strip of coloured tokens, in few bytes."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mechsvd.figures.display import escape

COLUMNS, ROWS = 48, 24  # cells at most; more positions or sites share a cell
LEVELS = 6  # of colour
WIDTH, ROW = 320, 9  # pixels
CURVE = (300, 110)


def heat_map(values: Float[Tensor, "site pos"], sites: Sequence[str], count: int) -> str:
    """Coefficients by site and position; of those that share a cell, the largest in size.

    Args:
        count: of cells that are drawn, at most: the largest.
    """
    cells = _largest(_largest(values, ROWS).mT, COLUMNS).mT
    rows, columns = cells.shape
    step, left = WIDTH / columns, 46
    largest = float(cells.abs().max()) or 1.0
    sizes = cells.abs().flatten()
    levels = (sizes / largest * LEVELS).round().long()
    levels[sizes.argsort(descending=True, stable=True)[count:]] = 0
    levels = levels.view(rows, columns)
    paths = []
    for level in range(1, LEVELS + 1):
        for side, own in (("p", cells > 0), ("n", cells < 0)):
            where = ((levels == level) & own).nonzero().tolist()
            if where:
                path = "".join(f"M{column} {row}h1v1h-1z" for row, column in where)
                paths.append(f'<path class=f{side} opacity="{level / LEVELS:.2f}" d="{path}"/>')
    height = rows * ROW
    shown = {0, len(sites) - 1}
    labels = "".join(
        f"<text x=0 y={round((0.8 + i * (rows - 1) / max(1, len(sites) - 1)) * ROW, 1)}>"
        f"{escape(sites[i])}</text>"
        for i in sorted(shown)
    )
    return (
        f'<svg viewBox="0 0 {left + WIDTH} {height + 16}" width="100%" style="max-width:'
        f'{left + WIDTH}px" role=img><rect x={left} width={WIDTH} height={height} fill=none '
        f'stroke="currentColor" stroke-opacity=".25"/><g transform="translate({left} 0) '
        f'scale({step:.3f} {ROW})">{"".join(paths)}</g>{labels}<text x={left} y={height + 12}>'
        f"first position</text><text x={left + WIDTH} y={height + 12} text-anchor=end>"
        f"last of {values.shape[1]}; darkest: {largest:.3g}</text></svg>"
    )


def dose_curve(
    gains: Sequence[float], effects: Sequence[float], random: Sequence[float], unit: str
) -> str:
    """The effect against the gain of the direction, next to a random direction's."""
    width, height = CURVE
    finite = [v for v in (*effects, *random, 0.0) if v == v and abs(v) != float("inf")]
    low, high = min(finite), max(finite)
    span, first, last = (high - low) or 1.0, min(gains), max(gains)

    def x(gain: float) -> float:
        return round(40 + (gain - first) / (last - first or 1.0) * (width - 50), 1)

    def y(effect: float) -> float:
        return round(8 + (high - effect) / span * (height - 30), 1)

    def line(values: Sequence[float], style: str) -> str:
        points = sorted((g, v) for g, v in zip(gains, values, strict=True) if v == v)
        where = " ".join(f"{x(g)},{y(v)}" for g, v in points if abs(v) != float("inf"))
        return f'<polyline fill=none points="{where}" {style}/>'

    dashed = 'stroke="currentColor" stroke-opacity=".45" stroke-dasharray="4 3"'
    solid = 'style="stroke:rgb(var(--up));stroke-width:2"'
    ticks = "".join(
        f"<text x={x(gain)} y={height - 8} text-anchor=middle>{gain:g}</text>"
        for gain in sorted({first, 0.0, 1.0, last})
        if first <= gain <= last
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px" role=img>'
        f'<line x1=40 x2={width - 10} y1={y(0.0)} y2={y(0.0)} stroke="currentColor" stroke-opacity=".3"/>'
        f"{line(random, dashed)}{line(effects, solid)}"
        f"<text x=36 y={y(high) + 4} text-anchor=end>{high:.3g}</text>"
        f"<text x=36 y={y(low) + 4} text-anchor=end>{low:.3g}</text>{ticks}</svg>"
        f"<p class=s>Damage in {escape(unit) or 'the metric'} against the gain (1: as it is); dashed: "
        "a random direction with changes of equal energy.</p>"
    )


def strip(pieces: Sequence[str], shares: Sequence[float], marked: int) -> str:
    """Tokens in a row, coloured by their share of the largest value, one of them outlined.

    Args:
        pieces: as HTML.
    """
    tokens = []
    for i, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
        side = "p" if share >= 0 else "n"
        outline = " o" if i == marked else ""
        text = piece or "∅"
        tokens.append(
            f'<span class="{side}{outline}" style="--a:{0.75 * min(1.0, abs(share)):.2f}">{text}</span>'
        )
    return f"<span class=w>{''.join(tokens)}</span>"


def _largest(values: Float[Tensor, "row column"], count: int) -> Float[Tensor, "kept column"]:
    """Of neighbouring rows that share one, the value largest in size, with its sign."""
    size = -(-len(values) // count)
    padded = pad(values, (0, 0, 0, -len(values) % size))
    groups = padded.unflatten(0, (-1, size))
    where = groups.abs().argmax(dim=1, keepdim=True)
    return groups.gather(1, where)[:, 0]
