"""Evaluation sets in the BEIR layout: queries, a corpus, and who judged which document relevant to which query.

    corpus.jsonl         {"_id": "d1", "title": "...", "text": "..."}      title may be missing or null
                         {"_id": "p1", "image": "pages/1.png"}             a path from here, or a list of them; a text
                                                                           beside them is optional
    queries.jsonl        {"_id": "q1", "text": "..."}                      or an image likewise
    qrels/test.tsv       query-id <tab> corpus-id <tab> score, below a header

Also read: each file gzipped (`.gz`), qrels without a header, qrels in TREC form (query, a column nobody reads, document
and grade, separated by white space), and one `qrels.tsv` beside the other files instead of one a split. Keys that BEIR
has besides are skipped. All else that is wrong is an error that names its file and line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.fields import read_content
from rtx.runtime.folder import replace_folder
from rtx.runtime.inputs import image_digest
from rtx.runtime.items import Content, check_text
from rtx.runtime.records import BadRecord, Input

_SHOWN_PROBLEMS = 10
_INTEGER = re.compile(r"\s*[+-]?\d+\s*")


@dataclass(frozen=True)
class EvalSet:
    """Queries with judged documents; every one has at least one relevant document, and all of those are in the corpus.

    Attributes:
        name: what reports call it.
        queries: text by query id.
        corpus: text by document id. The order decides which of two documents with equal scores comes first.
        qrels: grade by document id by query id. Above 0 is relevant; a document that is not here is not.
        titles: by document id, of the documents that have one: what their text begins with.

    Raises:
        DataError: a query without a relevant document, a judged document that is not in the corpus, or no query at all.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    titles: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems(f"evaluation set '{self.name}'")
        if not self.queries:
            problems.add("has no query; expected at least one with a relevant document")
        for query in [*self.queries, *(query for query in self.qrels if query not in self.queries)]:
            grades = self.qrels.get(query, {})
            if query not in self.queries:
                problems.add(f"qrels name query '{query}', which is not among the queries")
            elif not _has_relevant(grades):
                problems.add(f"query '{query}' has no relevant document (a grade above 0)")
            for document in grades:
                if document not in self.corpus:
                    problems.add(f"query '{query}': qrels name document '{document}', which is not in the corpus")
        problems.raise_any()

    @cached_property
    def sha256(self) -> str:
        """Hash of the content in its order, without the name."""
        digest = hashlib.sha256()
        for table in (self.queries, self.corpus, {query: self.qrels[query] for query in self.queries}):
            digest.update(f"{len(table)}\n".encode())
            for key, value in table.items():
                content = _portable(value) if isinstance(value, Content) else value
                digest.update(json.dumps([key, content], sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def limit(self, queries: int, seed: int = 0, *, documents: int | None = None) -> EvalSet:
        """A smaller set for a faster, coarser measurement.

        The samples go by a hash of seed and id: they do not depend on order, machine or library version, and a smaller
        one is part of a larger one.

        Args:
            queries: how many to keep; all where there are fewer.
            seed: another seed, another sample.
            documents: how many to keep; None for all. What is judged for a kept query is always kept. Fewer documents
                make the task easier: compare only numbers from the same set.

        Raises:
            UsageError: a number below 1.
        """
        if queries < 1 or (documents is not None and documents < 1):
            raise UsageError(f"an evaluation set needs at least 1 query and 1 document, got {queries} and {documents}")
        kept = set(_sample(self.queries, queries, seed))
        if len(kept) == len(self.queries) and (documents is None or documents >= len(self.corpus)):
            return self
        corpus = self.corpus
        if documents is not None:
            judged = {document for query in kept for document in self.qrels[query]}
            others = _sample((key for key in corpus if key not in judged), max(0, documents - len(judged)), seed)
            judged.update(others)
            corpus = {key: text for key, text in corpus.items() if key in judged}
        return EvalSet(
            f"{self.name}[{len(kept)} queries, {len(corpus)} documents, seed {seed}]",
            {key: text for key, text in self.queries.items() if key in kept},
            corpus,
            {key: self.qrels[key] for key in self.queries if key in kept},
            {key: title for key, title in self.titles.items() if key in corpus},
        )


def _fields(text: str) -> dict[str, Any]:
    if not isinstance(text, Content):
        return {"text": text}
    item = text.item
    return {"text": item.text, "image": list(item.images)}


def _portable(content: Content) -> dict[str, Any]:
    """A text with images, by the content of files and not by their paths on this machine."""
    return {"text": content.item.text, "image": [image_digest(str(image)) for image in content.item.images]}


class Problems:
    """Collects what is wrong with some input, to raise it all at once; the message shows the first ten.

    Args:
        source: what the input is, for the message.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._shown: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        self._count += 1
        if len(self._shown) < _SHOWN_PROBLEMS:
            self._shown.append(problem)

    def raise_any(self) -> None:
        """
        Raises:
            DataError: there was a problem.
        """
        if self._count:
            more = f"\n  … and {self._count - len(self._shown)} more" if self._count > len(self._shown) else ""
            shown = "\n".join(f"  {problem}" for problem in self._shown)
            raise DataError(f"{self._source}: {self._count} problem{'s' if self._count > 1 else ''}:\n{shown}{more}")


def load_evalset(path: str | os.PathLike[str], *, split: str = "test") -> EvalSet:
    """Read an evaluation set in the BEIR layout (see the module).

    A document's text is its title and its text, joined by a space and stripped, as BEIR's own models see it. Queries
    without a relevant document in this split are left out, as no ranking can be right or wrong about them.

    Args:
        path: the folder.
        split: which qrels to read; of no consequence where the folder has a single `qrels.tsv`.

    Raises:
        DataError: a file is missing or has lines that cannot be used, all counted and the first ten listed, or no query
            has a relevant document.
    """
    folder = Path(path)
    files = {name: _find(folder, candidates) for name, candidates in _layout(split).items()}
    if missing := [_layout(split)[name][0] for name, file in files.items() if file is None]:
        splits = sorted({file.name.split(".")[0] for file in folder.glob("qrels/*.tsv*")})
        hint = f" (splits in qrels: {', '.join(splits)})" if splits else ""
        raise DataError(f"{folder}: is no evaluation set in the BEIR layout: {', '.join(missing)} not found{hint}")
    problems = Problems(str(folder))
    titles: dict[str, str] = {}
    corpus = _read_texts(_found(files["corpus"]), problems, kind="document", titles=titles)
    queries = _read_texts(_found(files["queries"]), problems, kind="query", titles={})
    # Lines that could not be read would only make the qrels name texts that seem not to exist.
    problems.raise_any()
    qrels = _read_qrels(_found(files["qrels"]), queries, corpus, problems)
    problems.raise_any()
    qrels = {query: qrels[query] for query in queries if _has_relevant(qrels.get(query, {}))}
    if not qrels:
        raise DataError(f"{files['qrels']}: judges no document relevant; expected at least one grade above 0")
    name = folder.resolve().name
    return EvalSet(
        name if split == "test" else f"{name}/{split}", {key: queries[key] for key in qrels}, corpus, qrels, titles
    )


def write_evalset(evalset: EvalSet, path: str | os.PathLike[str], *, split: str = "test") -> None:
    """Write a folder in the BEIR layout; `load_evalset` reads the same content back if its texts are stripped.

    Another evaluation set at this place is replaced. Written to a temporary sibling and renamed.

    Raises:
        UsageError: something else is in the way.
        DataError: an id holds a tab or a line end, or is empty.
    """
    problems = Problems(f"evaluation set '{evalset.name}'")
    for key in [*evalset.queries, *evalset.corpus]:
        if not key or any(character in key for character in "\t\r\n"):
            problems.add(f"id {key!r}: expected a text without tabs and line ends")
    problems.raise_any()
    with replace_folder(Path(path), marker="corpus.jsonl") as folder:
        (folder / "qrels").mkdir()
        corpus = ({"_id": key, "title": "", **_fields(text)} for key, text in evalset.corpus.items())
        queries = ({"_id": key, **_fields(text)} for key, text in evalset.queries.items())
        _write_jsonl(folder / "corpus.jsonl", corpus)
        _write_jsonl(folder / "queries.jsonl", queries)
        with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
            writer.writerow(["query-id", "corpus-id", "score"])
            for query in evalset.queries:
                writer.writerows((query, document, grade) for document, grade in evalset.qrels[query].items())


def _layout(split: str) -> dict[str, tuple[str, ...]]:
    return {
        "corpus": ("corpus.jsonl",),
        "queries": ("queries.jsonl",),
        "qrels": (f"qrels/{split}.tsv", f"qrels/{split}.txt", "qrels.tsv", "qrels.txt"),
    }


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    candidates = (folder / f"{name}{ending}" for name in names for ending in ("", ".gz"))
    return next((file for file in candidates if file.is_file()), None)


def _found(file: Path | None) -> Path:
    assert file is not None
    return file


def _has_relevant(grades: Mapping[str, int]) -> bool:
    return any(grade > 0 for grade in grades.values())


def _read_texts(file: Path, problems: Problems, *, kind: str, titles: dict[str, str]) -> dict[str, str]:
    """Texts by id; the titles of documents go into `titles`."""
    texts: dict[str, str] = {}
    with Input(str(file), file_format="jsonl", id_column="_id") as source:
        for record in source.records(["text"], ["title", "image"], instead={"text": "image"}):
            if isinstance(record, BadRecord):
                problems.add(str(record))
                continue
            key, title, image = str(record.id), record.fields.get("title"), record.fields.get("image")
            text = record.fields.get("text", "")
            if image is None and "text" not in record.fields:
                problems.add(f"{record.where}: image: is empty, and there is no text")
                continue
            if image is not None:
                wrong_image: list[str] = []
                text = read_content({kind: {"text": text, "image": image}}, kind, wrong_image, file.parent)
                if wrong_image:
                    problems.add(f"{record.where}: {'; '.join(wrong_image)}")
                    continue
            if wrong := next((w for w in (_wrong_text("text", text), _wrong_text("title", title or "")) if w), None):
                problems.add(f"{record.where}: {wrong}")
            elif key in texts:
                problems.add(f"{record.where}: {kind} id '{key}' is there twice")
            elif kind == "query" and not text.strip():
                problems.add(f"{record.where}: query '{key}' is empty")
            else:
                texts[key] = text if kind == "query" or image is not None else f"{title or ''} {text}".strip()
                if kind == "document" and title and title.strip():
                    titles[key] = title.strip()
    return texts


def _wrong_text(column: str, value: object) -> str | None:
    checked = check_text(0, value)
    return None if isinstance(checked, str) else f"{column}: {checked.message}"


def _read_qrels(
    file: Path, queries: Mapping[str, str], corpus: Mapping[str, str], problems: Problems
) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with Input(str(file), file_format="txt") as source:
        first = True
        for record in source.records(["line"]):
            if isinstance(record, BadRecord):
                problems.add(str(record))
                continue
            line = record.fields["line"]
            if not line.strip():
                continue
            judgement = _parse_judgement(line, queries, corpus)
            if isinstance(judgement, str):
                if not (first and _is_header(line, queries, corpus)):
                    problems.add(f"{record.where}: {judgement}")
            else:
                query, document, grade = judgement
                known = qrels.setdefault(query, {}).setdefault(document, grade)
                if known != grade:
                    problems.add(f"{record.where}: query '{query}', document '{document}': graded {known} and {grade}")
            first = False
    return qrels


def _parse_judgement(line: str, queries: Mapping[str, str], corpus: Mapping[str, str]) -> tuple[str, str, int] | str:
    """Query, document and grade of a line, or what is wrong with it."""
    cells = line.split("\t")
    if len(cells) != 3:
        cells = cells if len(cells) == 4 else line.split()
        if len(cells) != 4:
            return "expected query-id, corpus-id and score between tabs, or the four columns of a TREC qrels file"
        del cells[1]
    query, document = _resolve(cells[0], queries), _resolve(cells[1], corpus)
    if query not in queries:
        return f"query '{query}' is not in the queries file"
    if document not in corpus:
        return f"document '{document}' is not in the corpus"
    if not _INTEGER.fullmatch(cells[2]):
        return f"expected a whole number as the grade, got '{cells[2].strip()}'"
    return query, document, int(cells[2])


def _is_header(line: str, queries: Mapping[str, str], corpus: Mapping[str, str]) -> bool:
    cells = line.split("\t")
    ids = len(cells) == 3 and (_resolve(cells[0], queries) in queries or _resolve(cells[1], corpus) in corpus)
    return len(cells) == 3 and not ids and not _INTEGER.fullmatch(cells[2])


def _resolve(cell: str, known: Mapping[str, str]) -> str:
    """The id in a cell. BEIR quotes as csv does (FEVER's "Weird_Al" Yankovic), other writers do not quote at all."""
    if cell not in known and len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _sample(keys: Iterable[str], count: int, seed: int) -> list[str]:
    """The keys with the smallest hashes."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())[:count]
