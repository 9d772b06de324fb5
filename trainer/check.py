"""What is in training data and what is wrong with it: a look before a run. Free of torch.

files -> rows -> counts, lengths, labels, leaks; hashes of pairs -> repeats -> some rows once more, for their texts

Both passes stream. What is held grows with the evaluation set and with the number of different lengths, not with rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rtx.runtime.contract import Contract
from rtx.runtime.evalset import EvalSet
from rtx.runtime.items import Content
from rtx.runtime.records import BadRecord
from rtx.trainer.data import Report, read_rows
from rtx.trainer.examples import FORMS, CheckedRow, Example, Form, Needs, RowChecker
from rtx.trainer.findings import SHOWN, Finding, quoted
from rtx.trainer.leaks import Leaks
from rtx.trainer.repeats import PairSpool, Place, Repeats
from rtx.trainer.store import hash_text

Role = Literal["positive", "negative", "document"]


class Length(NamedTuple):
    """How long something of a row is: `of` is "query", "positive", …, and `unit` what is counted."""

    of: str
    unit: str
    value: int


Measure = Callable[[Example, Sequence[Role]], Iterable[Length]]
"""Gives the lengths of an example, whose documents have these roles."""

# Labels and scores are counted so finely, and one by one where there are so few different ones.
_LABEL_DIGITS = 2
_FEW_VALUES = 10
_IMAGE_PATH = re.compile(r"[^\s\0]{1,250}\.(png|jpe?g|webp|gif|tiff?|bmp|avif|jp2|pdf)", re.IGNORECASE)


@dataclass
class FileCount:
    """What a file holds.

    Attributes:
        name: its path as given.
        rows: all of them.
        bad_rows: those that cannot be trained on.
        documents: of the others.
        forms: how many rows have which form, by the column that tells it.
    """

    name: str
    rows: int = 0
    bad_rows: int = 0
    documents: int = 0
    forms: dict[Form, int] = field(default_factory=lambda: dict.fromkeys(FORMS, 0))


@dataclass(frozen=True)
class Distribution:
    """Of lengths or of labels. Median and p95 are values that occur, those of the nearest rank.

    Attributes:
        of: what was measured, as "query" or "labels".
        unit: what was counted, as "tokens"; "" for labels.
        count: how many values there are.
        over: how many are above the model's limit; None without one.
        values: how often each value occurs, where there are few different ones.
    """

    of: str
    unit: str
    count: int
    min: float
    median: float
    p95: float
    max: float
    over: int | None = None
    values: dict[float, int] | None = None


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found."""

    files: tuple[FileCount, ...]
    lengths: tuple[Distribution, ...]
    labels: tuple[Distribution, ...]
    findings: tuple[Finding, ...]
    max_tokens: int | None

    @property
    def bad_rows(self) -> int:
        return sum(file.bad_rows for file in self.files)

    @property
    def leaks(self) -> int:
        """Evaluation queries, and documents that answer them, that the data has."""
        return sum(finding.count for finding in self.findings if finding.kind.startswith("leaked"))

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bad_rows": self.bad_rows, "leaks": self.leaks}


def check_data(
    paths: Sequence[str | Path],
    *,
    needs: Needs | None = None,
    with_first_stage: bool = False,
    contract: Contract | None = None,
    evalset: EvalSet | None = None,
    measure: Measure | None = None,
    max_tokens: int | None = None,
    report: Report | None = None,
) -> DataReport:
    """Look through training data.

    Args:
        paths: as TrainingData.read has them.
        needs: what the loss needs of a row; None takes rows of any form.
        with_first_stage: whether a row needs scores of a first stage.
        contract: as TrainingData.read has it.
        evalset: look for its queries and documents in the data.
        measure: how long texts are; None for words and characters.
        max_tokens: the limit of the model that `measure` counts for.
        report: is told now and then how far it is.

    Raises:
        DataError, UsageError, MissingExtraError: a file as a whole cannot be read.
    """
    checker = RowChecker(needs, with_first_stage=with_first_stage, contract=contract)
    check = _Check(checker, evalset, measure or _words_and_characters)
    for path in map(Path, paths):
        check.read(path, report)
    findings = [finding for finding in (check.bad, check.paths) if finding.count]
    findings += _repeats(check.pairs.repeats(), check.rows_at)
    if check.leaks is not None:
        findings += check.leaks.findings()
    return DataReport(
        tuple(check.files),
        tuple(_distribution(*key, values, limit=max_tokens) for key, values in check.lengths.items()),
        tuple(_distribution(of, "", values) for of, values in check.labels.items()),
        tuple(findings),
        max_tokens,
    )


class _Check:
    """Collects what a pass over the rows shows."""

    def __init__(self, checker: RowChecker, evalset: EvalSet | None, measure: Measure) -> None:
        self.files: list[FileCount] = []
        self.lengths: dict[tuple[str, str], Counter[float]] = {}
        self.labels: dict[str, Counter[float]] = {}
        self.bad = Finding("bad_rows", "rows that cannot be used")
        self.paths = Finding("image_paths", 'texts that look like the path of an image, which is {"image": PATH}')
        self.pairs = PairSpool(shown=SHOWN)
        self.leaks = None if evalset is None else Leaks(evalset)
        self._checker = checker
        self._measure = measure
        self._rows = 0

    def read(self, path: Path, report: Report | None) -> None:
        file = FileCount(str(path))
        self.files.append(file)
        for record in read_rows(path, report):
            file.rows += 1
            if isinstance(record.row, BadRecord):
                file.bad_rows += 1
                self.bad.add(str(record.row))
            else:
                scored = record.row.get("scores") not in (None, "")
                self._add(file, record.where, self._checker.check(record.row, path.parent), scored)
            self._rows += 1

    def rows_at(self, wanted: set[int]) -> dict[int, tuple[str, Example]]:
        """Place and example of some good rows, which are read once more."""
        found: dict[int, tuple[str, Example]] = {}
        paths = (Path(file.name) for file in self.files)
        numbered = enumerate((path.parent, record) for path in paths for record in read_rows(path))
        while len(found) < len(wanted):
            number, (folder, record) = next(numbered)
            if number in wanted:
                example = self._checker.check(record.row, folder).example
                assert example is not None
                found[number] = record.where, example
        return found

    def _add(self, file: FileCount, where: str, checked: CheckedRow, scored: bool) -> None:
        example, form = checked.example, checked.form
        if example is None or form is None:
            file.bad_rows += 1
            # A problem of the columns is told with the first row that has it.
            self.bad.add(f"{where}: {'; '.join(checked.problems)}" if checked.problems else "")
            return
        file.forms[form] += 1
        file.documents += len(example.documents)
        for of, unit, value in self._measure(example, _roles(example, form)):
            self.lengths.setdefault((of, unit), Counter())[value] += 1
        if form != "positive" or scored:
            values = self.labels.setdefault("scores" if form == "positive" else "labels", Counter())
            values.update(round(label, _LABEL_DIGITS) for label in example.labels)
        for text in (example.query, *example.documents):
            if not isinstance(text, Content) and _IMAGE_PATH.fullmatch(text):
                self.paths.add(f"{where}: {quoted(text)}")
        answers = [role == "positive" for role in _roles(example, form)]
        if form != "positive":
            answers = [label > 0 for label in example.labels]
        self.pairs.add(self._rows, example.query, example.documents, answers)
        if self.leaks is not None:
            self.leaks.look(where, example)


def _roles(example: Example, form: Form) -> list[Role]:
    if form != "positive":
        return ["document"] * len(example.documents)
    return ["positive", *["negative"] * (len(example.documents) - 1)]  # type: ignore[list-item]


def _words_and_characters(example: Example, roles: Sequence[Role]) -> Iterator[Length]:
    for of, text in zip(("query", *roles), (example.query, *example.documents), strict=True):
        if isinstance(text, Content):
            yield Length(of, "images", len(text.item.images))
            text = text.item.text
            if not text:
                continue
        yield Length(of, "words", len(text.split()))
        yield Length(of, "characters", len(text))


def _distribution(of: str, unit: str, values: Counter[float], *, limit: int | None = None) -> Distribution:
    ordered = sorted(values.items())
    count = values.total()

    def at(share: float) -> float:
        seen = 0
        for value, times in ordered:
            seen += times
            if seen >= share * count:
                return value
        raise AssertionError(share)

    return Distribution(
        of,
        unit,
        count,
        min=ordered[0][0],
        median=at(0.5),
        p95=at(0.95),
        max=ordered[-1][0],
        over=None if limit is None else sum(times for value, times in ordered if value > limit),
        values=dict(ordered) if not unit and len(ordered) <= _FEW_VALUES else None,
    )


def _repeats(repeats: Repeats, rows_at: Callable[[set[int]], dict[int, tuple[str, Example]]]) -> Iterator[Finding]:
    """What occurs more than once, as findings."""
    kinds = {
        "duplicate_queries": ("rows with the query of an earlier row", repeats.queries),
        "duplicate_pairs": ("positive pairs that an earlier row has", repeats.pairs),
        "duplicate_documents": ("documents that an earlier row has", repeats.documents),
        "several_positives": ("queries with several positives", repeats.several_positives),
        "contradictions": ("pairs that are positive and negative", repeats.contradictions),
    }
    places = [place for _, repeat in kinds.values() for place in repeat.places]
    found = rows_at({number for place in places for number in (place.row, place.other)})
    for kind, (text, repeat) in kinds.items():
        if repeat.count:
            yield Finding(kind, text, repeat.count, [_shown(place, found) for place in repeat.places])


def _shown(place: Place, found: dict[int, tuple[str, Example]]) -> str:
    where, example = found[place.row]
    other = "" if place.other == place.row else f"{found[place.other][0]} and "
    texts = (example.query, *example.documents)
    text = next(text for text in texts if int.from_bytes(hash_text(text.encode()), "little") == place.text)
    return f"{other}{where}: {quoted(text)}"
