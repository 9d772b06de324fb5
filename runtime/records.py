"""Records from files, one at a time, for commands that work through more than fits into memory.

    format   one record is                          a column is
    jsonl    a line with a JSON object              a key
    csv      a row                                  named by the first line
    tsv      the same, with tabs                    named by the first line
    txt      a line, blank ones too                 the line itself, by whatever name it is asked for
    parquet  a row                                  a column

All but parquet are UTF-8 and may be gzipped (`.gz`) or come from standard input. A record that cannot be read becomes
a BadRecord at its place; only what makes the whole input unreadable is raised.
"""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

from rtx.runtime.errors import DataError, MissingExtraError, UsageError, nearest

Format = Literal["jsonl", "csv", "tsv", "txt", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
STDIN = "-"

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}
_NOTHING_ELSE: Mapping[str, str] = {}
# Columns whose values are ids where the caller names none and the record has one; BEIR's corpora have the second.
_DEFAULT_ID_COLUMNS = ("id", "_id")
# Bounds the memory that one line can take: in a file without line ends, or behind a quote that is never closed.
_MAX_LINE_BYTES = 64 * 2**20
_PARQUET_BATCH_ROWS = 256
# Of rows that hold files, such as images.
_PARQUET_BATCH_FILES = 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        id: the given one, or the number of the line (parquet: of the row) where the record starts, from 1.
        where: input and line, as error messages name it: "corpus.jsonl:17".
        fields: those of the columns asked for that the record has.
    """

    id: str | int
    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used: where it is, and one sentence with what was expected."""

    id: str | int
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Input:
    """A file or standard input, read once from front to back.

    Args:
        path: the file; "-" for standard input.
        file_format: None to tell it by the ending of the name.
        id_column: column that holds the ids, which every record then has to have; None for "id" or "_id" where a record
            has it, and the number of the line (parquet: of the row) otherwise.
        number_ids: False for "corpus.jsonl:17" instead of that number, which tells records of several inputs apart.

    Raises:
        UsageError: the format is not known, or does not fit the other arguments.
        DataError: the file does not exist or cannot be read.
        MissingExtraError: the input is parquet and pyarrow is not installed.
    """

    def __init__(
        self,
        path: str,
        *,
        file_format: Format | None = None,
        id_column: str | None = None,
        number_ids: bool = True,
    ) -> None:
        self.name = "stdin" if path == STDIN else path
        if path != STDIN and not os.path.lexists(path):  # before its name is asked for a format
            raise DataError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
        self.format = file_format or _format_of(path)
        self._id_column = id_column
        self._id_columns = _DEFAULT_ID_COLUMNS if id_column is None else (id_column,)
        self._number_ids = number_ids
        if self.format == "parquet" and path == STDIN:
            raise UsageError("standard input cannot be parquet, which is not readable from front to back")
        if self.format == "txt" and id_column is not None:
            raise UsageError(f"id column '{id_column}': a txt input has no columns; ids are its line numbers")
        try:
            self._raw: BinaryIO = sys.stdin.buffer if path == STDIN else Path(path).open("rb")  # noqa: SIM115
        except OSError as broken:
            raise DataError(f"{path}: cannot be read: {broken.strerror}") from broken
        self._parquet = _open_parquet(self._raw, self.name) if self.format == "parquet" else None
        self._size = 0 if path == STDIN else os.fstat(self._raw.fileno()).st_size
        self._folder = None if path == STDIN else Path(path).parent
        self._zipped = path.endswith(".gz")
        self._read_rows = 0

    @property
    def folder(self) -> Path | None:
        """What paths in its records are relative to; None, the working directory, for standard input."""
        return self._folder

    def fraction(self) -> float | None:
        """How much of the input is read, 0 to 1; None where its size is not known."""
        if self._parquet is not None:
            return self._read_rows / max(int(self._parquet.metadata.num_rows), 1)
        return self._raw.tell() / self._size if self._size and not self._raw.closed else None

    def records(
        self, required: Sequence[str], optional: Sequence[str] = (), *, instead: Mapping[str, str] = _NOTHING_ELSE
    ) -> Iterator[Record | BadRecord]:
        """The records in order.

        Args:
            required: columns without which a record is bad. Of a txt input the one column, under whatever name.
            optional: columns that a record may have.
            instead: for a required column the optional one that does instead, where a record has it.

        Raises:
            DataError: a column is missing in all records, or the input is damaged from some place on.
            UsageError: more than one column is required of a txt input.
        """
        if self.format == "txt" and len(required) != 1:
            raise UsageError(f"{self.name}: a txt input has one text a line, not the columns {', '.join(required)}")
        for line, where, row in self._rows(required, optional, instead):
            if isinstance(row, BadRecord):
                yield row
            else:
                yield self._record(line, where, row, _needed(required, instead, row), (*required, *optional))

    def all_columns(self) -> Iterator[Record | BadRecord]:
        """The records in order with every column they have; the id is the number of the line (parquet: of the row).

        Raises:
            DataError: the input is damaged from some place on.
            UsageError: a txt input, which has no columns.
        """
        if self.format == "txt":
            raise UsageError(f"{self.name}: a txt input has no columns")
        for line, where, row in self._rows((), None):
            yield row if isinstance(row, BadRecord) else Record(line, where, row)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        if self._raw is not getattr(sys.stdin, "buffer", None):
            self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows(
        self, required: Sequence[str], optional: Sequence[str] | None, instead: Mapping[str, str] = _NOTHING_ELSE
    ) -> Iterator[tuple[int, str, Mapping[str, Any] | BadRecord]]:
        line = 0
        try:
            for line, where, row in self._unguarded_rows(required, optional, instead):
                yield line, where, row
        except (OSError, EOFError, zlib.error) as broken:
            raise DataError(f"{self.name}: cannot be read beyond line {line}: {broken}") from broken

    def _unguarded_rows(
        self, required: Sequence[str], optional: Sequence[str] | None, instead: Mapping[str, str]
    ) -> Iterator[tuple[int, str, Mapping[str, Any] | BadRecord]]:
        """Number, place and columns of each record; all columns, or at least those asked for."""
        if self._parquet is not None:
            yield from self._parquet_rows(required, optional, instead)
            return
        stream = gzip.open(self._raw) if self._zipped else self._raw  # noqa: SIM115 - closed with the file under it
        lines = _lines(stream)
        if self.format in ("csv", "tsv"):
            yield from self._delimited_rows(lines, required, instead)
            return
        for number, content in lines:
            where = f"{self.name}:{number}"
            try:
                text = _checked(content).decode().removesuffix("\n").removesuffix("\r")
                if self.format == "txt":
                    yield number, where, {required[0]: text}
                elif text.strip():
                    yield number, where, _json_object(text)
            except (ValueError, RecursionError) as broken:
                yield number, where, BadRecord(number, where, _why(broken))

    def _delimited_rows(
        self, lines: Iterator[tuple[int, bytes]], required: Sequence[str], instead: Mapping[str, str]
    ) -> Iterator[tuple[int, str, Mapping[str, Any] | BadRecord]]:
        # The limit is the module's, for all readers of the process, and by default shorter than a long document.
        csv.field_size_limit(_MAX_LINE_BYTES)
        # Bytes that are no UTF-8 come through as surrogates, so that they spoil one row and not the whole file.
        decoded = (_checked(content).decode("utf-8", "surrogateescape") for _, content in lines)
        # strict: otherwise a quote that is never closed makes one text of all the rows that follow.
        reader = csv.reader(decoded, delimiter="," if self.format == "csv" else "\t", strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            where = f"{self.name}:{number}"
            try:
                row = next(reader, None)
                if row is not None and not all(map(_is_unicode, row)):
                    raise csv.Error("holds bytes that are not UTF-8")
            except (csv.Error, ValueError) as broken:
                message = f"is no valid row: {broken}"
                # After a line beyond the limit, nothing tells where the next row starts.
                if header is None or isinstance(broken, ValueError):
                    raise DataError(f"{where}: {message}") from broken
                yield number, where, BadRecord(number, where, message)
                continue
            if header is None:
                header = self._header(row, required, instead)
            elif row is None:
                return
            elif len(row) == len(header):
                yield number, where, dict(zip(header, row, strict=True))
            elif row:  # a blank line is none
                message = f"has {len(row)} fields; expected {len(header)} ({', '.join(header)})"
                yield number, where, BadRecord(number, where, message)

    def _header(self, row: list[str] | None, required: Sequence[str], instead: Mapping[str, str]) -> list[str]:
        if not row:
            raise DataError(f"{self.name}:1: expected a first line that names the columns, found none")
        if twice := sorted({column for column in row if row.count(column) > 1}):
            raise DataError(f"{self.name}:1: names columns more than once: {', '.join(twice)}")
        self._check_columns(row, _needed(required, instead, row))
        return row

    def _parquet_rows(
        self, required: Sequence[str], optional: Sequence[str] | None, instead: Mapping[str, str]
    ) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        assert self._parquet is not None
        schema = self._parquet.schema_arrow
        present = schema.names
        self._check_columns(present, _needed(required, instead, present))
        wanted = {*required, *(present if optional is None else optional), *self._id_columns}
        columns = [name for name in present if name in wanted]
        files = any("binary" in str(schema.field(name).type) for name in columns)
        rows = _PARQUET_BATCH_FILES if files else _PARQUET_BATCH_ROWS
        try:
            for batch in self._parquet.iter_batches(batch_size=rows, columns=columns):
                for row in batch.to_pylist():
                    self._read_rows += 1
                    yield self._read_rows, f"{self.name}:{self._read_rows}", row
        except ValueError as broken:  # pyarrow's ArrowInvalid
            raise DataError(f"{self.name}: cannot be read beyond row {self._read_rows}: {broken}") from broken

    def _check_columns(self, present: Sequence[str], required: Sequence[str]) -> None:
        needed = [*required, self._id_column] if self._id_column is not None else required
        if missing := [column for column in needed if column not in present]:
            raise DataError(
                f"{self.name}: has no column "
                + ", ".join(f"'{column}' ({nearest(column, present)})" for column in missing)
            )

    def _record(
        self, number: int, where: str, row: Mapping[str, Any], required: Sequence[str], optional: Sequence[str]
    ) -> Record | BadRecord:
        column = next((name for name in self._id_columns if row.get(name) is not None), self._id_columns[0])
        identifier = row.get(column)
        if identifier is None and self._id_column is None:
            identifier = number if self._number_ids else where
        needed = [*required, column] if self._id_column is not None else required
        if missing := [name for name in needed if name not in row]:
            had = ", ".join(list(row)[:10]) or "none"
            message = f"has no column {', '.join(map(repr, missing))} (its columns: {had})"
            return BadRecord(number, where, message)
        if not isinstance(identifier, str | int) or isinstance(identifier, bool):
            kind = type(identifier).__name__
            return BadRecord(number, where, f"column '{column}': expected a text or a whole number as id, got {kind}")
        if isinstance(identifier, str) and not _is_unicode(identifier):
            return BadRecord(number, where, f"column '{column}': holds an unpaired surrogate; expected valid Unicode")
        return Record(
            identifier, where, {name: row[name] for name in dict.fromkeys((*required, *optional)) if name in row}
        )


def _needed(required: Sequence[str], instead: Mapping[str, str], present: Collection[str]) -> list[str]:
    """The required columns in whose place there is no other."""
    return [name for name in required if instead.get(name) not in present]


def _format_of(path: str) -> Format:
    if path == STDIN:
        raise UsageError("standard input has no name to tell its format by; pass --format jsonl, csv, tsv or txt")
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    if suffix not in _SUFFIXES:
        expected = ", ".join(_SUFFIXES)
        raise UsageError(f"{path}: the ending tells no format that can be read ({expected}, .gz); pass --format")
    return _SUFFIXES[suffix]


def _open_parquet(stream: BinaryIO, name: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as missing:
        raise MissingExtraError("pyarrow", "parquet", f"reading {name}") from missing
    try:
        return pyarrow.parquet.ParquetFile(stream)
    except (ValueError, OSError) as broken:
        raise DataError(f"{name}: cannot be read as parquet: {broken}") from broken


def _lines(stream: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers and ends; of one that is too long, as much as shows that it is."""
    number = 0
    while line := stream.readline(_MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(_MAX_LINE_BYTES)
        yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _checked(line: bytes) -> bytes:
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"is longer than {_MAX_LINE_BYTES // 2**20} MiB")
    return line


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _why(broken: Exception) -> str:
    if isinstance(broken, UnicodeDecodeError):
        return f"is not valid UTF-8 at byte {broken.start}"
    if isinstance(broken, json.JSONDecodeError):
        return f"is no valid JSON: {broken.msg} at character {broken.pos + 1}"
    if isinstance(broken, RecursionError):
        return "is JSON nested too deeply"
    return str(broken)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
