"""Candidate lists for reranking: for each query the documents that a first stage found, best first.

    *.jsonl      {"query-id": "q1", "corpus-ids": ["d7", "d3"]}
    others       a TREC run file: query Q0 document rank score tag, separated by white space

Either may be gzipped (`.gz`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import DataError
from rtx.runtime.evalset import EvalSet, Problems
from rtx.runtime.records import BadRecord, Input

Candidates = dict[str, list[str]]
"""Document ids, best first, by query id."""

_RUN_COLUMNS = "expected the six columns of a TREC run file (query Q0 document rank score tag), or a name in .jsonl"


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
        for document in documents:
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
    """Write candidates, atomically; a run file's scores only count down, as these lists have none.

    Raises:
        DataError: an id with white space, which a run file cannot hold.
        ArtifactError: the file cannot be written.
    """
    name = os.fspath(path)
    jsonl = _is_jsonl(name)
    if not jsonl:
        problems = Problems(name)
        for key in {*candidates, *(document for documents in candidates.values() for document in documents)}:
            if key.split() != [key]:
                problems.add(f"id {key!r}: a TREC run file holds no ids with white space; use a name in .jsonl")
        problems.raise_any()
    with atomic_file(name) as stream:
        for query, documents in candidates.items():
            if jsonl:
                row = {"query-id": query, "corpus-ids": documents}
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                continue
            for rank, document in enumerate(documents, start=1):
                stream.write(f"{query} Q0 {document} {rank} {len(documents) - rank + 1} rtx\n".encode())


def _is_jsonl(name: str) -> bool:
    return name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _read_jsonl(name: str, problems: Problems) -> Iterator[tuple[str, str, list[str]]]:
    with Input(name, file_format="jsonl", id_column="query-id") as source:
        for record in source.records(["corpus-ids"]):
            if isinstance(record, BadRecord):
                problems.add(str(record))
                continue
            documents = record.fields["corpus-ids"]
            if not isinstance(documents, list) or not all(type(document) in (str, int) for document in documents):
                problems.add(f"{record.where}: corpus-ids: expected a list of ids")
            else:
                yield record.where, str(record.id), [str(document) for document in documents]


def _read_run(name: str, problems: Problems) -> Iterator[tuple[str, str, list[str]]]:
    ranked: dict[str, list[tuple[float, float, int, str]]] = {}
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
            query, _, document, *numbers, _ = columns
            rank, score = map(_number, numbers)
            if math.isnan(rank) or math.isnan(score):
                problems.add(f"{record.where}: expected numbers as rank and score, got {' and '.join(numbers)}")
                continue
            ranked.setdefault(query, []).append((-score, rank, number, document))
    for query, documents in ranked.items():
        yield name, query, [document for *_, document in sorted(documents)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
