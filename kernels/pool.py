"""The op `pool`: one vector for each row of token vectors, by one or more modes.

    pool(hidden [batch, tokens, dim], mask [batch, tokens], modes) -> [batch, dim * len(modes)] float32

    mode                    a row's vector, over the tokens that its mask holds
    cls                     the first one's
    lasttoken               the last one's
    max                     the largest value of each dimension
    mean                    sum / count
    mean_sqrt_len_tokens    sum / sqrt(count)
    weightedmean            sum of position * token / sum of positions, the row's first attended token at position 1
                            (SGPT, arXiv 2202.08904)

What every implementation has to keep:
    - Modes are concatenated in the order given.
    - Padding may be left or right: first, last and position are counted on the mask, not on the columns.
    - Masked tokens count for nothing whatever they hold; an attention over no token leaves NaN there.
    - A row without a single token gives zeros.
    - All sums are in float32 whatever the type of `hidden`.
    - `attention_mask` counts the positions of weightedmean where `mask` leaves out a prompt: tokens keep the positions
      that they have with it.

Beside it what follows pooling in a retrieval model: `l2_normalize`, and `truncate`, the Matryoshka cut (arXiv
2205.13147). The functions here are the reference, in NumPy; `rtx.trainer.pooling` is the op in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

# The smallest norm that is divided by: a zero vector stays zero. It is the value of torch.nn.functional.normalize.
NORM_EPSILON = 1e-12

Float32 = NDArray[np.float32]


def pool(
    hidden: NDArray[np.floating[Any]],
    mask: NDArray[np.integer[Any]],
    modes: Sequence[str],
    *,
    attention_mask: NDArray[np.integer[Any]] | None = None,
) -> Float32:
    """The reference of the op.

    Args:
        hidden: [batch, tokens, dim], any floating type.
        mask: [batch, tokens], 1 for a token that is pooled, 0 for one that is not.
        modes: from MODES, at least one.
        attention_mask: [batch, tokens], 1 for a token and 0 for padding; None if it is `mask`.

    Returns:
        [batch, dim * len(modes)] float32.

    Raises:
        ValueError: a mode does not exist, or there is none.
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes: expected one or more of {', '.join(MODES)}, got {', '.join(unknown) or 'none'}")
    pooled = mask != 0
    attended = pooled if attention_mask is None else attention_mask != 0
    tokens = np.where(pooled[:, :, None], hidden, 0).astype(np.float32)
    return np.concatenate([_pool_one(tokens, pooled, attended, mode) for mode in modes], axis=1)


def _pool_one(tokens: Float32, pooled: NDArray[np.bool_], attended: NDArray[np.bool_], mode: str) -> Float32:
    """`tokens` [batch, tokens, dim] is zero where not `pooled` [batch, tokens]."""
    count = pooled.sum(axis=1, keepdims=True).astype(np.float32)
    rows = np.arange(len(tokens))
    if mode == "cls":
        return np.asarray(tokens[rows, pooled.argmax(axis=1)])
    if mode == "lasttoken":
        return np.asarray(tokens[rows, pooled.shape[1] - 1 - pooled[:, ::-1].argmax(axis=1)])
    if mode == "max":
        largest = np.where(pooled[:, :, None], tokens, -np.inf).max(axis=1)
        return np.where(count > 0, largest, 0).astype(np.float32)
    if mode == "weightedmean":
        positions = (attended.cumsum(axis=1) * pooled).astype(np.float32)
        weighted = np.einsum("btd,bt->bd", tokens, positions)
        return np.asarray(weighted / np.maximum(positions.sum(axis=1, keepdims=True), 1))
    divisor = np.sqrt(count) if mode == "mean_sqrt_len_tokens" else count
    return np.asarray(tokens.sum(axis=1) / np.maximum(divisor, 1))


def l2_normalize(vectors: Float32) -> Float32:
    """Vectors [..., dim] float32 divided by their L2 norm; a zero vector stays zero."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norm, NORM_EPSILON), dtype=np.float32)


def truncate(vectors: Float32, dimension: int, *, normalize: bool) -> Float32:
    """The Matryoshka cut.

    Args:
        vectors: [..., dim] float32.
        dimension: how many leading values to keep, 1 to dim.
        normalize: bring the shorter vectors to L2 norm 1 again.

    Returns:
        [..., dimension] float32.

    Raises:
        ValueError: `dimension` is out of range.
    """
    if not 1 <= dimension <= vectors.shape[-1]:
        raise ValueError(f"dimension: expected 1 to {vectors.shape[-1]}, got {dimension}")
    cut = vectors[..., :dimension]
    return l2_normalize(cut) if normalize else cut


def bound(
    hidden: NDArray[np.floating[Any]],
    mask: NDArray[np.integer[Any]],
    modes: Sequence[str],
    *,
    attention_mask: NDArray[np.integer[Any]] | None = None,
) -> Float32:
    """How far from the reference another sum in float32 may be, of the same shape; arguments as of `pool`.

    A float32 sum of n products is off by at most n * 2**-24 of the sum of their magnitudes, and product, divisor (two
    roundings at most) and quotient by another 4; that holds for the reference, too: twice as much. What is chosen, not
    added up, is not off at all.
    """
    steps = [0 if mode in ("cls", "lasttoken", "max") else mask.shape[1] + 4 for mode in modes]
    sizes = pool(np.abs(hidden), mask, modes, attention_mask=attention_mask)
    return np.asarray(sizes * np.repeat(np.float32(2.0**-23) * np.array(steps, np.float32), hidden.shape[2]))


def normalized_bound(vectors: Float32, moved: Float32) -> Float32:
    """How far from `l2_normalize(vectors)` in float32 that of vectors may be which are off by `moved`.

    v / |v| moves by at most 2 |d| / |v| where v moves by d. The norms of both, a sum of dim squares and a root, and
    the quotients are off by (dim + 4) * 2**-24 of a number each.

    Args:
        vectors: [..., dim].
        moved: of the same shape.
    """
    norm = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), NORM_EPSILON)
    turned = 2 * np.linalg.norm(moved, axis=-1, keepdims=True) / norm
    return np.asarray(turned + (vectors.shape[-1] + 4) * 2.0**-23 * np.abs(l2_normalize(vectors)), dtype=np.float32)
