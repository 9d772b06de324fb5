"""Interleaved rounds and their statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rtx.runtime.rounds import fitting_count, rotate, run_rounds, summarize


def test_each_measurement_meets_all_subjects_before_the_next_and_who_begins_rotates() -> None:
    order: list[str] = []

    def block(title: str) -> Callable[[str], dict[str, float]]:
        return lambda subject: order.append(f"{title}{subject}") or {title: float(len(order))}  # type: ignore[func-returns-value]

    noted: list[str] = []
    measured = run_rounds({"x": "1", "y": "2", "z": "3"}, {"a": block("a"), "b": block("b")}, 4, note=noted.append)
    rounds = [" ".join(order[start : start + 6]) for start in range(0, len(order), 6)]
    assert rounds == ["a1 a2 a3 b1 b2 b3", "a2 a3 a1 b2 b3 b1", "a3 a1 a2 b3 b1 b2", "a1 a2 a3 b1 b2 b3"]
    assert measured["x"] == {"a": [1.0, 9.0, 14.0, 19.0], "b": [4.0, 12.0, 17.0, 22.0]}
    assert noted[6] == "round 2 of 4: a, y"


def test_rotation() -> None:
    assert rotate(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert rotate(["a", "b", "c"], 2) == ["c", "a", "b"]
    assert rotate(["a", "b", "c"], 4) == ["b", "c", "a"]


def test_medians_quartiles_and_ratios_within_a_round() -> None:
    # The machine is twice as slow in the last two rounds: medians move, ratios do not.
    measured = {
        "PyTorch": {"speed": [10.0, 20.0, 30.0, 5.0, 5.0]},
        "int8": {"speed": [20.0, 40.0, 60.0, 10.0, 12.0]},
    }
    stats = summarize(measured, baseline="PyTorch")
    int8 = stats["int8"]["speed"]
    assert (int8.median, int8.low, int8.high) == (20.0, 12.0, 40.0)
    assert (int8.ratio, int8.ratio_low, int8.ratio_high) == (2.0, 2.0, 2.0)
    assert int8.rounds == (20.0, 40.0, 60.0, 10.0, 12.0)
    baseline = stats["PyTorch"]["speed"]
    assert (baseline.median, baseline.ratio, baseline.ratio_low, baseline.ratio_high) == (10.0, None, None, None)


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    stats = summarize({"a": {"n": [1.0, 2.0, 10.0]}, "b": {"n": [5.0, 4.0, 10.0]}}, baseline="a")
    assert stats["b"]["n"].ratio == 2.0  # of 5, 2 and 1; the medians are 2 and 5


def test_a_number_that_the_baseline_has_in_fewer_rounds_or_not_at_all() -> None:
    stats = summarize({"a": {"start": [10.0, 20.0]}, "b": {"start": [1.0, 4.0, 9.0], "own": [1.0]}}, baseline="a")
    assert stats["b"]["start"].median == 4.0
    assert stats["b"]["start"].ratio == pytest.approx(0.15)  # of 0.1 and 0.2
    assert stats["b"]["own"].ratio is None


def test_there_is_no_ratio_to_nothing() -> None:
    stats = summarize({"a": {"x": [0.0, 2.0], "y": [0.0]}, "b": {"x": [1.0, 1.0], "y": [1.0]}}, baseline="a")
    assert stats["b"]["x"].ratio == 0.5
    assert stats["b"]["y"].ratio is None


@pytest.mark.parametrize(
    ("cost_s", "expected"),
    [
        (0.01, 200),  # the slowest needs 10 ms a unit
        (0.0001, 1000),  # more than there may be
        (10.0, 8),  # less than there may be
    ],
)
def test_as_much_work_as_the_slowest_does_in_the_time(cost_s: float, expected: int) -> None:
    now_s = 0.0
    done: list[int] = []

    def run(subject: float, count: int) -> None:
        nonlocal now_s
        done.append(count)
        now_s += subject * count

    count = fitting_count([cost_s / 5, cost_s], run, 2.0, least=8, most=1000, clock=lambda: now_s)
    assert count == expected
    assert done[:2] == [8, 8]  # both are warmed up
    # The last trial took at least a quarter of the time, or was as large as it may be.
    assert done[-1] * cost_s >= 0.5 or done[-1] == 1000
