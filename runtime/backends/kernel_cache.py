"""What TensorRT-RTX compiles on a GPU for an engine, shared by its contexts, and kept from one start to the next.

Its engines hold no machine code for the very GPU: kernels are compiled when contexts are made and when shapes come for
the first time, at first such that take any shape, and in the background such that are made for one. TensorRT-RTX itself
refuses what another GPU, driver or version compiled, and compiles anew; and it captures CUDA graphs by itself, since it
alone knows when kernels change.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

from rtx.runtime.caching import read_cache, write_cache


class Taken(NamedTuple):
    """Compiled kernels, and how often some were taken before."""

    number: int
    content: bytes


class KernelCache:
    """The compiled kernels of an engine.

    Args:
        trt: the module of TensorRT-RTX.
        engine: of it.
        file: where they are kept; None to keep them while the engine is open.

    Attributes:
        config: to make contexts with, which then take kernels from here and put theirs in.
        found: whether there were some that fit.
        problem: why they are not kept, where that failed; None if they are, or nobody has tried.
    """

    def __init__(self, trt: Any, engine: Any, file: Path | None) -> None:
        self._file = file
        self.config = engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self.config.create_runtime_cache()
        kept = read_cache(file) if file is not None else b""
        self.found = bool(kept) and bool(self._cache.deserialize(kept))
        self._written = kept if self.found else b""
        self.config.set_runtime_cache(self._cache)
        self.problem: str | None = None
        self._writing = threading.Lock()
        self._taken = self._kept = 0

    def save(self) -> None:
        """Write what is new."""
        self.write(self.take())

    def take(self) -> Taken | None:
        """What is compiled, where that is kept; by one thread at a time, while nothing else is asked of the engine."""
        if self._file is None or self.problem is not None:
            return None
        try:
            content = bytes(self._cache.serialize())
        except (RuntimeError, TypeError) as broken:  # of TensorRT's bindings
            self.problem = f"{self._file}: TensorRT does not give its kernels: {broken}"
            return None
        self._taken += 1
        return Taken(self._taken, content)

    def write(self, taken: Taken | None) -> None:
        """Keep what `take` gave, if it is new; by any threads at once."""
        if self._file is None or taken is None:
            return
        with self._writing:
            if taken.number > self._kept and taken.content != self._written:
                self.problem = write_cache(self._file, taken.content)
                self._kept, self._written = taken
