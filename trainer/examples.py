"""Rows of training data to checked examples, one at a time. Free of torch.

A row has one of three forms, whatever the task:

    query, positive, negative / negatives / negative_1 …   [scores: one a document, the positive's first]
    query, document, label
    query, documents, labels

For a reranker on top of a first stage each has a column first_stage too: that stage's scores of the documents, a single
number in the second form.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rtx.runtime.contract import Contract
from rtx.runtime.fields import (
    LARGEST_FLOAT32,
    NUMBERED_NEGATIVE,
    is_blank,
    missing,
    read_content,
    read_items,
    read_negatives,
    single_negatives,
)
from rtx.runtime.fields import Row as Row

Needs = Literal["positives", "negatives", "labels", "lists", "scores"]
"""What a loss needs of every row.

    positives  the first document answers the query; any number of others do not
    negatives  the same, with at least one other
    labels     one label in [0, 1] a document
    lists      at least two documents, each with a label of at least 0
    scores     positive and negatives, at least two documents in all, each with a teacher's score
"""
Form = Literal["positive", "document", "documents"]
"""The column that tells the form of a row."""

FORMS: tuple[Form, ...] = get_args(Form)
_COLUMNS: dict[Form, tuple[str, ...]] = {
    "positive": ("query", "positive", "negative", "negatives"),
    "document": ("query", "document", "label"),
    "documents": ("query", "documents", "labels"),
}
_FORMS: dict[Needs | None, tuple[Form, ...]] = {
    None: FORMS,
    "positives": ("positive",),
    "negatives": ("positive",),
    "labels": ("document", "documents", "positive"),
    "lists": ("documents", "positive"),
    "scores": ("positive",),
}
_EXPECTED: dict[Needs | None, str] = {
    None: "query, positive, negative(s); or query, document, label; or query, documents, labels",
    "positives": "query, positive and, where there are any, negative(s)",
    "negatives": "query, positive and negative(s)",
    "labels": "query, document, label; or query, documents, labels; or query, positive, negative(s)",
    "lists": "query, documents, labels; or query, positive, negative(s)",
    "scores": "query, positive, negative(s) and scores",
}
# (lowest, highest, in words)
Bounds = tuple[float, float, str]
# Losses are computed in float32.
_FINITE: Bounds = (-LARGEST_FLOAT32, LARGEST_FLOAT32, "a finite number of float32")
# Where a label has others.
_BOUNDS: dict[Needs | None, Bounds] = {
    "labels": (0.0, 1.0, "a number from 0 to 1"),
    "lists": (0.0, LARGEST_FLOAT32, "a finite number of float32, at least 0"),
}


class Example(NamedTuple):
    """A query and documents for it.

    Attributes:
        query: a text, or with images a `Content`.
        documents: at least one of the same. Of a row with a positive, that one first and then the negatives in order.
        labels: one a document: how well it answers the query, or a teacher's score of it.
        first_stage: one a document: the score that a first stage gave it; empty where none is needed.
    """

    query: str
    documents: tuple[str, ...]
    labels: tuple[float, ...]
    first_stage: tuple[float, ...] = ()


class CheckedRow(NamedTuple):
    """What came of a row.

    Attributes:
        example: None if the row cannot be used.
        form: of the row; None where it is not clear.
        problems: what is wrong. A problem of the columns is told with the first row that has such columns, and those
            that follow come without example and without problem.
    """

    example: Example | None
    form: Form | None
    problems: tuple[str, ...] = ()


class RowChecker:
    """Turns rows into examples for a loss.

    Args:
        needs: what the loss needs; None takes whatever a row has.
        with_first_stage: whether a row needs scores of a first stage; where it does not, they are left aside.
        contract: of the model that is to take the rows, which then hold nothing that it never takes; None for any.
    """

    def __init__(
        self, needs: Needs | None, *, with_first_stage: bool = False, contract: Contract | None = None
    ) -> None:
        self.needs = needs
        self.with_first_stage = with_first_stage
        self._contract = contract
        # Where no scores are needed, a column `score` has a meaning of its own.
        scores = ("scores",) if needs == "scores" else ()
        extra = {*scores, *(("first_stage",) if with_first_stage else ())}
        self._known = sorted({name for form in _FORMS[needs] for name in _COLUMNS[form]} | extra)
        # Columns that have been looked at, with the form of the row: None where no such row can be used, else those of
        # single negatives in order.
        self._columns: dict[tuple[frozenset[str], Form], tuple[str, ...] | None] = {}

    def check(self, row: object, folder: Path | None = None) -> CheckedRow:
        """An example, or what is wrong with the row.

        Args:
            row: a mapping of columns.
            folder: what the paths of its images are relative to; None for the working directory.
        """
        if not isinstance(row, Mapping):
            return CheckedRow(None, None, (f"expected a mapping of columns, got {type(row).__name__}",))
        given = [form for form in FORMS if not is_blank(row.get(form))]
        if len(given) > 1:
            return CheckedRow(None, None, (f"has {' and '.join(given)}; expected one of them",))
        form = given[0] if given else next((form for form in FORMS if form in row), _FORMS[self.needs][0])
        columns = frozenset(row), form
        problems: list[str] = []
        if columns not in self._columns:
            problems += self._check_columns(*columns)
            self._columns[columns] = single_negatives(row) if form in _FORMS[self.needs] else None
        negatives = self._columns[columns]
        if negatives is None:
            return CheckedRow(None, form, tuple(problems))
        example = self._example(row, form, negatives, problems, folder)
        return CheckedRow(None if problems else example, form, tuple(problems))

    def _check_columns(self, names: frozenset[str], form: Form) -> list[str]:
        if form not in _FORMS[self.needs]:
            return [f"has the columns {', '.join(sorted(names))}; expected {_EXPECTED[self.needs]}"]
        # A misspelt column would be left out of the training in silence.
        problems = []
        known = {name for columns in _COLUMNS.values() for name in columns} | {"scores", "first_stage"}
        for name in sorted(names - known):
            # So close that it is no column of another meaning, as query_id or document_id would be.
            close = difflib.get_close_matches(name.lower(), self._known, n=1, cutoff=0.88)
            if close and not NUMBERED_NEGATIVE.fullmatch(name):
                problems.append(f"column '{name}' is not known; did you mean '{close[0]}'?")
        return problems

    def _example(
        self, row: Row, form: Form, negatives: tuple[str, ...], problems: list[str], folder: Path | None
    ) -> Example:
        query = read_content(row, "query", problems, folder, self._contract)
        if form == "positive":
            positive = read_content(row, "positive", problems, folder, self._contract)
            documents = (positive, *read_negatives(row, negatives, problems, folder, self._contract))
            labels: tuple[float, ...] = (1.0,) + (0.0,) * (len(documents) - 1)
            if not is_blank(row.get("scores")):
                labels = self._numbers(row, "scores", len(documents), problems)
            elif self.needs == "scores":
                problems.append(missing(row, "scores"))
        elif form == "document":
            documents = (read_content(row, "document", problems, folder, self._contract),)
            labels = (self._number("label", row.get("label"), problems),)
        else:
            documents = tuple(
                read_content({name: value}, name, problems, folder, self._contract)
                for name, value in read_items(row, "documents", "texts", problems)
            )
            labels = self._numbers(row, "labels", len(documents), problems)
        first_stage = self._first_stage(row, form, len(documents), problems) if self.with_first_stage else ()
        if not problems:
            problems += self._too_few(form, len(documents))
        return Example(query, documents, labels, first_stage)

    def _first_stage(self, row: Row, form: Form, documents: int, problems: list[str]) -> tuple[float, ...]:
        value = row.get("first_stage")
        if form == "document" and not is_blank(value) and not isinstance(value, list):
            return (self._number("first_stage", value, problems, _FINITE),)
        return self._numbers(row, "first_stage", documents, problems, _FINITE)

    def _too_few(self, form: Form, documents: int) -> list[str]:
        if form == "positive" and documents < 2 and self.needs in ("negatives", "lists", "scores"):
            return ["has no negative; expected at least one"]
        if documents < (2 if self.needs == "lists" else 1):
            return [f"documents: has {documents}; expected at least {2 if self.needs == 'lists' else 1}"]
        return []

    def _numbers(
        self, row: Row, name: str, documents: int, problems: list[str], bounds: Bounds | None = None
    ) -> tuple[float, ...]:
        if is_blank(row.get(name)):
            problems.append(missing(row, name))
            return ()
        before = len(problems)
        values = read_items(row, name, "numbers", problems)
        if len(problems) == before and len(values) != documents:
            problems.append(f"{name}: has {len(values)} for {documents} documents; expected one each")
        return tuple(self._number(place, value, problems, bounds) for place, value in values)

    def _number(self, name: str, value: object, problems: list[str], bounds: Bounds | None = None) -> float:
        low, high, words = bounds or _BOUNDS.get(self.needs, _FINITE)
        number = math.nan
        # A text is a cell of a csv file; a whole number may be larger than any float.
        if isinstance(value, str | numbers.Real):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(value)
        if not low <= number <= high:
            problems.append(f"{name}: expected {words}, got {reprlib.repr(value)}")
            return 0.0
        return number
