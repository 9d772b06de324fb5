"""The op `packed_pool`: `rtx.kernels.pool` over sequences that lie one behind the other, without padding.

What a mode is, and what is kept of rows without a token and of tokens that are left out, is told there. Sums are in
float32, token by token: the difference to exact arithmetic is at most length * 2**-23 * max|x|.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.pool import pool


def packed_pool(
    x: NDArray[np.floating],
    offsets: NDArray[np.int64],
    mode: str,
    *,
    pooled: NDArray[np.integer] | None = None,
) -> NDArray[np.float32]:
    """Reference of the op.

    Args:
        x: [tokens, width].
        offsets: [sequences + 1], rising from 0 to the number of tokens: where each sequence begins and the last ends.
        mode: of `rtx.kernels.pool.MODES`.
        pooled: [tokens], 0 for a token that is left out; None if none is. Tokens keep their positions.

    Returns:
        [sequences, width] float32.
    """
    taken = np.ones(len(x), dtype=np.int64) if pooled is None else pooled
    rows = [slice(start, stop) for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    found = np.zeros((len(rows), x.shape[1]), dtype=np.float32)
    for row, part in enumerate(rows):
        if part.start < part.stop:
            ones = np.ones((1, part.stop - part.start), dtype=np.int64)
            found[row] = pool(x[part][None], taken[part][None], [mode], attention_mask=ones)[0]
    return found
