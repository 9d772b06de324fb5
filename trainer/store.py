"""Examples in an Arrow file that is mapped into memory, so that data of any size trains in a few bytes a row.

Small data stays in memory, in the same record batches. Beside its texts a row has their hashes, by which rows are kept
apart in a batch without a text being read.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import weakref
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import ArtifactError, MissingExtraError
from rtx.runtime.items import Content
from rtx.trainer.examples import Example

# Of one record batch: what is held while rows are written.
_BATCH_ROWS = 8192
_BATCH_BYTES = 16 * 2**20
# A read maps what lies around it too, some 500 KiB. After so many, all is given back, or the whole file would come to
# count as memory of the process; the system still has it.
_READS_BEFORE_RELEASE = 128


class TextHashes(NamedTuple):
    """64-bit hashes of the texts of some rows: of each the query's, then those of its documents.

    Attributes:
        starts: [rows + 1] int64, where the hashes of each row start.
        values: [texts] uint64.
    """

    starts: NDArray[np.int64]
    values: NDArray[np.uint64]


class ExampleStore:
    """Examples by position, with the number of the line each came from.

    Args:
        batches: record batches that ExampleWriter made.
        path: the file that they are in; None for batches in memory. A copy in another process maps it again.
        mapped: the file's bytes.
    """

    def __init__(self, batches: list[Any], path: Path | None = None, mapped: mmap.mmap | None = None) -> None:
        self._batches = batches
        self._columns = [tuple(batch.columns) for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)], dtype=np.int64)
        self.path = path
        self._mapped = mapped
        self._reads = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def example(self, index: int) -> Example:
        """
        Args:
            index: 0 to len - 1.
        """
        (queries, documents, *numbers, _, _), place = self._find(index)
        found = Example(
            Content.stored(queries[place].as_py()),
            tuple(Content.stored(text) for text in documents[place].as_py()),
            *(tuple(column[place].as_py()) for column in numbers),
        )
        self._count_reads(1)
        return found

    def line(self, index: int) -> int:
        columns, place = self._find(index)
        return int(columns[-2][place].as_py())

    def hashes(self, rows: NDArray[np.integer[Any]]) -> TextHashes:
        """Hashes of the texts of some rows, in the order of `rows`."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        present, firsts = np.unique(numbers[order], return_index=True)
        found = []
        lengths = np.empty(len(rows), dtype=np.int64)
        for number, chosen in zip(present.tolist(), np.split(order, firsts[1:]), strict=True):
            column = self._columns[number][-1]
            offsets = column.offsets.to_numpy()
            places = rows[chosen] - self._starts[number]
            lows = offsets[places].astype(np.int64)
            lengths[chosen] = offsets[places + 1] - lows
            found.append((chosen, lows, column.values.to_numpy()))
            self._count_reads(len(chosen))
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        values = np.empty(starts[-1], dtype=np.uint64)
        for chosen, lows, hashes in found:
            values[_ranges(starts[chosen], lengths[chosen])] = hashes[_ranges(lows, lengths[chosen])]
            self._count_reads(len(chosen))
        return TextHashes(starts, values)

    def _find(self, index: int) -> tuple[tuple[Any, ...], int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._columns[number], index - int(self._starts[number])

    def _count_reads(self, reads: int) -> None:
        self._reads += reads
        if self._reads >= _READS_BEFORE_RELEASE and self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._reads = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (ExampleStore, (self._batches,)) if self.path is None else (_map, (self.path,))


class ExampleWriter:
    """Takes examples one by one and makes an ExampleStore of them.

    Args:
        folder: for the temporary file; None for the system's own.
        memory_bytes: more than that goes to the file.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, *, folder: Path | None, memory_bytes: int) -> None:
        try:
            import pyarrow
        except ImportError as missing:
            raise MissingExtraError("pyarrow", "train", "reading training data") from missing
        self._arrow = pyarrow
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._path: Path | None = None
        self._file: Any = None
        self._batches: list[Any] = []
        self._bytes = 0
        self._begin()

    def add(self, example: Example, line: int) -> None:
        """
        Raises:
            ArtifactError: the temporary file cannot be written.
        """
        self._queries.append(Content.storable(example.query))
        self._documents += [Content.storable(document) for document in example.documents]
        self._labels.extend(example.labels)
        self._first_stage.extend(example.first_stage)
        self._first_stage_ends.append(len(self._first_stage))
        self._ends.append(len(self._documents))
        self._lines.append(line)
        for text in (example.query, *example.documents):
            encoded = text.encode()
            self._open_bytes += len(encoded)
            self._hashes += hash_text(encoded)
        if len(self._queries) >= _BATCH_ROWS or self._open_bytes >= _BATCH_BYTES:
            self._flush()

    def finish(self) -> ExampleStore:
        """
        Raises:
            ArtifactError: the temporary file cannot be written.
        """
        self._flush()
        if self._path is None:
            return ExampleStore(self._batches)
        self._guarded(self._file.close)
        store = _map(self._path)
        # A process forked from this one has the object too, but not the right to end it.
        weakref.finalize(store, _remove, self._path, os.getpid())
        return store

    def discard(self) -> None:
        """Remove the temporary file of rows that nobody will read."""
        if self._path is not None:
            self._file.close()
            _remove(self._path, os.getpid())

    def _begin(self) -> None:
        self._queries: list[str] = []
        self._documents: list[str] = []
        self._labels = array("d")
        self._first_stage = array("d")
        self._ends, self._first_stage_ends = array("i", [0]), array("i", [0])
        self._lines = array("Q")
        self._hashes = bytearray()
        self._open_bytes = 0

    def _flush(self) -> None:
        if not self._queries:
            return
        arrow = self._arrow
        ends = np.frombuffer(self._ends, dtype=np.int32)
        rows = np.arange(len(ends), dtype=np.int32)
        columns = {
            "query": arrow.array(self._queries, arrow.string()),
            "documents": arrow.ListArray.from_arrays(arrow.array(ends), arrow.array(self._documents, arrow.string())),
            "labels": arrow.ListArray.from_arrays(arrow.array(ends), arrow.array(np.frombuffer(self._labels))),
            "first_stage": arrow.ListArray.from_arrays(
                arrow.array(np.frombuffer(self._first_stage_ends, dtype=np.int32)),
                arrow.array(np.frombuffer(self._first_stage)),
            ),
            "line": arrow.array(np.frombuffer(self._lines, dtype=np.uint64)),
            # One more a row than documents: the query's.
            "hashes": arrow.ListArray.from_arrays(
                arrow.array(ends + rows), arrow.array(np.frombuffer(self._hashes, dtype="<u8").astype(np.uint64))
            ),
        }
        batch = arrow.record_batch(columns)
        self._begin()
        self._bytes += batch.nbytes
        self._batches.append(batch)
        if self._bytes > self._memory_bytes:
            self._guarded(self._spill)

    def _spill(self) -> None:
        if self._file is None:
            handle, name = tempfile.mkstemp(prefix="rtx-data-", suffix=".arrow", dir=self._folder)
            os.close(handle)
            self._path = Path(name)
            self._file = self._arrow.ipc.new_file(name, self._batches[0].schema)
        for batch in self._batches:
            self._file.write_batch(batch)
        self._batches = []

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except OSError as broken:
            place = self._path or self._folder or tempfile.gettempdir()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            raise ArtifactError(f"{place}: the checked training data cannot be written: {broken}") from broken


def hash_text(text: bytes) -> bytes:
    """64 bits of a text in UTF-8, little-endian; equal in every process."""
    return hashlib.blake2b(text, digest_size=8).digest()


def _map(path: Path) -> ExampleStore:
    import pyarrow

    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Rows are read in no order: what follows one is not the next.
        mapped.madvise(mmap.MADV_RANDOM)
    reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped))
    return ExampleStore([reader.get_batch(number) for number in range(reader.num_record_batches)], path, mapped)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        path.unlink(missing_ok=True)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of all ranges [start, start + length), one range after the other."""
    ends = np.cumsum(lengths)
    within: NDArray[np.int64] = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return within + np.repeat(starts, lengths)
