"""The files of mining: training rows and texts in, training rows with negatives out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import ItemError, UsageError
from rtx.runtime.fields import read_negatives, read_text, single_negatives
from rtx.runtime.items import check_text
from rtx.runtime.mining import MinedQuery, Relevant, Unusable
from rtx.runtime.mining_summary import Summary
from rtx.runtime.records import BadRecord, Input

Fewer = Literal["keep", "drop"]


def read_rows(
    source: Input, *, query_column: str = "query", positive_column: str = "positive"
) -> Iterator[Relevant | BadRecord]:
    """Training rows: a query and a positive each, and maybe `negative`, `negatives` and `negative_1` ..., as
    `rtx finetune` reads them.

    Raises:
        DataError: the input is damaged from some place on.
        UsageError: a txt input, which has no columns.
    """
    for record in source.all_columns():
        if isinstance(record, BadRecord):
            yield record
            continue
        problems: list[str] = []
        query, positive = (read_text(record.fields, name, problems) for name in (query_column, positive_column))
        negatives = read_negatives(record.fields, single_negatives(record.fields), problems)
        if problems:
            yield BadRecord(record.id, record.where, "; ".join(problems))
        else:
            yield Relevant(query, positive, negatives, record.where)


def read_corpus(source: Input, *, text_column: str = "text", title_column: str = "title") -> Iterator[str | BadRecord]:
    """Texts to mine from: title and text joined by a space and stripped, as `load_evalset` reads a BEIR corpus.

    Raises:
        DataError: no record has the text column, or the input is damaged from some place on.
    """
    for record in source.records([text_column], [title_column] if title_column else ()):
        if isinstance(record, BadRecord):
            yield record
            continue
        text, title = record.fields[text_column], record.fields.get(title_column) or ""
        wrong = [
            f"{name}: {checked.message}"
            for name, value in ((text_column, text), (title_column, title))
            if isinstance(checked := check_text(0, value), ItemError)
        ]
        yield BadRecord(record.id, record.where, "; ".join(wrong)) if wrong else f"{title} {text}".strip()


def write_mined(
    path: str | Path,
    mined: Iterable[MinedQuery | Unusable],
    *,
    pairs: bool = False,
    scores: bool = False,
    with_first_stage: bool = False,
    fewer: Fewer = "keep",
    on_unusable: Callable[[Unusable], object] = lambda _unusable: None,
) -> Summary:
    """Write training rows, atomically, as the queries come.

    Args:
        path: of a jsonl file, which is replaced.
        mined: what `mine` gives.
        pairs: write a line {query, document, label} for each document, label 1 or 0, instead of a line {query,
            positive, negatives} for each positive.
        scores: add `scores` to each line, the positive's first; a query without a negative has no line then.
        with_first_stage: add the same as `first_stage`, or to a line of a pair that document's own. A reranker is to be
            trained on top of them, so they have to be the embedder's.
        fewer: whether a query with fewer negatives than wanted is written with those it has or left out.
        on_unusable: called with each row that could not be compared.

    Raises:
        UsageError: pairs with scores; their column is `label`.
        ArtifactError: the file cannot be written.
    """
    if pairs and scores:
        raise UsageError("scores: go with rows of a positive and negatives, not with pairs, which have labels")
    summary = Summary()
    with atomic_file(path) as stream:
        for found in mined:
            if isinstance(found, Unusable):
                summary.unusable += 1
                on_unusable(found)
                continue
            missing = found.wanted - len(found.negatives)
            keep = not ((missing and fewer == "drop") or (scores and not found.negatives))
            columns = [name for name, wanted in (("scores", scores), ("first_stage", with_first_stage)) if wanted]
            lines = list(_pair_lines(found, columns) if pairs else _row_lines(found, columns)) if keep else []
            stream.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
            summary.add(found, lines=len(lines))
    return summary


def _row_lines(found: MinedQuery, score_columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    negatives = [negative.text for negative in found.negatives]
    for positive in found.positives:
        line: dict[str, Any] = {"query": found.query, "positive": positive.text, "negatives": negatives}
        scores = [positive.score, *(negative.score for negative in found.negatives)]
        yield line | dict.fromkeys(score_columns, scores)


def _pair_lines(found: MinedQuery, score_columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for label, documents in ((1, found.positives), (0, found.negatives)):
        for document in documents:
            line = {"query": found.query, "document": document.text, "label": label}
            yield line | dict.fromkeys(score_columns, document.score)
