"""An output in the making: the parts of it that are finished, in a folder beside it, so that a killed run can go on.

<output>.partial/
    run.json          what the vectors are made with; a run with other arguments cannot go on with these parts
    000000.npy        the vectors of one part of the input, [rows, width]
    000000.json       written after them: with it the part is finished; the ids of its rows, its bad records, and a
                      hash of all records that it was made of
    lock              held as long as the process lives that writes here
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import ArtifactError, UsageError
from rtx.runtime.inputs import Page, image_digest
from rtx.runtime.items import Content
from rtx.runtime.records import BadRecord, Record


@dataclass(frozen=True)
class Part:
    """What is kept of a finished part beside its vectors.

    Attributes:
        digest: hash of the records that it was made of.
        ids: of the records that have a vector, in the order of the rows.
        failures: records that have none.
    """

    digest: str
    ids: tuple[str | int, ...]
    failures: tuple[BadRecord, ...]


class PartFolder:
    """The folder `<output>.partial`, locked against other processes while it is open.

    Args:
        output: the file that is to be made.
        run: everything that the vectors depend on except the input, as JSON values by name.
        overwrite: where the output exists, make it anew; where the parts are of a run with other arguments, drop them.

    Raises:
        UsageError: the output exists, another process writes it, or the parts were made with other arguments.
        ArtifactError: the folder cannot be written.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = output.with_name(output.name + ".partial")
        # A run that was killed after the output was made and before run.json was removed ends by being repeated.
        if output.exists() and not overwrite and not (self.path / "run.json").exists():
            raise UsageError(f"{output}: exists; pass --overwrite to replace it")
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as broken:
            raise ArtifactError(f"{self.path}: cannot be created: {broken.strerror}") from broken
        self._lock = _lock(self.path / "lock", output)
        try:
            self._claim(run, overwrite)
        except BaseException:
            self._lock.close()
            raise

    def finished(self) -> int:
        """Number of finished parts."""
        count = 0
        while self._file(count, ".json").exists():
            count += 1
        return count

    def part(self, index: int) -> Part | None:
        """A part if it is finished."""
        try:
            data = json.loads(self._file(index, ".json").read_bytes())
            part = Part(data["digest"], tuple(data["ids"]), tuple(BadRecord(**bad) for bad in data["failures"]))
            rows = len(self.vectors(index))
        except (OSError, EOFError, ValueError, TypeError, KeyError):  # a power cut can keep one file and lose the other
            return None
        return part if rows == len(part.ids) else None

    def vectors(self, index: int) -> NDArray[Any]:
        """[rows, width], on disk."""
        vectors: NDArray[Any] = np.load(self._file(index, ".npy"), mmap_mode="r", allow_pickle=False)
        return vectors

    def write(self, index: int, part: Part, vectors: NDArray[Any]) -> None:
        """Finish a part."""
        with atomic_file(self._file(index, ".npy")) as stream:
            # Not by np.save, which tells of a full disk how many items it has not written.
            content = np.ascontiguousarray(vectors)
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(content))
            stream.write(content.data)
        with atomic_file(self._file(index, ".json")) as stream:
            stream.write(json.dumps(asdict(part)).encode())

    def drop(self, first: int) -> None:
        """Forget the parts from `first` on."""
        for index in reversed(range(first, self.finished())):
            self._file(index, ".json").unlink()
            self._file(index, ".npy").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder: the output is made, or nothing of it is."""
        for pattern in ("run.json", "[0-9]*.json", "[0-9]*.npy", "*.tmp"):
            for file in self.path.glob(pattern):
                file.unlink()
        self._lock.close()
        (self.path / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # somebody keeps other files there
            self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.exists() and not self.finished():
            self.remove()
        self._lock.close()

    def _file(self, index: int, suffix: str) -> Path:
        return self.path / f"{index:06d}{suffix}"

    def _claim(self, run: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder this run's, or find that it is."""
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        file = self.path / "run.json"
        try:
            known = json.loads(file.read_bytes()) if file.exists() else None
        except ValueError:
            known = {}  # whatever made the parts, it is not known to be this run
        if known is not None and known != run and not overwrite:
            differences = "; ".join(
                f"{name} {known.get(name)!r} there, {run.get(name)!r} here"
                for name in sorted({*known, *run})
                if known.get(name) != run.get(name)
            )
            raise UsageError(
                f"{self.path}: holds an unfinished run with other arguments ({differences}). Repeat those to go on "
                "with it, or pass --overwrite to discard it"
            )
        if known != run:
            self.drop(0)
            with atomic_file(file) as stream:
                stream.write(json.dumps(run, indent=2).encode())


def digest_records(records: Sequence[Record | BadRecord]) -> str:
    """A hash of what records hold, wherever they come from: of images the content, not the place."""
    digest = hashlib.sha256()
    for record in records:
        content: object = record.message if isinstance(record, BadRecord) else _identities(record.fields)
        digest.update(json.dumps([record.id, content], default=repr).encode())
    return digest.hexdigest()


def _identities(fields: Mapping[str, Any]) -> dict[str, object]:
    return {name: _identity(value) for name, value in fields.items()}


def _identity(value: object) -> object:
    if isinstance(value, Content):
        return {"text": value.item.text, "image": [image_digest(str(image)) for image in value.item.images]}
    if isinstance(value, Path):
        return {"image": [image_digest(value)]}
    return value.identity if isinstance(value, Page) else value


def _lock(file: Path, output: Path) -> sqlite3.Connection:
    """Holds until it is closed or the process dies, however it dies.

    SQLite's is the one lock in the standard library that works on every system. A file with a process id in it would
    survive its process, and then be taken for that of another process with the same number.
    """
    try:
        connection = sqlite3.connect(file, timeout=0, isolation_level=None)
        # No second file for a journal: nothing is ever written.
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as refused:
        if refused.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise UsageError(
                f"{output}: another rtx process is writing it; wait for it or name another output"
            ) from None
        raise ArtifactError(f"{file}: cannot be locked: {refused}") from refused
    return connection
