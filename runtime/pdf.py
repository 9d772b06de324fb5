"""Pages of a PDF as images, rendered one by one when they are asked for.

Rendering is PDFium's (extra `pdf`). It is not safe in several threads: one lock guards every call of this process.
"""

from __future__ import annotations

import importlib
import io
import math
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.lazy import naming_the_extra

_POINTS_PER_INCH = 72
# PDFium's codes for what it could not open.
_REASONS = {
    0: "no PDF, a damaged one, or one without pages",
    3: "no PDF, a damaged one, or one without pages",
    4: "encrypted; expected its password",
    5: "encrypted in a way that cannot be read",
}
_WRONG_PASSWORD = 4

# Re-entrant: a collected object may close its document in whichever thread allocates next.
_pdfium = threading.RLock()


class PdfPages:
    """The pages of a PDF.

    `len` counts them, iteration and `[]` render them; several threads may do so, and one at a time is served. Fields of
    forms are drawn as they are filled in.

    Args:
        source: a path, or the PDF itself as bytes. A file is read as its pages are, and must stay as it is meanwhile.
        dpi: resolution. At 144 a letter has 1224 × 1584 pixels, a little more than Qwen3-VL-Embedding looks at.
        pages: (first, behind the last), from 0; None for all.
        password: of an encrypted PDF; one that is not encrypted needs none and takes any.
        max_pixels: of a page. A larger one, such as a plan, is rendered at the resolution at which it has that many.

    Raises:
        DataError: the PDF is missing, damaged, encrypted otherwise than by the password, or has no pages.
        UsageError: `dpi` or `max_pixels` is not positive, or the PDF does not have these pages.
        MissingExtraError: pypdfium2 is not installed.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        dpi: float = 144,
        pages: tuple[int, int] | None = None,
        password: str | None = None,
        max_pixels: int = 25_000_000,
    ) -> None:
        for name, value in (("dpi", dpi), ("max_pixels", max_pixels)):
            if not 0 < value < math.inf:
                raise UsageError(f"{name}: expected a number above 0, got {value}")
        self.name = "the PDF" if isinstance(source, bytes) else str(source)
        self._scale = dpi / _POINTS_PER_INCH
        self._max_pixels = max_pixels
        with naming_the_extra("pdf", "reading pages of a PDF"):
            library: Any = importlib.import_module("pypdfium2")
        self._failure: type[Exception] = library.PdfiumError
        with _pdfium:
            self._document = self._open(library, source, password)
            # A document that nobody closes is closed behind the lock, too.
            self._close = weakref.finalize(self, _closed, self._document)
            total = len(self._document)
        first, stop = pages if pages is not None else (0, total)
        if not 0 <= first < stop <= total:
            self.close()
            raise UsageError(f"{self.name}: pages: expected 0 ≤ first < behind the last ≤ {total}, got {first}, {stop}")
        self._pages = range(first, stop)

    def _open(self, library: Any, source: str | Path | bytes, password: str | None) -> Any:
        try:
            # Opened here first, as PDFium does not tell what the system says.
            with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
                beginning = file.read(1)
        except (OSError, ValueError) as wrong:
            raise DataError(f"{self.name}: cannot be read: {getattr(wrong, 'strerror', None) or wrong}") from wrong
        if not beginning:
            raise DataError(f"{self.name}: empty (0 bytes); expected a PDF")
        try:
            document = library.PdfDocument(source, password=password)
            document.init_forms()
        except self._failure as wrong:
            code: Any = getattr(wrong, "err_code", None)
            if code == _WRONG_PASSWORD and password is not None:
                raise DataError(f"{self.name}: encrypted; the password is not its own") from wrong
            raise DataError(f"{self.name}: {_REASONS.get(code, f'cannot be opened ({wrong})')}") from wrong
        return document

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Image.Image]:
        """Render page after page, in mode RGB, on white.

        Raises:
            DataError: a page is damaged; the error names it.
        """
        return (self._render(number) for number in self._pages)

    def __getitem__(self, index: int) -> Image.Image:
        """Render one page, counted from the first of the range.

        Raises:
            IndexError: there is no such page.
            DataError: it is damaged.
        """
        return self._render(self._pages[index])

    def _render(self, number: int) -> Image.Image:
        with _pdfium:
            if not self._close.alive:
                raise UsageError(f"{self.name}: is closed")
            try:
                page = self._document[number]
                try:
                    width, height = page.get_size()
                    scale = page_scale(width, height, self._scale, self._max_pixels)
                    bitmap = page.render(scale=scale)
                    try:
                        # Of three bytes a pixel, which Pillow copies.
                        image: Image.Image = bitmap.to_pil()
                    finally:
                        bitmap.close()
                finally:
                    page.close()
            except self._failure as wrong:
                raise DataError(f"{self.name}: page {number + 1} cannot be rendered: {wrong}") from wrong
        return image

    def close(self) -> None:
        """Close the document; further calls do nothing."""
        self._close()

    def __enter__(self) -> PdfPages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closed(document: Any) -> None:
    with _pdfium:
        document.close()


def page_scale(width: float, height: float, scale: float, max_pixels: int) -> float:
    """The largest factor up to `scale` at which a page has at most `max_pixels` pixels.

    Args:
        width, height: of the page, in points.
        scale: pixels a point.
        max_pixels: both sides of the image are rounded up to whole pixels before they are multiplied.
    """
    if math.ceil(width * scale) * math.ceil(height * scale) <= max_pixels:
        return scale
    # (width·s + 1)(height·s + 1) = max_pixels, solved for s: rounding up adds less than one pixel to a side.
    area, both = width * height, width + height
    return (math.sqrt(both**2 + 4 * area * (max_pixels - 1)) - both) / (2 * area)
