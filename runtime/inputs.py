"""What `rtx embed` reads: records with texts and images, images, PDFs, and folders of these, as one stream of records.

    INPUT             its items                                    their ids
    a.jsonl, a.csv    a text, an image or both a record            as for `rtx.runtime.records`
    page.png          one                                          page.png
    manual.pdf        its pages, each rendered when it is needed   manual.pdf#1, manual.pdf#2, ...
    scans/            the images and PDFs in it, however deep      paths within it: 2024/page.png, 2024/manual.pdf#1

Of several inputs the ids of files begin with the input as it was given, and records without an id have "a.jsonl:17".
However many files and pages there are, no list of them is held.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.fields import URL, is_blank, read_content
from rtx.runtime.hashing import sha256_of
from rtx.runtime.lazy import naming_the_extra
from rtx.runtime.pdf import PdfPages
from rtx.runtime.records import STDIN, BadRecord, Format, Input, Record

ITEM = "item"
"""The one field of each record: a text, a `Content`, the path of an image, or a `Page`."""

_PDF = ".pdf"
_IMAGES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm"}
_IMAGES |= {".pnm", ".jp2", ".j2k", ".avif", ".qoi"}
# Pages come in order, but those of two documents may be prepared at once, and their number is asked ahead.
_OPEN_PDFS = 2
# An open document keeps what it has read of its file, so it is opened anew after so many pages.
_PAGES_AT_ONCE = 128


class Page(Image.Image):
    """A page of a PDF that is rendered when it is decoded, and whose pixels belong to who asked for them.

    Pillow's own images keep what they have decoded as long as they live, here until all items of a call are done. This
    one gives it away: `convert("RGB")`, which whoever reads an image of another mode has to call, is the only way to
    the pixels.

    Args:
        pdf: its document.
        index: of the page, from 0.
    """

    format = "PDF"

    def __init__(self, pdf: _Pdf, index: int) -> None:
        super().__init__()
        # Not known before the page is rendered, whose pixels are limited there.
        self._mode, self._size = "RGBX", (1, 1)
        self._pdf = pdf
        self._index = index
        self._rendered: Image.Image | None = None

    @property
    def identity(self) -> list[str | int]:
        """What two pages of the same content and number have in common."""
        return [self._pdf.sha256, self._index]

    def load(self) -> None:
        """Render the page.

        Raises:
            DataError: it is damaged, or the file is gone.
        """
        if self._rendered is None:
            self._rendered = self._pdf.pages(self._index)[self._index]

    def convert(self, mode: str | None = None, *arguments: Any, **options: Any) -> Image.Image:
        """The rendered page."""
        self.load()
        assert self._rendered is not None
        rendered, self._rendered = self._rendered, None
        return rendered if mode == "RGB" else rendered.convert(mode, *arguments, **options)


@dataclass(frozen=True)
class _Pdf:
    path: Path
    opened: Callable[[Path, int], PdfPages]

    def pages(self, index: int) -> PdfPages:
        """All of them, of which the one of this index is going to be rendered."""
        return self.opened(self.path, index // _PAGES_AT_ONCE)

    @cached_property
    def sha256(self) -> str:
        return image_digest(self.path)


class Inputs:
    """Files and folders, read once from front to back.

    Args:
        paths: as they were given; "-" is standard input.
        file_format, id_column: of inputs with records, as for `rtx.runtime.records.Input`.
        dpi: at which pages of PDFs are rendered.

    Attributes:
        image: the first file that is an image or a PDF; None if there is none.
        others: by folder, how many files in it are neither.

    Raises:
        UsageError: a format is not known, an input is named twice or is a URL, or as for `Input`.
        DataError: an input does not exist or cannot be read, or a folder has no image.
        MissingExtraError: what reads a PDF, or parquet, is not installed.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        file_format: Format | None = None,
        id_column: str | None = None,
        dpi: float = 144,
    ) -> None:
        if paths.count(STDIN) > 1:
            raise UsageError("standard input can be read once; - is there more than once")
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise UsageError(f"{twice}: is given more than once")
        if url := next((path for path in paths if URL.match(path)), None):
            raise UsageError(f"{url}: is not fetched here; expected a file, a folder or -")
        self.image: Path | None = None
        self.others: dict[str, int] = {}
        self._paths = tuple(paths)
        self._opened = lru_cache(maxsize=_OPEN_PDFS)(lambda path, _part: PdfPages(path, dpi=dpi))
        self._total = self._done = 0
        self._within: Callable[[], float | None] = lambda: 0.0
        self._has_pdf = False
        with ExitStack() as stack:
            self._records = {
                path: stack.enter_context(
                    Input(path, file_format=file_format, id_column=id_column, number_ids=len(paths) == 1)
                )
                for path in paths
                if not self._count(path)
            }
            if self._has_pdf:
                with naming_the_extra("pdf", "reading pages of a PDF"):
                    importlib.import_module("pypdfium2")
            self._stack = stack.pop_all()

    def records(
        self, *, text_column: str, image_column: str, takes_images: bool = True
    ) -> Iterator[Record | BadRecord]:
        """The items in order, each under `ITEM`.

        Args:
            text_column, image_column: of inputs with records; "" for none.
            takes_images: whether the model does. Where it does not, records are read for their text, and their image is
                left aside.

        Raises:
            UsageError: the model takes no images, and a file is one or an input begins with a record that has nothing
                else; or neither column is named.
            DataError: as for `Input.records`.
        """
        if not takes_images and self.image is not None:
            raise UsageError(f"{self.image}: is an image; this model takes texts only")
        if not text_column and not (image_column and takes_images):
            raise UsageError("text column: expected a name, or at least that of an image column")
        for path in self._paths:
            source = self._records.get(path)
            if source is None:
                yield from self._of_files(path)
                continue
            self._within = source.fraction
            if takes_images and image_column and source.format != "txt":
                yield from _with_images(source, text_column, image_column)
            else:
                yield from _texts(source, text_column, image_column)
            self._finish_one()

    def fraction(self) -> float | None:
        """How much is read, 0 to 1; None where that is not known."""
        within = self._within()
        if within is None:
            return None if self._total == 1 else self._done / self._total
        return min((self._done + within) / max(self._total, 1), 1.0)

    def close(self) -> None:
        self._opened.cache_clear()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, given: str) -> bool:
        """Add to the totals; whether this input is made of images."""
        path = Path(given)
        if given == STDIN or not (path.is_dir() or _is_page_file(path)):
            self._total += 1
            return False
        before, others = self._total, 0
        for file in _files(path):
            if not _is_page_file(file):
                others += 1
                continue
            self._total += 1
            self.image = self.image or file
            self._has_pdf = self._has_pdf or file.suffix.lower() == _PDF
        if self._total == before:
            raise DataError(f"{given}: holds no image and no PDF; other files are given one by one")
        if others:
            self.others[given] = others
        return True

    def _of_files(self, given: str) -> Iterator[Record | BadRecord]:
        root = Path(given)
        base = root if root.is_dir() else root.parent
        for file in _files(root):
            if not _is_page_file(file):
                continue
            named = file.relative_to(base) if len(self._paths) == 1 else file
            name = os.fsencode(named.as_posix()).decode(errors="replace")
            if name != named.as_posix():
                yield BadRecord(name, str(file), "its name is not valid UTF-8, which an id has to be")
            elif file.suffix.lower() == _PDF:
                yield from self._of_pdf(file, name)
            else:
                yield Record(name, str(file), {ITEM: file})
            self._finish_one()

    def _of_pdf(self, file: Path, name: str) -> Iterator[Record | BadRecord]:
        pdf = _Pdf(file, self._opened)
        try:
            pages = len(pdf.pages(0))
        except DataError as wrong:
            yield BadRecord(name, str(file), str(wrong).removeprefix(f"{file}: "))
            return
        for index in range(pages):
            self._within = lambda index=index: index / pages  # type: ignore[misc]
            yield Record(f"{name}#{index + 1}", f"{file}#{index + 1}", {ITEM: Page(pdf, index)})

    def _finish_one(self) -> None:
        self._done += 1
        self._within = lambda: 0.0


def image_digest(source: str | Path) -> str:
    """SHA-256 of an image's bytes, wherever they are: equal for a file, its copy, and a data URL of it.

    Args:
        source: a path or a data URL. Of what is neither, or cannot be read, it is the hash of the name.
    """
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return _sha256(base64.b64decode(source.partition(",")[2]))
        except ValueError:
            return _sha256(source.encode(errors="surrogatepass"))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _sha256(source.encode())
    try:
        if Path(source).is_file():  # what is no file may be a pipe, which would never end
            return sha256_of(source)
    except (OSError, ValueError):
        pass
    return _sha256(os.fspath(source).encode(errors="surrogatepass"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_page_file(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES or path.suffix.lower() == _PDF


def _files(root: Path) -> Iterator[Path]:
    """The file itself; or all in a folder, sorted by their paths part by part. Hidden ones, and folders behind links,
    are left out.

    Raises:
        DataError: the file or folder cannot be read.
    """
    try:
        if not root.is_dir():
            root.stat()
            yield root
            return
        with os.scandir(root) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as broken:
        raise DataError(f"{root}: cannot be read: {broken.strerror}") from broken
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(root / entry.name)
        elif _is_file(entry):
            yield root / entry.name


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself: it is named where it is read, if it is called like an image
        return _is_page_file(Path(entry.name))


def _with_images(source: Input, text_column: str, image_column: str) -> Iterator[Record | BadRecord]:
    required = [text_column] if text_column else [image_column]
    optional = [image_column] if text_column else []
    for record in source.records(required, optional, instead={text_column: image_column}):
        yield record if isinstance(record, BadRecord) else _item(record, text_column, image_column, source.folder)


def _item(record: Record, text_column: str, image_column: str, folder: Path | None) -> Record | BadRecord:
    text, image = record.fields.get(text_column), record.fields.get(image_column)
    if is_blank(image) or (isinstance(image, list) and not image):
        if isinstance(text, Mapping):  # as rows have it; its paths are relative to the file, as those of all others
            return _content(record, text_column, text, folder)
        if text_column in record.fields and (text is not None or image_column not in record.fields):
            return Record(record.id, record.where, {ITEM: text})
        return BadRecord(record.id, record.where, f"{image_column}: is empty, and there is no text")
    # Beside an image nothing is asked of a text.
    beside = None if text is None or (isinstance(text, str) and not text.strip()) else text
    return _content(record, image_column, {"text": beside, "image": image}, folder)


def _content(record: Record, column: str, value: Mapping[str, object], folder: Path | None) -> Record | BadRecord:
    problems: list[str] = []
    content = read_content({column: value}, column, problems, folder)
    if problems:
        return BadRecord(record.id, record.where, "; ".join(p.removeprefix(f"{column}: ") for p in problems))
    return Record(record.id, record.where, {ITEM: content})


def _texts(source: Input, text_column: str, image_column: str) -> Iterator[Record | BadRecord]:
    # Of parquet, images would be read to be thrown away; a jsonl record is read as a whole anyway.
    look = source.format == "jsonl" and bool(image_column)
    optional, instead = ([image_column], {text_column: image_column}) if look else ([], {})
    for number, record in enumerate(source.records([text_column], optional, instead=instead)):
        if isinstance(record, BadRecord) or text_column in record.fields:
            yield record if isinstance(record, BadRecord) else _renamed(record, text_column)
            continue
        message = "has an image and no text; this model takes texts only"
        if number == 0:
            raise UsageError(f"{record.where}: {message}")
        yield BadRecord(record.id, record.where, message)


def _renamed(record: Record, text_column: str) -> Record:
    return Record(record.id, record.where, {ITEM: record.fields[text_column]})
