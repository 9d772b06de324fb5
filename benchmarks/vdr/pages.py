"""Pages of a PDF: their pixels, and their characters with the places where they stand.

Coordinates are points (1/72 inch) from the top left corner of the page as it is shown, x to the right, y downwards. At
`dpi` a point is dpi / 72 pixels.
"""

from __future__ import annotations

import ctypes
import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2  # type: ignore[import-untyped]
import pypdfium2.raw as pdfium  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image

from rtx.runtime.errors import DataError

# Lossless; what more effort saves (a tenth) is not worth twice the time.
_WEBP = {"lossless": True, "method": 2, "quality": 50}
# A page is grey if no pixel's channels differ by more: smoothing of text for a screen is not a colour.
_GREY_DIFFERENCE = 8
# Of the font size: how far a baseline may move inside a line (indices), and how near the next character has to be where
# PDFium sees a new line.
_SAME_LINE, _BESIDE = 0.6, 1.0
# The corners of a page are asked for in a grid so fine that whole numbers lose nothing.
_GRID = 1_000_000


@dataclass(frozen=True)
class Line:
    """A run of characters on one baseline.

    Attributes:
        start, stop: its characters in the page's text.
        text: them, white space collapsed.
        left, top, right, bottom, baseline: in points.
        size: median font size in points.
        widest_gap: between two neighbouring characters, in font sizes.
    """

    start: int
    stop: int
    text: str
    left: float
    top: float
    right: float
    bottom: float
    baseline: float
    size: float
    widest_gap: float


@dataclass(frozen=True, eq=False)
class PageText:
    """The text layer of a page.

    Attributes:
        text: the characters in the order of the file, with the spaces and line ends that PDFium adds.
        boxes: [characters, 4] float32, left, top, right, bottom of the ink; NaN where nothing is visible.
        baselines: [characters] float32, y of the origin; NaN where nothing is visible.
        sizes: [characters] float32, font size.
        width, height: of the page.
    """

    text: str
    boxes: NDArray[np.float32]
    baselines: NDArray[np.float32]
    sizes: NDArray[np.float32]
    width: float
    height: float

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """The lines that have a visible character, in the order of the file."""
        return tuple(_line(self, start, stop) for start, stop in _line_ranges(self))


def _line_ranges(page: PageText) -> Iterator[tuple[int, int]]:
    visible = np.flatnonzero(~np.isnan(page.baselines)).tolist()
    if not visible:
        return
    start = visible[0]
    for before, after in itertools.pairwise(visible):
        height = max(float(page.sizes[before]), float(page.sizes[after]), 1.0)
        moved = abs(float(page.baselines[after] - page.baselines[before])) > _SAME_LINE * height
        back = float(page.boxes[after, 0] - page.boxes[before, 0]) < -height
        broken = any(character in "\r\n" for character in page.text[before + 1 : after])
        gap = float(page.boxes[after, 0] - page.boxes[before, 2])
        if moved or back or (broken and not -_BESIDE / 2 * height < gap < _BESIDE * height):
            yield start, before + 1
            start = after
    yield start, visible[-1] + 1


def _line(page: PageText, start: int, stop: int) -> Line:
    boxes = page.boxes[start:stop]
    visible = boxes[~np.isnan(boxes[:, 0])]
    gaps = visible[1:, 0] - visible[:-1, 2]
    size = float(np.nanmedian(page.sizes[start:stop]))
    return Line(
        start=start,
        stop=stop,
        text=" ".join(page.text[start:stop].split()),
        left=float(np.nanmin(boxes[:, 0])),
        top=float(np.nanmin(boxes[:, 1])),
        right=float(np.nanmax(boxes[:, 2])),
        bottom=float(np.nanmax(boxes[:, 3])),
        baseline=float(np.nanmedian(page.baselines[start:stop])),
        size=size,
        widest_gap=float(gaps.max(initial=0)) / max(size, 1.0),
    )


@dataclass(frozen=True)
class OutlineEntry:
    """A bookmark: its title and the page that it points to, counted from 0."""

    title: str
    page: int


class Pdf:
    """An open PDF, gzipped or not.

    Raises:
        DataError: the file cannot be opened as a PDF.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        try:
            self._document = pypdfium2.PdfDocument(gzip.decompress(data) if path.suffix == ".gz" else data)
        except (pypdfium2.PdfiumError, OSError, EOFError) as broken:
            raise DataError(f"{path}: expected a PDF that can be opened, got: {broken}") from broken

    def __len__(self) -> int:
        return len(self._document)

    def close(self) -> None:
        self._document.close()

    def outline(self) -> list[OutlineEntry]:
        """The bookmarks that point to a page, all levels, in order."""
        entries = []
        for bookmark in self._document.get_toc():
            destination = bookmark.get_dest()
            page = destination.get_index() if destination is not None else None
            if page is not None and page >= 0:
                entries.append(OutlineEntry(" ".join(bookmark.get_title().split()), page))
        return entries

    def image(self, number: int, dpi: int) -> Image.Image:
        """The page on white; mode "L" where it has no colour, else "RGB"."""
        page = self._document[number]
        try:
            return without_empty_channels(page.render(scale=dpi / 72).to_pil().convert("RGB"))
        finally:
            page.close()

    def text(self, number: int) -> PageText:
        page = self._document[number]
        layer = page.get_textpage()
        try:
            return _read_text(page, layer)
        finally:
            layer.close()
            page.close()


def without_empty_channels(image: Image.Image) -> Image.Image:
    """In mode "L" if the three channels are the same up to the smoothing of text, else as it is."""
    pixels = np.asarray(image, dtype=np.int16)
    spread = np.abs(pixels - pixels[:, :, 1:2]).max()
    return image.convert("L") if spread <= _GREY_DIFFERENCE else image


def save_image(image: Image.Image, path: Path) -> None:
    """Write lossless WebP; the file is there whole or not at all."""
    partial = path.with_suffix(".partial")
    image.save(partial, "WEBP", **_WEBP)
    partial.replace(path)


def _read_text(page: Any, layer: Any) -> PageText:
    count = layer.count_chars()
    characters: list[str] = []
    measures = np.full((count, 5), np.nan)  # left, bottom, right, top, baseline: points from the bottom left, unrotated
    sizes = np.full(count, np.nan, dtype=np.float32)
    left, bottom, right, top, x, y = (ctypes.c_double() for _ in range(6))
    origins = np.zeros(count)
    for index in range(count):
        code = pdfium.FPDFText_GetUnicode(layer, index)
        character = chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else "\ufffd"
        characters.append(character)
        if character.isspace() or not pdfium.FPDFText_GetCharBox(layer, index, left, right, bottom, top):
            continue
        if right.value <= left.value or top.value <= bottom.value:
            continue
        pdfium.FPDFText_GetCharOrigin(layer, index, x, y)
        measures[index] = left.value, bottom.value, right.value, top.value, y.value
        origins[index] = x.value
        sizes[index] = pdfium.FPDFText_GetFontSize(layer, index)
    matrix, offset, width, height = _to_shown(page)
    first = measures[:, [0, 1]] @ matrix.T + offset
    second = measures[:, [2, 3]] @ matrix.T + offset
    baseline = np.stack([origins, measures[:, 4]], axis=1) @ matrix.T + offset
    boxes = np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)
    return PageText(
        "".join(characters),
        boxes.astype(np.float32),
        baseline[:, 1].astype(np.float32),
        sizes,
        width,
        height,
    )


def _to_shown(page: Any) -> tuple[NDArray[np.float64], NDArray[np.float64], float, float]:
    """How a point of the file becomes one of the shown page (rotated, cropped): matrix, offset, and the page's size."""
    width, height = page.get_size()

    def shown(x: float, y: float) -> NDArray[np.float64]:
        column, row = ctypes.c_int(), ctypes.c_int()
        pdfium.FPDF_PageToDevice(page, 0, 0, _GRID, _GRID, 0, x, y, column, row)
        return np.array([column.value * width / _GRID, row.value * height / _GRID])

    step = 1000.0
    offset = shown(0, 0)
    matrix = np.stack([shown(step, 0) - offset, shown(0, step) - offset], axis=1) / step
    return matrix, offset, width, height
