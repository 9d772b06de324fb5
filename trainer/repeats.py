"""What occurs more than once in training data, in bounded memory: by hashes, part by part from temporary files."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.trainer.store import hash_text

_PARTS = 64
# Of a part; more goes to the disk.
_MEMORY_BYTES = 2**18
_OPEN_RECORDS = 65536
# A query with one of its documents: their hashes, the number of the row, and whether the document answers the query.
_RECORD = np.dtype([("query", "<u8"), ("document", "<u8"), ("row", "<u4"), ("positive", "?")])

_Records = NDArray[Any]


class Place(NamedTuple):
    """Two rows that have something in common, which may be one, and the hash of the text that it is about.

    The later row comes first, so that the smallest places are those nearest to the beginning.
    """

    row: int
    other: int
    text: int


@dataclass
class Repeat:
    """How often something occurs, and some places nearest to the beginning."""

    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, count: int, places: Sequence[Place], *, shown: int) -> None:
        self.count += count
        self.places = sorted([*self.places, *places])[:shown]


@dataclass
class Repeats:
    """What occurs more than once.

    Attributes:
        queries: rows that have the query of an earlier row.
        pairs: positive pairs that an earlier row has, or the same one.
        documents: documents that occurred before.
        several_positives: queries with more than one positive.
        contradictions: pairs that are both positive and negative.
    """

    queries: Repeat = field(default_factory=Repeat)
    pairs: Repeat = field(default_factory=Repeat)
    documents: Repeat = field(default_factory=Repeat)
    several_positives: Repeat = field(default_factory=Repeat)
    contradictions: Repeat = field(default_factory=Repeat)


class PairSpool:
    """Takes the pairs of rows, to find repeats among them: some 40 bytes a pair in temporary files.

    Args:
        shown: how many places to give of each kind.
    """

    def __init__(self, *, shown: int) -> None:
        self._shown = shown
        # Equal queries meet in one part of the first, equal documents in one of the second.
        self._by_query, self._by_document = ([_part() for _ in range(_PARTS)] for _ in range(2))
        self._begin()

    def add(self, row: int, query: str, documents: Sequence[str], positive: Sequence[bool]) -> None:
        hashed = hash_text(query.encode())
        for document, answers in zip(documents, positive, strict=True):
            self._hashes += hashed
            self._hashes += hash_text(document.encode())
            self._rows.append(row)
            self._positive.append(answers)
        if len(self._rows) >= _OPEN_RECORDS:
            self._flush()

    def repeats(self) -> Repeats:
        """What there is; nothing can be added afterwards."""
        self._flush()
        found = Repeats()
        for records in _drained(self._by_query):
            _repeated_queries(records, found.queries, self._shown)
            _repeated_pairs(records, found, self._shown)
            _contradictions(records, found.contradictions, self._shown)
        for records in _drained(self._by_document):
            records = records[np.lexsort((records["row"], records["document"]))]
            again = _again(records, "document")
            _count(found.documents, records, again, "document", self._shown)
        return found

    def _begin(self) -> None:
        self._hashes = bytearray()
        self._rows = array("L")
        self._positive = bytearray()

    def _flush(self) -> None:
        records = np.empty(len(self._rows), dtype=_RECORD)
        hashes = np.frombuffer(self._hashes, dtype="<u8").reshape(-1, 2)
        records["query"], records["document"] = hashes[:, 0], hashes[:, 1]
        records["row"] = np.asarray(self._rows)
        records["positive"] = np.frombuffer(self._positive, dtype=np.bool_)
        for name, parts in (("query", self._by_query), ("document", self._by_document)):
            numbers = records[name] % _PARTS
            ordered = records[np.argsort(numbers, kind="stable")]
            ends = np.cumsum(np.bincount(numbers.astype(np.int64), minlength=_PARTS))
            for part, chosen in zip(parts, np.split(ordered, ends[:-1]), strict=True):
                part.write(chosen.tobytes())
        self._begin()


def _part() -> Any:
    return tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)


def _drained(parts: Sequence[Any]) -> Iterator[_Records]:
    for part in parts:
        part.seek(0)
        yield np.frombuffer(part.read(), dtype=_RECORD)
        part.close()


def _again(records: _Records, *names: str) -> NDArray[np.bool_]:
    """[records - 1]: whether a record has these fields of the one before it."""
    same = np.ones(max(len(records) - 1, 0), dtype=np.bool_)
    for name in names:
        same &= records[name][1:] == records[name][:-1]
    return same


def _distinct(records: _Records, *names: str) -> _Records:
    """The first of each run of records with equal fields."""
    return records[np.concatenate([[True], ~_again(records, *names)])] if len(records) else records


def _count(repeat: Repeat, records: _Records, again: NDArray[np.bool_], text: str, shown: int) -> None:
    """Count records that are like the one before them."""
    hits = np.flatnonzero(again)
    nearest = hits[np.argsort(records["row"][hits + 1], kind="stable")[:shown]]
    places = [Place(int(records["row"][hit + 1]), int(records["row"][hit]), int(records[text][hit])) for hit in nearest]
    repeat.add(len(hits), places, shown=shown)


def _repeated_queries(records: _Records, repeat: Repeat, shown: int) -> None:
    rows = _distinct(records[np.lexsort((records["row"], records["query"]))], "query", "row")
    _count(repeat, rows, _again(rows, "query"), "query", shown)


def _repeated_pairs(records: _Records, found: Repeats, shown: int) -> None:
    positives = records[records["positive"]]
    positives = positives[np.lexsort((positives["row"], positives["document"], positives["query"]))]
    _count(found.pairs, positives, _again(positives, "query", "document"), "query", shown)
    distinct = _distinct(positives, "query", "document")
    # In the order of rows, so that the second one is the later.
    distinct = distinct[np.lexsort((distinct["row"], distinct["query"]))]
    again = _again(distinct, "query")
    # A third positive is no further query.
    again &= ~np.concatenate([[False], again[:-1]])
    _count(found.several_positives, distinct, again, "query", shown)


def _contradictions(records: _Records, repeat: Repeat, shown: int) -> None:
    # First the earliest row of each pair with this label, then the earliest with the other.
    ordered = records[np.lexsort((records["row"], records["positive"], records["document"], records["query"]))]
    labels = _distinct(ordered, "query", "document", "positive")
    hits = np.flatnonzero(_again(labels, "query", "document"))
    both = np.stack([labels["row"][hits], labels["row"][hits + 1]])
    nearest = np.argsort(both.max(axis=0), kind="stable")[:shown]
    places = [
        Place(int(both[:, hit].max()), int(both[:, hit].min()), int(labels["document"][hits[hit]])) for hit in nearest
    ]
    repeat.add(len(hits), places, shown=shown)
