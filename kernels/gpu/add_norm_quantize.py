"""The op `add_norm_quantize` (contract: `rtx.kernels.add_norm_quantize`) in Triton.

One program makes one row: it reads x and residual once, and keeps the row in registers, in a block of the next power of
two, until sum, norm, scale and codes are written. In half precision that is 4 bytes read and 1 written for each element
(3 where the sum, 5 where the normalised row is wanted as well); one kernel an op, each through memory, would move 13.
Weight and bias are the same for all rows and come from the L2 cache.

Why so:
    - Three reductions (mean, squares, largest magnitude) follow one another. With the row in registers none of them
      reads it again, and the variance is that of differences from the mean: no large squares are subtracted.
    - Each row is one program's: its bits do not depend on the batch.
    - `width` is a constant of the compiled kernel, as a model has one: it then knows that rows begin at multiples of 16
      bytes, and loads that much at a time. (A view that begins elsewhere has a kernel of its own, which may add in
      another order.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtx.kernels.add_norm_quantize import NORMS
from rtx.kernels.gpu.ahead import Build
from rtx.kernels.gpu.arguments import device_of, expect, told
from rtx.kernels.int8_linear import LEVELS, SMALLEST_SCALE

MOST_COLUMNS = 16384
"""Of a row: beyond this it does not fit into the registers of a block."""

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Quantized(NamedTuple):
    """
    Attributes:
        codes: [..., width] int8.
        scale: [...] float32; y ≈ scale * codes.
        sum: [..., width] of the type of x, or None.
        y: [..., width] of the type of x, or None.
    """

    codes: Tensor
    scale: Tensor
    sum: Tensor | None
    y: Tensor | None


@triton.jit
def add_norm_quantize_kernel(
    x: tl.tensor,  # [rows, width]
    residual: tl.tensor,  # [rows, width] or None
    weight: tl.tensor,  # [width]
    bias: tl.tensor,  # [width] or None
    codes: tl.tensor,  # [rows, width] int8
    scale: tl.tensor,  # [rows] float32
    total: tl.tensor,  # [rows, width] or None
    y: tl.tensor,  # [rows, width] or None
    width: tl.constexpr,
    block: tl.constexpr,
    centred: tl.constexpr,
    epsilon: tl.constexpr,
    levels: tl.constexpr,
    smallest_scale: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    held = columns < width
    at = row * width + columns

    values = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + at, mask=held, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + at, values.to(total.dtype.element_ty), mask=held)
    if centred:
        values = tl.where(held, values - tl.div_rn(tl.sum(values), width * 1.0), 0.0)
    square = tl.div_rn(tl.sum(values * values), width * 1.0)
    values *= tl.rsqrt(square + epsilon)
    values *= tl.load(weight + columns, mask=held, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, mask=held, other=0.0).to(tl.float32)
    if y is not None:
        tl.store(y + at, values.to(y.dtype.element_ty), mask=held)

    # A maximum passes NaN over. The mean square is NaN or infinite where anything in the row is or becomes so, and
    # leaves nothing in every other row.
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(values)), levels * 1.0), smallest_scale) + square * 0.0
    tl.store(scale + row, step)
    steps = tl.div_rn(values, step)
    # 1.5 * 2**23, beside which no fraction has room: the sum rounds half to even. NaN is not equal to itself, and has
    # no code.
    rounded = tl.where(steps == steps, (steps + 12582912.0) - 12582912.0, 0.0)
    clipped = tl.minimum(tl.maximum(rounded, -levels * 1.0), levels * 1.0)
    tl.store(codes + at, clipped.to(tl.int8), mask=held)


def add_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str,
    epsilon: float,
    give_sum: bool = False,
    give_y: bool = False,
) -> Quantized:
    """y = norm(x + residual) in 8 bits.

    Args:
        x: [..., width] float32, float16 or bfloat16, contiguous; width 1 to MOST_COLUMNS.
        residual: as x; None for zeros.
        weight: [width] float32, float16 or bfloat16.
        bias: as weight, of layer_norm; None for zeros.
        norm: of `rtx.kernels.add_norm_quantize.NORMS`.
        epsilon: added to the variance or the mean square.
        give_sum: also write x + residual, in the type of x.
        give_y: also write y, in the type of x.

    Raises:
        ValueError: an argument is not as above, or not on the device of x.
    """
    _check(x, residual, weight, bias, norm)
    width = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    total = torch.empty_like(x) if give_sum else None
    y = torch.empty_like(x) if give_y else None
    if scale.numel():
        block = triton.next_power_of_2(width)
        with device_of(x):
            add_norm_quantize_kernel[(scale.numel(),)](
                x,
                residual,
                weight,
                bias,
                codes,
                scale,
                total,
                y,
                **_constants(width, norm, epsilon),
                num_warps=_warps(block),
            )
    return Quantized(codes, scale, total, y)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got '{norm}'")
    if norm == "rms_norm" and bias is not None:
        raise ValueError(f"bias: expected None, as rms_norm has none, got {told(bias)}")
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MOST_COLUMNS or x.dtype not in _TYPES or not x.is_contiguous():
        raise ValueError(f"x: expected [..., 1 to {MOST_COLUMNS}] of floats, contiguous, got {told(x)}")
    if residual is not None:
        expect("residual", residual, x.shape, (x.dtype,), x.device)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            expect(name, vector, x.shape[-1:], _TYPES, x.device)


def _constants(width: int, norm: str, epsilon: float) -> dict[str, Any]:
    return {
        "width": width,
        "block": triton.next_power_of_2(width),
        "centred": norm == "layer_norm",
        "epsilon": epsilon,
        "levels": LEVELS,
        "smallest_scale": SMALLEST_SCALE,
    }


def _warps(block: int) -> int:
    """8 columns a thread, 16 bytes of half precision; beyond 16 warps a block is hard to place."""
    return min(16, max(1, block // 256))


def _build(width: int, norm: str, kind: str, *, bias: bool, residual: bool, total: bool, y: bool) -> Build:
    optional = {
        "residual": kind if residual else None,
        "bias": kind if bias else None,
        "total": kind if total else None,
        "y": kind if y else None,
    }
    return Build(
        kernel=add_norm_quantize_kernel,
        types={
            "x": f"*{kind}",
            "weight": f"*{kind}",
            "codes": "*i8",
            "scale": "*fp32",
            **{name: f"*{given}" for name, given in optional.items() if given is not None},
        },
        constants={
            **_constants(width, norm, 1e-5),
            **{name: None for name, given in optional.items() if given is None},
        },
        warps=_warps(triton.next_power_of_2(width)),
    )


BUILDS: dict[str, Build] = {
    "layer_norm 384 fp16, with y": _build(384, "layer_norm", "fp16", bias=True, residual=True, total=False, y=True),
    "layer_norm 768 bf16, with sum": _build(768, "layer_norm", "bf16", bias=False, residual=True, total=True, y=False),
    "rms_norm 1024 bf16, with sum": _build(1024, "rms_norm", "bf16", bias=False, residual=True, total=True, y=False),
    "rms_norm 4096 bf16, with sum": _build(4096, "rms_norm", "bf16", bias=False, residual=True, total=True, y=False),
    "layer_norm 1024 fp32, with both": _build(1024, "layer_norm", "fp32", bias=True, residual=True, total=True, y=True),
    "rms_norm 33 fp16, codes alone": _build(33, "rms_norm", "fp16", bias=False, residual=False, total=False, y=False),
    "layer_norm 16384 fp32, with both": _build(
        MOST_COLUMNS, "layer_norm", "fp32", bias=True, residual=True, total=True, y=True
    ),
}
