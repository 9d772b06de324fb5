"""Weights in 4 bits, a scale for each block of inputs; and what channels are multiplied by so that less is lost.

Channels of large values carry most of a layer's result, and the rounding of their weights most of its error. Before
it is rounded, a weight's row is divided by a number that is less than 1 for such a channel, and the activation is
multiplied by it (AWQ, Lin et al. 2023, arXiv 2306.00978):

    factor[channel] ~ 1 / rms(x[channel]) ** strength          x @ W = (x * factor) @ (W / factor)

Which strength is best differs by layer: each is tried on calibration rows, and what changes the results least is taken.

What is clipped is decided a block at a time, by what it does to the results as far as one block tells:

    error[block, out] = off @ moments[block] @ off          off = rounded - exact, moments = mean of x[block] x[block]^T

and without calibration rows by the error of the weights, which is moments of 1. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.export.scales import Seen, half_up

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Of the factors: 0 leaves the activation as it is."""

# 4 bits and 16 / 64 more a weight. Smaller where a layer's inputs are no multiple of it.
BLOCKS = (64, 32, 16)
_LOWEST, _HIGHEST = -8, 7
# A block's largest magnitude is clipped where that makes its other steps so much finer that the error is less.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# What strengths are tried on: of a large layer a part says enough.
_TRIED_ROWS, _TRIED_COLUMNS = 512, 1024
# Of an activation times its factor, which is in half precision: other items than those of calibration come higher.
_MOST = float(np.finfo(np.float16).max) / 2
# Of a channel: what was 0 in calibration need not be so for ever.
_LEAST_SHARE, _LEAST_MAGNITUDE = 1e-2, 1e-5


class Int4Blocks(NamedTuple):
    """A weight in 4 bits.

    Attributes:
        values: [in, out] int8, -8 to 7.
        scale: [in / block, out] float32, in half precision to the last bit.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """[in, out] float32: the weight that the integers stand for."""
        return self.values.astype(np.float32) * self.scale.repeat(len(self.values) // len(self.scale), axis=0)


def quantize_blocks(weight: NDArray[np.float32], block: int, moments: NDArray[np.float32] | None = None) -> Int4Blocks:
    """Round a weight [in, out] to 4 bits, each output channel in blocks of inputs.

    Args:
        weight: finite; `in` is a multiple of `block`.
        block: inputs that share a scale.
        moments: [in / block, block, block], finite, of what the weight is multiplied by, to any scale; blocks are
            clipped by the error of results then, and by that of weights without.
    """
    blocks = weight.reshape(-1, block, weight.shape[1])
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    values = np.empty(blocks.shape, dtype=np.int8)
    scale = np.empty(largest.shape, dtype=np.float32)
    least = np.full(largest.shape, np.inf, dtype=np.float32)
    for clip in _CLIPS:
        step = half_up(largest * np.float32(clip / _HIGHEST))
        rounded = np.clip(np.rint(blocks / step), _LOWEST, _HIGHEST)
        off = rounded * step - blocks
        error = (off * (off if moments is None else moments @ off)).sum(axis=1, keepdims=True)
        better = error < least
        np.copyto(values, rounded, where=better, casting="unsafe")
        np.copyto(scale, step, where=better)
        np.copyto(least, error, where=better)
    return Int4Blocks(values.reshape(weight.shape), scale[:, 0])


@dataclass(frozen=True)
class Factor:
    """What an activation is multiplied by, and what that is good for.

    Attributes:
        modules: that read it, as `RetrievalModel.named_modules` calls them.
        strength: that it was found by.
        values: [channels] float32, in half precision to the last bit; None for strength 0.
        error: of the layers' results on calibration rows, sum of squares |in 4 bits - exact| / |exact|.
        plain_error: likewise, with weights rounded as they are.
        moments: [channels / block, block, block] float32, of the activation times its factor, by which blocks are
            clipped; None where the error of weights alone serves better.
    """

    modules: tuple[str, ...]
    strength: float
    values: NDArray[np.float32] | None
    error: float
    plain_error: float
    moments: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it."""
        numbers = {name: getattr(self, name) for name in ("strength", "error", "plain_error")}
        return {"modules": list(self.modules), **numbers}


Factors = Mapping[str, Factor]
"""By the name that an activation has in the plain graph."""


def block_of(inputs: int) -> int | None:
    """How many inputs share a scale; None where no block divides them."""
    return next((size for size in BLOCKS if inputs % size == 0), None)


def choose_factor(seen: Seen, weight: NDArray[np.float32], *, modules: tuple[str, ...] = ()) -> Factor | None:
    """The factor of an activation that changes its layers' results least; None where no block divides its channels.

    Args:
        seen: of the activation.
        weight: [channels, out] float32, of all layers that read it.
        modules: for the record.
    """
    block = block_of(len(weight))
    if block is None:
        return None
    rows, tried = _some(seen.rows, _TRIED_ROWS), np.ascontiguousarray(_some(weight.T, _TRIED_COLUMNS).T)
    exact = rows @ tried
    size = float(np.square(exact).sum()) or 1.0
    magnitude = np.sqrt(np.square(seen.rows, dtype=np.float64).mean(axis=0))

    def error(moved: NDArray[np.float32], read: NDArray[np.float32], moments: NDArray[np.float32] | None) -> float:
        return float(np.square(read @ quantize_blocks(moved, block, moments).dequantize() - exact).sum()) / size

    plain_error = error(tried, rows, None)
    found = [Factor(modules, 0.0, None, plain_error, plain_error)]
    for strength in STRENGTHS:
        values = _factor(magnitude, strength)
        if values is not None and float((seen.largest * values).max()) > _MOST:
            continue
        moved, factor = (tried, np.float32(1)) if values is None else (tried / values[:, np.newaxis], values)
        moments = _moments(seen.rows * factor, block)
        found.append(Factor(modules, strength, values, error(moved, rows * factor, moments), plain_error, moments))
    return min(found, key=lambda one: one.error)


def _moments(rows: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """[channels / block, block, block] float32, of numbers within ±1; what was 0 has some too."""
    scaled = rows / np.float32(np.abs(rows).max() or 1)
    blocks = scaled.reshape(len(rows), -1, block).swapaxes(0, 1)
    found: NDArray[np.float32] = np.matmul(blocks.swapaxes(1, 2), blocks) / np.float32(len(rows))
    own = np.diagonal(found, axis1=1, axis2=2)
    least = np.float32(max(_LEAST_SHARE**2 * float(np.median(own)), _LEAST_MAGNITUDE**2))
    return found + least * np.eye(block, dtype=np.float32)


def _factor(magnitude: NDArray[np.float64], strength: float) -> NDArray[np.float32] | None:
    """[channels] float32, around 1, and in half precision to the last bit."""
    if strength == 0:
        return None
    divisor = np.maximum(magnitude, max(_LEAST_SHARE * float(np.median(magnitude)), _LEAST_MAGNITUDE)) ** strength
    factor: NDArray[np.float64] = np.exp(np.log(divisor).mean()) / divisor
    limits = np.finfo(np.float16)
    return np.clip(factor, float(limits.smallest_normal), float(limits.max)).astype(np.float16).astype(np.float32)


def _some(rows: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]
