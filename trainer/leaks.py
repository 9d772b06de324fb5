"""Texts of an evaluation set that training data has too: what is measured on them is no longer what it says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rtx.runtime.corpus import key_of
from rtx.runtime.evalset import EvalSet
from rtx.runtime.items import Content
from rtx.trainer.examples import Example
from rtx.trainer.findings import Finding, quoted
from rtx.trainer.store import hash_text

_ALMOST = " but for case and white space"


class Leaks:
    """Looks for the texts of an evaluation set, as they are and with case and white space made alike."""

    def __init__(self, evalset: EvalSet) -> None:
        relevant = {document for grades in evalset.qrels.values() for document, grade in grades.items() if grade > 0}
        self._queries = _Texts(evalset.queries.items())
        self._answers, self._others = (
            _Texts(
                (key, form)
                for key, text in evalset.corpus.items()
                if (key in relevant) == answers
                for form in _forms(text, evalset.titles.get(key, ""))
            )
            for answers in (True, False)
        )
        query, answer = "queries that are evaluation queries", "documents that answer an evaluation query"
        self._leaked_queries = Finding("leaked_queries", query), Finding("leaked_queries_almost", query + _ALMOST)
        self._leaked_answers = Finding("leaked_documents", answer), Finding("leaked_documents_almost", answer + _ALMOST)
        self._shared = Finding("shared_documents", "documents that are others of the evaluation corpus")

    def look(self, where: str, example: Example) -> None:
        _compare(where, example.query, self._queries, self._leaked_queries)
        for document in example.documents:
            if not _compare(where, document, self._answers, self._leaked_answers):
                _compare(where, document, self._others, (self._shared, self._shared))

    def findings(self) -> list[Finding]:
        """Those that there are."""
        return [item for item in (*self._leaked_queries, *self._leaked_answers, self._shared) if item.count]


class _Texts:
    """Finds the id of a text."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self.exact: dict[str, str] = {}
        # As hashes: a large corpus is not held twice.
        self.almost: dict[bytes, str] = {}
        for key, text in texts:
            self.exact[_name(text)] = key
            self.almost[_alike(text)] = key


def _forms(text: str, title: str) -> Iterator[str]:
    """A document as it is ranked, and without its title, as training data often has it."""
    yield text
    if title and (body := text.removeprefix(title).strip()):
        yield body


def _compare(where: str, text: str, known: _Texts, findings: tuple[Finding, Finding]) -> bool:
    exact, almost = findings
    if (key := known.exact.get(_name(text))) is not None:
        exact.add(f"{where}: {quoted(text)} is {key}")
        return True
    if (key := known.almost.get(_alike(text))) is not None:
        almost.add(f"{where}: {quoted(text)} is {key}")
        return True
    return False


def _name(text: str) -> str:
    """A text itself; of one with images what is the same for the same files, however their paths are spelt."""
    return key_of(text).hex() if isinstance(text, Content) else text


def _alike(text: str) -> bytes:
    text = _name(text)
    return hash_text(" ".join(text.casefold().split()).encode())
