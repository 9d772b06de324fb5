"""The plot of a training run: which lines it has, and that it says in words what it shows."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from rtx.trainer.curve import draw_curve, draw_dimensions, thin_out

SVG = "{http://www.w3.org/2000/svg}"
LOSSES = [(10, 2.5), (20, 1.5), (30, 1.0)]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def described(svg: str) -> str:
    return next(e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}desc"))


def lines(svg: str) -> int:
    return len(list(ElementTree.fromstring(svg).iter(f"{SVG}path")))


def test_a_run_without_evaluation_has_its_loss() -> None:
    svg = draw_curve(LOSSES)
    assert described(svg) == "By step. loss: 2.500 at 10, 1.500 at 20, 1.000 at 30"
    assert lines(svg) == 1


def test_evaluations_and_learning_rates_have_axes_of_their_own() -> None:
    rates = [(10, 1e-5), (20, 2e-5), (30, 0.0)]
    evaluations = [(0, 0.41), (15, 0.4722), (30, 0.46)]
    svg = draw_curve(LOSSES, evaluations=evaluations, learning_rates=rates, best_step=15)
    assert lines(svg) == 3
    found = texts(svg)
    assert [found.index(name) for name in ("NDCG@10", "loss", "learning rate, in 1e-5", "step")] == sorted(
        found.index(name) for name in ("NDCG@10", "loss", "learning rate, in 1e-5", "step")
    )
    assert "0.4722 at step 15" in found
    assert "learning rate, in 1e-5: 1.000 at 10, 2.000 at 20, 0.000 at 30" in described(svg)
    assert "0.4100 at 0" in described(svg)


def test_losses_that_are_no_numbers_leave_a_gap() -> None:
    assert draw_curve([*LOSSES, (40, math.nan)]) == draw_curve(LOSSES)
    assert lines(draw_curve([(1, math.nan)], evaluations=[(0, 0.5), (1, 0.4)])) == 1


@pytest.mark.parametrize("losses", [[(5, 1.0)], [(5, 1.0), (6, 1.0)]])
def test_a_short_run_can_be_drawn(losses: list[tuple[int, float]]) -> None:
    assert "1.000 at 5" in described(draw_curve(losses, evaluations=[(0, 0.5)], learning_rates=[(5, 0.0)]))


def test_long_runs_are_averaged() -> None:
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    thin = thin_out(points, most=100)
    assert len(thin) == 100
    assert thin[0] == (5.5, 0.5)
    assert thin[-1] == (995.5, 0.5)
    assert thin_out(points[:100], most=100) == tuple(points[:100])
    assert len(thin_out(points[:101], most=100)) == 51


def test_quality_by_dimension_has_a_line_and_a_name_a_model() -> None:
    svg = draw_dimensions({"Matryoshka": [(32, 0.43), (64, 0.46), (128, 0.47)], "InfoNCE": [(32, 0.3), (128, 0.48)]})
    assert lines(svg) == 2
    assert {"Matryoshka", "InfoNCE", "32", "64", "128", "dimensions", "NDCG@10"} <= set(texts(svg))
    assert "NDCG@10, InfoNCE: 0.3000 at 32, 0.4800 at 128" in described(svg)
