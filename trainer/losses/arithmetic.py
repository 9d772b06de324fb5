"""The precision in which losses are computed, whatever the model runs in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from rtx.trainer.losses.targets import Targets

P = ParamSpec("P")


def full(values: Tensor) -> Tensor:
    """The values in float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def at_least_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A loss `(*outputs, targets, /, **options)` to which everything comes in one type, float32 or float64.

    The type is float64 if the first output has it. Autocast is off inside.
    """

    # bfloat16 numbers between 16 and 32 are 0.125 apart: scaled cosines of hard negatives would tie.
    @functools.wraps(loss)
    def in_full(*arguments: P.args, **options: P.kwargs) -> Tensor:
        *outputs, targets = cast("tuple[Any, ...]", arguments)
        dtype = full(outputs[0]).dtype
        with torch.autocast(outputs[0].device.type, enabled=False):
            outputs = [output.to(dtype) for output in outputs]
            return cast("Callable[..., Tensor]", loss)(*outputs, _with_dtype(targets, dtype), **options)

    return in_full


def mean(values: Tensor) -> Tensor:
    """The mean, and 0 with a gradient of 0 where there is nothing."""
    return values.sum() / max(values.numel(), 1)


def _with_dtype(targets: Targets, dtype: torch.dtype) -> Targets:
    guide = targets.guide
    return targets._replace(
        labels=targets.labels.to(dtype),
        guide=None if guide is None else (guide[0].to(dtype), guide[1].to(dtype)),
    )
