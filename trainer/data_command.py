"""`rtx data check`: a look at training data before a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtx.runtime.commands.progress import Progress
from rtx.runtime.contract import Contract, Task
from rtx.runtime.errors import DataError, UsageError, nearest
from rtx.runtime.evalset import load_evalset
from rtx.runtime.lazy import naming_the_extra
from rtx.trainer.check import DataReport, Distribution, Measure, check_data
from rtx.trainer.data import Needs, Report
from rtx.trainer.loss_table import DEFAULT_LOSS, LOSSES

if TYPE_CHECKING:
    from rtx.runtime.preprocessor import Preprocessor


@click.group()
def data() -> None:
    """Look at training data."""


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--eval", "evalset", metavar="DIR", help="Look for texts of this evaluation set (BEIR layout) in FILES.")
@click.option("--task", type=click.Choice(["embed", "rerank"]), help="Hold the rows against this task's default loss.")
@click.option("--loss", help="Hold the rows against what this loss needs.  [default: any form of row]")
@click.option("--first-stage", is_flag=True, help="Rows need first_stage, the scores of a first stage.")
@click.option(
    "--model", metavar="CHECKPOINT", help="Count its tokens, not words and characters; name rows that it does not take."
)
@click.option("--strict", is_flag=True, help="Fail if the files have evaluation queries or documents that answer them.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def check(
    files: tuple[str, ...],
    evalset: str | None,
    task: Task | None,
    loss: str | None,
    first_stage: bool,
    model: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Show what is in FILES and what is wrong with it: rows, lengths, labels, duplicates, contradictions, leaks.

    FILES are what rtx finetune takes. Exits with 4 if there are rows that cannot be used.

    \b
    rtx data check train.jsonl mined.jsonl --eval beir/ --loss info_nce
    """
    needs = _needs(task, loss)
    loaded = None if evalset is None else load_evalset(evalset)
    measure, contract = (None, None) if model is None else _token_lengths(model, task)
    with _reporting(len(files)) as report:
        found = check_data(
            files,
            needs=needs,
            with_first_stage=first_stage,
            evalset=loaded,
            measure=measure,
            contract=contract,
            max_tokens=None if contract is None else contract.max_tokens,
            report=report,
        )
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found)
    if found.bad_rows:
        raise DataError(f"rows that cannot be used: {found.bad_rows:,}")
    if not sum(file.rows for file in found.files):
        raise DataError(f"no rows in {', '.join(files)}")
    if strict and found.leaks:
        raise DataError(f"texts that are also in the evaluation set: {found.leaks:,}")


def _needs(task: Task | None, loss: str | None) -> Needs | None:
    """
    Raises:
        UsageError: the loss does not exist.
    """
    if loss is None:
        return None if task is None else LOSSES[task][DEFAULT_LOSS[task]].needs
    known = {name: spec for each, losses in LOSSES.items() if task in (None, each) for name, spec in losses.items()}
    if loss not in known:
        raise UsageError(f"loss '{loss}' does not exist ({nearest(loss, known)})")
    return known[loss].needs


def _token_lengths(checkpoint: str, task: Task | None) -> tuple[Measure, Contract]:
    with naming_the_extra("train", "--model"):
        from rtx.trainer.model import RetrievalModel
    from rtx.trainer.tokens import token_lengths

    model = RetrievalModel.load(checkpoint, task=task)
    preprocessor: Preprocessor = model.preprocessor
    return token_lengths(preprocessor), preprocessor.contract


@contextmanager
def _reporting(files: int) -> Iterator[Report]:
    """Progress over all files on standard error."""
    fraction: list[float | None] = [0.0]
    before, done = 0, 0

    def report(rows: int, share: float | None) -> None:
        nonlocal before, done
        # Rows are counted from the beginning of each file.
        done += rows < before
        progress.add(rows - before if rows > before else rows)
        before = rows
        fraction[0] = None if share is None else (done + share) / files

    with Progress("rows", lambda: fraction[0]) as progress:
        yield report


def _show(found: DataReport) -> None:
    console = Console(highlight=False)
    table = Table(box=None, title="rows", title_justify="left")
    table.add_column("file", overflow="fold")
    for name in ("rows", "bad", "documents", "with positive", "with label", "with labels"):
        table.add_column(name, justify="right")
    for file in found.files:
        counts = (file.rows, file.bad_rows, file.documents, *file.forms.values())
        table.add_row(escape(file.name), *(f"{count:,}" for count in counts))
    console.print(table)
    if found.lengths:
        limit = None if found.max_tokens is None else f"over {found.max_tokens:,}"
        console.print(_distributions("lengths", found.lengths, limit))
    if found.labels:
        console.print(_distributions("labels", found.labels, None))
        for item in found.labels:
            if item.values is not None:
                values = ", ".join(f"{value:g} ({count:,})" for value, count in item.values.items())
                console.print(f" {item.of}: {values}", markup=False, soft_wrap=True)
    for finding in found.findings:
        console.print(f"\n{finding.text}: {finding.count:,}", markup=False, soft_wrap=True)
        for example in finding.examples:
            console.print(f"  {example}", markup=False, soft_wrap=True)


def _distributions(title: str, items: Sequence[Distribution], limit: str | None) -> Table:
    table = Table("", box=None, title=title, title_justify="left")
    names = ("count", "min", "median", "p95", "max")
    for name in (*names, *(() if limit is None else (limit,))):
        table.add_column(name, justify="right")
    for item in items:
        values: list[Any] = [getattr(item, name) for name in names]
        table.add_row(
            f"{item.of} {item.unit}".strip(),
            *(f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in values),
            *_over(item),
        )
    return table


def _over(item: Distribution) -> list[str]:
    return [] if item.over is None else [f"{item.over:,} ({item.over / item.count:.1%})"]
