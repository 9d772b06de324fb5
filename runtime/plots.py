"""Plots as inline SVG, drawn by pure functions: no script, no library, colours from the page's style sheet.

A plot is scaled by the page. Each carries a title and, as its description, the numbers in words. Subjects are labelled
where they are, not in a legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rtx.runtime.report import COLORS, Html, number, text
from rtx.runtime.svg import (
    LETTER_WIDTH,
    LINE_HEIGHT,
    WIDTH,
    Scale,
    circle,
    drawing,
    line,
    linear,
    log_ticks,
    logarithmic,
    nice_ticks,
    spread_apart,
    text_at,
    tick_labels,
    x_axis,
    y_axis,
)

# A longer line has no dots.
_DOTTED_POINTS = 40

Shape = Literal["dot", "ring", "tick"]


@dataclass(frozen=True)
class Point:
    """A subject in a scatter plot; a range is drawn as a whisker through it."""

    label: str
    x: float
    y: float
    color: int = 0
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A subject in a line plot: (x, y) in ascending x, all positive."""

    label: str
    points: tuple[tuple[float, float], ...]
    color: int = 0


@dataclass(frozen=True)
class Bar:
    """A subject's bar: its parts in order (name, length), a value on its right and a smaller line below it."""

    label: str
    parts: tuple[tuple[str, float], ...]
    color: int = 0
    value: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Mark:
    """A value on a dot plot's line, by name ("p95", "lower end")."""

    name: str
    value: float
    shape: Shape = "dot"


@dataclass(frozen=True)
class Span:
    """A subject's line in a dot plot, from its lowest mark to its highest."""

    label: str
    marks: tuple[Mark, ...]
    color: int = 0
    value: str = ""


@dataclass(frozen=True)
class Panel:
    """A part of a plot with a y axis of its own: lines over what all parts have below them.

    Attributes:
        y_label: quantity and unit.
        series: at least one, of finite numbers. Of few points each is drawn, and several are labelled at their ends.
        y_min_span: the y axis covers at least so much, so that noise does not look like a difference.
        marked: points with a ring and a label.
        height: of the part.
    """

    y_label: str
    series: tuple[Series, ...]
    y_min_span: float = 0.0
    marked: tuple[Point, ...] = ()
    height: float = 150.0


def svg_scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_min_span: float = 0.01,
    y_max: float | None = None,
) -> Html:
    """A scatter plot of few labelled points, x from zero.

    Args:
        points: at least one.
        title: for who cannot see it.
        x_label, y_label: quantity and unit of the axes.
        y_min_span: the y axis covers at least so much, so that noise does not look like a difference.
        y_max: the best value that there can be: the axis ends there.
    """
    left, right, top, bottom = 56.0, WIDTH - 12, 34.0, 290.0
    ys = [value for p in points for value in (p.y, *(p.y_range or ()))]
    x_ticks = nice_ticks(0.0, max(value for p in points for value in (p.x, *(p.x_range or ()))) * 1.06, 5)
    middle, half = (min(ys) + max(ys)) / 2, max(max(ys) - min(ys), y_min_span) * 0.62
    high = middle + half if y_max is None else max(max(ys), min(middle + half, y_max))
    y_ticks = nice_ticks(high - 2 * half, high, 5)
    x, y = linear(x_ticks[0], x_ticks[-1], left, right), linear(y_ticks[0], y_ticks[-1], bottom, top)
    drawn = [y_axis(y_ticks, y, left, right, y_label), x_axis(x_ticks, x, bottom, x_label)]
    obstacles = [(x(p.x) - 8, y(p.y) - 8, x(p.x) + 8, y(p.y) + 8) for p in points]
    for point in points:
        stroke = f"whisker s{point.color % COLORS}"
        if point.x_range:
            drawn.append(line(x(point.x_range[0]), y(point.y), x(point.x_range[1]), y(point.y), stroke))
        if point.y_range:
            drawn.append(line(x(point.x), y(point.y_range[0]), x(point.x), y(point.y_range[1]), stroke))
    for point in points:
        tip = f"{point.label}: {number(point.x)} {x_label}, {number(point.y, digits=4)} {y_label}"
        drawn.append(circle(x(point.x), y(point.y), f"f{point.color % COLORS}", tip))
        box, anchor = _free_box(point.label, x(point.x), y(point.y), obstacles, (left, top - 12, right + 12, bottom))
        obstacles.append(box)
        start = {"": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
        drawn.append(text_at(start, box[3] - 4, point.label, f"strong halo {anchor}".strip()))
    words = "; ".join(f"{p.label}: {number(p.x)} {x_label}, {number(p.y, digits=4)} {y_label}" for p in points)
    return drawing(335, title, words, drawn)


def svg_lines(series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Html:
    """Lines over logarithmic axes: equal ratios are equal distances. A tick stands at each x that occurs.

    Raises:
        ValueError: a coordinate is not positive; a logarithm needs it to be.
    """
    values = [value for s in series for point in s.points for value in point]
    if any(not value > 0 for value in values):
        raise ValueError(f"svg_lines: expected positive coordinates, got {min(values)}")
    label_width = max(len(s.label) for s in series) * LETTER_WIDTH + 12
    left, right, top, bottom = 56.0, WIDTH - label_width, 34.0, 290.0
    x_ticks = sorted({x for s in series for x, _ in s.points})
    ys = [y for s in series for _, y in s.points]
    y_ticks = log_ticks(min(ys), max(ys))
    x = logarithmic(x_ticks[0], x_ticks[-1], left + 12, right)
    y = logarithmic(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), bottom, top)
    drawn = [y_axis(y_ticks, y, left, right, y_label), x_axis(x_ticks, x, bottom, x_label)]
    for s in series:
        path = " ".join(f"{'M' if i == 0 else 'L'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(s.points))
        drawn.append(f'<path class="line s{s.color % COLORS}" d="{path}" />')
        for a, b in s.points:
            tip = f"{s.label}, {number(a)} {x_label}: {number(b)} {y_label}"
            drawn.append(circle(x(a), y(b), f"f{s.color % COLORS}", tip, radius=3.5))
    places = spread_apart([y(s.points[-1][1]) for s in series], LINE_HEIGHT, top, bottom)
    for s, place in zip(series, places, strict=True):
        drawn.append(text_at(x(s.points[-1][0]) + 10, place + 4, s.label, f"strong f{s.color % COLORS}"))
    words = "; ".join(f"{s.label}: " + ", ".join(f"{number(b)} at {number(a)}" for a, b in s.points) for s in series)
    return drawing(335, title, f"{y_label} by {x_label}. {words}", drawn)


def svg_panels(panels: Sequence[Panel], *, title: str, x_label: str, doubling: bool = False) -> Html:
    """Lines over linear y axes, one part below the other, all over the same x axis.

    Args:
        panels: at least one, from top to bottom.
        title: for who cannot see it.
        x_label: quantity and unit.
        doubling: equal ratios of x are equal distances, and a tick stands at each x that occurs; else x is linear, with
            ticks at whole numbers.
    """
    every = [s for panel in panels for s in panel.series]
    xs = sorted({x for s in every for x, _ in s.points})
    several = [s.label for panel in panels for s in panel.series if len(panel.series) > 1]
    left, right = 56.0, WIDTH - 12 - max((len(label) * LETTER_WIDTH for label in several), default=0.0)
    x_ticks = xs if doubling else nice_ticks(xs[0], xs[-1], max(1, min(6, int(xs[-1] - xs[0]))))
    scale = logarithmic if doubling else linear
    x = scale(x_ticks[0], x_ticks[-1], left + 8, right - 8)
    drawn, top = [], 0.0
    for panel in panels:
        drawn += _draw_panel(panel, x, left, right, top)
        top += panel.height
    drawn.append(x_axis(_readable(x_ticks, x), x, top - 24, x_label))
    words = "; ".join(
        f"{panel.y_label}{f', {s.label}' if s.label else ''}: {_in_words(s.points)}"
        for panel in panels
        for s in panel.series
    )
    return drawing(top + 20, title, f"By {x_label}. {words}", drawn)


def _draw_panel(panel: Panel, x: Scale, left: float, right: float, top: float) -> list[str]:
    ys = [y for s in panel.series for _, y in s.points]
    middle, half = (min(ys) + max(ys)) / 2, max(max(ys) - min(ys), panel.y_min_span) / 2
    ticks = nice_ticks(middle - half, middle + half, 4)
    y = linear(ticks[0], ticks[-1], top + panel.height - 24, top + 34)
    drawn = [y_axis(ticks, y, left, right, panel.y_label, top=top)]
    for s in panel.series:
        path = " ".join(f"{'M' if i == 0 else 'L'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(s.points))
        drawn.append(f'<path class="line s{s.color % COLORS}" d="{path}" />')
        for a, b in s.points if len(s.points) <= _DOTTED_POINTS else ():
            drawn.append(
                circle(
                    x(a),
                    y(b),
                    f"f{s.color % COLORS}",
                    f"{s.label} {tick_labels([a])[0]}: {number(b, digits=4)}".strip(),
                    radius=3,
                )
            )
    if len(panel.series) > 1:
        ends = [s.points[-1] for s in panel.series]
        places = spread_apart([y(b) for _, b in ends], LINE_HEIGHT, top + 34, top + panel.height - 24)
        for s, (a, _), place in zip(panel.series, ends, places, strict=True):
            drawn.append(text_at(x(a) + 10, place + 4, s.label, f"strong f{s.color % COLORS}"))
    obstacles = [box for s in panel.series for box in _along([(x(a), y(b)) for a, b in s.points])]
    for point in panel.marked:
        drawn.append(circle(x(point.x), y(point.y), f"ring s{point.color % COLORS}", point.label))
        area = (left, top + 20, right + 12, top + panel.height - 20)
        box, anchor = _free_box(point.label, x(point.x), y(point.y), obstacles, area)
        start = {"": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
        drawn.append(text_at(start, box[3] - 4, point.label, f"strong halo {anchor}".strip()))
    return drawn


def _along(points: Sequence[tuple[float, float]]) -> list[_Box]:
    """Small boxes that cover a line."""
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(points):
        pieces = int(max(abs(x2 - x1), abs(y2 - y1)) / 6) + 1
        places = [(x1 + (x2 - x1) * part / pieces, y1 + (y2 - y1) * part / pieces) for part in range(pieces + 1)]
        boxes += [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    return boxes


def _readable(ticks: Sequence[float], x: Scale) -> list[float]:
    """Ticks whose numbers do not touch, the last one among them."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or x(kept[-1]) - x(tick) > LETTER_WIDTH * len(tick_labels([tick])[0]):
            kept.append(tick)
    return kept[::-1]


def _in_words(points: Sequence[tuple[float, float]], most: int = 12) -> str:
    """The points, or of many the ends and the lowest and highest."""
    if len(points) > most:
        chosen = {points[0], points[-1], min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])}
        points = sorted(chosen)
    return ", ".join(f"{number(b, digits=4)} at {tick_labels([a])[0]}" for a, b in points)


def svg_bars(bars: Sequence[Bar], *, title: str, x_label: str) -> Html:
    """Horizontal bars from zero, one a subject, stacked where a bar has several parts: a paler tint for each."""
    step = 62.0 if any(bar.detail for bar in bars) else 46.0
    ticks = nice_ticks(0.0, max(sum(length for _, length in bar.parts) for bar in bars), 4)
    x = linear(0.0, ticks[-1], 0.0, WIDTH)
    drawn = []
    for row, bar in enumerate(bars):
        base = row * step
        drawn += [text_at(0, base + 13, bar.label, "strong"), text_at(WIDTH, base + 13, bar.value, "end")]
        drawn.append(f'<rect class="track" x="0" y="{base + 21:.1f}" width="{WIDTH}" height="11" rx="2" />')
        start = 0.0
        for index, (name, length) in enumerate(bar.parts):
            width = max(x(start + length) - x(start) - (1.0 if index < len(bar.parts) - 1 else 0.0), 0.5)
            tip = (
                f"{bar.label}, {name}: {number(length)} {x_label}"
                if name
                else f"{bar.label}: {number(length)} {x_label}"
            )
            drawn.append(
                f'<rect class="f{bar.color % COLORS}" x="{x(start):.1f}" y="{base + 21:.1f}" width="{width:.1f}" '
                f'height="11" rx="1.5" opacity="{_tint(index, len(bar.parts))}"><title>{text(tip)}</title></rect>'
            )
            start += length
        if bar.detail:
            drawn.append(text_at(0, base + 48, bar.detail, "axis"))
    bottom = len(bars) * step - 8
    drawn.append(x_axis(ticks, x, bottom, x_label, ends=True))
    words = "; ".join(
        f"{bar.label}: " + ", ".join(f"{name} {number(length)}".strip() for name, length in bar.parts) for bar in bars
    )
    return drawing(bottom + 42, title, f"{x_label}. {words}", drawn)


def svg_dots(
    spans: Sequence[Span],
    *,
    title: str,
    x_label: str,
    reference: float | None = None,
    from_zero: bool = False,
    min_span: float = 0.0,
) -> Html:
    """A dot plot: for each subject a thin line with its marks, e.g. percentiles, or a difference with its interval.

    Args:
        spans: at least one, each with at least one mark.
        title: for who cannot see it.
        x_label: quantity and unit.
        reference: where a vertical line stands, e.g. 0 for "no difference"; always inside the axis.
        from_zero: start the axis at zero.
        min_span: the axis covers at least so much, so that noise does not look like a difference.
    """
    values = [mark.value for span in spans for mark in span.marks]
    values += [reference] if reference is not None else []
    values += [0.0] if from_zero else []
    spread = max(values) - min(values)
    margin = max(0.04 * spread, (min_span - spread) / 2) or 1.0
    ticks = nice_ticks(0.0 if from_zero else min(values) - margin, max(values) + margin, 5)
    x = linear(ticks[0], ticks[-1], 22.0, WIDTH - 22)
    step = 48.0
    bottom = len(spans) * step - 4
    drawn = [line(x(tick), 0, x(tick), bottom, "grid") for tick in ticks]
    if reference is not None:
        drawn.append(line(x(reference), 0, x(reference), bottom, "s0"))
    for row, span in enumerate(spans):
        base, color = row * step, span.color % COLORS
        middle = base + 29
        drawn += [text_at(0, base + 14, span.label, "strong halo"), text_at(WIDTH, base + 14, span.value, "end halo")]
        ends = [mark.value for mark in span.marks]
        drawn.append(line(x(min(ends)), middle, x(max(ends)), middle, f"line s{color}"))
        # From the last to the first, so that the first mark, the main one, lies on top.
        for mark in reversed(span.marks):
            tip = f"{span.label}, {mark.name}: {number(mark.value)} {x_label}"
            drawn.append(_mark(x(mark.value), middle, mark.shape, color, tip))
    drawn.append(x_axis(ticks, x, bottom, x_label))
    words = "; ".join(f"{s.label}: " + ", ".join(f"{m.name} {number(m.value)}" for m in s.marks) for s in spans)
    return drawing(bottom + 42, title, f"{x_label}. {words}", drawn)


_Box = tuple[float, float, float, float]


def _free_box(label: str, x: float, y: float, obstacles: Sequence[_Box], area: _Box) -> tuple[_Box, str]:
    """Where a label stands near its point, and how it is anchored: what covers least of all else and stays inside."""
    width, height = len(label) * LETTER_WIDTH, LINE_HEIGHT
    candidates: list[tuple[_Box, str]] = [
        ((x + 10, y - height / 2, x + 10 + width, y + height / 2), ""),
        ((x - 10 - width, y - height / 2, x - 10, y + height / 2), "end"),
        ((x - width / 2, y - 9 - height, x + width / 2, y - 9), "middle"),
        ((x - width / 2, y + 9, x + width / 2, y + 9 + height), "middle"),
        ((x + 7, y - 8 - height, x + 7 + width, y - 8), ""),
        ((x + 7, y + 8, x + 7 + width, y + 8 + height), ""),
        ((x - 7 - width, y - 8 - height, x - 7, y - 8), "end"),
        ((x - 7 - width, y + 8, x - 7, y + 8 + height), "end"),
    ]

    def cost(candidate: tuple[_Box, str]) -> float:
        box = candidate[0]
        outside = width * height - _overlap(box, area)
        return sum(_overlap(box, other) for other in obstacles) + 4 * outside

    return min(candidates, key=cost)


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _tint(index: int, count: int) -> str:
    return f"{1.0 - 0.75 * index / max(count - 1, 1):.2f}"


def _mark(x: float, y: float, shape: Shape, color: int, tip: str) -> str:
    if shape == "tick":
        return line(x, y - 6, x, y + 6, f"line s{color}", tip)
    return circle(x, y, f"f{color}" if shape == "dot" else f"ring s{color}", tip)
