"""The op `int8_linear` (contract: `rtx.kernels.int8_linear`) in Triton, on the tensor cores, of rows already in 8 bits.

    y = activation(scale_x[token] * scale_w[out] * (xq @ Wq^T) + bias)

xq [tokens, in] int8 and scale_x [tokens] are what `rtx.kernels.gpu.add_norm_quantize` gives: symmetric, without the
centre of the contract, whose term and whose column sums fall away. The sum of products is exact, in 32 bits
(128 * 128 * in < 2**31 for in <= MOST_INPUTS), so that neither the blocks nor the rest of the batch change a bit of y.

One program makes a tile of y, `block_tokens` by `block_out`: it walks along `in`, `block_in` at a time, with a tile of
xq and one of Wq in shared memory, and keeps the sums in registers; scales, bias and activation are applied to them
there, and y is written once. xq is read out / block_out times and Wq tokens / block_tokens times, mostly from the L2
cache: neighbouring programs share their tile of Wq.

Why so:
    - Wq is [out, in], the transpose of Int8Weight's and the layout of torch.nn.Linear. Tensor cores take four
      neighbouring numbers along `in` in one register, of both operands; mma and wgmma in 8 bits take no other order,
      and ldmatrix transposes pairs of bytes, not bytes. Of [in, out] each tile would be shuffled in registers.
    - 128 along `in` are 128 bytes, one line of the cache and one row of the swizzled shared memory.
    - Few tokens (queries) have tiles of 16, the fewest of an mma: they wait for the weight, not for arithmetic.
    - `inputs` and `outputs` are constants of the compiled kernel, as a layer has one of each: where they are multiples
      of 16, rows begin at multiples of 16 bytes, and are copied that much at a time. The number of tokens is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtx.kernels.gpu.ahead import Build
from rtx.kernels.gpu.arguments import device_of, expect, names, told

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
MOST_INPUTS = (2**31 - 1) // 128**2

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Up to this many tokens have the small tile.
_FEW = 64


@triton.jit(do_not_specialize=["tokens"])
def int8_linear_kernel(
    xq: tl.tensor,  # [tokens, inputs] int8
    scale_x: tl.tensor,  # [tokens] float32
    wq: tl.tensor,  # [outputs, inputs] int8
    scale_w: tl.tensor,  # [outputs] float32
    bias: tl.tensor,  # [outputs] or None
    y: tl.tensor,  # [tokens, outputs]
    tokens: tl.tensor,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    activation: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
) -> None:
    row = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    out = tl.program_id(1) * block_out + tl.arange(0, block_out)
    column = tl.arange(0, block_in)
    # In 64 bits: a batch may have more than 2**31 elements.
    x_at = xq + row.to(tl.int64)[:, None] * inputs + column[None, :]
    w_at = wq + out.to(tl.int64)[:, None] * inputs + column[None, :]

    sums = tl.zeros([block_tokens, block_out], dtype=tl.int32)
    for start in range(0, inputs, block_in):
        held = column[None, :] < inputs - start
        x_tile = tl.load(x_at + start, mask=(row[:, None] < tokens) & held, other=0)
        w_tile = tl.load(w_at + start, mask=(out[:, None] < outputs) & held, other=0)
        sums = tl.dot(x_tile, tl.trans(w_tile), sums, out_dtype=tl.int32)

    there = (row[:, None] < tokens) & (out[None, :] < outputs)
    per_out = tl.load(scale_w + out, mask=out < outputs, other=0.0)
    per_row = tl.load(scale_x + row, mask=row < tokens, other=0.0)
    # fma where a compiler might make one of a product and a sum, for the same bits of every tile.
    values = sums.to(tl.float32) * per_out[None, :]
    if bias is None:
        values *= per_row[:, None]
    else:
        more = tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)
        values = tl.fma(values, per_row[:, None], more[None, :])
    if activation == "gelu":
        values *= 0.5 * (1.0 + tl.erf(values * 0.7071067811865476))
    elif activation == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), with z = sqrt(2 / pi) * (x + 0.044715 * x^3).
        values *= tl.sigmoid(1.5957691216057308 * values * tl.fma(0.044715 * values, values, 1.0))
    elif activation == "silu":
        values *= tl.sigmoid(values)
    at = row.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(y + at, values.to(y.dtype.element_ty), mask=there)


def int8_linear(
    xq: Tensor,
    scale_x: Tensor,
    wq: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """A linear layer in 8 bits, with what follows it.

    Args:
        xq: [..., in] int8, contiguous; in 1 to MOST_INPUTS.
        scale_x: [...] float32, contiguous; a scale of NaN makes its row NaN.
        wq: [out, in] int8, contiguous: `transpose_weight` makes it of an Int8Weight.
        scale_w: [out] float32.
        bias: [out] float32, float16 or bfloat16; None for zeros.
        activation: of ACTIVATIONS; gelu is the exact one, by erf.
        dtype: of y: float32, float16 or bfloat16.

    Returns:
        [..., out] of `dtype`.

    Raises:
        ValueError: an argument is not as above, or not on the device of xq.
    """
    _check(xq, scale_x, wq, scale_w, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got '{activation}'")
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected {names(_FLOATS)}, got {names((dtype,))}")
    outputs, inputs = wq.shape
    tokens = scale_x.numel()
    y = torch.empty((*xq.shape[:-1], outputs), dtype=dtype, device=xq.device)
    if y.numel():
        tile, warps, stages = _tile(tokens, inputs)
        grid = (triton.cdiv(tokens, tile["block_tokens"]), triton.cdiv(outputs, tile["block_out"]))
        with device_of(xq):
            int8_linear_kernel[grid](
                xq,
                scale_x,
                wq,
                scale_w,
                bias,
                y,
                tokens,
                inputs=inputs,
                outputs=outputs,
                activation=activation,
                **tile,
                num_warps=warps,
                num_stages=stages,
            )
    return y


def transpose_weight(values: Tensor) -> Tensor:
    """Integers of an Int8Weight, [in, out] uint8 about 128, as the operator takes them: [out, in] int8 about 0.

    Raises:
        ValueError: `values` is no such matrix.
    """
    if values.dim() != 2 or values.dtype != torch.uint8:
        raise ValueError(f"values: expected [in, out] uint8, got {told(values)}")
    # The highest bit is all that differs between a number about 128 and one about 0.
    return (values ^ 128).view(torch.int8).T.contiguous()


def _check(xq: Tensor, scale_x: Tensor, wq: Tensor, scale_w: Tensor, bias: Tensor | None) -> None:
    if xq.dim() == 0 or not 1 <= xq.shape[-1] <= MOST_INPUTS or xq.dtype != torch.int8 or not xq.is_contiguous():
        raise ValueError(f"xq: expected [..., 1 to {MOST_INPUTS}] int8, contiguous, got {told(xq)}")
    if wq.dim() != 2:
        raise ValueError(f"wq: expected [out, in] int8, got {told(wq)}")
    outputs = wq.shape[:1]
    expect("scale_x", scale_x, xq.shape[:-1], (torch.float32,), xq.device)
    expect("wq", wq, torch.Size((*outputs, xq.shape[-1])), (torch.int8,), xq.device)
    expect("scale_w", scale_w, outputs, (torch.float32,), xq.device)
    if bias is not None:
        expect("bias", bias, outputs, _FLOATS, xq.device)


def _tile(tokens: int, inputs: int) -> tuple[dict[str, int], int, int]:
    """The blocks, the warps and the stages."""
    # Rows that begin anywhere are loaded byte by byte: the addresses of a large tile do not fit into the registers.
    if tokens <= _FEW or inputs % 16:
        return {"block_tokens": 16, "block_out": 64, "block_in": 128}, 4, 4
    # Of 4 stages, 2 * 128 * 128 bytes each, Triton keeps 3 in shared memory: 96 KiB, of the 99 that the smallest of the
    # GPUs have. On H100 and B200, which have 227, it keeps all 4.
    return {"block_tokens": 128, "block_out": 128, "block_in": 128}, 8, 4


def _build(tokens: int, inputs: int, outputs: int, activation: str, kind: str, *, bias: bool = True) -> Build:
    tile, warps, stages = _tile(tokens, inputs)
    return Build(
        kernel=int8_linear_kernel,
        types={
            "xq": "*i8",
            "scale_x": "*fp32",
            "wq": "*i8",
            "scale_w": "*fp32",
            **({"bias": f"*{kind}"} if bias else {}),
            "y": f"*{kind}",
            "tokens": "i32",
        },
        constants={
            "inputs": inputs,
            "outputs": outputs,
            "activation": activation,
            **({} if bias else {"bias": None}),
            **tile,
        },
        warps=warps,
        stages=stages,
    )


_MANY = _FEW + 1
BUILDS: dict[str, Build] = {
    "gelu 384 to 1536 fp16, many tokens": _build(_MANY, 384, 1536, "gelu", "fp16"),
    "gelu 384 to 1536 fp16, few tokens": _build(1, 384, 1536, "gelu", "fp16"),
    "none 4096 to 1024 bf16, many tokens": _build(_MANY, 4096, 1024, "none", "bf16", bias=False),
    "none 4096 to 1024 bf16, few tokens": _build(1, 4096, 1024, "none", "bf16", bias=False),
    "silu 1024 to 3072 bf16, many tokens": _build(_MANY, 1024, 3072, "silu", "bf16", bias=False),
    "gelu_tanh 768 to 3072 fp32, many tokens": _build(_MANY, 768, 3072, "gelu_tanh", "fp32"),
    "none 33 to 7 fp32, few tokens": _build(1, 33, 7, "none", "fp32"),
    "gelu 333 to 77 fp16, many tokens": _build(_MANY, 333, 77, "gelu", "fp16"),
    "silu 336 to 77 fp16, many tokens": _build(_MANY, 336, 77, "silu", "fp16"),
}
