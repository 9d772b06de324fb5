"""Many records through an embedder: a part of them at a time, each finished on disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import DataError, InvalidItemsError, ItemError
from rtx.runtime.failures import failure_log
from rtx.runtime.items import check_text, count_images
from rtx.runtime.parts import Part, PartFolder, digest_records
from rtx.runtime.records import BadRecord, Record
from rtx.runtime.vectors import Rows, write_npy, write_parquet

OnInvalid = Literal["fail", "skip"]
Embed = Callable[[Sequence[Any]], tuple[NDArray[Any], list[int], list[ItemError]]]
"""Items to the vectors of those that have one, the positions of these, and what is wrong with the others."""

# Texts that go to the embedder in one call: enough to sort by length, few enough to show progress.
_TEXTS_PER_CALL = 1024
# A part ends early once its texts are this long: whatever the number of its rows, it has to fit into memory.
_MAX_PART_CHARS = 32 * 2**20
IMAGES_PER_CALL = 128
"""Images that go to a model in one call. It decodes the next 32 while it works on the last; only those that a call
begins with are waited for. Also of a part: a page may take a second, and what a killed run loses is one part."""

_T = TypeVar("_T")


@dataclass
class Totals:
    """What has become of the records so far.

    Attributes:
        parts: finished ones.
        rows: vectors in them.
        kept: records in parts that an earlier run had finished.
        failed: records that have no vector.
        first: the first few of those.
    """

    parts: int = 0
    rows: int = 0
    kept: int = 0
    failed: int = 0
    first: tuple[BadRecord, ...] = ()

    @property
    def records(self) -> int:
        return self.rows + self.failed

    def add(self, part: Part, *, kept: bool) -> None:
        self.parts += 1
        self.rows += len(part.ids)
        self.failed += len(part.failures)
        self.first = (*self.first, *part.failures)[:5]
        if kept:
            self.kept += len(part.ids) + len(part.failures)


def embed_records(
    embed: Embed,
    records: Iterable[Record | BadRecord],
    folder: PartFolder,
    *,
    column: str,
    rows_per_part: int,
    check: Callable[[int, object], object] = check_text,
    on_invalid: OnInvalid = "skip",
    replace: bool = False,
    on_progress: Callable[[int, bool], object] = lambda _records, _computed: None,
) -> Totals:
    """Embed what is not yet in finished parts.

    Args:
        embed: items to vectors, [n, width], and to what is wrong with items that have none.
        records: all of the input, also what an earlier run has embedded: it is compared with what that run has read.
        folder: takes the parts; afterwards it holds exactly those of this input.
        column: the field that holds the item.
        rows_per_part: records of a part, at most; a part with many images, or very long texts, has fewer.
        check: says what is wrong with an item before anything is computed, as an ItemError; all else is right.
        on_invalid: whether a bad record stops the run ("fail"), before anything of its part is computed, or is listed.
        replace: compute a part anew where the input has changed, instead of refusing.
        on_progress: called with a number of records, and whether they were just computed or found in finished parts.

    Raises:
        DataError: a record is bad and `on_invalid` is "fail"; or the input has changed since parts of it were finished.
    """
    totals = Totals()
    for index, chunk in enumerate(_cut(records, rows_per_part, column)):
        digest = digest_records(chunk)
        part = folder.part(index)
        if part is not None and part.digest != digest:
            _refuse_or_drop(folder, index, replace, f"it differs from {chunk[0].where} on")
            part = None
        kept = part is not None
        if part is None:
            ids, vectors, failures = _compute(embed, check, chunk, column, on_invalid, on_progress)
            part = Part(digest, ids, failures)
            folder.write(index, part, vectors)
        else:
            on_progress(len(chunk), False)
        totals.add(part, kept=kept)
    if folder.finished() > totals.parts:
        _refuse_or_drop(folder, totals.parts, replace, f"it ends after {totals.records:,} records")
    return totals


def write_output(
    path: Path, folder: PartFolder, totals: Totals, *, width: int, dtype: np.dtype[Any], metadata: Mapping[str, Any]
) -> None:
    """Put the parts together: errors and ids first, so that where `path` is, all that belongs to it is.

    Args:
        path: ends in .npy or .parquet.
        folder: the finished parts.
        totals: of `embed_records`.
        width, dtype: of the vectors.
        metadata: what a parquet file tells of them.
    """
    with failure_log(path, workspace=folder.path) as log:
        for part in _parts(folder, totals):
            for failure in part.failures:
                log(failure)
    rows = (Rows(part.ids, folder.vectors(index)) for index, part in enumerate(_parts(folder, totals)))
    if path.suffix == ".parquet":
        write_parquet(path, rows, width=width, dtype=dtype, metadata=metadata, workspace=folder.path)
    else:
        write_npy(path, rows, shape=(totals.rows, width), dtype=dtype, workspace=folder.path)


def without_invalid(
    run: Callable[[list[_T]], NDArray[Any]], items: Sequence[_T]
) -> tuple[NDArray[Any], list[int], list[ItemError]]:
    """Run what can be run.

    Args:
        run: items to results; raises InvalidItemsError.
        items: its items.

    Returns:
        The results; the position in `items` of each; and the errors of all other items.
    """
    rows, errors = list(range(len(items))), list[ItemError]()
    while True:
        try:
            return run([items[row] for row in rows]), rows, errors
        except InvalidItemsError as invalid:
            found = {rows[error.index]: error.message for error in invalid.items}
            assert found, "an InvalidItemsError without items"
            errors += [ItemError(row, message) for row, message in found.items()]
            rows = [row for row in rows if row not in found]


def calls(items: Sequence[_T], most: int, images: Callable[[_T], int] = count_images) -> Iterator[Sequence[_T]]:
    """Items a call at a time: at most so many, with at most `IMAGES_PER_CALL` images unless one item has more."""
    start = held = 0
    for place, item in enumerate(items):
        more = images(item)
        if place - start >= most or (held and held + more > IMAGES_PER_CALL):
            yield items[start:place]
            start, held = place, 0
        held += more
    if start < len(items):
        yield items[start:]


def _cut(records: Iterable[Record | BadRecord], rows_per_part: int, column: str) -> Iterator[list[Record | BadRecord]]:
    """Parts of the input: the same for the same records, whatever was finished before."""
    chunk: list[Record | BadRecord] = []
    chars = images = 0
    for record in records:
        chunk.append(record)
        item = record.fields[column] if isinstance(record, Record) else None
        chars += len(item) if isinstance(item, str) else 0
        images += count_images(item)
        if len(chunk) >= rows_per_part or chars >= _MAX_PART_CHARS or images >= IMAGES_PER_CALL:
            yield chunk
            chunk, chars, images = [], 0, 0
    if chunk:
        yield chunk


def _compute(
    embed: Embed,
    check: Callable[[int, object], object],
    chunk: Sequence[Record | BadRecord],
    column: str,
    on_invalid: OnInvalid,
    on_progress: Callable[[int, bool], object],
) -> tuple[tuple[str | int, ...], NDArray[Any], tuple[BadRecord, ...]]:
    """Ids, vectors and failures of one part."""
    good: list[tuple[int, Record]] = []
    failures: dict[int, BadRecord] = {}
    for place, record in enumerate(chunk):
        if isinstance(record, BadRecord):
            failures[place] = record
        elif isinstance(wrong := check(place, record.fields[column]), ItemError):
            failures[place] = _failed(record, wrong.message)
        else:
            good.append((place, record))
    _stop_at(failures, on_invalid)
    on_progress(len(failures), True)
    ids: list[str | int] = []
    blocks: list[NDArray[Any]] = []
    for some in calls(good, _TEXTS_PER_CALL, lambda placed: count_images(placed[1].fields[column])):
        vectors, rows, errors = embed([record.fields[column] for _, record in some])
        for error in errors:
            place, record = some[error.index]
            failures[place] = _failed(record, error.message)
        _stop_at(failures, on_invalid)
        ids += [some[row][1].id for row in rows]
        blocks.append(vectors)
        on_progress(len(some), True)
    vectors = np.concatenate(blocks) if blocks else embed([])[0]
    return tuple(ids), vectors, tuple(failures[place] for place in sorted(failures))


def _failed(record: Record, message: str) -> BadRecord:
    # An image that is a record by itself is named by where it is.
    return BadRecord(record.id, record.where, message.removeprefix(f"image: '{record.where}': "))


def _stop_at(failures: Mapping[int, BadRecord], on_invalid: OnInvalid) -> None:
    if failures and on_invalid == "fail":
        raise DataError(str(failures[min(failures)]))


def _refuse_or_drop(folder: PartFolder, first: int, replace: bool, difference: str) -> None:
    if not replace:
        raise DataError(
            f"the input is not the one that the unfinished run in {folder.path} has read: {difference}. Go on with the "
            "former input, or pass --overwrite to keep only the parts that still fit"
        )
    folder.drop(first)


def _parts(folder: PartFolder, totals: Totals) -> Iterator[Part]:
    for index in range(totals.parts):
        part = folder.part(index)
        assert part is not None, f"part {index} was finished and is gone"
        yield part
