"""Build a data set for retrieving pages of documents by what they show: figures, tables and sections.

    python benchmarks/vdr/build.py --out build/vdr              # 9,800 pages: 25 minutes on two cores, 1.2 GB
    python benchmarks/vdr/build.py --out build/pages --small    # 640 of them: a minute or two

Pages are images; a query is the caption of a figure or of a table, or the title of a section. In the masked pages these
texts are painted over, so that a page has to be found by what it shows. Split by document:

    train.jsonl                       {"query", "positive": {"image"}, "kind", "document"}: masked pages
    train_unmasked.jsonl              the same with the pages as they are
    eval/{test,dev}-{masked,unmasked} corpus.jsonl, queries.jsonl, qrels/test.tsv (the BEIR layout, images as documents)
    page_text.jsonl                   {"_id", "text"}: the text layer of every page of a corpus
    page_text_masked.jsonl            … without what is painted over
    pages/, masked/                   lossless WebP; a page of which nothing is hidden is not in masked/
    manifest.json                     versions, hashes, counts, what was left out and why, results of the checks

The same packages, settings and versions give the same files. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.vdr import ocr
from benchmarks.vdr.dataset import Content, Selection, counts, page_id, reasons, select, still_visible
from benchmarks.vdr.documents import (
    DEV,
    PACKAGES,
    SPLITS,
    TEST,
    TRAIN,
    Document,
    fetch,
)
from benchmarks.vdr.documents import select as select_packages
from benchmarks.vdr.masking import character_areas, readable, rectangles, text_without
from benchmarks.vdr.queries import KINDS, folded
from benchmarks.vdr.work import Ink, MaskJob, ReadJob, mask_document, read_document, run_jobs
from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import DataError, RtxError
from rtx.runtime.hashing import sha256_of

MANIFEST = "manifest.json"
_NICENESS = 10
_PACKAGES_NEEDED = ("pypdfium2", "pillow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to build.

    Attributes:
        dpi: of the images.
        workers: processes, 1 or 2.
        ocr_sample: pages whose images are read by OCR, before and after masking; 0 for none.
        min_queries: fewer in training or in the test set are an error.
    """

    dpi: int = 100
    workers: int = 2
    ocr_sample: int = 0
    min_queries: int = 50


def build(documents: Sequence[Document], out: Path, settings: Settings) -> dict[str, Any]:
    """Write the data set of these documents into `out`, and return the manifest.

    Raises:
        DataError: there are too few queries, or a text that is to be hidden is still visible.
    """
    if len({document.name for document in documents}) < len(documents):
        raise DataError(f"two documents have the same name: {sorted(document.name for document in documents)}")
    jobs = [ReadJob(document, out, settings.dpi) for document in documents]
    contents = run_jobs(read_document, jobs, settings.workers, "pages")
    failed: dict[str, str] = {}
    selections = _select_all(contents, failed)
    ink = _mask(selections, out, settings)
    checks: dict[str, Any] = {"ocr": "not run"}
    if settings.ocr_sample:
        checks["ocr"], failed = ocr.check(selections, out, settings.ocr_sample)
        if failed:
            selections = _select_all(contents, failed)
            ink = _mask(selections, out, settings)
    visible = [line for split in SPLITS for line in _still_visible(selections, split)]
    checks |= {
        "character_boxes": ink.boxes,
        "character_boxes_with_ink_before": ink.before,
        "character_boxes_with_ink_after": ink.after,
        "queries_in_masked_text": len(visible),
    }
    if visible or ink.after:
        raise DataError(f"still visible after masking: {ink.after} characters; in the text layer: {visible[:10]}")
    _write(selections, out)
    manifest = _manifest(selections, out, settings, checks)
    with atomic_file(out / MANIFEST) as stream:
        stream.write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    sizes = manifest["totals"]
    for split in (TRAIN, TEST):
        if sizes[split]["queries"] < settings.min_queries:
            raise DataError(f"{split}: {sizes[split]['queries']} queries, expected at least {settings.min_queries}")
    return manifest


def _select_all(contents: Sequence[Content], failed: Mapping[str, str]) -> list[Selection]:
    """Evaluation sets first: what they ask for is not asked for in training."""
    by_split: dict[str, list[Selection]] = {}
    held_out: set[str] = set()
    for split in (TEST, DEV, TRAIN):
        of_split = [content for content in contents if content.document.split == split]
        by_split[split] = select(of_split, one_scope=split != TRAIN, held_out=held_out, failed=failed)
        held_out |= {folded(query.text) for selection in by_split[split] for query in selection.queries}
    return [selection for split in SPLITS for selection in by_split[split]]


def _still_visible(selections: Sequence[Selection], split: str) -> list[str]:
    of_split = [selection for selection in selections if selection.document.split == split]
    if split == TRAIN:
        return [line for selection in of_split for line in still_visible([selection])]
    return still_visible(of_split)


def _mask(selections: Sequence[Selection], out: Path, settings: Settings) -> Ink:
    jobs = []
    for selection in selections:
        areas, boxes = {}, {}
        for number, ranges in selection.hidden.items():
            page = selection.pages[number].page
            areas[number] = rectangles(page, ranges, settings.dpi)
            boxes[number] = list(character_areas(page, ranges, settings.dpi))
        jobs.append(MaskJob(selection.document.name, out, areas, boxes))
    inks = run_jobs(mask_document, jobs, settings.workers, "masked pages")
    return Ink(*(sum(column) for column in zip(*inks, strict=True)))


def image_path(selection: Selection, number: int, *, masked: bool) -> str:
    """Of a page's image, relative to the data set's folder."""
    folder = "masked" if masked and number in selection.hidden else "pages"
    return f"{folder}/{page_id(selection.document.name, number)}.webp"


def _write(selections: Sequence[Selection], out: Path) -> None:
    for name, masked in (("train.jsonl", True), ("train_unmasked.jsonl", False)):
        rows = (
            {
                "query": query.text,
                "positive": {"image": image_path(selection, query.page, masked=masked)},
                "kind": query.kind,
                "document": selection.document.name,
            }
            for selection in selections
            if selection.document.split == TRAIN
            for query in selection.queries
        )
        write_jsonl(out / name, rows)
    for split in (TEST, DEV):
        of_split = [selection for selection in selections if selection.document.split == split]
        for masked in (True, False):
            _write_evalset(of_split, out / "eval" / f"{split}-{'masked' if masked else 'unmasked'}", masked=masked)
    pages = [(selection, number, page) for selection in selections for number, page in selection.corpus.items()]
    plain = ({"_id": s.page_id(number), "text": readable(page.text)} for s, number, page in pages)
    write_jsonl(out / "page_text.jsonl", plain)
    without = (
        {"_id": s.page_id(number), "text": text_without(page.page, s.hidden.get(number, []))}
        for s, number, page in pages
    )
    write_jsonl(out / "page_text_masked.jsonl", without)


def _write_evalset(selections: Sequence[Selection], folder: Path, *, masked: bool) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = (
        {
            "_id": selection.page_id(number),
            "image": f"../../{image_path(selection, number, masked=masked)}",
            "text": "",
        }
        for selection in selections
        for number in selection.corpus
    )
    write_jsonl(folder / "corpus.jsonl", corpus)
    queries = [
        (f"{selection.document.name}/q{place:04d}", query, selection.page_id(query.page))
        for selection in selections
        for place, query in enumerate(selection.queries)
    ]
    rows = ({"_id": key, "text": query.text, "kind": query.kind} for key, query, _ in queries)
    write_jsonl(folder / "queries.jsonl", rows)
    lines = ["query-id\tcorpus-id\tscore", *(f"{key}\t{page}\t1" for key, _, page in queries)]
    with atomic_file(folder / "qrels" / "test.tsv") as stream:
        stream.write(("\n".join(lines) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with atomic_file(path) as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _manifest(
    selections: Sequence[Selection], out: Path, settings: Settings, checks: Mapping[str, Any]
) -> dict[str, Any]:
    texts = [*out.glob("*.jsonl"), *out.glob("eval/*/*.jsonl"), *out.glob("eval/*/qrels/*.tsv")]
    return {
        "dpi": settings.dpi,
        "versions": {name: version(name) for name in _PACKAGES_NEEDED},
        "totals": {split: _total([s for s in selections if s.document.split == split], out) for split in SPLITS},
        "checks": dict(checks),
        "documents": {
            selection.document.name: {
                "package": selection.document.package,
                "version": selection.document.version,
                "split": selection.document.split,
                "sha256": selection.document.sha256,
                "pages": len(selection.pages),
                "corpus": len(selection.corpus),
                "left_out": _by_reason(selection.left_out),
                "masked": len(selection.hidden),
                "queries": counts(selection.queries),
                "dropped": reasons(selection.found),
            }
            for selection in selections
        },
        "files": {path.relative_to(out).as_posix(): sha256_of(path) for path in sorted(texts)},
    }


def _by_reason(left_out: Mapping[int, str]) -> dict[str, list[int]]:
    return {why: [n + 1 for n, reason in left_out.items() if reason == why] for why in sorted(set(left_out.values()))}


def _total(selections: Sequence[Selection], out: Path) -> dict[str, Any]:
    queries = [query for selection in selections for query in selection.queries]
    images = {
        out / image_path(selection, number, masked=masked)
        for selection in selections
        for number in selection.corpus
        for masked in (False, True)
    }
    return {
        "documents": len(selections),
        "pages": sum(len(selection.pages) for selection in selections),
        "corpus": sum(len(selection.corpus) for selection in selections),
        "masked": sum(len(selection.hidden) for selection in selections),
        "targets": len({(s.document.name, query.page) for s in selections for query in s.queries}),
        "queries": len(queries),
        "by_kind": counts(queries),
        "dropped": reasons(query for selection in selections for query in selection.found),
        "image_bytes": sum(path.stat().st_size for path in images),
    }


def report(manifest: Mapping[str, Any]) -> Iterable[str]:
    """The table of documents and splits, in lines for a terminal."""
    head = "".join(f"{name:>9}" for name in ("pages", "corpus", "masked", *KINDS))
    yield f"{'':46}{head}"

    def line(name: str, row: Mapping[str, Any], kinds: Mapping[str, int]) -> str:
        cells = [row["pages"], row["corpus"], row["masked"], *(kinds.get(kind, 0) for kind in KINDS)]
        return f"{name:46}" + "".join(f"{cell:>9}" for cell in cells)

    for split in SPLITS:
        for name, row in manifest["documents"].items():
            if row["split"] == split:
                yield line(f"{split:6}{name}", row, row["queries"])
        total = manifest["totals"][split]
        yield line(f"{split:6}all {total['documents']} documents", total, total["by_kind"])
    yield "left out:"
    for split in SPLITS:
        for reason, count in manifest["totals"][split]["dropped"].items():
            yield f"{split:6}{count:>6}  {reason}"
    yield f"checks: {json.dumps(manifest['checks'])}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/vdr"), show_default=True)
@click.option("--documents", default="", help="Packages to build from, separated by commas; by default all.")
@click.option("--dpi", type=click.IntRange(50, 300), default=Settings.dpi, show_default=True)
@click.option("--workers", type=click.IntRange(1, 2), default=Settings.workers, show_default=True, help="Processes.")
@click.option("--small", is_flag=True, help="The small set.")
@click.option("--ocr-sample", default=0, show_default=True, help=f"Pages to check by OCR; needs {ocr.PYTHON}.")
def main(out: Path, documents: str, dpi: int, workers: int, small: bool, ocr_sample: int) -> None:
    """Build the data set, at low priority."""
    start = time.perf_counter()
    os.nice(max(0, _NICENESS - os.nice(0)))
    names = [name for name in documents.split(",") if name]
    settings = Settings(dpi=dpi, workers=workers, ocr_sample=ocr_sample, min_queries=0 if names else 50)
    try:
        if ocr_sample:
            ocr.check_environment()
        found, missing = fetch(select_packages(PACKAGES, names, small=small), out)
        for problem in missing:
            click.echo(f"left out: {problem}", err=True)
        click.echo(f"{len(found)} documents ({time.perf_counter() - start:.0f} s)")
        manifest = build(found, out, settings)
    except RtxError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    for line in report(manifest):
        click.echo(line)
    click.echo(f"{out}: written ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
