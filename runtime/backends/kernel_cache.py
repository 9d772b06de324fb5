"""What TensorRT-RTX compiles on a GPU for an engine, shared by its contexts, and kept from one start to the next.

Its engines hold no machine code for the very GPU: kernels are compiled when contexts are made and when shapes come for
the first time, at first such that take any shape, and in the background such that are made for one. TensorRT-RTX itself
refuses what another GPU, driver or version compiled, and compiles anew; and it captures CUDA graphs by itself, since it
alone knows when kernels change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtx.runtime.caching import read_cache, write_cache


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

    def save(self) -> None:
        """Write what is new."""
        self.write(self.take())

    def take(self) -> bytes:
        """What is compiled, if that is new and kept; while nothing else is asked of the engine."""
        if self._file is None or self.problem is not None:
            return b""
        try:
            content = bytes(self._cache.serialize())
        except (RuntimeError, TypeError) as broken:  # of TensorRT's bindings
            self.problem = f"{self._file}: TensorRT does not give its kernels: {broken}"
            return b""
        return b"" if content == self._written else content

    def write(self, content: bytes) -> None:
        """Keep what `take` gave."""
        if self._file is not None and content:
            self.problem = write_cache(self._file, content)
            self._written = content
