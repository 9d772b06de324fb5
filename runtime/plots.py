"""Plots as inline SVG, drawn by pure functions: no script, no library, colours from the page's style sheet.

A plot is drawn 480 units wide, so that its letters stay readable on a phone, and is scaled by the page. Each carries a
title and, as its description, the numbers in words. Subjects are labelled where they are, not in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rtx.runtime.report import COLORS, Html, number, text

_WIDTH = 480.0
_LETTER_WIDTH = 8.0  # of the 13 units high type, on the wide side: an estimate, used only to keep labels apart
_LINE_HEIGHT = 16.0
_RADIUS = 5.5

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
    left, right, top, bottom = 56.0, _WIDTH - 12, 34.0, 290.0
    ys = [value for p in points for value in (p.y, *(p.y_range or ()))]
    x_ticks = nice_ticks(0.0, max(value for p in points for value in (p.x, *(p.x_range or ()))) * 1.06, 5)
    middle, half = (min(ys) + max(ys)) / 2, max(max(ys) - min(ys), y_min_span) * 0.62
    high = middle + half if y_max is None else max(max(ys), min(middle + half, y_max))
    y_ticks = nice_ticks(high - 2 * half, high, 5)
    x, y = _linear(x_ticks[0], x_ticks[-1], left, right), _linear(y_ticks[0], y_ticks[-1], bottom, top)
    drawn = [_y_axis(y_ticks, y, left, right, y_label), _x_axis(x_ticks, x, bottom, x_label)]
    obstacles = [(x(p.x) - 8, y(p.y) - 8, x(p.x) + 8, y(p.y) + 8) for p in points]
    for point in points:
        stroke = f"whisker s{point.color % COLORS}"
        if point.x_range:
            drawn.append(_line(x(point.x_range[0]), y(point.y), x(point.x_range[1]), y(point.y), stroke))
        if point.y_range:
            drawn.append(_line(x(point.x), y(point.y_range[0]), x(point.x), y(point.y_range[1]), stroke))
    for point in points:
        tip = f"{point.label}: {number(point.x)} {x_label}, {number(point.y, digits=4)} {y_label}"
        drawn.append(_circle(x(point.x), y(point.y), f"f{point.color % COLORS}", tip))
        box, anchor = _free_box(point.label, x(point.x), y(point.y), obstacles, (left, top - 12, right + 12, bottom))
        obstacles.append(box)
        start = {"": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
        drawn.append(_text(start, box[3] - 4, point.label, f"strong halo {anchor}".strip()))
    words = "; ".join(f"{p.label}: {number(p.x)} {x_label}, {number(p.y, digits=4)} {y_label}" for p in points)
    return _svg(335, title, words, drawn)


def svg_lines(series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Html:
    """Lines over logarithmic axes: equal ratios are equal distances. A tick stands at each x that occurs.

    Raises:
        ValueError: a coordinate is not positive; a logarithm needs it to be.
    """
    values = [value for s in series for point in s.points for value in point]
    if any(not value > 0 for value in values):
        raise ValueError(f"svg_lines: expected positive coordinates, got {min(values)}")
    label_width = max(len(s.label) for s in series) * _LETTER_WIDTH + 12
    left, right, top, bottom = 56.0, _WIDTH - label_width, 34.0, 290.0
    x_ticks = sorted({x for s in series for x, _ in s.points})
    ys = [y for s in series for _, y in s.points]
    y_ticks = log_ticks(min(ys), max(ys))
    x = _logarithmic(x_ticks[0], x_ticks[-1], left + 12, right)
    y = _logarithmic(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), bottom, top)
    drawn = [_y_axis(y_ticks, y, left, right, y_label), _x_axis(x_ticks, x, bottom, x_label)]
    for s in series:
        path = " ".join(f"{'M' if i == 0 else 'L'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(s.points))
        drawn.append(f'<path class="line s{s.color % COLORS}" d="{path}" />')
        for a, b in s.points:
            tip = f"{s.label}, {number(a)} {x_label}: {number(b)} {y_label}"
            drawn.append(_circle(x(a), y(b), f"f{s.color % COLORS}", tip, radius=3.5))
    places = spread_apart([y(s.points[-1][1]) for s in series], _LINE_HEIGHT, top, bottom)
    for s, place in zip(series, places, strict=True):
        drawn.append(_text(x(s.points[-1][0]) + 10, place + 4, s.label, f"strong f{s.color % COLORS}"))
    words = "; ".join(f"{s.label}: " + ", ".join(f"{number(b)} at {number(a)}" for a, b in s.points) for s in series)
    return _svg(335, title, f"{y_label} by {x_label}. {words}", drawn)


def svg_bars(bars: Sequence[Bar], *, title: str, x_label: str) -> Html:
    """Horizontal bars from zero, one a subject, stacked where a bar has several parts: a paler tint for each."""
    step = 62.0 if any(bar.detail for bar in bars) else 46.0
    ticks = nice_ticks(0.0, max(sum(length for _, length in bar.parts) for bar in bars), 4)
    x = _linear(0.0, ticks[-1], 0.0, _WIDTH)
    drawn = []
    for row, bar in enumerate(bars):
        base = row * step
        drawn += [_text(0, base + 13, bar.label, "strong"), _text(_WIDTH, base + 13, bar.value, "end")]
        drawn.append(f'<rect class="track" x="0" y="{base + 21:.1f}" width="{_WIDTH}" height="11" rx="2" />')
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
            drawn.append(_text(0, base + 48, bar.detail, "axis"))
    bottom = len(bars) * step - 8
    drawn.append(_x_axis(ticks, x, bottom, x_label, ends=True))
    words = "; ".join(
        f"{bar.label}: " + ", ".join(f"{name} {number(length)}".strip() for name, length in bar.parts) for bar in bars
    )
    return _svg(bottom + 42, title, f"{x_label}. {words}", drawn)


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
    x = _linear(ticks[0], ticks[-1], 22.0, _WIDTH - 22)
    step = 48.0
    bottom = len(spans) * step - 4
    drawn = [_line(x(tick), 0, x(tick), bottom, "grid") for tick in ticks]
    if reference is not None:
        drawn.append(_line(x(reference), 0, x(reference), bottom, "s0"))
    for row, span in enumerate(spans):
        base, color = row * step, span.color % COLORS
        middle = base + 29
        drawn += [_text(0, base + 14, span.label, "strong halo"), _text(_WIDTH, base + 14, span.value, "end halo")]
        ends = [mark.value for mark in span.marks]
        drawn.append(_line(x(min(ends)), middle, x(max(ends)), middle, f"line s{color}"))
        # From the last to the first, so that the first mark, the main one, lies on top.
        for mark in reversed(span.marks):
            tip = f"{span.label}, {mark.name}: {number(mark.value)} {x_label}"
            drawn.append(_mark(x(mark.value), middle, mark.shape, color, tip))
    drawn.append(_x_axis(ticks, x, bottom, x_label))
    words = "; ".join(f"{s.label}: " + ", ".join(f"{m.name} {number(m.value)}" for m in s.marks) for s in spans)
    return _svg(bottom + 42, title, f"{x_label}. {words}", drawn)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, 1 - math.floor(math.log10(step)))
    return [round(index * step, decimals) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or below `low` to the first at or above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max((tick for tick in candidates if tick <= low * (1 + 1e-9)), default=candidates[0])
    last = min((tick for tick in candidates if tick >= high * (1 - 1e-9)), default=candidates[-1])
    return [tick for tick in candidates if first <= tick <= last]


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in the same order, at least `gap` apart and within [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = [0.0] * len(wanted)
    previous = low - gap
    for index in order:
        previous = places[index] = max(wanted[index], previous + gap)
    following = max(high, low + gap * (len(wanted) - 1)) + gap
    for index in reversed(order):
        following = places[index] = min(places[index], following - gap)
    return places


_Scale = Callable[[float], float]
_Box = tuple[float, float, float, float]


def _linear(low: float, high: float, start: float, stop: float) -> _Scale:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _logarithmic(low: float, high: float, start: float, stop: float) -> _Scale:
    if low == high:
        return lambda _: (start + stop) / 2
    return lambda value: start + math.log(value / low) / math.log(high / low) * (stop - start)


def _free_box(label: str, x: float, y: float, obstacles: Sequence[_Box], area: _Box) -> tuple[_Box, str]:
    """Where a label stands near its point, and how it is anchored: what covers least of all else and stays inside."""
    width, height = len(label) * _LETTER_WIDTH, _LINE_HEIGHT
    candidates: list[tuple[_Box, str]] = [
        ((x + 10, y - height / 2, x + 10 + width, y + height / 2), ""),
        ((x - 10 - width, y - height / 2, x - 10, y + height / 2), "end"),
        ((x - width / 2, y - 9 - height, x + width / 2, y - 9), "middle"),
        ((x - width / 2, y + 9, x + width / 2, y + 9 + height), "middle"),
        ((x + 7, y - 8 - height, x + 7 + width, y - 8), ""),
        ((x + 7, y + 8, x + 7 + width, y + 8 + height), ""),
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


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as tell them apart, the same for all."""
    decimals = next((d for d in range(9) if all(math.isclose(round(t, d), t, abs_tol=1e-12) for t in ticks)), 9)
    return [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]


def _y_axis(ticks: Sequence[float], y: _Scale, left: float, right: float, label: str) -> str:
    parts = [_text(0, 13, label, "axis")]
    for tick, shown in zip(ticks, _tick_labels(ticks), strict=True):
        parts += [_line(left, y(tick), right, y(tick), "grid"), _text(left - 8, y(tick) + 4, shown, "axis end")]
    return "".join(parts)


def _x_axis(ticks: Sequence[float], x: _Scale, bottom: float, label: str, *, ends: bool = False) -> str:
    """Tick labels below `bottom`, the axis' name below them; `ends`: the outer labels stay within the plot's width."""
    parts = []
    for index, (tick, shown) in enumerate(zip(ticks, _tick_labels(ticks), strict=True)):
        anchor = "middle"
        if ends and index in (0, len(ticks) - 1):
            anchor = "end" if index else ""
        parts.append(_text(x(tick), bottom + 18, shown, f"axis {anchor}".strip()))
    return "".join([*parts, _text(_WIDTH, bottom + 37, label, "axis end")])


def _mark(x: float, y: float, shape: Shape, color: int, tip: str) -> str:
    if shape == "tick":
        return _line(x, y - 6, x, y + 6, f"line s{color}", tip)
    return _circle(x, y, f"f{color}" if shape == "dot" else f"ring s{color}", tip)


def _circle(x: float, y: float, classes: str, tip: str, *, radius: float = _RADIUS) -> str:
    return f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{text(tip)}</title></circle>'


def _line(x1: float, y1: float, x2: float, y2: float, classes: str, tip: str = "") -> str:
    inside = f"<title>{text(tip)}</title>" if tip else ""
    return f'<line class="{classes}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{inside}</line>'


def _text(x: float, y: float, content: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{text(content)}</text>' if content else ""


def _svg(height: float, title: str, description: str, drawn: Sequence[str]) -> Html:
    return Html(
        f'<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img"><title>{text(title)}</title>'
        f"<desc>{text(description)}</desc>{''.join(drawn)}</svg>"
    )
