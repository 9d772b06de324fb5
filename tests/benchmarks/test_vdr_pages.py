from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.vdr.pages import OutlineEntry, Pdf, save_image, without_empty_channels
from rtx.runtime.errors import DataError

TEXTS = [(50, 100, 12, "Figure 1: One"), (50, 114, 12, "and two"), (300, 114, 12, "beside"), (50, 300, 20, "Far")]


def test_lines_stand_where_they_were_written(make_pdf: Any) -> None:
    page = Pdf(make_pdf([TEXTS])).text(0)
    assert (page.width, page.height) == (400, 500)
    assert [line.text for line in page.lines] == ["Figure 1: One", "and two beside", "Far"]
    first, second, third = page.lines
    assert [line.baseline for line in page.lines] == pytest.approx([100, 114, 300], abs=0.01)
    assert [line.size for line in page.lines] == pytest.approx([12, 12, 20])
    assert first.left == pytest.approx(50, abs=1.5)
    assert 100 - 12 < first.top < 100 - 7
    assert first.bottom == pytest.approx(103, abs=1)  # the g of "Figure" goes below the baseline
    assert second.right > 300
    assert page.text[third.start : third.stop] == "Far"


def test_the_boxes_of_the_characters_lie_on_their_ink(make_pdf: Any) -> None:
    pdf = Pdf(make_pdf([TEXTS]))
    page, pixels = pdf.text(0), np.asarray(pdf.image(0, 144))
    assert pixels.shape == (1000, 800)
    covered = np.zeros(pixels.shape, dtype=bool)
    visible = [box for box in page.boxes if not np.isnan(box[0])]
    assert len(visible) == sum(len(text.replace(" ", "")) for *_, text in TEXTS)
    for left, top, right, bottom in visible:
        area = np.s_[int(top * 2) - 1 : int(bottom * 2) + 2, int(left * 2) - 1 : int(right * 2) + 2]
        assert pixels[area].min() < 100
        covered[area] = True
    assert pixels[~covered].min() == 255


def test_a_turned_page_is_measured_as_it_is_shown(make_pdf: Any) -> None:
    pdf = Pdf(make_pdf([[(50, 100, 12, "Word")]], rotate=90))
    page, pixels = pdf.text(0), np.asarray(pdf.image(0, 72))
    assert (page.width, page.height) == (500, 400)
    left, top = np.nanmin(page.boxes[:, :2], axis=0)
    right, bottom = np.nanmax(page.boxes[:, 2:], axis=0)
    rows, columns = np.nonzero(pixels < 128)
    # Clockwise: what was 100 below the top edge is 100 left of the right one, and runs downwards.
    assert left == pytest.approx(400, abs=1)
    assert top == pytest.approx(50, abs=1.5)
    assert [columns.min(), columns.max()] == pytest.approx([left, right], abs=1.5)
    assert [rows.min(), rows.max()] == pytest.approx([top, bottom], abs=1.5)


def test_colour_is_kept_and_its_absence_too(make_pdf: Any, tmp_path: Path) -> None:
    pdf = Pdf(make_pdf([TEXTS, TEXTS], drawing={1: b"1 0 0 rg 20 20 50 50 re f 0 g\n"}))
    grey, colour = pdf.image(0, 72), pdf.image(1, 72)
    assert (grey.mode, colour.mode) == ("L", "RGB")
    assert colour.getpixel((30, 470)) == (255, 0, 0)
    save_image(colour, tmp_path / "page.webp")
    with Image.open(tmp_path / "page.webp") as read:
        assert np.array_equal(np.asarray(read), np.asarray(colour))
    assert list(tmp_path.glob("*.partial")) == []


def test_the_fringes_of_smoothed_text_are_no_colour() -> None:
    fringe = np.full((4, 4, 3), 200, dtype=np.uint8)
    fringe[0, 0] = 204, 200, 196
    assert without_empty_channels(Image.fromarray(fringe)).mode == "L"
    fringe[0, 0] = 212, 200, 196
    assert without_empty_channels(Image.fromarray(fringe)).mode == "RGB"


def test_outline_and_gzipped_files(make_pdf: Any, tmp_path: Path) -> None:
    path = make_pdf([TEXTS, TEXTS], outline=[("1 First  part", 0), ("2 Second part", 1)])
    zipped = tmp_path / "doc.pdf.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    for each in (path, zipped):
        assert Pdf(each).outline() == [OutlineEntry("1 First part", 0), OutlineEntry("2 Second part", 1)]


def test_a_file_that_is_no_pdf(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.pdf: expected a PDF that can be opened"):
        Pdf(tmp_path / "a.pdf")
