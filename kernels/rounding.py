"""What rounding to a floating type costs: the table that contracts, tests and trials on a GPU share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Rounding(NamedTuple):
    """How far rounding to nearest moves a number: half a unit in the last place.

    Attributes:
        relative: as a part of it, of normal numbers.
        absolute: of subnormal ones; 0 where these are smaller than anything here.
    """

    relative: float
    absolute: float

    def of(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """How far from `values` rounding may move them, of the same shape."""
        moved: NDArray[np.float64] = self.relative * np.abs(values.astype(np.float64)) + self.absolute
        return moved


ROUNDING = {
    "float32": Rounding(2.0**-24, 0.0),
    "float16": Rounding(2.0**-11, 2.0**-25),
    "bfloat16": Rounding(2.0**-8, 0.0),
}
"""By the names that PyTorch has for types."""
