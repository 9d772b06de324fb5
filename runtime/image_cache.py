"""What a model made of images, kept by their content: an image that comes twice is run once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import UsageError

Key = TypeVar("Key", bound=Hashable)

DEFAULT_CACHE_BYTES = 256 << 20


class ImageCache(Generic[Key]):
    """Arrays by what tells images apart, the least recently used dropped first. Safe to use from several threads.

    Args:
        limit_bytes: what the arrays may take together; 0 keeps none.

    Raises:
        UsageError: the limit is negative.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise UsageError(f"cache_bytes: expected at least 0, got {limit_bytes}")
        self._limit = limit_bytes
        self._bytes = 0
        self._entries: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Iterable[Key]) -> dict[Key, NDArray[np.float32]]:
        """What there is of them."""
        with self._lock:
            found = {key: self._entries[key] for key in keys if key in self._entries}
            for key in found:
                self._entries.move_to_end(key)
        return found

    def put(self, key: Key, array: NDArray[np.float32]) -> None:
        """Keep an array, which should hold on to no larger one."""
        if array.nbytes > self._limit:
            return
        with self._lock:
            if (previous := self._entries.pop(key, None)) is not None:
                self._bytes -= previous.nbytes
            self._entries[key] = array
            self._bytes += array.nbytes
            while self._bytes > self._limit:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.nbytes

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0
