"""`rtx bench`: measure a bundle, beside PyTorch if asked to, and show it as a table, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtx.runtime.atomic import atomic_file, check_target
from rtx.runtime.bench import BenchOptions, BenchResult, Judgements, Texts
from rtx.runtime.bench import bench as measure
from rtx.runtime.bench_page import bench_page, headline, result_rows, where_of
from rtx.runtime.candidates import read_candidates
from rtx.runtime.commands.opening import device_option
from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.evalset import load_evalset
from rtx.runtime.records import STDIN, BadRecord, Input
from rtx.runtime.rounds import Note

_STDOUT = "-"
# More documents than that are not needed to make a mix of them.
_MAX_TEXTS = 100_000


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    bundle: str
    against: str | None
    variants: tuple[str, ...]
    evalset: str | None
    candidates: str | None
    texts: str | None
    text_column: str
    rounds: int
    seconds: float
    threads: int | None
    device: str
    json_path: str | None
    html_path: str | None


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--against", metavar="CHECKPOINT", help="Run the checkpoint that the bundle was made of on PyTorch too.")
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Measure this variant only; repeatable.")
@click.option("--eval", "evalset", metavar="DIR", help="Measure NDCG@10 on this evaluation set (BEIR layout) too.")
@click.option("--candidates", metavar="FILE", help="For a reranker with --eval: the documents to rerank.")
@click.option("--texts", metavar="FILE", help="Run these texts (jsonl, csv, tsv, txt or parquet).")
@click.option("--text-column", default="text", show_default=True, help="Their column in the file.")
@click.option("--rounds", type=int, default=5, show_default=True, help="How often everything is measured.")
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Of one measurement in a round, about.")
@click.option("--threads", type=int, help="Threads of one run.  [default: the usable cores]")
@device_option
@click.option("--json", "json_path", metavar="FILE", help="Write one line of JSON; - for standard output.")
@click.option("--html", "html_path", metavar="FILE", help="Write the report as a self-contained page.")
def bench(**values: Any) -> None:
    """Measure latency, throughput, memory and parity of BUNDLE.

    Each variant is first held against the golden outputs in the bundle: what is wrong is not timed. Then all of them,
    and with --against PyTorch, run in interleaved rounds on the same texts: from --texts, else from --eval, else made
    of the words of the tokenizer's vocabulary. Numbers are medians over rounds; ratios are taken within a round.
    """
    arguments = _Arguments(**values)
    options = BenchOptions(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        threads=arguments.threads,
        device=arguments.device,
        variants=arguments.variants,
    )
    for path in (arguments.json_path, arguments.html_path):
        _check_output(path)
    judgements = _judgements(arguments.evalset, arguments.candidates)
    texts = _texts_of(judgements) if arguments.texts is None else _texts(arguments.texts, arguments.text_column)
    with _notes() as note:
        result = measure(
            arguments.bundle, options, against=arguments.against, texts=texts, judgements=judgements, note=note
        )
    _show(result, Console(stderr=arguments.json_path == _STDOUT))
    if arguments.json_path == _STDOUT:
        click.echo(json.dumps(result.to_dict()))
    elif arguments.json_path is not None:
        _write(arguments.json_path, json.dumps(result.to_dict()) + "\n")
    if arguments.html_path is not None:
        _write(arguments.html_path, bench_page(result))


def _judgements(evalset: str | None, candidates: str | None) -> Judgements | None:
    if evalset is None:
        if candidates is not None:
            raise UsageError("--candidates needs --eval: they are documents of an evaluation set")
        return None
    loaded = load_evalset(evalset)
    return Judgements(loaded, read_candidates(candidates, loaded) if candidates is not None else None)


def _texts(path: str, column: str) -> Texts:
    """The texts of a file; what cannot be used is an error, as a benchmark of half a file is not what was asked for."""
    documents: list[str] = []
    with Input(path) as source:
        for record in source.records([column]):
            if isinstance(record, BadRecord):
                raise DataError(str(record))
            value = record.fields[column]
            if not isinstance(value, str):
                raise DataError(f"{record.where}: {column}: expected a text, got {type(value).__name__}")
            if value.strip():
                documents.append(value)
            if len(documents) == _MAX_TEXTS:
                break
    if not documents:
        raise DataError(f"{path}: holds no text")
    name = "standard input" if path == STDIN else Path(path).name
    return Texts(tuple(documents), source=f"{len(documents):,} texts of {name}")


def _texts_of(judgements: Judgements | None) -> Texts | None:
    if judgements is None:
        return None
    evalset = judgements.evalset
    documents, queries = tuple(evalset.corpus.values()), tuple(evalset.queries.values())
    return Texts(documents, queries, f"corpus and queries of {evalset.name}")


@contextmanager
def _notes() -> Iterator[Note]:
    """Shows what is being done on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield lambda doing: status.update(escape(doing))


def _show(result: BenchResult, console: Console) -> None:
    shown = Table(title=escape(f"{result.bundle}: {where_of(result)}"), box=None)
    shown.add_column("", overflow="fold")
    for subject in result.subjects:
        shown.add_column(escape(subject.name), justify="right")
    for group, rows in result_rows(result).items():
        shown.add_row(f"[bold]{escape(group)}[/bold]")
        for row in rows:
            cells = [f"{escape(cell.text)}\n[dim]{escape(cell.note)}[/dim]" for cell in row.cells]
            shown.add_row(f"  {escape(row.label)}\n  [dim]{escape(row.unit)}[/dim]", *cells)
    console.print(shown)
    console.print()
    console.print(headline(result), markup=False, highlight=False)


def _check_output(path: str | None) -> None:
    """Find out before anything is measured that a result could not be written."""
    if path is not None and path != _STDOUT:
        check_target(path)


def _write(path: str, content: str) -> None:
    with atomic_file(path) as stream:
        stream.write(content.encode())
