"""Curves as inline SVG: no script, no network, colours from the page's own variables, a title for screen readers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 14, 44
MOST_POINTS = 400


class Point(NamedTuple):
    x: float
    y: float


def series(log: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """The points (step, value) of one key; of a step that was made again after a resume, the last."""
    found: dict[float, float] = {}
    for line in log:
        step, value = line.get("step"), line.get(key)
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (step, value))
        if numbers and math.isfinite(float(value or 0)):
            found[float(step or 0)] = float(value or 0)
    return [Point(step, found[step]) for step in sorted(found)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: the mean of each stretch, so that a long run does not make a large page."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        Point(sum(point.x for point in part) / len(part), sum(point.y for point in part) / len(part))
        for part in stretches
    ]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    rough = (high - low) / count if high > low else abs(high) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def line_chart(title: str, lines: Mapping[str, Sequence[Point]], unit: str = "") -> str:
    """An SVG of the named lines over steps; empty where no line has two points. Every text in it is escaped."""
    lines = {name: thinned(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    across = ticks(min(point.x for point in every), max(point.x for point in every), 6)
    up = ticks(min(point.y for point in every), max(point.y for point in every))
    x_low, x_high = min(point.x for point in every), max(point.x for point in every)

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (point.x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point.y - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = []
    for tick in up:
        y = place(Point(x_low, tick))[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_short(tick)}</text>')
    for tick in (tick for tick in across if x_low <= tick <= x_high):
        x = place(Point(tick, up[0]))[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">optimizer step</text>')
    for index, points in enumerate(lines.values()):
        path = " ".join(f"{x},{y}" for x, y in map(place, points))
        parts.append(f'<polyline class="line line-{index}" points="{path}"/>')
    told = escape(_told(title, lines, unit))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
        f"<title>{told}</title>{''.join(parts)}</svg>"
    )


def dumbbell(before: float, after: float, low: float, high: float, top: float) -> str:
    """A bar from `before` to `after` on 0..`top`, with the interval of `after` behind it. Decoration of a table row."""
    x_before, x_after, x_low, x_high = (
        round(4 + 112 * min(max(value / top, 0.0), 1.0), 1) for value in (before, after, low, high)
    )
    return (
        '<svg class="dumbbell" viewBox="0 0 120 16" aria-hidden="true" focusable="false">'
        f'<path class="grid" d="M4 8H116"/><path class="span" d="M{x_low} 8H{x_high}"/>'
        f'<path class="move" d="M{x_before} 8H{x_after}"/>'
        f'<circle class="then" cx="{x_before}" cy="8" r="3"/><circle class="now" cx="{x_after}" cy="8" r="4"/></svg>'
    )


def _told(title: str, lines: Mapping[str, Sequence[Point]], unit: str) -> str:
    said = [f"{name} from {_short(points[0].y)} to {_short(points[-1].y)}{unit}" for name, points in lines.items()]
    last = max(points[-1].x for points in lines.values())
    return f"{title} over {_short(last)} steps: {', '.join(said)}."


def _short(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 100_000):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
