"""Curves as an SVG of a few kilobytes, written by hand: no plotting library is asked of anyone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 48, 58
COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#475569")
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #222 } .title { font-size: 15px; font-weight: 600 }
.mark { font-size: 11px } .tick { fill: #555 } .grid { stroke: #e3e3e3 } .axis { stroke: #555 }
</style>"""


class Point(NamedTuple):
    x: float
    y: float
    mark: str


class Curve(NamedTuple):
    name: str
    points: Sequence[Point]


def ticks(largest: float, wanted: int = 6) -> list[float]:
    """From 0 to the first round number that is not below `largest`."""
    rough = max(largest, 1e-9) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [i * step for i in range(math.ceil(largest / step - 1e-9) + 1)]


def svg(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    points = [point for curve in curves for point in curve.points]
    across = ticks(max((p.x for p in points), default=1.0) * 1.04)
    up = ticks(max((p.y for p in points), default=1.0) * 1.04)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / across[-1]

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / up[-1]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        STYLE,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 26, title, kind="title"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label, anchor="middle"),
        f'<g transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)">'
        f"{_text(0, 0, y_label, anchor='middle')}</g>",
    ]
    for value in across:
        parts.append(_line(x(value), TOP, x(value), HEIGHT - BOTTOM, "grid" if value else "axis"))
        parts.append(_text(x(value), HEIGHT - BOTTOM + 18, f"{value:,g}", kind="tick", anchor="middle"))
    for value in up:
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid" if value else "axis"))
        parts.append(_text(LEFT - 8, y(value) + 4, f"{value:,g}", kind="tick", anchor="end"))
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        places = [(x(p.x), y(p.y), p.mark) for p in curve.points]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for px, py, mark in places:
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
            parts.append(_text(px + 7, py - 7, mark, kind="mark"))
        parts.append(f'<rect x="{WIDTH - RIGHT - 26}" y="{TOP + 12 + 20 * i}" width="18" height="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT - 34, TOP + 19 + 20 * i, curve.name, anchor="end"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
