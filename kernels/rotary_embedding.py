"""The op `rotary_embedding`: each head's first half and second half turned by a token's position.

    y[i]       = x[i] * cos[i] - x[i + half] * sin[i]
    y[i+half]  = x[i + half] * cos[i + half] + x[i] * sin[i + half]       (RoFormer, arXiv 2104.09864, by halves)

cos and sin are a token's, of as many numbers as a head has, and the same for every head. In float32: three roundings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rotary_embedding(
    x: NDArray[np.floating], cos: NDArray[np.floating], sin: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Reference of the op, in float64: x [tokens, heads, width]; cos, sin [tokens, width]; width is even."""
    wide, half = x.astype(np.float64), x.shape[-1] // 2
    turned = np.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    found: NDArray[np.float64] = wide * cos[:, None, :] + turned * sin[:, None, :]
    return found
