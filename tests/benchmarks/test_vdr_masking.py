from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.vdr.masking import character_areas, hidden_ranges, paint, readable, rectangles, text_without, with_ink
from benchmarks.vdr.pages import Pdf
from benchmarks.vdr.queries import Query, SearchText, folded

BLUE_BAR = b"0 0 1 rg 0 394 400 30 re f 0 g\n"
TEXTS = [
    (50, 100, 12, "The voltage over"),
    (50, 120, 12, "time is shown"),
    (50, 300, 12, "Beside it: voltage"),
    (150, 300, 12, "over time"),
]


@pytest.fixture
def pdf(make_pdf: Any) -> Pdf:
    return Pdf(make_pdf([TEXTS], drawing={0: BLUE_BAR}))


def test_texts_are_hidden_wherever_they_stand(pdf: Pdf) -> None:
    page = SearchText(pdf.text(0))
    at = page.text.index("shown")
    found = [Query("title", "shown", 0, at, at + 5, "title: under 2 words"), Query("title", "elsewhere", 0, 0, 0, "x")]
    ranges = hidden_ranges(page, found, [folded("Voltage over time"), folded("over")])
    assert [" ".join(page.text[start:stop].split()) for start, stop in ranges] == [
        "voltage over time",
        "shown",
        "voltage over time",
    ]
    assert text_without(page.page, ranges) == "The is\nBeside it:"
    assert text_without(page.page, []) == "The voltage over\ntime is shown\nBeside it: voltage over time"


def test_brackets_around_a_text_are_hidden_with_it(make_pdf: Any) -> None:
    page = SearchText(
        Pdf(make_pdf([[(50, 100, 12, "2.1 (AC) Sources (VCCS)"), (50, 300, 12, "See AC sources, or not")]])).text(0)
    )
    ranges = hidden_ranges(page, [], [folded("AC sources VCCS"), folded("AC sources")])
    assert text_without(page.page, ranges) == "2.1\nSee , or not"


def test_nothing_of_the_hidden_characters_is_seen(pdf: Pdf) -> None:
    page = SearchText(pdf.text(0))
    ranges = hidden_ranges(page, [], [folded("Voltage over time")])
    for dpi in (72, 100, 200):
        image = pdf.image(0, dpi)
        areas = rectangles(page.page, ranges, dpi)
        assert len(areas) == 3  # two lines, and a line written in two parts
        boxes = list(character_areas(page.page, ranges, dpi))
        assert len(boxes) == 2 * len("voltageovertime")
        painted = paint(image, areas)
        assert with_ink(image, boxes) == (len(boxes), len(boxes))
        assert with_ink(painted, boxes) == (0, len(boxes))
        # Only what is named is changed.
        changed = (np.asarray(painted) != np.asarray(image)).any(axis=2)
        covered = np.zeros_like(changed)
        for left, top, right, bottom in areas:
            covered[top:bottom, left:right] = True
        assert changed.any()
        assert not (changed & ~covered).any()


def test_the_paint_is_the_ground_that_the_text_stands_on(pdf: Pdf) -> None:
    page = SearchText(pdf.text(0))
    areas = rectangles(page.page, hidden_ranges(page, [], [folded("Voltage over time")]), 72)
    painted = paint(pdf.image(0, 72), areas)
    colours = [painted.getpixel((left + 1, top + 1)) for left, top, _, _ in areas]
    assert colours == [(0, 0, 255), (255, 255, 255), (255, 255, 255)]


def test_paint_in_grey_stays_grey() -> None:
    image = Image.new("L", (10, 10), 200)
    image.putpixel((5, 5), 0)
    painted = paint(image, [(4, 4, 7, 7)])
    assert painted.mode == "L"
    assert painted.getextrema() == (200, 200)


def test_areas_stay_inside_the_page(make_pdf: Any) -> None:
    pdf = Pdf(
        make_pdf([[(-3, 8, 12, "Edge"), (390, 499, 12, "Edge"), (450, 100, 12, "Beside"), (50, 100, 12, "Inside")]])
    )
    page = SearchText(pdf.text(0))
    image = pdf.image(0, 72)
    areas = rectangles(page.page, [(0, len(page.text))], 72)
    assert len(areas) == 3
    for left, top, right, bottom in areas:
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
    assert paint(image, areas).getextrema() == (255, 255)


def test_texts_above_the_page_have_no_pixels(make_pdf: Any) -> None:
    pdf = Pdf(make_pdf([[(50, -50, 12, "Above"), (50, 100, 12, "Inside")]]))
    page = pdf.text(0)
    assert len(list(character_areas(page, [(0, len(page.text))], 72))) == len("Inside")


def test_readable_text() -> None:
    assert readable("A volt\x02\r\nage  of\r\n \r\nlow\x00tones\ufffe") == "A volt\nage of\nlow tones"
