"""Training data: files of rows to checked examples. Free of torch.

files (rtx.runtime.records, or a folder that datasets saved) -> rows -> check -> Triple or Pair -> TrainingData

Every bad row is named by file and line; nothing is trained on before all of them have been looked at.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

from rtx.runtime.contract import Task
from rtx.runtime.errors import DataError, ItemError, MissingExtraError
from rtx.runtime.evalset import Problems
from rtx.runtime.hashing import sha256_of
from rtx.runtime.records import BadRecord, Input
from rtx.runtime.text import check_text

_COLUMNS: dict[Task, tuple[str, ...]] = {
    "embed": ("query", "positive", "negative", "negatives"),
    "rerank": ("query", "document", "label", "positive", "negative", "negatives"),
}
_NUMBERED_NEGATIVE = re.compile(r"negative_\d+")


class Triple(NamedTuple):
    """What an embedder learns from: a query, a document that answers it, and documents that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


class Pair(NamedTuple):
    """What a reranker learns from: `label` in [0, 1] is whether the document answers the query."""

    query: str
    document: str
    label: float


Example = Triple | Pair
Row = Mapping[str, object]


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
    """Checked examples, all Triple or all Pair, and the files they came from."""

    def __init__(self, task: Task, examples: list[Example], sources: tuple[Source, ...]) -> None:
        self.task = task
        self.examples = examples
        self.sources = sources

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def read(cls, paths: Sequence[str | Path], *, task: Task) -> TrainingData:
        """Read and join files; a row with a positive and negatives becomes several pairs for a reranker.

        Args:
            paths: files as rtx.runtime.records reads them (jsonl, csv, tsv, each also .gz, and parquet), or folders
                that `datasets` saved to disk.
            task: which columns are expected.

        Raises:
            DataError: a file cannot be read, a column is missing or misspelt, a row cannot be used (the first ten and
                their number), or there is no row at all.
            UsageError: a file's name tells no format.
            MissingExtraError: pyarrow or datasets is needed and not installed.
        """
        builder = _Builder(task)
        for path in map(Path, paths):
            before = builder.rows
            for where, row in _read(path):
                builder.add(where, row)
            builder.sources.append(Source(path.name, builder.rows - before, sha256_of(path)))
        return builder.build()

    @classmethod
    def from_rows(cls, rows: Iterable[Row], *, task: Task, name: str = "rows") -> TrainingData:
        """Examples from mappings with the same columns, such as a list of dicts or a `datasets.Dataset`.

        Raises:
            DataError: a row cannot be used, or there is none.
        """
        builder = _Builder(task)
        for number, row in enumerate(rows, start=1):
            builder.add(f"{name}:{number}", row)
        digest = hashlib.sha256()
        for example in builder.examples:
            digest.update(json.dumps(example).encode() + b"\n")
        builder.sources.append(Source(name, builder.rows, digest.hexdigest()))
        return builder.build()


class _Builder:
    """Collects examples and problems over all files, so that one pass names every bad row."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows = 0
        self.examples: list[Example] = []
        self.sources: list[Source] = []
        self._problems = Problems("training data")
        self._seen_columns: set[frozenset[str]] = set()

    def add(self, where: str, row: object) -> None:
        self.rows += 1
        if isinstance(row, BadRecord):
            self._problems.add(str(row))
            return
        if not isinstance(row, Mapping):
            self._problems.add(f"{where}: expected a mapping of columns, got {type(row).__name__}")
            return
        self._check_columns(where, frozenset(row))
        problems: list[str] = []
        found = [_triple(row, problems)] if self.task == "embed" else _pairs(row, problems)
        if problems:
            self._problems.add(f"{where}: {'; '.join(problems)}")
        else:
            self.examples += found

    def build(self) -> TrainingData:
        self._problems.raise_any()
        if not self.examples:
            raise DataError(f"training data: no rows in {', '.join(source.name for source in self.sources)}")
        return TrainingData(self.task, self.examples, tuple(self.sources))

    def _check_columns(self, where: str, names: frozenset[str]) -> None:
        """A misspelt column would be left out of the training in silence."""
        if names in self._seen_columns:
            return
        self._seen_columns.add(names)
        for name in sorted(names - {*_COLUMNS[self.task]}):
            # So close that it is no column of another meaning, as query_id or document_id would be.
            close = difflib.get_close_matches(name.lower(), _COLUMNS[self.task], n=1, cutoff=0.88)
            if close and not _NUMBERED_NEGATIVE.fullmatch(name):
                self._problems.add(f"{where}: column '{name}' is not known; did you mean '{close[0]}'?")


def _triple(row: Row, problems: list[str]) -> Triple:
    return Triple(_text(row, "query", problems), _text(row, "positive", problems), _negatives(row, problems))


def _pairs(row: Row, problems: list[str]) -> list[Pair]:
    if "positive" in row and "document" not in row:
        query, positive, negatives = _triple(row, problems)
        return [Pair(query, positive, 1.0), *(Pair(query, negative, 0.0) for negative in negatives)]
    return [Pair(_text(row, "query", problems), _text(row, "document", problems), _label(row, problems))]


def _text(row: Row, name: str, problems: list[str]) -> str:
    if name not in row:
        problems.append(f"has no {name}; it has {', '.join(sorted(row)) or 'no field at all'}")
        return ""
    value = check_text(0, row[name])
    if isinstance(value, ItemError):
        problems.append(f"{name}: {value.message}")
        return ""
    if not value.strip():
        problems.append(f"{name}: is empty")
    return value


def _negatives(row: Row, problems: list[str]) -> tuple[str, ...]:
    """All negatives of a row, from `negative`, `negatives` and `negative_1` … together; null and "" are none."""
    numbered = sorted((name for name in row if _NUMBERED_NEGATIVE.fullmatch(name)), key=lambda name: int(name[9:]))
    found = [(name, row[name]) for name in ("negative", *numbered) if row.get(name) not in (None, "")]
    several = row.get("negatives")
    if isinstance(several, str) and several:
        # A cell of a csv file.
        try:
            several = json.loads(several)
        except json.JSONDecodeError:
            problems.append("negatives: expected a list of texts (in csv: a JSON list)")
            several = None
    if several is not None and several != "":
        if isinstance(several, str | Mapping) or not isinstance(several, Iterable):
            problems.append(f"negatives: expected a list of texts, got {type(several).__name__}")
        else:
            found += [(f"negatives[{i}]", value) for i, value in enumerate(several)]
    return tuple(_text({name: value}, name, problems) for name, value in found)


def _label(row: Row, problems: list[str]) -> float:
    value = row.get("label")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            problems.append(f"label: expected a number from 0 to 1, got {value!r}")
            return 0.0
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        problems.append(f"label: expected a number from 0 to 1, got {value!r}")
        return 0.0
    return float(value)


def _read(path: Path) -> Iterator[tuple[str, Row | BadRecord]]:
    """Rows of one file, each with its place."""
    if path.is_dir():
        yield from _read_datasets(path)
        return
    with Input(str(path)) as source:
        for record in source.all_columns():
            yield record.where, record if isinstance(record, BadRecord) else record.fields


def _read_datasets(path: Path) -> Iterator[tuple[str, Row]]:
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
        yield f"{path}:{number}", row
