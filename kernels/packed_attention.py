"""The op `packed_attention`: attention within each of several sequences that lie one behind the other, without padding.

    y[t] = sum_j softmax_j(scale * query[t] . key[j]) * value[j]      j in t's own sequence, and seen from t

Which j is seen: all; with `causal` those up to t; with a `window` those at most so many tokens away. With fewer heads
of keys than of queries, several heads of queries share one (Ainslie et al. 2023, arXiv 2305.13245).

A sequence is computed by itself: what else is in the batch does not change it by a bit. In float32, with the largest
score subtracted before the exponential, so that nothing overflows; the difference to exact arithmetic is below

    |difference| <= (2 * width * |scale| * max|query| * max|key| + length) * 2**-23 * max|value|

With `bfloat16` an operator may round weights and values to it, and make two numbers of it of each query and key, where
a machine multiplies these faster. Two have 16 bits, and what their product leaves out is below 2**-16 of it:

    |difference| <= (width * |scale| * max|query| * max|key| * 2**-15 + 2**-7 + length * 2**-23) * max|value|
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_attention(
    query: NDArray[np.floating],
    key: NDArray[np.floating],
    value: NDArray[np.floating],
    offsets: NDArray[np.int64],
    *,
    scale: float,
    causal: bool = False,
    window: int = -1,
) -> NDArray[np.float64]:
    """Reference of the op, in float64.

    Args:
        query: [tokens, heads, width].
        key, value: [tokens, key_heads, width]; heads is a multiple of key_heads.
        offsets: [sequences + 1], rising from 0 to the number of tokens: where each sequence begins and the last ends.
        scale: factor of the scores.
        causal: whether a token sees none behind it.
        window: how far a token sees; negative for any distance.

    Returns:
        [tokens, heads, width] float64.
    """
    groups = query.shape[1] // key.shape[1]
    found = np.empty(query.shape)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        length = stop - start
        q = query[start:stop].astype(np.float64)
        k, v = (np.repeat(side[start:stop].astype(np.float64), groups, axis=1) for side in (key, value))
        scores = scale * np.einsum("qhw,khw->hqk", q, k)
        distance = np.arange(length)[None, :] - np.arange(length)[:, None]
        seen = np.ones((length, length), dtype=bool)
        if causal:
            seen &= distance <= 0
        if window >= 0:
            seen &= np.abs(distance) <= window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        found[start:stop] = np.einsum("hqk,khw->qhw", weights, v)
    return found


def bound(
    query: NDArray[np.floating],
    key: NDArray[np.floating],
    value: NDArray[np.floating],
    *,
    scale: float,
    longest: int,
    rounding: float = 0.0,
) -> float:
    """How far from the reference float32 may be.

    Args:
        query, key, value: as of `packed_attention`.
        scale: of the scores.
        longest: tokens of a sequence.
        rounding: relative error of the type that the weights and the result are rounded to. Each moves a result by one
            rounding of the largest value: a weight of float16 below 2**-14 has no more than 2**-25 of its own, which
            the `longest` numbers of 2**-23 hold, and weights after rounding no longer add up to their sum.
    """
    largest_query, largest_key, largest_value = (float(np.abs(side).max()) for side in (query, key, value))
    steps: float = 2 * query.shape[2] * abs(scale) * largest_query * largest_key + longest
    return (steps * 2.0**-23 + 2 * rounding) * largest_value
