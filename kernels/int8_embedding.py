"""The op `int8_embedding`: rows of an int8 table, with what is added to them and a norm behind that.

    y[t] = norm(values[ids[t]] * scale[ids[t]] + added[t])

`rtx.kernels.int8_linear.quantize_rows` makes the table; norms are those of `rtx.kernels.norm`. Without a norm it is two
roundings in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.int8_linear import Int8Rows


def int8_embedding(
    table: Int8Rows,
    ids: NDArray[np.int64],
    added: NDArray[np.floating] | None = None,
    *,
    norm: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> NDArray[np.float64]:
    """Reference of the op, in float64.

    Args:
        table: [rows, width].
        ids: [tokens], each a row.
        added: [tokens, width], or None.
        norm: of rows, or None.

    Returns:
        [tokens, width] float64.
    """
    found = table.values[ids].astype(np.float64) * table.scale[ids]
    if added is not None:
        found = found + added
    return found if norm is None else norm(found)
