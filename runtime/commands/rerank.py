"""`rtx rerank`: order the documents of each query, or score pairs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtx.runtime.atomic import atomic_file, check_target
from rtx.runtime.bulk import IMAGES_PER_CALL, OnInvalid
from rtx.runtime.commands.opening import batch_option, budget_of, device_option, open_as
from rtx.runtime.commands.progress import Progress
from rtx.runtime.errors import DataError, InvalidItemsError, ItemError, UsageError
from rtx.runtime.failures import failure_log, failures_file
from rtx.runtime.fields import LARGEST_FLOAT32, finite_float32, read_content
from rtx.runtime.items import check_text, describe, read_item, read_pair
from rtx.runtime.records import FORMATS, STDIN, BadRecord, Format, Input, Record
from rtx.runtime.reranker import Reranker

_STDOUT = "-"
# Pairs that are scored in one call: enough to sort by length, few enough to bound memory.
_RECORDS_PER_CALL = 1024
_SHOWN_PROBLEMS = 5
_NOT_FINITE = "the model gives it a score that is not finite"

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    model: str
    source: str
    output: str
    query: str | None
    top_k: int | None
    with_text: bool
    variant: str | None
    query_column: str
    documents_column: str
    document_column: str
    first_stage_column: str
    id_column: str | None
    file_format: Format | None
    threads: int | None
    device: str
    max_batch_tokens: int | None
    on_invalid: OnInvalid
    overwrite: bool


@click.command()
@click.argument("model", type=click.Path())
@click.argument("source", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option("-o", "--output", default=_STDOUT, help="OUT.jsonl.  [default: standard output]")
@click.option("--query", help="One query for all of INPUT, which then has one document a record.")
@click.option("--top-k", type=click.IntRange(min=1), help="Keep the best K of each query.  [default: all]")
@click.option("--with-text", is_flag=True, help="Repeat each document beside its score.")
@click.option("--variant", help="A variant of the bundle.  [default: the bundle's]")
@click.option("--query-column", default="query", show_default=True)
@click.option("--documents-column", default="documents", show_default=True, help="A list of texts or images.")
@click.option("--document-column", default="document", show_default=True, help="One text or image.")
@click.option(
    "--first-stage-column",
    default="first_stage",
    show_default=True,
    help="Scores of the first stage, for a model that was trained on top of one: a list, or a number.",
)
@click.option("--id-column", help="[default: id or _id where there is one, otherwise the line or row number]")
@click.option("--format", "file_format", type=click.Choice(FORMATS), help="[default: by the ending of INPUT]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@device_option
@batch_option
@click.option(
    "--on-invalid",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="What a record that cannot be ranked does: it is left out and listed, or stops the run.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def rerank(**arguments: Any) -> None:
    """Order the documents of each query of INPUT, best first, by MODEL, a bundle or a checkpoint (jsonl, csv, tsv,
    parquet; - for standard input).

    \b
    a record                              gives
    {"query": ..., "documents": [...]}    {"id": ..., "ranking": [{"index": ..., "score": ...}, ...]}
    {"query": ..., "document": ...}       {"id": ..., "score": ...}

    A query and a document are texts or, if the model takes images, {"image": "page.png"}, also with a "text" beside it:
    a path from the file's own folder, a data URL, or a list of these.

    A model that was trained on top of a first stage takes that stage's scores too, in a column "first_stage".

    With --query, INPUT holds documents alone, such as lines of text. They come out best first: a table on a terminal,
    elsewhere a line {"id": ..., "score": ...} for each.

    Records that cannot be ranked are left out and listed in OUT.errors.jsonl, or on standard error if there is no OUT;
    the exit code is then 4.
    """
    given = _Arguments(**arguments)
    with ExitStack() as stack:
        failed = _run(given, stack)
    if failed:
        where = "" if given.output == _STDOUT else f"; all are listed in {failures_file(Path(given.output))}"
        click.echo(f"{failed:,} {'record' if failed == 1 else 'records'} could not be ranked{where}", err=True)
        raise click.exceptions.Exit(DataError.exit_code)


def _run(given: _Arguments, stack: ExitStack) -> int:
    """Number of records that could not be ranked."""
    if given.query is not None and isinstance(wrong := check_text(0, given.query), ItemError):
        raise UsageError(f"--query: {wrong.message}")
    output = None if given.output == _STDOUT else Path(given.output)
    if output is not None:
        for file in (output, failures_file(output)):
            check_target(file, source=None if given.source == STDIN else given.source)
    if output is not None and output.exists() and not given.overwrite:
        raise UsageError(f"{output}: exists; pass --overwrite to replace it")
    source = stack.enter_context(_open_input(given))
    budget = budget_of(given.device, given.max_batch_tokens)
    model = stack.enter_context(
        open_as(Reranker, given.model, variant=given.variant, threads=given.threads, device=given.device, budget=budget)
    )
    on_terminal = output is None and _is_terminal()
    write = stack.enter_context(_sink(output, as_table=on_terminal and given.query is not None))
    log = stack.enter_context(failure_log(output)) if output is not None else _echo
    # Lines that scroll by on the same terminal say enough.
    progress = stack.enter_context(Progress("records", source.fraction, quiet=on_terminal))
    if given.query is None:
        results = _rank_each(model, source, given, progress)
    else:
        results = _rank_for(given.query, model, source, given, progress, keep_text=given.with_text or on_terminal)
    failed = 0
    for result in results:
        if isinstance(result, BadRecord):
            failed += 1
            if given.on_invalid == "fail":
                raise DataError(str(result))
            log(result)
        else:
            write(result)
    return failed


def _open_input(given: _Arguments) -> Input:
    file_format = given.file_format
    if given.source == STDIN and file_format is None:
        # Queries and their documents come as JSON, the documents of one query more often as lines.
        file_format = "txt" if given.query is not None else "jsonl"
    source = Input(given.source, file_format=file_format, id_column=given.id_column)
    if source.format == "txt" and given.query is None:
        source.close()
        raise UsageError(
            f"{source.name}: a txt input has one text a line; it cannot hold queries and documents: pass --query"
        )
    return source


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _rank_each(model: Reranker, source: Input, given: _Arguments, progress: Progress) -> Iterator[Result | BadRecord]:
    """Every record by itself, but pairs that follow each other go to the model together."""
    records = source.records(
        [given.query_column], [given.documents_column, given.document_column, given.first_stage_column]
    )
    for is_pair, group in groupby(records, lambda record: _is_pair(record, given)):
        while chunk := list(islice(group, _records_per_call(model) if is_pair else 1)):
            if is_pair:
                yield from _score_pairs(model, chunk, given, source.folder)
            else:
                yield _rank_list(model, chunk[0], given, source.folder)
            progress.add(len(chunk))


def _rank_for(
    query: str, model: Reranker, source: Input, given: _Arguments, progress: Progress, *, keep_text: bool
) -> Iterator[Result | BadRecord]:
    """All records as documents of one query; of those seen so far no more are kept than can be among the best."""
    best: list[Result] = []
    records = source.records([given.document_column], [given.first_stage_column])
    while chunk := list(islice(records, _records_per_call(model))):
        results = _score(
            model, chunk, lambda record: (query, record.fields[given.document_column]), given, source.folder
        )
        for result in results:
            if isinstance(result, BadRecord):
                yield result
            else:
                record, score = result
                text = record.fields[given.document_column]
                best.append({"id": record.id, "score": score, **_text(text, keep_text)})
        # Stable: equal scores keep the order of the input, as in Reranker.rank.
        best = sorted(best, key=lambda result: -result["score"])[: given.top_k]
        progress.add(len(chunk))
    yield from best


def _records_per_call(model: Reranker) -> int:
    return IMAGES_PER_CALL if model.contract.takes_images else _RECORDS_PER_CALL


def _is_pair(record: Record | BadRecord, given: _Arguments) -> bool:
    return isinstance(record, Record) and record.fields.get(given.documents_column) is None


def _rank_list(
    model: Reranker, record: Record | BadRecord, given: _Arguments, folder: Path | None
) -> Result | BadRecord:
    """A query and its documents: all of them, or none if one cannot be scored."""
    if isinstance(record, BadRecord):
        return record
    query, documents = record.fields[given.query_column], record.fields[given.documents_column]
    if not isinstance(documents, list):
        found = type(documents).__name__
        return BadRecord(record.id, record.where, f"{given.documents_column}: expected a list of texts, got {found}")
    values = {given.query_column: query} | {f"{given.documents_column}[{i}]": item for i, item in enumerate(documents)}
    problems: list[str] = []
    items = [_read(name, value, problems, folder) for name, value in values.items()]
    if not problems:
        checked = [(name, read_item(0, item, model.contract)) for name, item in zip(values, items, strict=True)]
        problems = [f"{name}: {wrong.message}" for name, wrong in checked if isinstance(wrong, ItemError)]
    if problems:
        return BadRecord(record.id, record.where, _joined(problems))
    first_stage = _first_stage(model, record, given, documents=len(documents))
    if isinstance(first_stage, BadRecord):
        return first_stage
    try:
        ranking = model.rank(items[0], items[1:], first_stage=first_stage, top_k=given.top_k)
    except InvalidItemsError as invalid:
        problems = [f"{given.documents_column}[{error.index}]: {error.message}" for error in invalid.items]
        return BadRecord(record.id, record.where, _joined(problems))
    except DataError as wrong:  # of the query
        return BadRecord(record.id, record.where, str(wrong))
    if not all(math.isfinite(ranked.score) for ranked in ranking):
        return BadRecord(record.id, record.where, _NOT_FINITE)
    lines = [
        {"index": ranked.index, "score": ranked.score, **_text(documents[ranked.index], given.with_text)}
        for ranked in ranking
    ]
    return {"id": record.id, "ranking": lines}


def _score_pairs(
    model: Reranker, chunk: Sequence[Record | BadRecord], given: _Arguments, folder: Path | None
) -> Iterator[Result | BadRecord]:
    """Records that hold a query and one document each."""
    columns = (given.documents_column, given.document_column)
    chunk = [
        record
        if isinstance(record, BadRecord) or given.document_column in record.fields
        else BadRecord(record.id, record.where, f"has neither a column '{columns[0]}' nor a column '{columns[1]}'")
        for record in chunk
    ]
    for result in _score(
        model, chunk, lambda record: (record.fields[given.query_column], record.fields[columns[1]]), given, folder
    ):
        if isinstance(result, BadRecord):
            yield result
        else:
            record, score = result
            yield {"id": record.id, "score": score, **_text(record.fields[given.document_column], given.with_text)}


def _score(
    model: Reranker,
    chunk: Sequence[Record | BadRecord],
    pair_of: Callable[[Record], tuple[object, object]],
    given: _Arguments,
    folder: Path | None,
) -> Iterator[tuple[Record, float] | BadRecord]:
    """Bad records first, before anything is computed; then the others in order, with their scores."""
    good: list[tuple[Record, tuple[object, object], float]] = []
    for record in chunk:
        if isinstance(record, BadRecord):
            yield record
            continue
        problems: list[str] = []
        names = ("query", "document")
        query, document = (
            _read(name, value, problems, folder) for name, value in zip(names, pair_of(record), strict=True)
        )
        if not problems and isinstance(wrong := read_pair(0, (query, document), model.contract), ItemError):
            problems = [wrong.message]
        if problems:
            yield BadRecord(record.id, record.where, "; ".join(problems))
        elif isinstance(first_stage := _first_stage(model, record, given), BadRecord):
            yield first_stage
        else:
            good.append((record, (query, document), first_stage[0]))
    first = [score for *_, score in good]
    scores = model.score([pair for _, pair, _ in good], first_stage=first, on_invalid="nan")
    # Not in one pass: bad ones first.
    for place in np.flatnonzero(~np.isfinite(scores)).tolist():
        record, pair, _ = good[place]
        (found,) = model.preprocessor.encode_pairs([pair])
        yield BadRecord(record.id, record.where, found.message if isinstance(found, ItemError) else _NOT_FINITE)
    for (record, *_), value in zip(good, scores.tolist(), strict=True):
        if math.isfinite(value):
            yield record, value


def _read(name: str, value: object, problems: list[str], folder: Path | None) -> object:
    """A text as it is, whatever else it is; of a mapping its images and text."""
    return read_content({name: value}, name, problems, folder) if isinstance(value, Mapping) else value


def _first_stage(
    model: Reranker, record: Record, given: _Arguments, *, documents: int | None = None
) -> list[float] | BadRecord:
    """The first stage's scores of a record's documents, or of its one document; 0 for a model that takes none."""
    count = 1 if documents is None else documents
    if not model.needs_first_stage:
        return [0.0] * count
    name = given.first_stage_column
    found: object = record.fields.get(name)
    expected = "a finite number" if documents is None else f"a list of {count} finite numbers, one a document"
    if found is None:
        problem = f"has no column '{name}'; this model was trained on top of a first stage and needs its scores"
        return BadRecord(record.id, record.where, f"{problem}: {expected}")
    # What is added has to be finite too.
    limit = LARGEST_FLOAT32 / model.contract.first_stage_weight
    scores = _numbers([found] if documents is None else found, count, limit)
    return scores if scores is not None else BadRecord(record.id, record.where, f"{name}: expected {expected}")


def _numbers(values: object, count: int, limit: float) -> list[float] | None:
    """So many numbers of at most this size; None for anything else."""
    if not isinstance(values, list) or len(values) != count:
        return None
    found = [number for value in values if (number := finite_float32(value)) is not None and abs(number) <= limit]
    return found if len(found) == count else None


def _text(document: object, wanted: bool) -> Result:
    return {"document": document} if wanted else {}


def _joined(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + more


def _echo(failure: BadRecord) -> None:
    click.echo(f"error: {failure}", err=True)


@contextmanager
def _sink(output: Path | None, *, as_table: bool) -> Iterator[Callable[[Result], None]]:
    """Takes results one by one: a file that is there at the end, lines on standard output, or a table on it."""
    if as_table:
        table = Table(box=None, header_style="bold")
        table.add_column("score", justify="right")
        table.add_column("id", justify="right", style="dim")
        table.add_column("document", no_wrap=True, overflow="ellipsis")
        yield lambda result: table.add_row(
            f"{result['score']:.4f}", escape(str(result["id"])), escape(_shown(result["document"]))
        )
        Console().print(table)
    elif output is None:
        yield lambda result: click.echo(_line(result), nl=False)
    else:
        with atomic_file(output) as stream:

            def write(result: Result) -> None:
                stream.write(_line(result))

            yield write


def _shown(document: object) -> str:
    return document if isinstance(document, str) else describe(document)


def _line(result: Result) -> bytes:
    # Bytes of an image in a parquet file are not repeated.
    return json.dumps(result, ensure_ascii=False, default=describe).encode() + b"\n"
