"""Training data: files of rows to checked examples. Free of torch.

read (jsonl, csv, tsv, parquet, datasets' folders) -> rows -> check -> Triple or Pair -> TrainingData

Every bad row is named by file and line; nothing is trained on before all of them have been looked at.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO, overload

from rtx.runtime.contract import Task
from rtx.runtime.errors import DataError, ItemError, MissingExtraError, nearest
from rtx.runtime.text import check_text

_SHOWN_PROBLEMS = 10
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


class Place(NamedTuple):
    """Where a row stands: "pairs.jsonl:12". `row` counts from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


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
    """Checked examples, all Triple or all Pair, with where each came from."""

    def __init__(self, task: Task, examples: list[Example], places: list[Place], sources: tuple[Source, ...]) -> None:
        self.task = task
        self.examples = examples
        self.places = places
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
            paths: .jsonl, .csv, .tsv (each also .gz), .parquet, or folders that `datasets` saved to disk.
            task: which columns are expected.

        Raises:
            DataError: a file cannot be read, a column is missing or misspelt, a row cannot be used (the first ten and
                their number), or there is no row at all.
            MissingExtraError: pyarrow or datasets is needed and not installed.
        """
        builder = _Builder(task)
        for path in map(Path, paths):
            before = builder.rows
            for row, place in _read(path, builder.problem):
                builder.add(row, place)
            builder.sources.append(Source(path.name, builder.rows - before, sha256_of(path)))
        return builder.build()

    @classmethod
    def from_rows(cls, rows: Iterable[Row], *, task: Task, name: str = "rows") -> TrainingData:
        """Examples from mappings with the same columns, such as a list of dicts or a `datasets.Dataset`.

        Raises:
            DataError: a row cannot be used, or there is none.
        """
        builder = _Builder(task)
        digest = hashlib.sha256()
        for number, row in enumerate(rows, start=1):
            builder.add(row, Place(name, number))
            digest.update(json.dumps(dict(row), sort_keys=True, default=str).encode() + b"\n")
        builder.sources.append(Source(name, builder.rows, digest.hexdigest()))
        return builder.build()


class _Builder:
    """Collects examples and problems over all files, so that one pass names every bad row."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows = 0
        self.examples: list[Example] = []
        self.places: list[Place] = []
        self.sources: list[Source] = []
        self.problems: list[str] = []
        self._seen_columns: set[tuple[str, frozenset[str]]] = set()

    def problem(self, place: Place, message: str) -> None:
        self.problems.append(f"{place}: {message}")

    def add(self, row: object, place: Place) -> None:
        self.rows += 1
        if not isinstance(row, Mapping):
            self.problem(place, f"expected an object with named fields, got {type(row).__name__}")
            return
        names = {name for name in row if isinstance(name, str)}
        self._check_columns(names, place)
        problems: list[str] = []
        named = {name: row[name] for name in names}
        found = [_triple(named, problems)] if self.task == "embed" else _pairs(named, problems)
        if problems:
            self.problem(place, "; ".join(problems))
            return
        self.examples += found
        self.places += [place] * len(found)

    def build(self) -> TrainingData:
        if self.problems:
            shown = "\n".join(f"  {problem}" for problem in self.problems[:_SHOWN_PROBLEMS])
            hidden = len(self.problems) - _SHOWN_PROBLEMS
            more = f"\n  … and {hidden} more" if hidden > 0 else ""
            raise DataError(f"training data: {len(self.problems)} problems in {self.rows} rows:\n{shown}{more}")
        if not self.examples:
            raise DataError(f"training data: no rows in {', '.join(source.name for source in self.sources)}")
        return TrainingData(self.task, self.examples, self.places, tuple(self.sources))

    def _check_columns(self, names: set[str], place: Place) -> None:
        """A misspelt column would be left out of the training in silence."""
        key = (place.file, frozenset(names))
        if key in self._seen_columns:
            return
        self._seen_columns.add(key)
        known = _COLUMNS[self.task]
        for name in sorted(names - set(known)):
            hint = nearest(name, known)
            if hint.startswith("did you mean") and not _NUMBERED_NEGATIVE.fullmatch(name):
                self.problem(place, f"column '{name}' is not known ({hint}, negative_1 …)")


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


Problem = Callable[[Place, str], None]


def _read(path: Path, problem: Problem) -> Iterator[tuple[object, Place]]:
    """Rows of one file with their places; a line that is no row at all is reported and left out."""
    if not path.exists():
        raise DataError(f"{path}: does not exist; expected training data")
    if path.is_dir():
        yield from _read_datasets(path)
        return
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        yield from _read_parquet(path)
    elif kind in (".jsonl", ".csv", ".tsv"):
        # What is not UTF-8 turns into surrogates, which the check of each text then reports with its line.
        reader = gzip.open if path.suffix == ".gz" else open
        try:
            with reader(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
                if kind == ".jsonl":
                    yield from _read_jsonl(path, lines, problem)
                else:
                    yield from _read_csv(path, lines, "," if kind == ".csv" else "\t", problem)
        except (OSError, EOFError, zlib.error) as broken:
            raise DataError(f"{path}: cannot be read: {broken}") from broken
    else:
        raise DataError(
            f"{path}: is of no known format; expected .jsonl, .csv or .tsv (also .gz), .parquet, "
            "or a folder that datasets saved"
        )


def _read_jsonl(path: Path, lines: TextIO, problem: Problem) -> Iterator[tuple[object, Place]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = Place(str(path), number)
        try:
            yield json.loads(line), place
        except (json.JSONDecodeError, RecursionError) as broken:
            problem(place, f"is not valid JSON: {broken}")


def _read_csv(path: Path, lines: TextIO, delimiter: str, problem: Problem) -> Iterator[tuple[object, Place]]:
    # The module's limit of 128 KiB a cell is a setting of the whole process.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        width = len(reader.fieldnames or ())
        for row in reader:
            place = Place(str(path), reader.line_num)
            cells = width + len(row.get(None, ())) - sum(value is None for value in row.values())
            if cells != width:
                problem(place, f"expected {width} cells, got {cells}")
            else:
                yield row, place
    except csv.Error as broken:
        problem(Place(str(path), reader.line_num), f"cannot be split into cells: {broken}")
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[tuple[object, Place]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise MissingExtraError("pyarrow", "parquet", "Reading parquet") from missing
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, Place(str(path), number)
    except (pyarrow.ArrowException, OSError) as broken:
        raise DataError(f"{path}: cannot be read as parquet: {broken}") from broken


def _read_datasets(path: Path) -> Iterator[tuple[object, Place]]:
    try:
        import datasets
    except ImportError as missing:
        raise MissingExtraError("datasets", "train", "Reading a folder that datasets saved") from missing
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as broken:
        raise DataError(f"{path}: is no folder that datasets' save_to_disk wrote") from broken
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(f"{path}: has no split 'train' ({', '.join(found)}); name the folder of a split instead")
        found = found["train"]
    for number, row in enumerate(found, start=1):
        yield row, Place(str(path), number)


def sha256_of(path: str | Path) -> str:
    """Hash of a file's content, or of all files in a folder with their names in it."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()} {sha256_of(file_path)}\n".encode())
    return digest.hexdigest()
