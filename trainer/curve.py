"""The course of a training run as an SVG file, for its model card; and the quality of vectors that were cut.

Free of torch. A card shows the file by its relative link: ![Training](training.svg)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rtx.runtime.plots import Panel, Point, Series, svg_panels
from rtx.runtime.svg import standalone

CURVE_NAME = "training.svg"
"""The file beside the model card."""

# More than a line of some hundred units can show: longer ones are averaged.
_MOST_POINTS = 200


def draw_curve(
    losses: Sequence[tuple[int, float]],
    *,
    evaluations: Sequence[tuple[int, float]] = (),
    learning_rates: Sequence[tuple[int, float]] = (),
    metric: str = "ndcg@10",
    best_step: int | None = None,
) -> str:
    """Loss, learning rate and evaluations over the steps of a run, in parts below each other.

    Args:
        losses: (step, mean loss since the last one). One finite loss, evaluation or learning rate has to be there.
        evaluations: (step, value of the metric); step 0 is before training.
        learning_rates: (step, learning rate).
        metric: what the evaluations measure.
        best_step: the evaluation that the weights are from; it is marked.

    Returns:
        The content of an SVG file.
    """
    panels = []
    if evaluations:
        marked = [
            Point(f"{value:.4f} at step {step:,}", step, value, color=2)
            for step, value in evaluations
            if step == best_step
        ]
        name = metric.replace("ndcg", "NDCG").replace("mrr", "MRR").replace("map", "MAP")
        course = Series("", tuple(evaluations), color=2)
        panels.append(Panel(name, (course,), y_min_span=0.01, marked=tuple(marked)))
    if line := thin_out(losses):
        panels.append(Panel("loss", (Series("", line, color=1),), y_min_span=1e-3))
    if learning_rates:
        power = math.floor(math.log10(max(rate for _, rate in learning_rates) or 1.0))
        scaled = [(step, rate / 10.0**power) for step, rate in learning_rates]
        name = f"learning rate, in 1e{power}" if power < 0 else "learning rate"
        panels.append(Panel(name, (Series("", thin_out(scaled), color=3),), height=110))
    return standalone(svg_panels(panels, title="Training", x_label="step"))


def draw_dimensions(lines: Mapping[str, Sequence[tuple[int, float]]], *, metric: str = "NDCG@10") -> str:
    """Quality by the number of dimensions that a vector is cut to, one line a model.

    Args:
        lines: name -> (dimension, value) in ascending order, such as of a model with and without Matryoshka's loss.
        metric: what the values are.

    Returns:
        The content of an SVG file.
    """
    series = tuple(Series(name, tuple(points), color) for color, (name, points) in enumerate(lines.items(), start=1))
    panel = Panel(metric, series, y_min_span=0.01, height=290)
    title = f"{metric} by dimension"
    return standalone(svg_panels([panel], title=title, x_label="dimensions", doubling=True))


def thin_out(points: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> tuple[tuple[float, float], ...]:
    """Means of neighbouring points, if there are more than can be seen. What is not finite is left out.

    Args:
        points: (step, value), ascending.
        most: points to keep.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    size = -(-len(finite) // most) or 1
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return tuple(
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group)) for group in groups
    )
