"""What plots are drawn from: scales, ticks, axes and shapes as SVG.

A drawing is 480 units wide, so that its letters stay readable on a phone. Colours and type come from a style sheet: the
page's around it, or, in a file of its own, the one that `standalone` puts into it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib import resources

from rtx.runtime.report import Html, text

WIDTH = 480.0
LETTER_WIDTH = 8.0  # of the 13 units high type, on the wide side: an estimate, used only to keep labels apart
LINE_HEIGHT = 16.0
RADIUS = 5.5

Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def logarithmic(low: float, high: float, start: float, stop: float) -> Scale:
    if low == high:
        return lambda _: (start + stop) / 2
    return lambda value: start + math.log(value / low) / math.log(high / low) * (stop - start)


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


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as tell them apart, the same for all."""
    decimals = next((d for d in range(9) if all(math.isclose(round(t, d), t, abs_tol=1e-12) for t in ticks)), 9)
    return [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]


def y_axis(ticks: Sequence[float], y: Scale, left: float, right: float, label: str, *, top: float = 0.0) -> str:
    """Lines at the ticks with their numbers left of them; the axis' name above them, below `top`."""
    parts = [text_at(0, top + 13, label, "axis")]
    for tick, shown in zip(ticks, tick_labels(ticks), strict=True):
        parts += [line(left, y(tick), right, y(tick), "grid"), text_at(left - 8, y(tick) + 4, shown, "axis end")]
    return "".join(parts)


def x_axis(ticks: Sequence[float], x: Scale, bottom: float, label: str, *, ends: bool = False) -> str:
    """Tick labels below `bottom`, the axis' name below them; `ends`: the outer labels stay within the plot's width."""
    parts = []
    for index, (tick, shown) in enumerate(zip(ticks, tick_labels(ticks), strict=True)):
        anchor = "middle"
        if ends and index in (0, len(ticks) - 1):
            anchor = "end" if index else ""
        parts.append(text_at(x(tick), bottom + 18, shown, f"axis {anchor}".strip()))
    return "".join([*parts, text_at(WIDTH, bottom + 37, label, "axis end")])


def circle(x: float, y: float, classes: str, tip: str, *, radius: float = RADIUS) -> str:
    return f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{text(tip)}</title></circle>'


def line(x1: float, y1: float, x2: float, y2: float, classes: str, tip: str = "") -> str:
    inside = f"<title>{text(tip)}</title>" if tip else ""
    return f'<line class="{classes}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{inside}</line>'


def text_at(x: float, y: float, content: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{text(content)}</text>' if content else ""


def drawing(height: float, title: str, description: str, drawn: Sequence[str]) -> Html:
    return Html(
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img"><title>{text(title)}</title>'
        f"<desc>{text(description)}</desc>{''.join(drawn)}</svg>"
    )


def standalone(svg: Html, *, margin: float = 14.0) -> str:
    """A drawing as the content of a file, to be shown as an image, on white.

    Its style sheet is that of the page, but light whatever the page around it is: an image is not told.
    """
    opening = re.match(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)" role="img">', svg)
    assert opening is not None
    width, height = float(opening[1]) + 2 * margin, float(opening[2]) + 2 * margin
    area = f'x="{-margin:.0f}" y="{-margin:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{1.5 * width:.0f}" height="{1.5 * height:.0f}" '
        f'viewBox="{-margin:.0f} {-margin:.0f} {width:.0f} {height:.0f}"><style>{_light_style()}</style>'
        f'<rect {area} fill="#ffffff" />{svg[opening.end() :]}\n'
    )


def _light_style() -> str:
    """What the page's style sheet says of drawings, with its light colours in place of their names."""
    page = resources.files("rtx.runtime").joinpath("report.html").read_text(encoding="utf-8")
    # A name is defined for light first, then for dark.
    colors = dict(reversed(re.findall(r"--(\w+): (#\w+);", page)))
    rules = re.findall(r"^(?:svg \S.*|\.[fs]\d .*)$", page, flags=re.MULTILINE)
    family = "text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif; }"
    style = " ".join([family, *(rule for rule in rules if not rule.startswith("svg {"))])
    return re.sub(r"var\(--(\w+)\)", lambda name: colors[name[1]], style)
