"""What a long command tells while it runs, on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts records.

    Args:
        what: what is counted, in the plural ("texts").
        fraction: how much of the input is read, 0 to 1; None if that is not known.
        quiet: say nothing.
    """

    def __init__(self, what: str, fraction: Callable[[], float | None], *, quiet: bool = False) -> None:
        self._what = what
        self._fraction = fraction
        self._quiet = quiet
        self._done = 0
        self._computed = 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar: Bar | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None if fraction() is None else 1.0)

    def add(self, records: int, computed: bool = True) -> None:
        """Records that are done now; not `computed` if an earlier run did them, which says nothing of the speed."""
        self._done += records
        self._computed += records if computed else 0
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._fraction() or 0.0, description=self._state(now))
        elif not self._quiet and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            fraction = self._fraction()
            share = "" if fraction is None else f" ({fraction:.0%})"
            click.echo(self._state(now) + share, err=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _state(self, now: float) -> str:
        rate = self._computed / max(now - self._started, 1e-9)
        return f"{self._done:,} {self._what}, {rate:,.0f}/s"
