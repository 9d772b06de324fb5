"""Training data: files of rows to checked examples on disk. Free of torch.

files (rtx.runtime.records, or a folder that datasets saved) -> rows -> check -> Example -> TrainingData

Every bad row is named by file and line; nothing is trained on before all of them have been looked at. One pass over the
files does that, and leaves the examples where they are read from by position, so that no more than some bytes a row are
held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError, MissingExtraError
from rtx.runtime.evalset import Problems
from rtx.runtime.hashing import sha256_of
from rtx.runtime.records import BadRecord, Input
from rtx.trainer.examples import Example as Example
from rtx.trainer.examples import Needs as Needs
from rtx.trainer.examples import Row as Row
from rtx.trainer.examples import RowChecker
from rtx.trainer.store import ExampleStore, ExampleWriter, TextHashes

# Data that takes more than this is kept in a file.
_MEMORY_BYTES = 64 * 2**20
_ROWS_BETWEEN_REPORTS = 4096

Report = Callable[[int, float | None], None]
"""Is told the number of rows that are read, and how much of the file at hand that is, 0 to 1, if that is known."""


@dataclass(frozen=True)
class Source:
    """One file or folder of training data.

    Attributes:
        name: its name without the folders above it.
        rows: rows read from it.
        sha256: of its content, whatever it is called.
    """

    name: str
    rows: int
    sha256: str


class TrainingData(Sequence[Example]):
    """Checked examples by position, and the files they came from.

    A copy in another process reads the same file; that of large data is removed with the object that made it.

    Attributes:
        needs: what was demanded of each row.
        with_first_stage: whether scores of a first stage were demanded too.
        sources: in the order of the examples.
        documents: how many documents the examples have together.
    """

    def __init__(
        self,
        store: ExampleStore,
        sources: tuple[Source, ...],
        *,
        needs: Needs,
        with_first_stage: bool,
        paths: Sequence[str],
        documents: int,
    ) -> None:
        self.needs = needs
        self.with_first_stage = with_first_stage
        self.sources = sources
        self.documents = documents
        self._store = store
        self._paths = tuple(paths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._store.example(place) for place in range(*index.indices(len(self)))]
        return self._store.example(self._checked(index))

    def __len__(self) -> int:
        return len(self._store)

    def where(self, index: int) -> str:
        """Where an example came from, as "train.jsonl:17": its file and line (parquet: row)."""
        index = self._checked(index)
        for path, end in zip(self._paths, accumulate(source.rows for source in self.sources), strict=True):
            if index < end:
                return f"{path}:{self._store.line(index)}"
        raise AssertionError(index)

    def hashes(self, rows: NDArray[np.integer[Any]]) -> TextHashes:
        """Hashes of the texts of some rows, in the order of `rows`: equal texts have equal ones, in any process."""
        return self._store.hashes(rows)

    @classmethod
    def read(
        cls,
        paths: Sequence[str | Path],
        *,
        needs: Needs,
        with_first_stage: bool = False,
        contract: Contract | None = None,
        folder: str | Path | None = None,
        memory_bytes: int = _MEMORY_BYTES,
        report: Report | None = None,
    ) -> TrainingData:
        """Read and join files.

        Args:
            paths: files as rtx.runtime.records reads them (jsonl, csv, tsv, each also .gz, and parquet), or folders
                that `datasets` saved to disk.
            needs: what the loss needs of a row.
            with_first_stage: whether a reranker on top of a first stage needs its scores.
            contract: of the model that is trained: a row with what it never takes cannot be used. None for any model.
            folder: where the checked rows of large data are kept for as long as this object lives; None for the
                system's folder of temporary files.
            memory_bytes: smaller data is kept in memory.
            report: is told now and then how far it is.

        Raises:
            DataError: a file cannot be read, a column is missing or misspelt, a row cannot be used (the first ten and
                their number), or there is no row at all.
            UsageError: a file's name tells no format.
            MissingExtraError: pyarrow or datasets is needed and not installed.
            ArtifactError: there is no room for the checked rows.
        """
        builder = _Builder(
            RowChecker(needs, with_first_stage=with_first_stage, contract=contract), needs, folder, memory_bytes
        )
        with builder:
            for path in map(Path, paths):
                builder.read(path, report)
            return builder.build()

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row],
        *,
        needs: Needs,
        with_first_stage: bool = False,
        contract: Contract | None = None,
        name: str = "rows",
        folder: str | Path | None = None,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> TrainingData:
        """Examples from mappings with the same columns, such as a list of dicts or a `datasets.Dataset`.

        Args:
            rows: read once, from front to back.
            needs, with_first_stage, contract, folder, memory_bytes: as `read` has them.
            name: what messages call them.

        Raises:
            DataError: a row cannot be used, or there is none.
            ArtifactError: there is no room for the checked rows.
        """
        builder = _Builder(
            RowChecker(needs, with_first_stage=with_first_stage, contract=contract), needs, folder, memory_bytes
        )
        with builder:
            builder.take(name, rows)
            return builder.build()

    def _checked(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return place


class _Builder:
    """Collects examples and problems over all files, so that one pass names every bad row."""

    def __init__(self, checker: RowChecker, needs: Needs, folder: str | Path | None, memory_bytes: int) -> None:
        self._checker = checker
        self._needs: Needs = needs
        self._writer = ExampleWriter(folder=None if folder is None else Path(folder), memory_bytes=memory_bytes)
        self._problems = Problems("training data")
        self._sources: list[Source] = []
        self._paths: list[str] = []
        self._rows = 0
        self._documents = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._writer.discard()

    def read(self, path: Path, report: Report | None) -> None:
        before = self._rows
        for record in read_rows(path, report):
            self._add(record.where, record.line, record.row, path.parent)
        self._sources.append(Source(path.name, self._rows - before, sha256_of(path)))
        self._paths.append(str(path))

    def take(self, name: str, rows: Iterable[Row]) -> None:
        digest = hashlib.sha256()
        for number, row in enumerate(rows, start=1):
            if (example := self._add(f"{name}:{number}", number, row)) is not None:
                digest.update(json.dumps(example).encode() + b"\n")
        self._sources.append(Source(name, self._rows, digest.hexdigest()))
        self._paths.append(name)

    def build(self) -> TrainingData:
        self._problems.raise_any()
        if not self._rows:
            raise DataError(f"training data: no rows in {', '.join(source.name for source in self._sources)}")
        return TrainingData(
            self._writer.finish(),
            tuple(self._sources),
            needs=self._needs,
            with_first_stage=self._checker.with_first_stage,
            paths=self._paths,
            documents=self._documents,
        )

    def _add(self, where: str, line: int, row: Row | BadRecord, folder: Path | None = None) -> Example | None:
        self._rows += 1
        if isinstance(row, BadRecord):
            self._problems.add(str(row))
            return None
        example, _, problems = self._checker.check(row, folder)
        if problems:
            self._problems.add(f"{where}: {'; '.join(problems)}")
        elif example is not None:
            self._documents += len(example.documents)
            self._writer.add(example, line)
        return example


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row of a file as it is there, or what keeps it from being read; `line` is the row's number in parquet."""

    where: str
    line: int
    row: Row | BadRecord


def read_rows(path: Path, report: Report | None = None) -> Iterator[ReadRow]:
    """The rows of a file or of a folder that `datasets` saved, one at a time, unchecked.

    Raises:
        DataError, UsageError, MissingExtraError: the file as a whole cannot be read.
    """
    if path.is_dir():
        yield from _read_datasets(path, report)
        return
    with Input(str(path)) as source:
        for count, record in enumerate(source.all_columns(), start=1):
            if report is not None and count % _ROWS_BETWEEN_REPORTS == 0:
                report(count, source.fraction())
            row = record if isinstance(record, BadRecord) else record.fields
            yield ReadRow(record.where, int(record.id), row)


def _read_datasets(path: Path, report: Report | None) -> Iterator[ReadRow]:
    try:
        import datasets
    except ImportError as missing:
        raise MissingExtraError("datasets", "train", f"reading {path}") from missing
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as broken:
        raise DataError(f"{path}: is no folder that datasets' save_to_disk wrote") from broken
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(f"{path}: has no split 'train' ({', '.join(found)}); name the folder of a split instead")
        found = found["train"]
    for number, row in enumerate(found, start=1):
        if report is not None and number % _ROWS_BETWEEN_REPORTS == 0:
            report(number, number / len(found))
        yield ReadRow(f"{path}:{number}", number, row)
