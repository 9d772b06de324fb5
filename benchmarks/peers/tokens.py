"""Around a bare encoder: texts to tokens, batches of similar length, pooling. tokenizers and numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.worker import Source

Tokenize = Callable[[Sequence[Any]], list[Any]]


def open_tokenizer(source: Source) -> Tokenize:
    """Items to encodings, cut to the checkpoint's limit and not padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source.checkpoint / "tokenizer.json"))
    settings = json.loads((source.checkpoint / "sentence_bert_config.json").read_text(encoding="utf-8"))
    tokenizer.enable_truncation(settings["max_seq_length"])
    tokenizer.no_padding()

    def tokenize(items: Sequence[Any]) -> list[Any]:
        texts = items if source.task == "embed" else [(query, passage) for query, passage in items]
        found: list[Any] = tokenizer.encode_batch_fast(texts)
        return found

    return tokenize


def in_batches(
    lengths: Sequence[int], batch_size: int, forward: Callable[[list[int]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Items through a model in batches of similar length, the longest first; results in the order of the items.

    Args:
        lengths: tokens of each item.
        batch_size: items a batch.
        forward: the items at these places to their results, along the first axis.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    ordered = np.concatenate([forward(order[at : at + batch_size]) for at in range(0, len(order), batch_size)])
    results = np.empty_like(ordered)
    results[order] = ordered
    return results


def padded(rows: Sequence[Sequence[int]], fill: int) -> NDArray[np.int64]:
    """[rows, longest row] int64."""
    table = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def mean_pooled(hidden: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean over the tokens of each row, scaled to norm 1.

    Args:
        hidden: [rows, tokens, dimension] float32.
        mask: [rows, tokens] 1 for a token, 0 for padding.

    Returns:
        [rows, dimension] float32.
    """
    sums = np.matmul(mask.astype(np.float32)[:, None, :], hidden)[:, 0]
    vectors: NDArray[np.float32] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return vectors
