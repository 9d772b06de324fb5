"""What a training run says while it runs: bars on a terminal, else a line each time it reports."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rich.progress
from rich.console import Console
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]
    """Reports steps, loss, learning rate, time left and evaluations; a context in which the bars are there.

    Args:
        console: None for standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[values]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._steps: rich.progress.TaskID | None = None
        self._first_step = 0
        self._started = 0.0
        self._before: float | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def silence(self) -> None:
        """Say nothing from now on: another process speaks for this one."""
        self.console.quiet = True
        self._bars.disable = True

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Callable[[int, int], None]]:
        """Give what to call with the number of texts that are done, and of all."""
        bar = self._bars.add_task("evaluating", total=None, values="")
        try:
            yield lambda done, total: self._bars.update(bar, completed=done, total=total)
        finally:
            self._bars.remove_task(bar)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int, float | None], None]]:
        """Give what to call with the rows that are read of a file, and their share of it."""
        with self._bars if not self._bars.live.is_started else contextlib.nullcontext():
            bar = self._bars.add_task("reading", total=None, values="rows")
            try:
                yield lambda rows, share: self._bars.update(
                    bar, completed=rows, total=round(rows / share) if share else None
                )
            finally:
                self._bars.remove_task(bar)

    def measured(self, step: int, metric: str, metrics: Mapping[str, float]) -> None:
        """An evaluation at a step; 0 is before training."""
        value = metrics[metric]
        if step == 0:
            self._before = value
        change = "" if step == 0 or self._before is None else f" ({value - self._before:+.4f})"
        self.say(f"{'before training' if step == 0 else f'step {step}'}: {metric} {value:.4f}{change}")

    def resumed(
        self, checkpoint: Path | None, was: Mapping[str, Any], now: Mapping[str, Any], before: float | None
    ) -> None:
        """A run goes on: where from, what of the machine has changed since, and its metric before training."""
        self._before = before
        self.say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
        if changed := [f"{name} {was.get(name)} → {now[name]}" for name in now if was.get(name) != now[name]]:
            self.say(f"warning: {', '.join(changed)}: the weights may differ in their last bits from an unbroken run's")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._first_step, self._started = state.global_step, time.monotonic()
        self._steps = self._bars.add_task("step", total=state.max_steps, completed=state.global_step, values="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert self._steps is not None
        # What the last step came to is reported, wherever the last report was.
        control.should_log = control.should_log or state.global_step >= state.max_steps
        self._bars.update(self._steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:  # noqa: ARG002
        if "loss" not in logs or self._steps is None:
            return
        values = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}"
        self._bars.update(self._steps, values=values)
        if not self.console.is_terminal:
            elapsed = time.monotonic() - self._started
            left = elapsed / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
            self.say(f"step {state.global_step}/{state.max_steps}  {values}  {_clock(elapsed)}, {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
