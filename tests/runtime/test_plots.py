"""Plots: where things are drawn, and that no label covers another."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from rtx.runtime.plots import (
    Bar,
    Mark,
    Point,
    Series,
    Span,
    log_ticks,
    nice_ticks,
    spread_apart,
    svg_bars,
    svg_dots,
    svg_lines,
    svg_scatter,
)


def _classes(svg: str, tag: str, name: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter(tag) if name in e.attrib.get("class", "").split()]


def _texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (0.0, 47.0, [0, 10, 20, 30, 40, 50]),
        (0.4051, 0.4149, [0.404, 0.406, 0.408, 0.41, 0.412, 0.414, 0.416]),
        (-0.0031, 0.0011, [-0.004, -0.003, -0.002, -0.001, 0.0, 0.001, 0.002]),
        (7.0, 7.0, [6, 8, 10, 12, 14]),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    if low < high or low == 0:
        assert ticks == pytest.approx(expected)


def test_logarithmic_ticks_are_1_2_5_and_enclose() -> None:
    assert log_ticks(3.6, 55.8) == [2, 5, 10, 20, 50, 100]
    assert log_ticks(1.0, 10.0) == [1, 2, 5, 10]
    assert log_ticks(50.0, 50.0) == [50]


def test_spreading_keeps_order_distance_and_bounds() -> None:
    assert spread_apart([10.0, 50.0], 16, 0, 100) == [10.0, 50.0]
    assert spread_apart([50.0, 49.0, 48.0], 10, 0, 100) == [68.0, 58.0, 48.0]
    assert spread_apart([99.0, 99.5], 10, 0, 100) == [90.0, 100.0]
    # More than fit: they keep their distance and leave the bounds.
    assert spread_apart([0.0, 0.0, 0.0], 10, 0, 5) == [0.0, 10.0, 20.0]


def test_a_scatter_puts_points_in_proportion_from_zero() -> None:
    svg = svg_scatter(
        [Point("a", 25.0, 0.41, 1), Point("b", 50.0, 0.42, 2), Point("c", 100.0, 0.43, 3)],
        title="t",
        x_label="texts/s",
        y_label="NDCG@10",
    )
    circles = list(ElementTree.fromstring(svg).iter("circle"))
    x = [float(circle.attrib["cx"]) for circle in circles]
    y = [float(circle.attrib["cy"]) for circle in circles]
    zero = next(e for e in ElementTree.fromstring(svg).iter("text") if e.text == "0")
    origin = float(zero.attrib["x"])
    assert (x[1] - origin) / (x[0] - origin) == pytest.approx(2, abs=0.01)
    assert (x[2] - origin) / (x[0] - origin) == pytest.approx(4, abs=0.01)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[0] > y[2]  # better is higher up
    assert [circle.attrib["class"] for circle in circles] == ["f1", "f2", "f3"]
    assert "a: 25.0 texts/s, 0.4100 NDCG@10" in "".join(circles[0].itertext())


def test_a_scatter_does_not_blow_up_small_differences() -> None:
    svg = svg_scatter([Point("a", 1.0, 1.0), Point("b", 2.0, 0.9999)], title="t", x_label="x", y_label="y")
    y = [float(circle.attrib["cy"]) for circle in ElementTree.fromstring(svg).iter("circle")]
    assert 0 < y[1] - y[0] < 10


def test_a_scatter_ends_at_the_best_that_there_can_be() -> None:
    points = [Point("a", 1.0, 1.0), Point("b", 2.0, 0.999)]
    assert "1.0025" in _texts(svg_scatter(points, title="t", x_label="x", y_label="y"))
    limited = _texts(svg_scatter(points, title="t", x_label="x", y_label="y", y_max=1.0))
    assert {"0.9875", "1.0000"} <= set(limited)
    assert "1.0025" not in limited
    # Rounding can leave a cosine a little above 1: it is drawn inside all the same.
    above = svg_scatter([Point("a", 1.0, 1.0000001)], title="t", x_label="x", y_label="y", y_max=1.0)
    assert float(_classes(above, "circle", "f0")[0].attrib["cy"]) >= 30


def test_labels_of_a_scatter_keep_clear_of_each_other() -> None:
    points = [Point("PyTorch", 50.0, 0.412), Point("fp32", 52.0, 0.412, 1), Point("fp16", 51.0, 0.4121, 2)]
    svg = svg_scatter(points, title="t", x_label="x", y_label="y")
    boxes = []
    for label in _classes(svg, "text", "strong"):
        width = 8.0 * len(label.text or "")
        anchor = label.attrib["class"].split()[-1]
        x = float(label.attrib["x"]) - {"end": width, "middle": width / 2}.get(anchor, 0.0)
        boxes.append((x, float(label.attrib["y"]), width))
    assert len(boxes) == 3
    for (x1, y1, w1), (x2, y2, w2) in itertools.combinations(boxes, 2):
        assert x1 + w1 <= x2 + 0.2 or x2 + w2 <= x1 + 0.2 or abs(y1 - y2) >= 12


def test_lines_are_logarithmic_in_both_axes() -> None:
    svg = svg_lines(
        [Series("a", ((16.0, 400.0), (64.0, 100.0), (256.0, 25.0)), 1)], title="t", x_label="tokens", y_label="texts/s"
    )
    circles = list(ElementTree.fromstring(svg).iter("circle"))
    x = [float(circle.attrib["cx"]) for circle in circles]
    y = [float(circle.attrib["cy"]) for circle in circles]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2)
    assert {"16", "64", "256", "20", "500"} <= set(_texts(svg))


def test_lines_refuse_what_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="expected positive coordinates, got 0"):
        svg_lines([Series("a", ((16.0, 0.0), (64.0, 1.0)))], title="t", x_label="x", y_label="y")


def test_bars_are_in_proportion_and_their_parts_add_up() -> None:
    svg = svg_bars(
        [Bar("a", (("run", 3.0), ("rest", 1.0)), 1, "4 ms"), Bar("b", (("run", 8.0),), 2, "8 ms", "all of it")],
        title="t",
        x_label="ms",
    )
    parts = [e for e in ElementTree.fromstring(svg).iter("rect") if e.attrib["class"] != "track"]
    widths = [float(e.attrib["width"]) for e in parts]
    unit = widths[2] / 8
    assert widths[0] == pytest.approx(3 * unit - 1, abs=0.11)  # a gap of one unit between parts
    assert float(parts[1].attrib["x"]) == pytest.approx(3 * unit, abs=0.11)
    assert widths[1] == pytest.approx(unit, abs=0.11)
    assert [float(e.attrib["opacity"]) for e in parts] == [1.0, 0.25, 1.0]
    assert {"a", "b", "4 ms", "8 ms", "all of it", "ms"} <= set(_texts(svg))


def test_dots_show_each_mark_where_it_is() -> None:
    marks = (Mark("p50", 2.0), Mark("p95", 4.0, "ring"), Mark("p99", 6.0, "tick"))
    svg = svg_dots([Span("int8", marks, 3, "2.0 ms")], title="t", x_label="ms", from_zero=True)
    dot, ring = _classes(svg, "circle", "f3")[0], _classes(svg, "circle", "ring")[0]
    line, tick = _classes(svg, "line", "line")[:2]
    zero = next(float(e.attrib["x"]) for e in ElementTree.fromstring(svg).iter("text") if e.text == "0")
    unit = (float(dot.attrib["cx"]) - zero) / 2
    assert float(ring.attrib["cx"]) - zero == pytest.approx(4 * unit, abs=0.2)
    assert float(tick.attrib["x1"]) - zero == pytest.approx(6 * unit, abs=0.3)
    assert float(line.attrib["x1"]) == float(dot.attrib["cx"])
    assert float(line.attrib["x2"]) == float(tick.attrib["x1"])


def test_a_reference_is_always_on_the_axis() -> None:
    spans = [Span("int8", (Mark("difference", -0.01), Mark("low", -0.012, "tick"), Mark("high", -0.008, "tick")))]
    svg = svg_dots(spans, title="t", x_label="difference", reference=0.0)
    zero = next(float(e.attrib["x"]) for e in ElementTree.fromstring(svg).iter("text") if float(e.text == "0.000"))
    assert [float(e.attrib["x1"]) for e in _classes(svg, "line", "s0") if e.attrib["class"] == "s0"] == [zero]
    assert "−0.010" in _texts(svg)


def test_dots_that_are_all_equal_can_be_drawn() -> None:
    svg = svg_dots([Span("fp32", (Mark("difference", 0.0),))], title="t", x_label="x", reference=0.0, min_span=0.01)
    assert {"−0.004", "0.000", "0.004"} <= set(_texts(svg))
