"""When a run should end before its last step: it goes nowhere, or it goes off."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# A loss that is above so many times the worst of the first batches, for so many on end, does not come back.
_FIRST, _FACTOR, _ON_END = 20, 4.0, 10


class LossWatch:
    """Tells a loss that has gone off from a few bad batches."""

    def __init__(self) -> None:
        self.always_zero = False
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=_ON_END)

    def resume(self, reported: Sequence[float]) -> None:
        """Go on in a run that was interrupted: its first reports, means of some steps, tell how high its loss was."""
        self._first = list(reported[:_FIRST])

    def add(self, loss: float) -> str | None:
        """Look at the loss of a batch; say what is wrong, or None."""
        self.always_zero = loss == 0 and (self.always_zero or not self._first)
        if len(self._first) < _FIRST:
            self._first.append(loss)
            return None
        self._recent.append(loss)
        worst = max(self._first)
        # A loss that began at 0, as that of triplets far enough apart, gives no measure of what is much.
        if worst <= 0 or len(self._recent) < _ON_END or min(self._recent) <= _FACTOR * worst:
            return None
        return (
            f"the loss diverges: at least {min(self._recent):.4g} in each of the last {_ON_END} batches, "
            f"at most {worst:.4g} in the first {_FIRST}"
        )


def out_of_patience(values: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` of these evaluations were no better than the best before them."""
    if patience is None or not values:
        return False
    return len(values) - 1 - list(values).index(max(values)) >= patience
