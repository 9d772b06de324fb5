"""Painting over a text wherever a page shows it, by the boxes of its characters.

What is hidden from a page of the masked corpus:
- the words of every query of the corpus, wherever they stand, be it its page or another one;
- every caption and every heading that was found, whether or not it became a query. A blank line is therefore no sign of
  a page that is asked for.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.vdr.pages import PageText
from benchmarks.vdr.queries import Query, SearchText

# Smoothing spreads a character's ink over the edge of its box.
_PAD_PIXELS = 1
Rectangle = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom excluded."""


def hidden_ranges(page: SearchText, found: Iterable[Query], texts: Iterable[str]) -> list[tuple[int, int]]:
    """The characters of a page that are hidden, as ranges that do not touch.

    Args:
        page: the page.
        found: what was found on this page, with its place.
        texts: the words that are hidden wherever they stand, folded.
    """
    ranges = [(query.start, query.stop) for query in found if query.stop > query.start]
    for text in texts:
        ranges += [_with_brackets(page.text, *place) for place in page.find(text)]
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _with_brackets(text: str, start: int, stop: int) -> tuple[int, int]:
    """With the brackets, quotes and the like around it, which would tell how long it was."""
    while start > 0 and _is_bracket(text[start - 1]):
        start -= 1
    while stop < len(text) and _is_bracket(text[stop]):
        stop += 1
    return start, stop


def _is_bracket(character: str) -> bool:
    return character in "\"'?!" or unicodedata.category(character) in ("Ps", "Pe", "Pi", "Pf")


def rectangles(page: PageText, ranges: Sequence[tuple[int, int]], dpi: int) -> list[Rectangle]:
    """What to paint: of every range, one rectangle a line around the ink of its characters."""
    scale = dpi / 72
    width, height = math.ceil(page.width * scale), math.ceil(page.height * scale)
    found = []
    for start, stop in ranges:
        for line in page.lines:
            boxes = page.boxes[max(start, line.start) : min(stop, line.stop)]
            boxes = boxes[~np.isnan(boxes[:, 0])] if len(boxes) else boxes
            if not len(boxes):
                continue
            left, top = np.floor(boxes[:, :2].min(axis=0) * scale).astype(int) - _PAD_PIXELS
            right, bottom = np.ceil(boxes[:, 2:].max(axis=0) * scale).astype(int) + _PAD_PIXELS
            area = max(int(left), 0), max(int(top), 0), min(int(right), width), min(int(bottom), height)
            if area[0] < area[2] and area[1] < area[3]:  # some texts stand beside the page
                found.append(area)
    return found


def paint(image: Image.Image, areas: Iterable[Rectangle]) -> Image.Image:
    """A copy of the image with each area in the colour that is most frequent in it and around it."""
    pixels = np.array(image)
    for left, top, right, bottom in areas:
        around = pixels[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2]
        pixels[top:bottom, left:right] = _most_frequent(around.reshape(-1, *pixels.shape[2:]))
    return Image.fromarray(pixels, image.mode)


def _most_frequent(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    values, counts = np.unique(colours, axis=0, return_counts=True)
    return np.asarray(values[counts.argmax()])


def text_without(page: PageText, ranges: Sequence[tuple[int, int]]) -> str:
    """The page's text without the characters of `ranges`."""
    return readable(" ".join(parts_without(page, ranges)))


def parts_without(page: PageText, ranges: Sequence[tuple[int, int]]) -> list[str]:
    """The pieces of the page's text between the characters of `ranges`."""
    starts, stops = [0, *(stop for _, stop in ranges)], [*(start for start, _ in ranges), len(page.text)]
    return [page.text[start:stop] for start, stop in zip(starts, stops, strict=True)]


def readable(text: str) -> str:
    """The text of a page line by line, without what PDFium puts for hyphens and unknown characters."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").translate({0x02: "", 0xFFFE: "", 0xAD: "", 0x00: " "})
    return "\n".join(line for line in (" ".join(line.split()) for line in lines.split("\n")) if line)


def character_areas(page: PageText, ranges: Iterable[tuple[int, int]], dpi: int) -> Iterator[Rectangle]:
    """The pixels that lie inside the boxes of the characters of `ranges`, a rectangle a character."""
    scale = dpi / 72
    for start, stop in ranges:
        for box in page.boxes[start:stop]:
            if not np.isnan(box[0]):
                left, top = np.floor(box[:2] * scale).astype(int).tolist()
                right, bottom = np.ceil(box[2:] * scale).astype(int).tolist()
                if right > 0 and bottom > 0:
                    yield max(left, 0), max(top, 0), right, bottom


def with_ink(image: Image.Image, areas: Iterable[Rectangle], *, contrast: int = 48) -> tuple[int, int]:
    """In how many areas something can be seen, and how many there are."""
    pixels = np.asarray(image, dtype=np.int16)
    seen = total = 0
    for left, top, right, bottom in areas:
        area = pixels[top:bottom, left:right]
        if area.size:
            total += 1
            seen += int((area.max(axis=(0, 1)) - area.min(axis=(0, 1))).max() > contrast)
    return seen, total
