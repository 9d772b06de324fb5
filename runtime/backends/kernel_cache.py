"""What TensorRT-RTX compiles on a GPU for an engine, kept from one start of a process to the next.

Its engines hold no machine code for the very GPU: kernels are compiled when contexts are made and when shapes come for
the first time. TensorRT-RTX itself refuses what another GPU, driver or version compiled, and compiles anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtx.runtime.caching import read_cache, write_cache


class KernelCache:
    """The compiled kernels of an engine.

    Args:
        engine: of TensorRT-RTX.
        file: where they are kept.

    Attributes:
        config: to make contexts with, which then take kernels from here and put theirs in.
        found: whether there were some that fit.
        problem: why they are not kept, where that failed; None if they are, or nobody has tried.
    """

    def __init__(self, engine: Any, file: Path) -> None:
        self._file = file
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        kept = read_cache(file)
        self.found = bool(kept) and bool(self._cache.deserialize(kept))
        self._written = kept if self.found else b""
        self.config.set_runtime_cache(self._cache)
        self.problem: str | None = None

    def save(self) -> None:
        """Write what is new."""
        if self.problem is not None:
            return
        try:
            content = bytes(self._cache.serialize())
        except (RuntimeError, TypeError) as broken:  # of TensorRT's bindings
            self.problem = f"{self._file}: TensorRT does not give its kernels: {broken}"
            return
        if content != self._written:
            self.problem = write_cache(self._file, content)
            self._written = content
