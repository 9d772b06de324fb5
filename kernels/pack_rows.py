"""The op `pack_rows`: rows with padding to their tokens, one row behind the other.

offsets      where each row begins among the tokens that the mask keeps, and where the last ends
positions    of each kept token within its row, from `first` on
packed       what else is known of each token, without what belongs to padding
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class PackedRows(NamedTuple):
    """
    Attributes:
        offsets: [batch + 1] int64, rising from 0.
        positions: [kept] int64.
        packed: [kept] int64 each.
    """

    offsets: Int64
    positions: Int64
    packed: tuple[Int64, ...]


def pack_rows(mask: Int64, *rows: Int64, first: int = 0) -> PackedRows:
    """Reference of the op.

    Args:
        mask: [batch, tokens], 0 for padding, which may stand anywhere.
        rows: [batch, tokens] each.
        first: position of a row's first token.
    """
    kept = mask != 0
    offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int64)
    positions = (kept.cumsum(axis=1) - 1 + first)[kept]
    return PackedRows(offsets, positions, tuple(some[kept] for some in rows))
