# ruff: noqa: N802 - functions are called as the driver's
"""Stand-ins for NVIDIA's driver and for TensorRT, for machines without a GPU.

All work is held back until somebody waits for it, as late as a GPU may do it: what is read too early, freed too early
or left without an order gives wrong numbers or an error. Capturing is void where a context changes afterwards.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUT_OF_MEMORY, INVALID_VALUE = 2, 1


@dataclass
class Stream:
    work: list[Any] = field(default_factory=list)
    capturing: list[Any] | None = None


@dataclass
class Event:
    recorded: Any = None


class Record:
    """A place in a stream where an event is set."""

    done = False


@dataclass
class Wait:
    record: Record


class Driver:
    """`cuda.bindings.driver`. `refused` makes calls of a name fail: name -> how many may still succeed."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread-local")

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.streams: list[Stream] = []
        self.events: list[Event] = []
        self.graphs: list[Any] = []
        self.contexts = 0
        self.launches = 0
        self.refused: dict[str, int] = {}
        self._addresses = itertools.count(1 << 20, 1 << 20)
        self._thread = threading.local()
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu"):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                if name in self.refused:
                    if self.refused[name] == 0:
                        return (OUT_OF_MEMORY,)
                    self.refused[name] -= 1
                if name not in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"):
                    current = [*self.pushed(), ""][-2:][0].startswith("context")
                    assert name == "cuGetErrorString" or current != (name == "cuDevicePrimaryCtxRelease"), name
                result: tuple[Any, ...] = found(*arguments)
                return result

        return call

    def left(self) -> int:
        """What was taken and not given back."""
        return sum(map(len, (self.memory, self.pinned, self.streams, self.events, self.graphs))) + self.contexts

    def cuInit(self, _: int) -> Any:
        return (0,)

    def cuDeviceGet(self, index: int) -> Any:
        return (0, index) if index < 2 else (101,)

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        self.contexts += 1
        return 0, f"context {device}"

    def cuDevicePrimaryCtxRelease(self, _: int) -> Any:
        self.contexts -= 1
        return (0,)

    def pushed(self) -> list[Any]:
        """The contexts of this thread, the current one last."""
        self._thread.contexts = getattr(self._thread, "contexts", [])
        found: list[Any] = self._thread.contexts
        return found

    def cuCtxPushCurrent(self, context: Any) -> Any:
        self.pushed().append(context)
        return (0,)

    def cuCtxPopCurrent(self) -> Any:
        return 0, self.pushed().pop()

    def cuMemGetInfo(self) -> Any:
        return 0, 3 << 20, 24 << 30

    def cuGetErrorString(self, _: int) -> Any:
        return 0, b"it was refused"

    def cuMemAlloc(self, size: int) -> Any:
        address = next(self._addresses)
        self.memory[address] = bytearray(b"\xff" * size)
        return 0, address

    def cuMemFree(self, address: int) -> Any:
        del self.memory[address]
        return (0,)

    def cuMemAllocHost(self, size: int) -> Any:
        buffer = np.full(size, 255, dtype=np.uint8)
        self.pinned[buffer.ctypes.data] = buffer
        return 0, buffer.ctypes.data

    def cuMemFreeHost(self, address: int) -> Any:
        del self.pinned[address]
        return (0,)

    def cuStreamCreate(self, flags: int) -> Any:
        assert flags == 1
        self.streams.append(Stream())
        return 0, self.streams[-1]

    def cuStreamDestroy(self, stream: Stream) -> Any:
        assert not stream.work, "a stream was given back with work in it"
        self.streams = [other for other in self.streams if other is not stream]
        return (0,)

    def cuStreamSynchronize(self, stream: Stream) -> Any:
        assert stream.capturing is None, "waited for a stream that is captured"
        self._until(stream, None)
        return (0,)

    def cuMemcpyHtoDAsync(self, address: int, host: int, size: int, stream: Stream) -> Any:
        assert size <= len(self.pinned[host])
        self.put(stream, lambda: self.write(address, self.pinned[host][:size].tobytes()))
        return (0,)

    def cuMemcpyDtoHAsync(self, host: int, address: int, size: int, stream: Stream) -> Any:
        assert size <= len(self.pinned[host])
        self.put(stream, lambda: ctypes.memmove(host, self.read(address, size), size))
        return (0,)

    def cuEventCreate(self, flags: int) -> Any:
        assert flags == 2
        self.events.append(Event())
        return 0, self.events[-1]

    def cuEventDestroy(self, event: Event) -> Any:
        self.events = [other for other in self.events if other is not event]
        return (0,)

    def cuEventRecord(self, event: Event, stream: Stream) -> Any:
        event.recorded = Record()
        self.put(stream, event.recorded)
        return (0,)

    def cuStreamWaitEvent(self, stream: Stream, event: Event, _: int) -> Any:
        assert event.recorded is not None
        self.put(stream, Wait(event.recorded))
        return (0,)

    def cuStreamBeginCapture(self, stream: Stream, mode: str) -> Any:
        assert mode == "thread-local"
        assert stream.capturing is None
        stream.capturing = []
        return (0,)

    def cuStreamEndCapture(self, stream: Stream) -> Any:
        graph, stream.capturing = stream.capturing, None
        self.graphs.append(graph)
        return 0, graph

    def cuGraphInstantiate(self, graph: Any, _: int) -> Any:
        self.graphs.append(tuple(graph))
        return 0, self.graphs[-1]

    def cuGraphDestroy(self, graph: Any) -> Any:
        self.graphs = [other for other in self.graphs if other is not graph]
        return (0,)

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815 - the driver's name

    def cuGraphLaunch(self, graph: Any, stream: Stream) -> Any:
        assert any(graph is other for other in self.graphs), "a graph was launched that is not there any more"
        self.launches += 1
        for work in graph:
            self.put(stream, work)
        return (0,)

    def put(self, stream: Stream, work: Callable[[], Any] | Record | Wait) -> None:
        assert any(stream is other for other in self.streams)
        (stream.work if stream.capturing is None else stream.capturing).append(work)

    def read(self, address: int, size: int) -> bytes:
        assert size <= len(self.memory[address])
        return bytes(self.memory[address][:size])

    def write(self, address: int, content: bytes) -> None:
        assert len(content) <= len(self.memory[address])
        self.memory[address][: len(content)] = content

    def _until(self, stream: Stream, record: Record | None) -> None:
        """Do the work of a stream, up to a place in it, and what that waits for in others."""
        while stream.work:
            work = stream.work.pop(0)
            if isinstance(work, Record):
                work.done = True
                if work is record:
                    return
            elif isinstance(work, Wait):
                if not work.record.done:
                    self._until(next(other for other in self.streams if work.record in other.work), work.record)
            else:
                work()


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8


Shape = tuple[int, ...]


@dataclass
class Model:
    """What an engine computes. `y` are its outputs by name."""

    inputs: dict[str, DataType]
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]]
    shapes: Callable[[dict[str, Shape]], dict[str, Shape]]
    compute: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
    outputs: dict[str, DataType]
    memory_bytes: int = 1000


class TensorRt:
    """The module of TensorRT, and what each engine computes by its content. What `refused` holds fails, and what
    `silent` holds without a word; `graphs` are how contexts were told to make CUDA graphs."""

    __version__ = "1.7.1"
    DataType = DataType
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user-managed")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")

    class ILogger:
        Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"], start=0)
        log: Callable[[Any, str], None]

    def __init__(self, driver: Driver, models: dict[bytes, Model]) -> None:
        self.driver, self.models = driver, models
        self.refused: set[str] = set()
        self.silent: set[str] = set()
        self.graphs: set[str] = set()
        self.loaded = 0
        self.logger: Any = None

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def refuse(self, what: str) -> bool:
        if what in self.refused:
            self.logger.log(self.ILogger.Severity.ERROR, f"no {what} today")
        return what in self.refused | self.silent

    def _load(self, content: bytes) -> Any:
        self.loaded += 1
        return None if self.refuse("engine") or content not in self.models else Engine(self, self.models[content])


class Kernels:
    """`IRuntimeCache`: what was compiled, in the order of it."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def serialize(self) -> Any:
        return memoryview("kernels:{}".format(",".join(self.compiled)).encode())

    def deserialize(self, content: bytes) -> bool:
        fits = content.startswith(b"kernels:")
        if fits:
            self.compiled = content.decode().removeprefix("kernels:").split(",")
        return fits


class Config:
    """`IRuntimeConfig`."""

    strategy = "static"
    cuda_graph_strategy = "disabled"
    cache: Kernels | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Kernels:
        return Kernels()

    def set_runtime_cache(self, cache: Kernels) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(self, trt: TensorRt, model: Model) -> None:
        self.trt, self.model = trt, model
        self.names = [*self.model.outputs, *self.model.inputs]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(self.model.profiles)

    def get_tensor_name(self, at: int) -> str:
        return self.names[at]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.model.inputs else "output"

    def get_tensor_dtype(self, name: str) -> DataType:
        return {**self.model.inputs, **self.model.outputs}[name]

    def get_tensor_profile_shape(self, name: str, at: int) -> list[Shape]:
        return list(self.model.profiles[at][name])

    def get_device_memory_size_for_profile_v2(self, at: int) -> int:
        return self.model.memory_bytes * (1 + at)

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, how: str | Config) -> Any:
        strategy, cache = (how.strategy, how.cache) if isinstance(how, Config) else (how, None)
        assert strategy == "user-managed"
        self.trt.graphs.add(how.cuda_graph_strategy if isinstance(how, Config) else "by hand")
        return None if self.trt.refuse("context") else Context(self, cache)


class Context:
    def __init__(self, engine: Engine, cache: Kernels | None = None) -> None:
        self.cache = cache or Kernels()
        self._compile("context")
        self.engine, self.trt, self.model = engine, engine.trt, engine.model
        self.driver = engine.trt.driver
        self.profile: int | None = None
        self.memory: int | None = None
        self.given: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.ran: dict[str, Shape] | None = None
        self.captured = False

    def _compile(self, what: str) -> None:
        if what not in self.cache.compiled:
            self.cache.compiled.append(what)

    def set_device_memory(self, address: int, size: int) -> None:
        assert (
            len(self.driver.memory[address]) >= size >= self.model.memory_bytes * self.engine.num_optimization_profiles
        )
        self.memory = address

    def set_optimization_profile_async(self, at: int, stream: Stream) -> bool:
        self.driver.put(stream, lambda: setattr(self, "profile", at))
        return not self.trt.refuse("profile")

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert self.profile is not None, "the profile is not there yet: nobody waited"
        assert not self.captured, "the context of a graph was changed"
        least, _, most = self.model.profiles[self.profile][name]
        self.given[name] = shape
        return all(low <= axis <= high for low, axis, high in zip(least, shape, most, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.model.inputs if name not in self.given]

    def get_tensor_shape(self, name: str) -> Shape:
        return self.model.shapes(self.given)[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.captured
        assert address in self.driver.memory
        self.addresses[name] = address
        return not self.trt.refuse("address")

    def execute_async_v3(self, stream: Stream) -> bool:
        given, addresses, memory = dict(self.given), dict(self.addresses), self.memory
        self._compile(f"profile {self.profile}")
        if stream.capturing is not None:
            assert self.ran == given, "captured before the first run of these shapes"
            if self.trt.refuse("capture"):
                return False
            self.captured = True
        self.ran = given

        def work() -> None:
            assert memory in self.driver.memory, "the memory of a context is gone"
            arrays = {}
            for name, shape in given.items():
                dtype = np.dtype({"INT64": np.int64, "FLOAT": np.float32}[self.model.inputs[name].name])
                content = self.driver.read(addresses[name], int(np.prod(shape)) * dtype.itemsize)
                arrays[name] = np.frombuffer(content, dtype).reshape(shape)
            for name, found in self.model.compute(arrays).items():
                assert found.shape == self.model.shapes(given)[name]
                self.driver.write(addresses[name], found.tobytes())

        if self.trt.refuse("run"):
            return False
        self.driver.put(stream, work)
        return True
