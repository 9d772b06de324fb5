"""The op `pool` (contract: `rtx.kernels.pool`) in Triton, and what follows it in one pass: cut, L2 norm, code.

One program makes one row's vector: all its columns stand in registers, in a block of the next power of two, while the
tokens pass one after the other. It reads the mask (twice: where the row begins and ends, then token by token), the
first `dimension` columns of every pooled token once, and writes the vector once, in its final type; nothing between
pooling and the code is written or read again. Padding is not read.

Why so:
    - The norm needs all columns of a row. A program that had only some would have to write them and start again.
    - Tokens are added in their order, one by one, and a token left out adds nothing: the sum has the same bits alone,
      in any batch and at any padding. Sums of blocks of tokens would differ with where the padding ends.
    - `width` and `dimension` are constants of the compiled kernel, as a model has one: it then knows that rows begin
      at multiples of 16 bytes, and loads that much at a time. The number of tokens is not: one kernel serves all. (A
      view that begins elsewhere has a kernel of its own, which may add the squares of the norm in another order.)

What is left to the caller: NaN and infinity have no code, and no error comes from here. NaN gets the int8 code 0,
infinity 127.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtx.kernels.gpu.ahead import Build
from rtx.kernels.gpu.arguments import device_of, told
from rtx.kernels.pool import MODES, NORM_EPSILON

OUTPUTS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "binary": torch.uint8}

_HIDDEN_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASK_TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@triton.jit(do_not_specialize=["tokens"])
def pool_kernel(
    hidden: tl.tensor,  # [rows, tokens, width]
    mask: tl.tensor,  # [rows, tokens]
    attended: tl.tensor,  # [rows, tokens], read by weightedmean alone
    out: tl.tensor,  # [rows, dimension], or [rows, ceil(dimension / 8)] of bits
    tokens: tl.tensor,
    mode: tl.constexpr,
    width: tl.constexpr,
    dimension: tl.constexpr,
    block: tl.constexpr,
    normalize: tl.constexpr,
    output: tl.constexpr,
    epsilon: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    mask += row * tokens
    attended += row * tokens
    hidden += row * tokens * width
    columns = tl.arange(0, block)

    first = tokens
    last = tl.full((), -1, dtype=tl.int32)
    count = 0
    for start in range(0, tokens, 128):
        at = start + tl.arange(0, 128)
        held = tl.load(mask + at, mask=at < tokens, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(held, at, tokens)))
        last = tl.maximum(last, tl.max(tl.where(held, at, -1)))
        count += tl.sum(held.to(tl.int32))
    # How many columns are read: a vector & a scalar would say the same, and be int32 in the interpreter of Triton 3.9.
    nonempty = tl.where(count > 0, dimension, 0)
    # In 64 bits, as what a token is reached by is: a row may have more than 2**31 elements.
    begin, end = first.to(tl.int64), last.to(tl.int64) + 1

    if mode == "cls" or mode == "lasttoken":
        chosen = begin if mode == "cls" else end - 1
        vector = tl.load(hidden + chosen * width + columns, mask=columns < nonempty, other=0.0).to(tl.float32)
    elif mode == "max":
        vector = tl.full([block], float("-inf"), dtype=tl.float32)
        for token in tl.range(begin, end, loop_unroll_factor=4):
            held = tl.where(tl.load(mask + token) != 0, dimension, 0)
            at = hidden + token * width + columns
            values = tl.load(at, mask=columns < held, other=float("-inf")).to(tl.float32)
            vector = tl.maximum(vector, values, propagate_nan=tl.PropagateNan.ALL)
        vector = tl.where(columns < nonempty, vector, 0.0)
    elif mode == "weightedmean":
        vector = tl.zeros([block], dtype=tl.float32)
        position = 0
        total = tl.full((), 0, dtype=tl.int64)
        # From the first column: positions also count what `mask` leaves out.
        for token in tl.range(0, end, loop_unroll_factor=4):
            held = tl.where(tl.load(mask + token) != 0, dimension, 0)
            position += (tl.load(attended + token) != 0).to(tl.int32)
            at = hidden + token * width + columns
            values = tl.load(at, mask=columns < held, other=0.0).to(tl.float32)
            vector += values * position.to(tl.float32)
            total += tl.where(held > 0, position, 0)
        vector = tl.div_rn(vector, tl.maximum(total, 1).to(tl.float32))
    else:
        vector = tl.zeros([block], dtype=tl.float32)
        for token in tl.range(begin, end, loop_unroll_factor=4):
            held = tl.where(tl.load(mask + token) != 0, dimension, 0)
            at = hidden + token * width + columns
            vector += tl.load(at, mask=columns < held, other=0.0).to(tl.float32)
        divisor = tl.maximum(count, 1).to(tl.float32)
        if mode == "mean_sqrt_len_tokens":
            divisor = tl.sqrt_rn(divisor)
        vector = tl.div_rn(vector, divisor)

    if normalize:
        vector = tl.div_rn(vector, tl.maximum(tl.sqrt_rn(tl.sum(vector * vector)), epsilon))
    if output == "binary":
        places = 7 - tl.arange(0, 8)
        bits = tl.reshape((vector > 0).to(tl.int32), [block // 8, 8]) << places[None, :]
        size: tl.constexpr = (dimension + 7) // 8
        byte = tl.arange(0, block // 8)
        tl.store(out + row * size + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < size)
    elif output == "int8":
        # NaN is not equal to itself. Clipped before, not after: 127 * 1 is a whole number, so that nothing changes.
        clipped = tl.where(vector == vector, tl.minimum(tl.maximum(vector, -1.0), 1.0), 0.0)
        # 1.5 * 2**23, beside which no fraction has room: the one rounding of the whole, of a product that is not
        # rounded before, is half to even.
        code = tl.fma(clipped, 127.0, 12582912.0) - 12582912.0
        tl.store(out + row * dimension + columns, code.to(tl.int8), mask=columns < dimension)
    else:
        tl.store(out + row * dimension + columns, vector.to(out.dtype.element_ty), mask=columns < dimension)


def pool(
    hidden: Tensor,
    mask: Tensor,
    mode: str,
    *,
    attention_mask: Tensor | None = None,
    dimension: int | None = None,
    normalize: bool = False,
    output: str = "float32",
) -> Tensor:
    """One vector for each row of token vectors, cut, normalised and coded.

    Args:
        hidden: [rows, tokens, width] float32, float16 or bfloat16, contiguous.
        mask: [rows, tokens] bool or integer, not 0 for a token that is pooled; contiguous.
        mode: of `rtx.kernels.pool.MODES`.
        attention_mask: as `mask`, by which weightedmean counts positions; None if it is `mask`.
        dimension: how many leading columns to keep, 1 to width; None for all.
        normalize: bring what is kept to L2 norm 1.
        output: of OUTPUTS; int8 and binary are the codes of `rtx.kernels.quantize` without ranges.

    Returns:
        [rows, dimension] of the type of `output`; [rows, ceil(dimension / 8)] uint8 for binary.

    Raises:
        ValueError: an argument is not as above, or not on the device of `hidden`.
    """
    positions = mask if attention_mask is None else attention_mask
    _check(hidden, {"mask": mask, "attention_mask": positions}, mode, output)
    rows, tokens, width = hidden.shape
    kept = width if dimension is None else dimension
    if not 1 <= kept <= width:
        raise ValueError(f"dimension: expected 1 to {width}, got {kept}")
    size = -(-kept // 8) if output == "binary" else kept
    out = torch.empty((rows, size), dtype=OUTPUTS[output], device=hidden.device)
    if rows:
        block = max(8, triton.next_power_of_2(kept))
        with device_of(hidden):
            pool_kernel[(rows,)](
                hidden,
                _bytes_of_bool(mask),
                _bytes_of_bool(positions),
                out,
                tokens,
                mode=mode,
                width=width,
                dimension=kept,
                block=block,
                normalize=normalize,
                output=output,
                epsilon=NORM_EPSILON,
                num_warps=_warps(block),
            )
    return out


def _check(hidden: Tensor, masks: dict[str, Tensor], mode: str, output: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got '{mode}'")
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got '{output}'")
    if hidden.dim() != 3 or not hidden.is_contiguous() or hidden.dtype not in _HIDDEN_TYPES:
        raise ValueError(f"hidden: expected [rows, tokens, width] of floats, contiguous, got {told(hidden)}")
    for name, mask in masks.items():
        fits = mask.shape == hidden.shape[:2] and mask.is_contiguous() and mask.dtype in _MASK_TYPES
        if not fits or mask.device != hidden.device:
            shape = list(hidden.shape[:2])
            raise ValueError(f"{name}: expected {shape} of integers, contiguous, on {hidden.device}, got {told(mask)}")


def _bytes_of_bool(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _warps(block: int) -> int:
    """8 columns a thread, 16 bytes of half precision; beyond 16 warps a block is hard to place."""
    return min(16, max(1, block // 256))


def _build(
    mode: str, width: int, output: str, *, dimension: int | None = None, kind: str = "fp16", masks: str = "i64"
) -> Build:
    kept = width if dimension is None else dimension
    block = max(8, triton.next_power_of_2(kept))
    written = {"float32": "*fp32", "float16": "*fp16", "int8": "*i8", "binary": "*u8"}[output]
    return Build(
        kernel=pool_kernel,
        types={
            "hidden": f"*{kind}",
            "mask": f"*{masks}",
            "attended": f"*{masks}",
            "out": written,
            "tokens": "i32",
        },
        constants={
            "mode": mode,
            "width": width,
            "dimension": kept,
            "block": block,
            "normalize": True,
            "output": output,
            "epsilon": NORM_EPSILON,
        },
        warps=_warps(block),
    )


BUILDS: dict[str, Build] = {
    "mean 384 fp16 to float32": _build("mean", 384, "float32"),
    "mean 768 bf16 to int8": _build("mean", 768, "int8", kind="bf16"),
    "cls 1024 fp16 to float16": _build("cls", 1024, "float16"),
    "lasttoken 4096 cut to 1024 bf16 to binary": _build("lasttoken", 4096, "binary", dimension=1024, kind="bf16"),
    "weightedmean 4096 fp16 to float32": _build("weightedmean", 4096, "float32"),
    "max 768 fp32 to int8": _build("max", 768, "int8", kind="fp32", masks="u8"),
    "mean_sqrt_len_tokens 33 fp32 to binary": _build("mean_sqrt_len_tokens", 33, "binary", kind="fp32"),
}
