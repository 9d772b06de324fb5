"""What takes long, document by document: reading, rendering, masking.

What a document's images were made from stands beside them, so that nothing is made twice and nothing stale stays.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.vdr.dataset import Content, page_id
from benchmarks.vdr.documents import Document
from benchmarks.vdr.masking import Rectangle, paint, with_ink
from benchmarks.vdr.pages import OutlineEntry, PageText, Pdf, save_image
from rtx.runtime.atomic import atomic_file

Job = TypeVar("Job")
Result = TypeVar("Result")

_REPORT_S = 30
_MADE_FROM, _TEXT, _AREAS = "made_from.json", "text.npz", "areas.json"
_COLUMNS = ("boxes", "baselines", "sizes")


class Ink(NamedTuple):
    """Boxes of hidden characters: how many, and in how many there was something to see before and after."""

    boxes: int
    before: int
    after: int


@dataclass(frozen=True)
class ReadJob:
    document: Document
    out: Path
    dpi: int


@dataclass(frozen=True)
class MaskJob:
    """By page number, what is painted over and the boxes of its characters, in pixels."""

    document: str
    out: Path
    areas: Mapping[int, Sequence[Rectangle]]
    boxes: Mapping[int, Sequence[Rectangle]]


def run_jobs(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, what: str) -> list[Result]:
    """The results in the order of the jobs.

    Args:
        function: of one job, at the top level of a module.
        jobs: what to do.
        workers: processes; with 1 everything happens in this one.
        what: is made, for the reports of progress.
    """
    start = time.perf_counter()
    if workers == 1 or len(jobs) < 2:
        results = list(_reported(map(function, jobs), len(jobs), what))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            results = list(_reported(pool.map(function, jobs), len(jobs), what))
    click.echo(f"{what}: done ({time.perf_counter() - start:.0f} s)", err=True)
    return results


def _reported(results: Iterable[Result], total: int, what: str) -> Iterator[Result]:
    last = time.perf_counter()
    for done, result in enumerate(results, start=1):
        if time.perf_counter() - last > _REPORT_S:
            last = time.perf_counter()
            click.echo(f"{what}: {done} of {total} documents", err=True)
        yield result


def read_document(job: ReadJob) -> Content:
    """Text, outline and images of a document; what is on disk of the same PDF is taken from there."""
    folder = job.out / "pages" / job.document.name
    made_from = {"sha256": job.document.sha256, "dpi": job.dpi, "pypdfium2": version("pypdfium2")}
    if _read_json(folder / _MADE_FROM) != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(job.out / "masked" / job.document.name, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _MADE_FROM).write_text(json.dumps(made_from))
    text = folder / _TEXT
    content = _load(text, job.document) if text.is_file() else None
    if content is not None:  # written last
        return content
    pdf = Pdf(job.document.path)
    try:
        for number in range(len(pdf)):
            path = _image(job.out, "pages", job.document.name, number)
            if not path.is_file():
                save_image(pdf.image(number, job.dpi), path)
        content = Content(job.document, tuple(map(pdf.text, range(len(pdf)))), tuple(pdf.outline()))
    finally:
        pdf.close()
    _save(content, text)
    return content


def mask_document(job: MaskJob) -> Ink:
    """The masked images of a document, and what can be seen of the hidden characters in the files."""
    folder = job.out / "masked" / job.document
    known = _read_json(folder / _AREAS) or {}
    wanted = {f"{number + 1:04d}": [list(area) for area in areas] for number, areas in job.areas.items()}
    for path in folder.glob("*.webp"):
        if known.get(path.stem) != wanted.get(path.stem):
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _AREAS).write_text(json.dumps(wanted))
    before = after = boxes = 0
    for number, areas in job.areas.items():
        path = _image(job.out, "masked", job.document, number)
        with Image.open(_image(job.out, "pages", job.document, number)) as opened:
            original = opened.convert("RGB")
        if not path.is_file():
            save_image(paint(original, areas), path)
        with Image.open(path) as opened:
            masked = opened.convert("RGB")
        seen, total = with_ink(original, job.boxes[number])
        before, boxes = before + seen, boxes + total
        after += with_ink(masked, job.boxes[number])[0]
    return Ink(boxes, before, after)


def _image(out: Path, folder: str, document: str, number: int) -> Path:
    return out / folder / f"{page_id(document, number)}.webp"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _save(content: Content, path: Path) -> None:
    pages = content.pages
    arrays: dict[str, NDArray[Any]] = {
        "lengths": np.array([len(page.text) for page in pages]),
        "shapes": np.array([(page.width, page.height) for page in pages]),
        "text": np.array([ord(character) for page in pages for character in page.text], dtype=np.uint32),
        "titles": np.frombuffer(json.dumps([[e.title, e.page] for e in content.outline]).encode(), dtype=np.uint8),
    }
    for column in _COLUMNS:
        arrays[column] = np.concatenate([getattr(page, column) for page in pages])
    with atomic_file(path) as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def _load(path: Path, document: Document) -> Content:
    with np.load(path) as arrays:
        stops = arrays["lengths"].cumsum()
        text = "".join(map(chr, arrays["text"].tolist()))
        boxes, baselines, sizes = (np.split(arrays[column], stops[:-1]) for column in _COLUMNS)
        pages = tuple(
            PageText(text[stop - length : stop], box, baseline, size, width, height)
            for stop, length, box, baseline, size, (width, height) in zip(
                stops, arrays["lengths"], boxes, baselines, sizes, arrays["shapes"].tolist(), strict=True
            )
        )
        titles = json.loads(arrays["titles"].tobytes())
    return Content(document, pages, tuple(OutlineEntry(title, page) for title, page in titles))
