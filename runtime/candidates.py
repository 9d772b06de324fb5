"""Candidate lists for reranking: for each query the documents that a first stage found, best first.

    *.jsonl      {"query-id": "q1", "corpus-ids": ["d7", "d3"], "scores": [0.61, 0.58]}     scores may be missing
    others       a TREC run file: query Q0 document rank score tag, separated by white space

Either may be gzipped (`.gz`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import DataError
from rtx.runtime.evalset import EvalSet, Problems
from rtx.runtime.fields import finite_float32
from rtx.runtime.records import BadRecord, Input


class Candidate(NamedTuple):
    """A document that a first stage found.

    Attributes:
        document: its id.
        score: what the first stage gave it, higher is better; NaN where that is not known.
    """

    document: str
    score: float = math.nan


Candidates = dict[str, list[Candidate]]
"""Documents by query id, best first."""

# The tag of lines whose scores were not known: what stands there only counts down.
_RANKS_ONLY = "rtx-ranks"
_RUN_COLUMNS = "expected the six columns of a TREC run file (query Q0 document rank score tag), or a name in .jsonl"


def check_scored(candidates: Candidates, name: str) -> None:
    """
    Raises:
        DataError: a candidate has no score; counted, and the first ten named.
    """
    problems = Problems(f"candidates for '{name}': a reranker on top of a first stage needs its scores")
    for query, documents in candidates.items():
        for document, score in documents:
            if not math.isfinite(score):
                problems.add(f"query '{query}': document '{document}' has no score")
    problems.raise_any()


def read_candidates(path: str | os.PathLike[str], evalset: EvalSet) -> Candidates:
    """Read the candidates for the queries of an evaluation set.

    A run file is sorted by score, then rank, then line, whatever the order of its lines. Other queries in the file are
    skipped. A query that is not in the file has no candidates, as a first stage may find none.

    Raises:
        DataError: lines that cannot be used, a document that is not in the corpus or is listed twice for a query, all
            counted and the first ten listed; or no query of the set in the file.
    """
    name = os.fspath(path)
    problems = Problems(name)
    read = _read_jsonl if _is_jsonl(name) else _read_run
    found: Candidates = {}
    for where, query, documents in read(name, problems):
        if query not in evalset.queries:
            continue
        if query in found:
            problems.add(f"{where}: query '{query}' is there twice")
        seen: set[str] = set()
        for document, _ in documents:
            if document not in evalset.corpus:
                problems.add(f"{where}: document '{document}' of query '{query}' is not in the corpus")
            elif document in seen:
                problems.add(f"{where}: document '{document}' is there twice for query '{query}'")
            seen.add(document)
        found[query] = documents
    problems.raise_any()
    if not found:
        raise DataError(f"{name}: holds none of the {len(evalset.queries)} queries of '{evalset.name}'")
    return {query: found.get(query, []) for query in evalset.queries}


def write_candidates(candidates: Candidates, path: str | os.PathLike[str]) -> None:
    """Write candidates, atomically. Scores that are not known count down in a run file, and are read as not known.

    Raises:
        DataError: an id with white space, which a run file cannot hold.
        ArtifactError: the file cannot be written.
    """
    name = os.fspath(path)
    jsonl = _is_jsonl(name)
    if not jsonl:
        problems = Problems(name)
        for key in {*candidates, *(found.document for documents in candidates.values() for found in documents)}:
            if key.split() != [key]:
                problems.add(f"id {key!r}: a TREC run file holds no ids with white space; use a name in .jsonl")
        problems.raise_any()
    with atomic_file(name) as stream:
        for query, documents in candidates.items():
            scores = [found.score for found in documents]
            scored = bool(scores) and all(map(math.isfinite, scores))
            if jsonl:
                row: dict[str, Any] = {"query-id": query, "corpus-ids": [found.document for found in documents]}
                if scored:
                    row["scores"] = scores
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                continue
            for rank, (document, score) in enumerate(documents, start=1):
                written = f"{score!r} rtx" if scored else f"{len(documents) - rank + 1} {_RANKS_ONLY}"
                stream.write(f"{query} Q0 {document} {rank} {written}\n".encode())


def _is_jsonl(name: str) -> bool:
    return name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _read_jsonl(name: str, problems: Problems) -> Iterator[tuple[str, str, list[Candidate]]]:
    with Input(name, file_format="jsonl", id_column="query-id") as source:
        for record in source.records(["corpus-ids"], ["scores"]):
            if isinstance(record, BadRecord):
                problems.add(str(record))
                continue
            documents, scores = record.fields["corpus-ids"], record.fields.get("scores")
            if not isinstance(documents, list) or not all(type(document) in (str, int) for document in documents):
                problems.add(f"{record.where}: corpus-ids: expected a list of ids")
            elif scores is None:
                yield record.where, str(record.id), [Candidate(str(document)) for document in documents]
            elif not isinstance(scores, list) or len(scores) != len(documents) or not all(map(_is_score, scores)):
                expected = f"expected a list of {len(documents)} finite numbers, one a document"
                problems.add(f"{record.where}: scores: {expected}")
            elif any(above < below for above, below in pairwise(scores)):
                problems.add(f"{record.where}: scores: expected the best first; higher is better")
            else:
                found = [Candidate(str(key), float(score)) for key, score in zip(documents, scores, strict=True)]
                yield record.where, str(record.id), found


def _read_run(name: str, problems: Problems) -> Iterator[tuple[str, str, list[Candidate]]]:
    ranked: dict[str, list[tuple[float, float, int, str]]] = {}
    unscored: set[str] = set()
    with Input(name, file_format="txt") as source:
        for number, record in enumerate(source.records(["line"])):
            if isinstance(record, BadRecord):
                problems.add(str(record))
                continue
            columns = record.fields["line"].split()
            if not columns:
                continue
            if len(columns) != 6:
                problems.add(f"{record.where}: {_RUN_COLUMNS}, got {len(columns)}")
                continue
            query, _, document, *numbers, tag = columns
            if tag == _RANKS_ONLY:
                unscored.add(query)
            rank, score = map(_number, numbers)
            if math.isnan(rank) or not math.isfinite(score):
                problems.add(f"{record.where}: expected numbers as rank and score, got {' and '.join(numbers)}")
                continue
            ranked.setdefault(query, []).append((-score, rank, number, document))
    for query, documents in ranked.items():
        known = query not in unscored
        found = [Candidate(key, -negated if known else math.nan) for negated, _, _, key in sorted(documents)]
        yield name, query, found


def _is_score(value: object) -> bool:
    return not isinstance(value, str) and finite_float32(value) is not None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
