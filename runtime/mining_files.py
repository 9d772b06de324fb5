"""The files of mining: training rows and texts in, training rows with negatives out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rtx.runtime.atomic import atomic_file
from rtx.runtime.contract import Contract
from rtx.runtime.errors import ItemError, UsageError
from rtx.runtime.fields import is_blank, read_content, read_negatives, single_negatives
from rtx.runtime.items import Content, check_text
from rtx.runtime.mining import MinedQuery, Relevant, Unusable
from rtx.runtime.mining_summary import Summary
from rtx.runtime.records import BadRecord, Input

Fewer = Literal["keep", "drop"]


def read_rows(
    source: Input,
    *,
    query_column: str = "query",
    positive_column: str = "positive",
    contract: Contract | None = None,
) -> Iterator[Relevant | BadRecord]:
    """Training rows: a query and a positive each, and maybe `negative`, `negatives` and `negative_1` ..., as
    `rtx finetune` reads them: texts, or `{"image": ...}` with paths from the file's own folder.

    Args:
        source: the rows.
        query_column, positive_column: their names there.
        contract: of the model that is to take them, or None; a row with something that it never takes is a bad record.

    Raises:
        DataError: the input is damaged from some place on.
        UsageError: a txt input, which has no columns.
    """
    for record in source.all_columns():
        if isinstance(record, BadRecord):
            yield record
            continue
        problems: list[str] = []
        query, positive = (
            read_content(record.fields, name, problems, source.folder, contract)
            for name in (query_column, positive_column)
        )
        negatives = read_negatives(record.fields, single_negatives(record.fields), problems, source.folder, contract)
        if problems:
            yield BadRecord(record.id, record.where, "; ".join(problems))
        else:
            yield Relevant(query, positive, negatives, record.where)


def read_corpus(
    source: Input,
    *,
    text_column: str = "text",
    title_column: str = "title",
    image_column: str = "",
    contract: Contract | None = None,
) -> Iterator[str | BadRecord]:
    """Texts to mine from: title and text joined by a space and stripped, as `load_evalset` reads a BEIR corpus.

    Args:
        source: the corpus.
        text_column, title_column: "" for no title.
        image_column: where a record has an image, it is that, with a text of its own, as a `Content`; "" for none.
        contract: as `read_rows` has it.

    Raises:
        DataError: no record has the text column, or the input is damaged from some place on.
    """
    optional = [name for name in (title_column, image_column) if name and source.format != "txt"]
    for record in source.records([text_column], optional, instead={text_column: image_column} if image_column else {}):
        if isinstance(record, BadRecord):
            yield record
            continue
        if image_column and not is_blank(image := record.fields.get(image_column)):
            problems: list[str] = []
            given = {"text": record.fields.get(text_column), "image": image}
            content = read_content({image_column: given}, image_column, problems, source.folder, contract)
            yield BadRecord(record.id, record.where, "; ".join(problems)) if problems else content
            continue
        if text_column not in record.fields:
            yield BadRecord(record.id, record.where, f"{image_column}: is empty, and there is no {text_column}")
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
        path: of a jsonl file, which is replaced. Images in its folder are named by their paths within it.
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
    folder = Path(path).absolute().parent
    with atomic_file(path) as stream:
        for found in mined:
            if isinstance(found, Unusable):
                summary.unusable += 1
                on_unusable(found)
                continue
            missing = found.wanted - len(found.negatives)
            keep = not ((missing and fewer == "drop") or (scores and not found.negatives))
            columns = [name for name, wanted in (("scores", scores), ("first_stage", with_first_stage)) if wanted]
            lines_of = _pair_lines if pairs else _row_lines
            lines = list(lines_of(found, columns, folder)) if keep else []
            stream.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
            summary.add(found, lines=len(lines))
    return summary


def _row_lines(found: MinedQuery, score_columns: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    query = _written(found.query, folder)
    negatives = [_written(negative.text, folder) for negative in found.negatives]
    for positive in found.positives:
        line: dict[str, Any] = {"query": query, "positive": _written(positive.text, folder), "negatives": negatives}
        scores = [positive.score, *(negative.score for negative in found.negatives)]
        yield line | dict.fromkeys(score_columns, scores)


def _pair_lines(found: MinedQuery, score_columns: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    query = _written(found.query, folder)
    for label, documents in ((1, found.positives), (0, found.negatives)):
        for document in documents:
            line = {"query": query, "document": _written(document.text, folder), "label": label}
            yield line | dict.fromkeys(score_columns, document.score)


def _written(text: str, folder: Path) -> str | dict[str, Any]:
    """A text, or images as a row of a file in this folder has them."""
    if not isinstance(text, Content):
        return text
    item = text.item
    images = [_from(folder, str(image)) for image in item.images]
    return {"image": images[0] if len(images) == 1 else images, **({"text": item.text} if item.text else {})}


def _from(folder: Path, image: str) -> str:
    """A path from the folder if it is below it, so that both can be moved together; all else as it is."""
    if image.startswith(("data:", "http://", "https://")):
        return image
    given = Path(image).absolute()
    plain = Path(os.path.normpath(given))
    # Behind a link, a/../b is not b.
    if ".." in given.parts and not (plain.exists() and given.exists() and plain.samefile(given)):
        plain = given
    return plain.relative_to(folder).as_posix() if plain.is_relative_to(folder) else str(plain)
