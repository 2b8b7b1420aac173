"""Fit a straight line to points and draw both as an SVG file."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 640, 400, 60
NUM_TICKS = 5

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """Least-squares line through points.

    Attributes:
        intercept: Value at zero.
        slope: Growth per unit.
        residual: Root mean square distance of the points from it, in units of y.
        r_squared: Part of the variance that it explains.
    """

    intercept: float
    slope: float
    residual: float
    r_squared: float

    def at(self, x: float) -> float:
        """Return the line's value at ``x``."""
        return self.intercept + self.slope * x


@dataclass(frozen=True, slots=True)
class Labels:
    """Texts of a plot."""

    title: str
    x: str
    y: str


def fit_line(points: Sequence[Point]) -> Line:
    """Return the line with the least sum of squared distances in y."""
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    squares = sum((y - intercept - slope * x) ** 2 for x, y in points)
    mean = statistics.fmean(ys)
    total = sum((y - mean) ** 2 for y in ys)
    r_squared = 1 - squares / total if total else 1.0
    return Line(intercept, slope, (squares / len(points)) ** 0.5, r_squared)


def draw_plot(points: Sequence[Point], line: Line, labels: Labels) -> str:
    """Return an SVG document with points, line and axes that start at zero."""
    max_x = max(x for x, _ in points)
    max_y = 1.05 * max(*(y for _, y in points), line.at(max_x))

    def place(x: float, y: float) -> Point:
        left = MARGIN + (WIDTH - 2 * MARGIN) * x / max_x
        return left, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * y / max_y

    shapes = [_text((WIDTH / 2, MARGIN / 2), labels.title)]
    shapes.append(_text((WIDTH / 2, HEIGHT - 12), labels.x))
    shapes.append(_text((MARGIN, MARGIN - 10), labels.y))
    for i in range(NUM_TICKS):
        x, y = max_x * i / (NUM_TICKS - 1), max_y * i / (NUM_TICKS - 1)
        column, row = place(x, 0)
        shapes.append(_text((column, row + 18), f"{x:g}"))
        column, row = place(0, y)
        shapes.append(_text((column - 8, row + 4), f"{y:.3g}", anchor="end"))
        shapes.append(_stroke(place(0, y), place(max_x, y), "#dddddd"))
    shapes.append(_stroke(place(0, line.at(0)), place(max_x, line.at(max_x)), "#c04000"))
    for x, y in points:
        column, row = place(x, y)
        shapes.append(f'<circle cx="{column:.1f}" cy="{row:.1f}" r="4" fill="#0050a0"/>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, background, *shapes, "</svg>"]) + "\n"


def _text(place: Point, text: str, anchor: str = "middle") -> str:
    x, y = place
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _stroke(start: Point, end: Point, color: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        f' stroke="{color}" stroke-width="1.5"/>'
    )
