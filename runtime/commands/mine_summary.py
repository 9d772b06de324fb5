"""The summary that `rtx mine` ends with."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtx.runtime.items import Content, describe
from rtx.runtime.mining_summary import DEEPER, Spread, Summary
from rtx.runtime.negatives import Rules

_SHOWN_CHARS = 100


def show(found: Summary, output: Path, rules: Rules) -> None:
    """Print what was found and what was left out by which rule, on standard output."""
    console = Console()

    def line(text: str) -> None:
        console.print(text, soft_wrap=True)

    line(f"{escape(str(output))}: {found.lines:,} lines from {found.queries:,} queries")
    if found.short:
        line(f"queries with fewer than {rules.negatives} negatives: {found.short:,}, of them with none: {found.none:,}")
    if found.left_out:
        line(f"queries left out: {found.left_out:,}")
    if found.unusable:
        line(f"rows that could not be compared: {found.unusable:,}")
    line(f"\n{found.candidates:,} candidates, those of rank {rules.skip + 1:,} to {rules.depth:,}")
    console.print(_candidates(found))
    line(f"\n{found.positives.count:,} positives by rank; in the corpus: {found.positives_in_corpus:,}")
    console.print(_ranks(found, rules.depth))
    line("\nscores")
    console.print(_scores(found))
    for example in found.examples:
        line(f"\nquery            {_shown(example.query)}")
        for kind, documents in (("positive", example.positives), ("negative", example.negatives)):
            for document in documents:
                rank = f"rank {document.rank:,}" if document.rank else f"deeper than rank {rules.depth:,}"
                line(f"{kind} {document.score:8.4f}  {_shown(document.text)} [dim]({rank})[/dim]")


def _candidates(found: Summary) -> Table:
    table = _table("", "documents", "share")
    rows = {f"dropped: {rule}": count for rule, count in found.dropped.items()}
    for name, count in {**rows, "left": found.candidates - found.dropped.total()}.items():
        if count or name == "left":
            table.add_row(name.replace("_", " "), f"{count:,}", f"{count / max(1, found.candidates):.1%}")
    return table


def _ranks(found: Summary, depth: int) -> Table:
    table = _table("rank", "positives", "share")
    for name, count in found.ranks.items():
        if name == DEEPER or int(name.split("-")[0]) <= depth:
            table.add_row(name, f"{count:,}", f"{count / max(1, found.positives.count):.1%}")
    return table


def _scores(found: Summary) -> Table:
    table = _table("", "documents", "mean", "lowest", "highest")
    for name, spread in (("positives", found.positives), ("negatives", found.negatives)):
        table.add_row(name, f"{spread.count:,}", *_numbers(spread))
    return table


def _numbers(spread: Spread) -> tuple[str, ...]:
    values = (spread.mean, spread.lowest, spread.highest)
    return tuple(f"{value:.4f}" if spread.count else "-" for value in values)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _shown(text: str) -> str:
    text = describe(text, _SHOWN_CHARS) if isinstance(text, Content) else " ".join(text.split())
    return escape(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")
