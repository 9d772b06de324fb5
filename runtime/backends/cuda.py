"""Memory, streams and graphs of an NVIDIA GPU: what an engine of TensorRT asks of the driver, and nothing else.

Functions are those of the CUDA driver API (docs.nvidia.com/cuda/cuda-driver-api), by NVIDIA's package `cuda-bindings`.
Whatever the driver refuses is an EngineError that names the call.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import EngineError, MissingExtraError

# Names of the driver's constants, whose values are in cuda.h.
_STREAM_NON_BLOCKING, _EVENT_DISABLE_TIMING = 1, 2
_THREAD_LOCAL = "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"


class Cuda:
    """The primary context of a GPU, which PyTorch and ONNX Runtime in the same process use too.

    Args:
        index: N of the device "cuda:N".

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        EngineError: there is no driver, or no such GPU.
    """

    def __init__(self, index: int) -> None:
        self._driver = load_driver()
        try:
            self._call("cuInit", 0)
        except EngineError:
            raise
        except Exception as missing:  # the package has a class of its own for a driver that is not there
            raise EngineError(f"cuda:{index}: no NVIDIA driver: {missing}") from missing
        self._device = self._call("cuDeviceGet", index)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is this thread's inside, as everything else needs it to be; outside it is what it was before."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def free_bytes(self) -> int:
        """What is left of the GPU's memory, for all processes together."""
        return int(self._call("cuMemGetInfo"))

    def allocate(self, size: int) -> int:
        """The address of so many bytes on the GPU, at least one, on a multiple of 256."""
        return int(self._call("cuMemAlloc", max(1, size)))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """So many bytes of this machine's memory, at least one, that the GPU copies from and to by itself (pinned)."""
        size = max(1, size)
        address = int(self._call("cuMemAllocHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_host(self, buffer: NDArray[np.uint8]) -> None:
        self._call("cuMemFreeHost", buffer.ctypes.data)

    def stream(self) -> Any:
        """A queue of work, which waits for no other one."""
        return self._call("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until all that was put into the stream is done."""
        self._call("cuStreamSynchronize", stream)

    def copy_in(self, address: int, buffer: NDArray[np.uint8], size: int, stream: Any) -> None:
        """Bytes of a pinned buffer to the GPU, when it is their turn in the stream."""
        self._call("cuMemcpyHtoDAsync", address, buffer.ctypes.data, size, stream)

    def copy_out(self, buffer: NDArray[np.uint8], address: int, size: int, stream: Any) -> None:
        """Bytes of the GPU to a pinned buffer, when it is their turn in the stream."""
        self._call("cuMemcpyDtoHAsync", buffer.ctypes.data, address, size, stream)

    def event(self) -> Any:
        """A mark that one stream sets and another waits for."""
        return self._call("cuEventCreate", _EVENT_DISABLE_TIMING)

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream go on only when what was recorded last in the event is done."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def begin_capture(self, stream: Any) -> None:
        """What is put into the stream from here on is written down and not done; other threads are not concerned."""
        mode = getattr(self._driver.CUstreamCaptureMode, _THREAD_LOCAL)
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """What was written down, ready to be launched."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Give the context back, which must not be the current one any more."""
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._driver, name)(*arguments)
        if int(error) != 0:
            known, text = self._driver.cuGetErrorString(error)
            reason = text.decode(errors="replace") if int(known) == 0 else "an unknown error"
            raise EngineError(f"the NVIDIA driver answers {name} with error {int(error)}: {reason}")
        return results[0] if results else None


def load_driver() -> Any:
    """
    Raises:
        MissingExtraError: cuda-bindings is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as missing:
        raise MissingExtraError("cuda-bindings", "tensorrt-rtx", "running an engine of TensorRT") from missing
