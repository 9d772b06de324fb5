"""Plots: where things are drawn, and that no label covers another."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from rtx.runtime.plots import (
    Bar,
    Mark,
    Panel,
    Point,
    Series,
    Span,
    svg_bars,
    svg_dots,
    svg_lines,
    svg_panels,
    svg_scatter,
)
from rtx.runtime.svg import log_ticks, nice_ticks, spread_apart, standalone


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


def _paths(svg: str) -> list[list[tuple[float, float]]]:
    paths = [e.attrib["d"] for e in ElementTree.fromstring(svg).iter() if e.tag.rpartition("}")[2] == "path"]
    return [
        [(float(x), float(y)) for x, y in (p[1:].split() for p in re.findall(r"[ML][^ML]+", path))] for path in paths
    ]


def test_panels_share_the_x_axis_and_have_their_own_y_axes() -> None:
    svg = svg_panels(
        [
            Panel("NDCG@10", (Series("", ((0, 0.4), (100, 0.5))),), height=100),
            Panel("loss", (Series("", ((50, 2.0), (100, 1.0), (200, 0.0))),), height=100),
        ],
        title="t",
        x_label="step",
    )
    (first, second), lower = _paths(svg)
    assert first[0] < lower[0][0] < second[0] == lower[1][0] < lower[2][0]
    assert lower[2][0] - first[0] == pytest.approx(2 * (second[0] - first[0]), abs=0.3)
    assert second[1] < first[1] < 100 < lower[0][1] < lower[1][1] < lower[2][1] < 200
    assert lower[1][1] - lower[0][1] == pytest.approx(lower[2][1] - lower[1][1], abs=0.2)
    texts = _texts(svg)
    assert texts.index("NDCG@10") < texts.index("loss")
    assert texts[-6:] == ["0", "50", "100", "150", "200", "step"]


def test_a_small_difference_is_not_drawn_large() -> None:
    line = (Series("", ((0, 0.4999), (10, 0.5001))),)
    (narrow,), (wide,) = (
        _paths(svg_panels([Panel("m", line, y_min_span=span)], title="t", x_label="x")) for span in (0.0, 0.1)
    )
    assert narrow[0][1] - narrow[1][1] > 50
    assert 0 < wide[0][1] - wide[1][1] < 2


def test_ticks_of_steps_are_whole_numbers() -> None:
    svg = svg_panels([Panel("loss", (Series("", ((1, 3.0), (2, 2.0), (3, 1.5))),))], title="t", x_label="step")
    assert _texts(svg)[-4:] == ["1", "2", "3", "step"]


def test_equal_ratios_of_dimensions_are_equal_distances() -> None:
    lines = tuple(Series(name, ((32, 0.3), (64, 0.4), (128, 0.42), (136, 0.43)), i) for i, name in enumerate("ab"))
    svg = svg_panels([Panel("NDCG@10", lines)], title="t", x_label="dimensions", doubling=True)
    line = _paths(svg)[0]
    assert line[2][0] - line[1][0] == pytest.approx(line[1][0] - line[0][0], abs=0.2)
    texts = _texts(svg)
    # 128 stands too near to 136 to be read.
    assert texts[-4:] == ["32", "64", "136", "dimensions"]
    places = [float(e.attrib["y"]) for e in _classes(svg, "text", "strong")]
    assert abs(places[0] - places[1]) >= 16


def test_a_marked_point_has_its_label_beside_the_line() -> None:
    points = ((0, 0.4), (250, 0.46), (500, 0.48), (750, 0.4877), (1000, 0.486))
    panel = Panel("NDCG@10", (Series("", points),), marked=(Point("0.4877 at step 750", 750, 0.4877),))
    svg = svg_panels([panel], title="t", x_label="step")
    (label,) = _classes(svg, "text", "halo")
    assert label.text == "0.4877 at step 750"
    ring = _classes(svg, "circle", "ring")[0]
    assert float(label.attrib["y"]) < float(ring.attrib["cy"])  # the line goes down on both sides


def test_long_lines_have_no_dots_and_are_put_in_few_words() -> None:
    points = tuple((float(x), 1.0 + abs(x - 30)) for x in range(100))
    svg = svg_panels([Panel("loss", (Series("", points),))], title="t", x_label="step")
    assert not list(ElementTree.fromstring(svg).iter("circle"))
    described = next(ElementTree.fromstring(svg).iter("desc")).text
    assert described == "By step. loss: 31.00 at 0, 1.000 at 30, 70.00 at 99"


def test_a_file_of_its_own_has_its_style_and_stands_on_white() -> None:
    svg = standalone(svg_panels([Panel("loss", (Series("", ((0, 1.0), (1, 2.0)), 1),))], title="t", x_label="x"))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = next(e.text or "" for e in root.iter() if e.tag.endswith("style"))
    assert "var(" not in style
    assert ".s1 { stroke: #2563eb; }" in style  # the light colour
    assert "svg text.axis { fill: #5b6472; font-size: 12px; }" in style
    ground = next(e for e in root.iter() if e.tag.endswith("rect"))
    assert (ground.attrib["fill"], ground.attrib["width"]) == ("#ffffff", root.attrib["viewBox"].split()[2])
