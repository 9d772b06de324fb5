"""Comparing speeds on a machine that others use too: interleaved rounds, medians, ratios within a round.

A round runs each measurement once for every subject before it goes on to the next measurement, and the subject that
begins rotates from round to round: whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import numpy as np

S = TypeVar("S")
Note = Callable[[str], None]
Block = Callable[[S], Mapping[str, float]]
"""A measurement: runs a subject and gives numbers by name."""


@dataclass(frozen=True)
class Stat:
    """A number that was measured in every round.

    Attributes:
        median, low, high: over rounds; low and high are the quartiles.
        ratio, ratio_low, ratio_high: the same of the ratio to the baseline in the same round; None for the baseline.
        rounds: as measured.
    """

    median: float
    low: float
    high: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: tuple[float, ...]


def run_rounds(
    subjects: Mapping[str, S],
    blocks: Mapping[str, Block[S]],
    rounds: int,
    *,
    note: Note = lambda _: None,
) -> dict[str, dict[str, list[float]]]:
    """Run every block for every subject, `rounds` times.

    Args:
        subjects: what is compared, by name.
        blocks: measurements, by what `note` calls them.
        rounds: at least one.
        note: told what runs next.

    Returns:
        By subject and by name of the number: its values by round.
    """
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    for turn in range(rounds):
        for title, block in blocks.items():
            for name in rotate(list(subjects), turn):
                note(f"round {turn + 1} of {rounds}: {title}, {name}")
                for number, value in block(subjects[name]).items():
                    measured[name].setdefault(number, []).append(value)
    return measured


def rotate(names: Sequence[str], turn: int) -> list[str]:
    """The names in their order, beginning with another one each turn."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def summarize(measured: Mapping[str, Mapping[str, Sequence[float]]], *, baseline: str) -> dict[str, dict[str, Stat]]:
    """Values by round to medians, quartiles, and ratios to the baseline.

    Where a subject has more rounds of a number than the baseline, the ratio is that of the rounds that both have.
    """
    return {
        subject: {
            name: _stat(values, measured[baseline].get(name, ()) if subject != baseline else ())
            for name, values in numbers.items()
        }
        for subject, numbers in measured.items()
    }


def fitting_count(
    subjects: Sequence[S],
    run: Callable[[S, int], None],
    seconds: float,
    *,
    least: int,
    most: int,
    clock: Callable[[], float] = perf_counter,
) -> int:
    """How many units of work the slowest subject does in about so many seconds; warms all of them up.

    Args:
        subjects: who does the work.
        run: has a subject do so many units.
        seconds: for the slowest.
        least, most: bounds of the result.
        clock: seconds from anywhere.
    """
    count = least
    while True:
        slowest_s = 0.0
        for subject in subjects:
            start = clock()
            run(subject, count)
            slowest_s = max(slowest_s, clock() - start)
        fitting = max(least, min(most, round(count * seconds / max(slowest_s, 1e-9))))
        # A short trial says little: the first runs of a session are slow, and small counts are noise.
        if count >= most or slowest_s >= seconds / 4:
            return fitting
        count = fitting


def _stat(values: Sequence[float], baseline: Sequence[float]) -> Stat:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    # A stage can take no time that the clock sees: there is no ratio to that.
    ratios = [value / base for value, base in zip(values, baseline, strict=False) if base]
    ratio_low, ratio, ratio_high = np.percentile(ratios, (25, 50, 75)).tolist() if ratios else (None, None, None)
    return Stat(median, low, high, ratio, ratio_low, ratio_high, tuple(values))
