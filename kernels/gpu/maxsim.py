"""The op `maxsim` (contract: `rtx.kernels.maxsim`) in Triton.

One program scores one document: for each block of 32 query tokens it walks the document in blocks of 64 tokens, the
maxima in registers, and adds them up once the document ends. It reads the document once for every 32 query tokens, the
query once for every block (from L2, as every program reads the same), and writes one number.

Why so:
    - Products, query tokens times tokens, are never in memory.
    - A document's blocks begin where it does, and no program has two: its score has the same bits in any batch.
    - No two programs share a document, so nothing is added up afterwards. A long document among short ones runs
      longest and alone; a batch of fewer documents than multiprocessors leaves some idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtx.kernels.gpu.ahead import Build
from rtx.kernels.gpu.arguments import device_of, expect_offsets, names, told

_QUERY_BLOCK = 32
_BLOCK = 64
_STAGES = 2


@triton.jit(do_not_specialize=["query_tokens"])
def maxsim_kernel(
    query: tl.tensor,  # [query_tokens, dim]
    documents: tl.tensor,  # [tokens, dim]
    offsets: tl.tensor,
    out: tl.tensor,
    query_tokens: tl.tensor,
    dim: tl.constexpr,
    query_block: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    document = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + document), tl.load(offsets + document + 1)
    score = tl.full((), 0.0, dtype=tl.float32)
    broken = tl.full((), 0, dtype=tl.int32)
    for first in range(0, query_tokens, query_block):
        row = first + tl.arange(0, query_block)
        has_row = row < query_tokens
        best = tl.full([query_block], float("-inf"), dtype=tl.float32)
        for start in range(begin, end, block):
            token = start + tl.arange(0, block)
            has_token = token < end
            products = tl.full([query_block, block], 0.0, dtype=tl.float32)
            for part in range(0, dim, depth):
                at = part + tl.arange(0, depth)
                fits = at < dim
                left = tl.load(
                    query + row[:, None] * dim + at[None, :], mask=has_row[:, None] & fits[None, :], other=0.0
                )
                here = documents + token[None, :] * dim + at[:, None]
                right = tl.load(here, mask=has_token[None, :] & fits[:, None], other=0.0)
                products = tl.dot(left, right, products, input_precision="ieee")
            real = has_row[:, None] & has_token[None, :]
            # A maximum may pass over NaN. Padding, of zeros, adds nothing here: times infinity it is NaN, where a
            # product of the same vector is not finite either.
            odd = ~(tl.abs(products) < float("inf"))
            broken = tl.maximum(broken, tl.max(tl.max(odd.to(tl.int32), axis=1), axis=0))
            best = tl.maximum(best, tl.max(tl.where(real, products, float("-inf")), axis=1))
        score += tl.sum(tl.where(has_row & (begin < end), best, 0.0), axis=0)
    tl.store(out + document, tl.where(broken > 0, float("nan"), score))


def maxsim(query: Tensor, documents: Tensor, offsets: Tensor) -> Tensor:
    """Score of each document: the sum, over the query's tokens, of the largest product with one of its tokens.

    Args:
        query: [query_tokens, dim] float16 or float32, contiguous.
        documents: [tokens, dim] of the same type, contiguous.
        offsets: [documents + 1] int64, contiguous, rising from 0 to the number of tokens, which only the GPU could
            check: with others it reads what is not there.

    Returns:
        [documents] float32; 0 for a document without tokens, NaN for one with a product that is not finite.

    Raises:
        ValueError: an argument is not as above, or not on the device of `query`.
    """
    _check(query, documents, offsets)
    query_tokens, dim = query.shape
    out = torch.empty(len(offsets) - 1, dtype=torch.float32, device=query.device)
    if len(out):
        with device_of(query):
            maxsim_kernel[(len(out),)](
                query,
                documents,
                offsets,
                out,
                query_tokens,
                dim=dim,
                query_block=_QUERY_BLOCK,
                block=_BLOCK,
                depth=_depth(query.dtype),
                num_stages=_STAGES,
            )
    return out


def _check(query: Tensor, documents: Tensor, offsets: Tensor) -> None:
    if query.dim() != 2 or query.dtype not in (torch.float16, torch.float32) or not query.is_contiguous():
        raise ValueError(f"query: expected [query_tokens, dim] float16 or float32, contiguous, got {told(query)}")
    fits = documents.dim() == 2 and documents.shape[1] == query.shape[1] and documents.dtype == query.dtype
    if not fits or not documents.is_contiguous() or documents.device != query.device:
        expected = f"[tokens, {query.shape[1]}] {names([query.dtype])}, contiguous, on {query.device}"
        raise ValueError(f"documents: expected {expected}, as query is, got {told(documents)}")
    expect_offsets("documents", offsets, query.device)


def _depth(kind: torch.dtype) -> int:
    """Columns at a time; float32 is multiplied without tensor cores, each thread with its operands in registers."""
    return 64 if kind == torch.float16 else 16


def _build(dim: int, kind: str) -> Build:
    return Build(
        kernel=maxsim_kernel,
        types={
            "query": f"*{kind}",
            "documents": f"*{kind}",
            "offsets": "*i64",
            "out": "*fp32",
            "query_tokens": "i32",
        },
        constants={
            "dim": dim,
            "query_block": _QUERY_BLOCK,
            "block": _BLOCK,
            "depth": _depth(torch.float16 if kind == "fp16" else torch.float32),
        },
        stages=_STAGES,
    )


BUILDS: dict[str, Build] = {
    "128 fp16": _build(128, "fp16"),
    "96 fp16": _build(96, "fp16"),
    "128 fp32": _build(128, "fp32"),
    "768 fp32": _build(768, "fp32"),
}
