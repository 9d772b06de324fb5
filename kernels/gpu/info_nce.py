"""The op `info_nce` (contract: `rtx.kernels.info_nce`) in Triton, forward and backward, without a matrix of Q * D.

positives    a program takes 32 queries and their positives: the diagonal of a block of products
forward      a program takes 32 queries and a run of 1,024 documents, block by block: the sum of exponentials of what
             each is above the positive, rescaled whenever the maximum moves (arXiv 1805.02867); of each run it writes
             one number a query: Q * D / 1,024 in all
backward     a program takes 32 vectors of one side and walks those of the other: products again, from them the
             weights of the softmax, and those times the vectors walked by

Why so:
    - Products are recomputed, as 3 passes of Q * D * dim, instead of kept, as 4 * Q * D bytes.
    - The positive comes from the same sums as every product: a copy of it ties with it, at any margin.
    - Exponents count from the positive, not from 0: scale 100 would leave lse - scale * positive 2**-17 of precision.
    - 32 gradients of 4,096 columns do not fit registers: the program adds to its own rows in memory, where no other
      writes, so that no atomic is needed and the sum has one order. That reads and writes 32 * dim numbers for each
      block of 32 vectors walked by, mostly in L2, and no product is computed twice.
    - With few vectors there would be few programs: the columns of the gradient are then split among several. Each
      computes all products of its rows, on multiprocessors that were idle. The bits do not depend on the split.

What a program reads is its own side once a block of the other, and the other side once (backward: twice): Q * D * dim *
(1/32 + 1/32) * 4 bytes, of which L2 has most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtx.kernels.gpu.ahead import Build
from rtx.kernels.gpu.arguments import device_of, expect, told
from rtx.kernels.info_nce import MAX_DIM

_ROWS = 32
_OTHERS = 32
_DEPTH = 16
_COLUMNS = 32
_STAGES = 2
_RUN = 1024
# Programs that fill the multiprocessors of any GPU here.
_ENOUGH = 128


@triton.jit
def _products(
    rows: tl.tensor,
    row: tl.tensor,
    has_row: tl.tensor,
    others: tl.tensor,
    other: tl.tensor,
    has_other: tl.tensor,
    filler: tl.constexpr,
    dim: tl.constexpr,
    depth: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """[rows, others] of what stands at these indices; `filler` is what an index that does not exist holds."""
    found = tl.full([row.shape[0], other.shape[0]], 0.0, dtype=tl.float32)
    for start in range(0, dim, depth):
        at = start + tl.arange(0, depth)
        left = tl.load(rows + row[:, None] * dim + at[None, :], mask=has_row[:, None] & (at < dim)[None, :], other=0.0)
        held = has_other[None, :] & (at < dim)[:, None]
        right = tl.load(others + other[None, :] * dim + at[:, None], mask=held, other=filler)
        if filler != 0.0:
            right = tl.where((at < dim)[:, None], right, 0.0)
        found = tl.dot(left, right, found, input_precision=precision)
    return found


@triton.jit(do_not_specialize=["query_count", "document_count"])
def positives_kernel(
    queries: tl.tensor,
    documents: tl.tensor,
    positives: tl.tensor,
    out: tl.tensor,
    query_count: tl.tensor,
    document_count: tl.tensor,
    dim: tl.constexpr,
    rows: tl.constexpr,
    depth: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    place = tl.arange(0, rows)
    row = tl.program_id(0).to(tl.int64) * rows + place
    has_row = row < query_count
    positive = tl.load(positives + row, mask=has_row, other=0)
    exists = (positive >= 0) & (positive < document_count)
    found = _products(queries, row, has_row, documents, positive, exists, float("nan"), dim, depth, precision)
    tl.store(out + row, tl.sum(tl.where(place[:, None] == place[None, :], found, 0.0), axis=1), mask=has_row)


@triton.jit(do_not_specialize=["query_count", "document_count", "scale", "margin"])
def forward_kernel(
    queries: tl.tensor,
    documents: tl.tensor,
    positives: tl.tensor,
    of_positives: tl.tensor,
    out: tl.tensor,  # [runs, queries]
    query_count: tl.tensor,
    document_count: tl.tensor,
    scale: tl.tensor,
    margin: tl.tensor,
    has_margin: tl.constexpr,
    dim: tl.constexpr,
    rows: tl.constexpr,
    others: tl.constexpr,
    run: tl.constexpr,
    depth: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    has_row = row < query_count
    positive = tl.load(positives + row, mask=has_row, other=0)
    base = tl.load(of_positives + row, mask=has_row, other=0.0)
    largest = tl.full([rows], float("-inf"), dtype=tl.float32)
    total = tl.full([rows], 0.0, dtype=tl.float32)
    first = tl.program_id(1).to(tl.int64) * run
    for start in range(first, tl.minimum(first + run, document_count), others):
        other = start + tl.arange(0, others)
        has_other = other < document_count
        products = _products(queries, row, has_row, documents, other, has_other, 0.0, dim, depth, precision)
        kept = has_other[None, :]
        if has_margin:
            kept = kept & ~((products > (base + margin)[:, None]) & (other[None, :] != positive[:, None]))
        above = tl.where(kept, scale * (products - base[:, None]), float("-inf"))
        larger = tl.maximum(largest, tl.max(above, axis=1))
        # Of a block that leaves out all there is no maximum, and the difference of two infinities is NaN.
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(above - finite[:, None]), axis=1)
        largest = larger
    found = tl.where(total == 0.0, float("-inf"), largest + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(out + tl.program_id(1).to(tl.int64) * query_count + row, found, mask=has_row)


@triton.jit(do_not_specialize=["query_count", "document_count", "scale", "margin"])
def backward_kernel(
    queries: tl.tensor,
    documents: tl.tensor,
    positives: tl.tensor,
    of_positives: tl.tensor,
    losses: tl.tensor,
    upstream: tl.tensor,  # [queries]: gradient of each one's loss
    out: tl.tensor,  # of queries or documents, all zeros
    query_count: tl.tensor,
    document_count: tl.tensor,
    scale: tl.tensor,
    margin: tl.tensor,
    of_documents: tl.constexpr,
    has_margin: tl.constexpr,
    dim: tl.constexpr,
    rows: tl.constexpr,
    others: tl.constexpr,
    share: tl.constexpr,  # columns of the gradient that are this program's
    columns: tl.constexpr,  # of them at a time
    depth: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    if of_documents:
        own, walked, own_count, walked_count = documents, queries, document_count, query_count
    else:
        own, walked, own_count, walked_count = queries, documents, query_count, document_count
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    has_row = row < own_count
    for start in range(0, walked_count, others):
        other = start + tl.arange(0, others).to(tl.int64)
        has_other = other < walked_count
        products = _products(own, row, has_row, walked, other, has_other, 0.0, dim, depth, precision)
        if of_documents:
            query, has_query, document = other[None, :], has_other[None, :], row[:, None]
        else:
            query, has_query, document = row[:, None], has_row[:, None], other[None, :]
        base = tl.load(of_positives + query, mask=has_query, other=0.0)
        loss = tl.load(losses + query, mask=has_query, other=0.0)
        is_positive = tl.load(positives + query, mask=has_query, other=-1) == document
        kept = has_row[:, None] & has_other[None, :]
        if has_margin:
            kept = kept & ~((products > base + margin) & ~is_positive)
        weights = tl.exp(tl.where(kept, scale * (products - base) - loss, float("-inf")))
        weights = (weights - tl.where(is_positive, 1.0, 0.0)) * tl.load(upstream + query, mask=has_query, other=0.0)
        weights = tl.where(kept, weights * scale, 0.0)
        for part in range(0, share, columns):
            column = tl.program_id(1) * share + part + tl.arange(0, columns)
            fits = (column < dim)[None, :]
            vectors = tl.load(
                walked + other[:, None] * dim + column[None, :], mask=has_other[:, None] & fits, other=0.0
            )
            at = out + row[:, None] * dim + column[None, :]
            before = tl.load(at, mask=has_row[:, None] & fits, other=0.0)
            after = before + tl.dot(weights, vectors, input_precision=precision)
            tl.store(at, after, mask=has_row[:, None] & fits)
        # What a thread reads of `out` next another one may have written.
        tl.debug_barrier()


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    scale: float,
    false_negative_margin: float | None = None,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of picking each query's positive among all documents; see `rtx.kernels.info_nce`.

    Args:
        queries: [queries, dim] float32, contiguous, of L2 norm 1; at least one, dim 1 to MAX_DIM.
        documents: [documents, dim] float32, contiguous, of L2 norm 1.
        positives: [queries] int64, contiguous: which document is each query's positive. One that does not exist makes
            the query's loss NaN, since only the GPU knows.
        scale: factor of the products.
        false_negative_margin: leave out a document whose product is more than this above the positive's; None for none.
        allow_tf32: let tensor cores multiply, with operands of 10 bits after the point instead of 23.

    Returns:
        Each query's loss, and its product with its positive: [queries] float32 each.

    Raises:
        ValueError: an argument is not as above, or not on the device of `queries`.
    """
    _check(queries, documents, positives)
    (query_count, dim), document_count = queries.shape, len(documents)
    runs, blocks = triton.cdiv(document_count, _RUN), triton.cdiv(query_count, _ROWS)
    of_positives = queries.new_empty(query_count)
    of_runs = queries.new_empty((runs, query_count))
    counts = (query_count, document_count)
    shape = {"dim": dim, "rows": _ROWS, "depth": _DEPTH, "precision": _precision(allow_tf32), "num_stages": _STAGES}
    with device_of(queries):
        positives_kernel[(blocks,)](queries, documents, positives, of_positives, *counts, **shape)
        forward_kernel[(blocks, runs)](
            queries,
            documents,
            positives,
            of_positives,
            of_runs,
            *counts,
            scale,
            false_negative_margin or 0.0,
            has_margin=false_negative_margin is not None,
            others=_OTHERS,
            run=_RUN,
            **shape,
        )
    return torch.logsumexp(of_runs, dim=0), of_positives


def info_nce_backward(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    losses: Tensor,
    of_positives: Tensor,
    upstream: Tensor,
    *,
    scale: float,
    false_negative_margin: float | None = None,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_i upstream[i] * losses[i].

    Args:
        queries, documents, positives, scale, false_negative_margin, allow_tf32: as `info_nce` was given them.
        losses, of_positives: what it gave.
        upstream: [queries] float32.

    Returns:
        Of the queries, [queries, dim] float32, and of the documents, [documents, dim].
    """
    dim = queries.shape[1]
    gradients = torch.zeros_like(queries), torch.zeros_like(documents)
    with device_of(queries):
        for of_documents, gradient in enumerate(gradients):
            blocks = triton.cdiv(len(gradient), _ROWS)
            share = _share(blocks, dim)
            backward_kernel[(blocks, triton.cdiv(dim, share))](
                queries,
                documents,
                positives,
                of_positives,
                losses,
                upstream.contiguous(),
                gradient,
                len(queries),
                len(documents),
                scale,
                false_negative_margin or 0.0,
                of_documents=bool(of_documents),
                has_margin=false_negative_margin is not None,
                dim=dim,
                rows=_ROWS,
                others=_OTHERS,
                share=share,
                columns=_COLUMNS,
                depth=_DEPTH,
                precision=_precision(allow_tf32),
                num_stages=_STAGES,
            )
    return gradients


def _check(queries: Tensor, documents: Tensor, positives: Tensor) -> None:
    for name, vectors in (("queries", queries), ("documents", documents)):
        fits = vectors.dim() == 2 and 1 <= vectors.shape[1] <= MAX_DIM and len(vectors) > 0
        if not fits or vectors.dtype != torch.float32 or not vectors.is_contiguous():
            raise ValueError(f"{name}: expected [{name}, 1 to {MAX_DIM}] float32, contiguous, got {told(vectors)}")
    if documents.shape[1] != queries.shape[1] or documents.device != queries.device:
        expected = f"[documents, {queries.shape[1]}] on {queries.device}"
        raise ValueError(f"documents: expected {expected}, as queries are, got {told(documents)}")
    expect("positives", positives, queries.shape[:1], (torch.int64,), queries.device)


def _precision(allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 else "ieee"


def _share(blocks: int, dim: int) -> int:
    """How many columns a program takes, so that there are enough programs."""
    most = triton.cdiv(dim, _COLUMNS)
    splits = min(most, triton.cdiv(_ENOUGH, blocks))
    return int(triton.cdiv(most, splits) * _COLUMNS)


_VECTORS = {"queries": "*fp32", "documents": "*fp32", "positives": "*i64"}
_COUNTS = {"query_count": "i32", "document_count": "i32"}
_FACTORS = {"scale": "fp32", "margin": "fp32"}


def _build_positives(dim: int) -> Build:
    constants = {"dim": dim, "rows": _ROWS, "depth": _DEPTH, "precision": "ieee"}
    return Build(
        kernel=positives_kernel, types={**_VECTORS, "out": "*fp32", **_COUNTS}, constants=constants, stages=_STAGES
    )


def _build_forward(dim: int, *, has_margin: bool, precision: str = "ieee") -> Build:
    return Build(
        kernel=forward_kernel,
        types={**_VECTORS, "of_positives": "*fp32", "out": "*fp32", **_COUNTS, **_FACTORS},
        constants={
            "has_margin": has_margin,
            "dim": dim,
            "rows": _ROWS,
            "others": _OTHERS,
            "run": _RUN,
            "depth": _DEPTH,
            "precision": precision,
        },
        stages=_STAGES,
    )


def _build_backward(dim: int, *, of_documents: bool, has_margin: bool, precision: str = "ieee") -> Build:
    vectors = ("of_positives", "losses", "upstream", "out")
    return Build(
        kernel=backward_kernel,
        types={**_VECTORS, **dict.fromkeys(vectors, "*fp32"), **_COUNTS, **_FACTORS},
        constants={
            "of_documents": of_documents,
            "has_margin": has_margin,
            "dim": dim,
            "rows": _ROWS,
            "others": _OTHERS,
            "share": _share(_ENOUGH, dim),
            "columns": _COLUMNS,
            "depth": _DEPTH,
            "precision": precision,
        },
        stages=_STAGES,
    )


BUILDS: dict[str, Build] = {
    "positives 768": _build_positives(768),
    "forward 384": _build_forward(384, has_margin=False),
    "forward 4096 with margin": _build_forward(4096, has_margin=True),
    "forward 1024 tf32": _build_forward(1024, has_margin=True, precision="tf32"),
    "backward of queries 384": _build_backward(384, of_documents=False, has_margin=False),
    "backward of documents 4096 with margin": _build_backward(4096, of_documents=True, has_margin=True),
    "backward of documents 1024 tf32": _build_backward(1024, of_documents=True, has_margin=True, precision="tf32"),
    "backward of queries 33": _build_backward(33, of_documents=False, has_margin=False),
}
