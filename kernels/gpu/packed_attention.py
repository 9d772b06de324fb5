"""The op `packed_attention` (contract: `rtx.kernels.packed_attention`) in Triton: flash attention (arXiv 2205.14135).

One program takes 64 queries (float32: 32) of one head of one sequence and walks the keys that these see, block by
block: scores, their running maximum and sum, and the sum of values so far stay in registers, rescaled whenever the
maximum moves. It reads its queries once, keys and values of its own sequence once, and writes its rows once.

Why so:
    - Scores, length * length of a head, are never in memory.
    - Blocks begin where the sequence does: a sequence has the same bits in any batch.
    - Blocks of keys that nothing in the program sees, behind it or beyond the window, are skipped: with a window the
      work is length * window.
    - The grid has as many blocks for each sequence as the longest needs; those of shorter ones read two offsets and
      end, which no GPU has timed yet; no list of blocks has to be made and copied first.
    - A width that is no power of two is padded in registers, not in memory: 96 is multiplied as 128.

Products of half precision are exact in float32; weights are rounded to the type of the values to be multiplied by
tensor cores. float32 is multiplied as such, without them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtx.kernels.gpu.ahead import Build
from rtx.kernels.gpu.arguments import device_of, expect_offsets, names, told

MAX_WIDTH = 128

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_STAGES = 2


@triton.jit(do_not_specialize=["blocks", "scale", "window"])
def packed_attention_kernel(
    query: tl.tensor,  # [tokens, heads, width]
    key: tl.tensor,  # [tokens, key_heads, width]
    value: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    blocks: tl.tensor,  # of the longest sequence
    scale: tl.tensor,
    window: tl.tensor,
    causal: tl.constexpr,
    has_window: tl.constexpr,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    key_block: tl.constexpr,
    widen: tl.constexpr,  # multiply in float32: NumPy, in the interpreter, has no bfloat16
) -> None:
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    first = (tl.program_id(0) % blocks) * block
    if first >= length:
        return
    head = tl.program_id(1)
    key_head = head // (heads // key_heads)
    column = tl.arange(0, padded)
    fits = (column < width)[None, :]
    row = first + tl.arange(0, block)
    has_row = (row < length)[:, None]
    place = ((begin + row) * heads + head)[:, None] * width + column[None, :]
    queries = tl.load(query + place, mask=has_row & fits, other=0.0)
    if widen:
        queries = queries.to(tl.float32)

    low, high = 0, length
    if causal:
        high = tl.minimum(high, first + block)
    if has_window:
        low = tl.maximum(first - window, 0) // key_block * key_block
        high = tl.minimum(high, first + block + window)
    largest = tl.full([block], float("-inf"), dtype=tl.float32)
    total = tl.full([block], 0.0, dtype=tl.float32)
    found = tl.full([block, padded], 0.0, dtype=tl.float32)
    for start in range(low, high, key_block):
        other = start + tl.arange(0, key_block)
        has_other = other < length
        there = ((begin + other) * key_heads + key_head) * width
        keys = tl.load(
            key + there[None, :] + column[:, None], mask=has_other[None, :] & (column < width)[:, None], other=0.0
        )
        values = tl.load(value + there[:, None] + column[None, :], mask=has_other[:, None] & fits, other=0.0)
        if widen:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        distance = other[None, :] - row[:, None]
        seen = has_other[None, :] & has_row
        if causal:
            seen = seen & (distance <= 0)
        if has_window:
            seen = seen & (distance <= window) & (distance >= -window)
        scores = tl.where(seen, tl.dot(queries, keys, input_precision="ieee") * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # Where a row has seen nothing yet, the difference of two infinities would be NaN.
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(largest - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        found = tl.dot(weights.to(values.dtype), values, found * shrink[:, None], input_precision="ieee")
        largest = larger
    found = found / tl.where(has_row, total[:, None], 1.0)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=has_row & fits)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int = -1,
    longest: int | None = None,
) -> Tensor:
    """Attention within each of several sequences that lie one behind the other.

    Args:
        query: [tokens, heads, width] float16, bfloat16 or float32, contiguous; width 1 to MAX_WIDTH.
        key, value: [tokens, key_heads, width] of the same type, contiguous; heads is a multiple of key_heads.
        offsets: [sequences + 1] int64, contiguous, rising from 0 to the number of tokens, which only the GPU could
            check: with others it reads what is not there.
        scale: factor of the scores.
        causal: whether a token sees none behind it.
        window: how far a token sees; negative for any distance.
        longest: no sequence has more tokens; what it has more is not computed. None to ask `offsets`, which waits for
            the GPU.

    Returns:
        [tokens, heads, width] of the same type.

    Raises:
        ValueError: an argument is not as above, or not on the device of `query`.
    """
    _check(query, key, value, offsets)
    if longest is None:
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    out = torch.empty_like(query)
    _, heads, width = query.shape
    block, key_block = _blocks(query.dtype)
    blocks = -(-longest // block)
    if blocks and len(query):
        with device_of(query):
            packed_attention_kernel[(blocks * (len(offsets) - 1), heads)](
                query,
                key,
                value,
                offsets,
                out,
                blocks,
                scale,
                min(window, longest),
                causal=causal,
                has_window=window >= 0,
                heads=heads,
                key_heads=key.shape[1],
                width=width,
                padded=_padded(width),
                block=block,
                key_block=key_block,
                widen=not query.is_cuda,
                num_warps=_warps(query.dtype, width),
                num_stages=_STAGES,
            )
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> None:
    fits = query.dim() == 3 and query.shape[1] > 0 and 1 <= query.shape[2] <= MAX_WIDTH
    if not fits or query.dtype not in _TYPES or not query.is_contiguous():
        expected = f"[tokens, heads, 1 to {MAX_WIDTH}] float16, bfloat16 or float32, contiguous"
        raise ValueError(f"query: expected {expected}, got {told(query)}")
    tokens, heads, width = query.shape
    for name, side in (("key", key), ("value", value)):
        fits = side.dim() == 3 and side.shape == (tokens, key.shape[1], width) and side.dtype == query.dtype
        if not fits or not side.is_contiguous() or side.device != query.device:
            expected = f"[{tokens}, key_heads, {width}] {names([query.dtype])}, contiguous, on {query.device}"
            raise ValueError(f"{name}: expected {expected}, got {told(side)}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: expected heads that divide the query's {heads}, got {key.shape[1]}")
    expect_offsets("sequences", offsets, query.device)


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _blocks(kind: torch.dtype) -> tuple[int, int]:
    """Queries and keys at a time; float32, without tensor cores, has operands in registers."""
    return (32, 16) if kind == torch.float32 else (64, 64)


def _warps(kind: torch.dtype, width: int) -> int:
    """With 4, queries, scores and values so far of 128 columns take more registers than threads have."""
    return 8 if kind != torch.float32 and _padded(width) == 128 else 4


def _build(kind: str, width: int, *, groups: int = 1, causal: bool = False, has_window: bool = False) -> Build:
    block, key_block = _blocks(torch.float32 if kind == "fp32" else torch.float16)
    return Build(
        kernel=packed_attention_kernel,
        types={
            **dict.fromkeys(("query", "key", "value"), f"*{kind}"),
            "offsets": "*i64",
            "out": f"*{kind}",
            "blocks": "i32",
            "scale": "fp32",
            "window": "i32",
        },
        constants={
            "causal": causal,
            "has_window": has_window,
            "heads": 12,
            "key_heads": 12 // groups,
            "width": width,
            "padded": _padded(width),
            "block": block,
            "key_block": key_block,
            "widen": False,
        },
        warps=_warps(torch.float32 if kind == "fp32" else torch.float16, width),
        stages=_STAGES,
    )


BUILDS: dict[str, Build] = {
    "32 fp16": _build("fp16", 32),
    "64 bf16 window": _build("bf16", 64, has_window=True),
    "96 fp16 causal": _build("fp16", 96, causal=True),
    "128 bf16 causal, heads share keys": _build("bf16", 128, groups=4, causal=True),
    "64 fp32": _build("fp32", 64),
    "128 fp32 causal window": _build("fp32", 128, causal=True, has_window=True),
}
