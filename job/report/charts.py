"""Draws curves as inline SVG, without scripts or requests, in the page's colours and with a title for screen readers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from job.report.contents import Numbers

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 14, 44
MOST_POINTS = 400
Point = tuple[float, float]


def series(log: Iterable[Numbers], key: str) -> list[Point]:
    """Returns the points (step, value) of one key. If a step was repeated after a resume, its last value counts."""
    found = {line["step"]: line[key] for line in log if line.get(key) is not None and math.isfinite(line[key])}
    return sorted(found.items())


def thinned(points: Sequence[Point]) -> list[Point]:
    """Averages consecutive points so that at most `MOST_POINTS` remain, and a long run does not make a large page."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers that cover `low` to `high`, spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count if high > low else abs(high) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def line_chart(title: str, lines: Mapping[str, Sequence[Point]], unit: str = "") -> str:
    """Returns an SVG chart of the named lines over optimizer steps. Each line needs two or more points. All text is escaped."""
    lines = {name: thinned(points) for name, points in lines.items()}
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    y_ticks, x_low, x_high = ticks(min(ys), max(ys)), min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">optimizer step</text>']
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_short(tick)}</text>')
    for tick in (tick for tick in ticks(x_low, x_high, 6) if x_low <= tick <= x_high):
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(tick)}</text>')
    for index, points in enumerate(lines.values()):
        path = " ".join("{},{}".format(*place(*point)) for point in points)
        parts.append(f'<polyline class="line line-{index}" points="{path}"/>')
    ranges = [f"{name} from {_short(points[0][1])} to {_short(points[-1][1])}{unit}" for name, points in lines.items()]
    description = escape(f"{title} over {_short(x_high)} steps: {', '.join(ranges)}.")
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">'
        f"<title>{description}</title>{''.join(parts)}</svg>"
    )


def _short(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 100_000):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
