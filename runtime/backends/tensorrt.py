"""Engines of TensorRT that were built ahead of time, behind the contract of every engine.

    batch ─► pinned buffer ─► GPU      a slot's own stream
                               │
                              run      the stream of all runs
                               │
    vectors ◄─ pinned buffer ◄─        the slot's stream again

Two slots: while one caller's batch runs, another's is copied. Buffers, and what TensorRT computes in, are allocated
when the engine is opened, for the largest batch of its profiles. CUDA graphs are captured here with classic TensorRT,
and by TensorRT-RTX itself; what they take, and the kernels that TensorRT-RTX compiles, comes on top. Nothing here has
run on a GPU: tests have a stand-in for the driver and for TensorRT, which holds back all work until it is waited for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import threading
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.backends.cuda import Cuda
from rtx.runtime.backends.kernel_cache import KernelCache
from rtx.runtime.engine import rows_taken
from rtx.runtime.errors import EngineError, install_command
from rtx.runtime.gpu import Gpu
from rtx.runtime.machine import installed_version
from rtx.runtime.manifest import EngineEntry, Target
from rtx.runtime.text import Batch, Encoded

INSTALL: dict[Target, str] = {
    "tensorrt-rtx": install_command("tensorrt-rtx"),
    "tensorrt": "pip install tensorrt 'cuda-bindings>=12.9.1,<14'",
}
"""The command that brings each."""

_MODULES: dict[Target, tuple[str, ...]] = {
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "tensorrt": ("tensorrt",),
}
_PACKAGES: dict[Target, tuple[str, ...]] = {
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),  # the last alone does not say for which CUDA
}
_SLOTS = 2
# Runs of a profile after which what TensorRT-RTX has compiled is kept: a first batch compiles what takes any shape, and
# what is made for one follows in the background. Many a process is killed, not closed.
_KEPT_AFTER = (1, 16, 256, 4096)
# Each keeps a context of TensorRT on the host, and what the driver needs of a graph on the GPU.
_MAX_GRAPHS = 32
_TYPES = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}

T = TypeVar("T")
_Shape = tuple[int, ...]
_Shapes = tuple[tuple[str, _Shape], ...]


def load_tensorrt(target: Target) -> Any:
    """TensorRT's module.

    Raises:
        EngineError: it is not installed, or cannot be loaded; says how to install it.
    """
    reasons = []
    for name in _MODULES[target]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as broken:
            reasons.append(f"{name}: {broken}")
    why = "; ".join(reasons) or "it is not installed"
    raise EngineError(f"{target}: {why}. It comes with: {INSTALL[target]}")


def installed_tensorrt(target: Target) -> str | None:
    """Its version; None where it is not installed."""
    package = tensorrt_package(target)
    return None if package is None else installed_version(package)


def tensorrt_package(target: Target) -> str | None:
    """The installed package that it comes with."""
    return next((package for package in _PACKAGES[target] if installed_version(package)), None)


def quiet_logger(trt: Any, tell: Callable[[str], None] = lambda _: None) -> Any:
    """A logger of TensorRT that is silent and keeps the last error in `last`; `tell` is told all that is no error."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = message.strip()
            else:
                tell(message)

    return Logger()


def mismatch(entry: EngineEntry, version: str | None, capabilities: set[int]) -> str | None:
    """Why an engine cannot run here; None if nothing is known against it.

    Args:
        entry: of the engine.
        version: of the TensorRT that is installed; None if it is not.
        capabilities: of the GPUs at hand, as 89.
    """
    if version != entry.version:
        here = f"here is {version}" if version else "it is not installed here"
        return f"it was built with {entry.target} {entry.version}, and runs with that alone; {here}"
    if entry.capabilities and not capabilities & {*entry.capabilities}:
        built, here = (", ".join(f"sm_{sm}" for sm in sorted(of)) for of in ({*entry.capabilities}, capabilities))
        return f"it was built for {built}; here is {here}"
    return None


class _Tensor(NamedTuple):
    """An input or output of an engine.

    Attributes:
        dtype: of its numbers.
        largest: by profile, its shape in the largest batch.
        limits: by profile, the least and the largest shape; of inputs alone.
    """

    dtype: np.dtype[Any]
    largest: list[_Shape]
    limits: list[tuple[_Shape, _Shape]]

    @property
    def size(self) -> int:
        """Bytes that it takes at most."""
        return max(int(np.prod(shape, dtype=np.int64)) for shape in self.largest) * self.dtype.itemsize


@dataclass
class _Slot:
    """What one run at a time has for itself.

    Attributes:
        number: of the slot.
        stream: of its copies.
        host, device: pinned buffers and addresses on the GPU, by tensor.
        copied, computed: marks: the inputs are there, the outputs are there.
    """

    number: int
    stream: Any
    host: dict[str, NDArray[np.uint8]]
    device: dict[str, int]
    copied: Any
    computed: Any


class _Captured(NamedTuple):
    """A run as a CUDA graph, and its own context: what TensorRT captured is void once a context has other shapes."""

    graph: Any
    context: Any


class TensorRtEngine:
    """A serialized engine of TensorRT on a GPU.

    Args:
        content: the engine.
        entry: what the bundle's manifest says of it.
        output: name of the output that `run` gives.
        gpu: that it runs on.
        name: what error messages call the engine.
        max_graphs: with classic TensorRT, shapes that came before and are launched as a CUDA graph; 0 for none.
            TensorRT-RTX has graphs of its own.
        kernels: file in which TensorRT-RTX keeps what it compiles on this GPU; None to compile at every start.

    Attributes:
        input_names: of the engine.
        metadata: nothing; it is what graphs have.
        graph_problem: why runs are not captured as graphs, where that failed; they go on without.
        kernels: what TensorRT-RTX has compiled, and why that is not kept where it is not; None with classic TensorRT.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        EngineError: TensorRT is missing or another version, the GPU is another, or one of them cannot use the engine.
    """

    packed = False

    def __init__(
        self,
        content: bytes,
        entry: EngineEntry,
        *,
        output: str,
        gpu: Gpu,
        name: str = "tensorrt",
        max_graphs: int = _MAX_GRAPHS,
        kernels: Path | None = None,
    ) -> None:
        self.name = name
        trt = load_tensorrt(entry.target)
        if problem := mismatch(entry, str(trt.__version__), {gpu.capability}):
            raise EngineError(f"{name}: {problem}")
        self._trt, self._output, self._profiles = trt, output, entry.profiles
        self._max_graphs = max_graphs if entry.target == "tensorrt" else 0
        self._logger = quiet_logger(trt)
        # CUDA does not work in a process that was forked off another one that uses it.
        self._process = os.getpid()
        # In the order in which they were taken, to be given back in the other one.
        self._held = contextlib.ExitStack()
        self._closing, self._computing = threading.Lock(), threading.Lock()
        self._captured: OrderedDict[tuple[int, int, _Shapes], _Captured | None] = OrderedDict()
        # The one that was used last comes first: a caller alone has one slot, and its graphs.
        self._slots: queue.LifoQueue[_Slot] = queue.LifoQueue()
        self.graph_problem: str | None = None
        self.kernels: KernelCache | None = None
        self._served: Counter[int] = Counter()
        self.metadata: dict[str, str] = {}
        self._closed = False
        try:
            self._cuda = Cuda(gpu.index)
        except EngineError as refused:
            raise EngineError(f"{name}: {refused}") from refused
        try:
            with self._cuda.current():
                try:
                    self._open(content, entry, kernels)
                except BaseException as broken:
                    # Its frames hold contexts of TensorRT, which have to go before the memory that they work in.
                    traceback.clear_frames(broken.__traceback__)
                    self._held.close()
                    raise
        except BaseException as broken:
            self._cuda.close()
            if isinstance(broken, Exception):  # TensorRT raises RuntimeError and TypeError
                raise EngineError(f"{name}: {broken}") from broken
            raise

    def run(self, batch: Batch) -> NDArray[np.float32]:
        return self.fetch([self._output], batch)[0]

    def fetch(self, outputs: Sequence[str], batch: Batch) -> list[NDArray[Any]]:
        """Some of the engine's outputs, the caller's to keep.

        Raises:
            EngineError: no profile takes the batch, or it could not be run.
        """
        arrays = self._checked(batch)
        profile = self._profile_of(arrays)
        slot = self._slots.get()
        done = False
        try:
            self._check_open()
            with self._cuda.current():
                try:
                    shapes = self._start(slot, profile, arrays, outputs)
                    self._cuda.synchronize(slot.stream)
                    found = [self._view(slot, name, shapes[name]).copy() for name in outputs]
                    done = True
                    self._keep_kernels(profile)
                finally:
                    if not done:
                        self._settle(slot)
            return found
        except Exception as broken:  # TensorRT raises RuntimeError and TypeError
            what = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items())
            raise EngineError(f"{self.name}: running a batch failed ({what}): {broken}") from broken
        finally:
            self._slots.put(slot)

    def max_rows(self, longest: Encoded) -> int | None:
        return rows_taken(self._profiles, longest)

    def close(self) -> None:
        if os.getpid() != self._process:
            return
        with self._closing:
            if self._closed:
                return
            slots = [self._slots.get() for _ in range(_SLOTS)]  # nothing runs any more
            self._closed = True
            try:
                with self._cuda.current():
                    if self.kernels is not None:
                        self.kernels.save()
                    self._held.close()
                self._cuda.close()
            finally:
                for slot in slots:  # for those that wait for one, to be told
                    self._slots.put(slot)

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise EngineError(
                f"{self.name}: the engine was opened before this process was forked off; expected it to be opened in "
                "the process that uses it"
            )
        if self._closed:
            raise EngineError(f"{self.name}: the engine is closed")

    def _settle(self, slot: _Slot) -> None:
        """Let end what a run that failed has begun, before its buffers are used again."""
        with contextlib.suppress(EngineError):  # if the GPU is lost, the next run says so
            with self._computing:  # what is captured must not be waited for
                self._cuda.synchronize(self._compute)
            self._cuda.synchronize(slot.stream)

    def _keep_kernels(self, profile: int) -> None:
        """Write what batches of a profile made TensorRT-RTX compile."""
        if self.kernels is None:
            return
        with self._computing:
            self._served[profile] += 1
            new = self.kernels.take() if self._served[profile] in _KEPT_AFTER else None
        if new is not None:
            self.kernels.write(new)

    def _open(self, content: bytes, entry: EngineEntry, kernels: Path | None) -> None:
        cuda = self._cuda
        self._compute = self._keep(cuda.stream(), cuda.destroy_stream)
        self._held.callback(self._unload)
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(f"{entry.target} cannot load the engine: {self._why()}")
        if engine.num_optimization_profiles != len(entry.profiles):
            found = engine.num_optimization_profiles
            raise EngineError(f"expected {len(entry.profiles)} profiles in the engine, found {found}")
        profiles = range(len(entry.profiles))
        # Runs follow each other in one stream, so that all contexts can work in the same memory.
        self._memory_bytes = max(int(engine.get_device_memory_size_for_profile_v2(at)) for at in profiles)
        self._memory = self._allocate(self._memory_bytes, "what TensorRT computes in")
        self._held.callback(self._drop)
        self._how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if entry.target == "tensorrt-rtx":
            self.kernels = KernelCache(self._trt, engine, kernels)
            self._how = self.kernels.config
        self._contexts = [self._context(at) for at in profiles]
        self._tensors = self._describe()
        self.input_names = tuple(name for name, tensor in self._tensors.items() if tensor.limits)
        if self._output not in self._tensors or self._output in self.input_names:
            others = ", ".join(name for name in self._tensors if name not in self.input_names)
            raise EngineError(f"the engine has no output '{self._output}' (it has {others})")
        for number in range(_SLOTS):
            self._slots.put(self._slot(number))
        if self.kernels is not None:
            self.kernels.save()
        self._held.callback(self._drop)  # before the buffers that its graphs know

    def _slot(self, number: int) -> _Slot:
        cuda = self._cuda
        stream = self._keep(cuda.stream(), cuda.destroy_stream)
        copied, computed = (self._keep(cuda.event(), cuda.destroy_event) for _ in range(2))
        slot = _Slot(number, stream, {}, {}, copied, computed)
        for name, tensor in self._tensors.items():
            slot.host[name] = self._keep(cuda.allocate_host(tensor.size), cuda.free_host)
            slot.device[name] = self._allocate(tensor.size, f"'{name}'")
        return slot

    def _allocate(self, size: int, purpose: str) -> int:
        """So many bytes on the GPU, until the engine is closed."""
        try:
            return self._keep(self._cuda.allocate(size), self._cuda.free)
        except EngineError as refused:
            free = f"{self._cuda.free_bytes() / 2**20:,.0f}"
            raise EngineError(
                f"{size / 2**20:,.0f} MiB for {purpose}, of {free} MiB that are free: {refused}. An engine for shorter "
                "texts (--lengths of rtx export) needs less"
            ) from refused

    def _keep(self, what: T, give_back: Callable[[T], None]) -> T:
        """Something of the GPU that is given back when the engine is closed."""
        self._held.callback(give_back, what)
        return what

    def _context(self, profile: int) -> Any:
        """A context of TensorRT for batches of a profile."""
        context = self._engine.create_execution_context(self._how)
        if context is None:
            raise EngineError(f"TensorRT makes no context: {self._why()}")
        context.set_device_memory(self._memory, self._memory_bytes)
        if not context.set_optimization_profile_async(profile, self._compute):
            raise EngineError(f"TensorRT does not take profile {profile}: {self._why()}")
        self._cuda.synchronize(self._compute)
        return context

    def _describe(self) -> dict[str, _Tensor]:
        """Inputs and outputs by name, inputs first."""
        engine, found = self._engine, {}
        names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        profiles = range(len(self._contexts))
        for name in inputs:
            shapes = [[tuple(shape) for shape in engine.get_tensor_profile_shape(name, at)] for at in profiles]
            limits = [(of[0], of[2]) for of in shapes]
            found[name] = _Tensor(self._dtype(name), [largest for _, largest in limits], limits)
        for at, context in enumerate(self._contexts):
            self._set_shapes(context, tuple((name, found[name].largest[at]) for name in inputs))
        for name in (name for name in names if name not in found):
            found[name] = _Tensor(
                self._dtype(name), [tuple(context.get_tensor_shape(name)) for context in self._contexts], []
            )
        return found

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise EngineError(f"'{name}' is {kind}; expected one of {', '.join(_TYPES)}")
        return np.dtype(_TYPES[kind])

    def _checked(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """The engine's inputs, in the order of its own."""
        self._check_open()
        if {*batch} != {*self.input_names}:
            raise EngineError(
                f"{self.name}: expected {', '.join(self.input_names)}, got {', '.join(batch) or 'nothing'}"
            )
        for name in self.input_names:
            if batch[name].dtype != (dtype := self._tensors[name].dtype):
                raise EngineError(f"{self.name}: '{name}': expected {dtype}, got {batch[name].dtype}")
        return {name: batch[name] for name in self.input_names}

    def _profile_of(self, arrays: dict[str, NDArray[Any]]) -> int:
        """The first profile that takes arrays of these shapes."""
        tensors = self._tensors
        for at in range(len(self._contexts)):
            if all(_within(array.shape, *tensors[name].limits[at]) for name, array in arrays.items()):
                return at
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        name = next(iter(arrays))
        taken = "; ".join(f"{list(least)} to {list(most)}" for least, most in tensors[name].limits)
        raise EngineError(
            f"{self.name}: no profile of the engine takes this batch ({found}); it was built for {name} of {taken}. "
            "A smaller budget makes smaller batches; other lengths need an engine that was built for them"
        )

    def _start(
        self, slot: _Slot, profile: int, arrays: dict[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, _Shape]:
        """Put a batch into the streams: the shapes of the outputs, which are there when the slot's stream is done."""
        cuda = self._cuda
        for name, array in arrays.items():
            self._view(slot, name, array.shape)[...] = array
            cuda.copy_in(slot.device[name], slot.host[name], array.nbytes, slot.stream)
        cuda.record(slot.copied, slot.stream)
        given = tuple((name, tuple(array.shape)) for name, array in arrays.items())
        with self._computing:
            self._logger.last = ""
            cuda.wait(self._compute, slot.copied)
            context = self._run(slot, profile, given)
            shapes = {name: tuple(context.get_tensor_shape(name)) for name in outputs}
            cuda.record(slot.computed, self._compute)
        cuda.wait(slot.stream, slot.computed)
        for name, shape in shapes.items():
            size = int(np.prod(shape, dtype=np.int64)) * self._tensors[name].dtype.itemsize
            cuda.copy_out(slot.host[name], slot.device[name], size, slot.stream)
        return shapes

    def _run(self, slot: _Slot, profile: int, given: _Shapes) -> Any:
        """Put a run into the stream of all runs; gives the context that knows its shapes."""
        key = (slot.number, profile, given)
        captured = self._captured.get(key)
        if captured is not None:
            self._captured.move_to_end(key)
            self._cuda.launch(captured.graph, self._compute)
            return captured.context
        context = self._contexts[profile]
        self._enqueue(context, slot, given)
        if self._max_graphs == 0:
            return context
        # Worth it for shapes that come again.
        self._captured[key] = self._try_capture(slot, profile, given) if key in self._captured else None
        self._captured.move_to_end(key)
        while len(self._captured) > self._max_graphs:
            self._forget(self._captured.popitem(last=False)[1])
        return context

    def _enqueue(self, context: Any, slot: _Slot, given: _Shapes) -> None:
        self._set_shapes(context, given)
        for name, address in slot.device.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT does not take a buffer for '{name}': {self._why()}")
        self._execute(context)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._compute):
            raise EngineError(f"TensorRT does not run: {self._why()}")

    def _set_shapes(self, context: Any, shapes: _Shapes) -> None:
        for name, shape in shapes:
            if not context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT does not take {list(shape)} for '{name}': {self._why()}")
        if unknown := context.infer_shapes():
            raise EngineError(f"TensorRT cannot tell the shapes of {', '.join(unknown)}: {self._why()}")

    def _try_capture(self, slot: _Slot, profile: int, given: _Shapes) -> _Captured | None:
        """A run as a graph; None where it cannot be one now. What was asked for has run already, without."""
        try:
            return self._capture(slot, profile, given)
        except (EngineError, RuntimeError, TypeError) as broken:  # TensorRT raises the latter two
            self.graph_problem, self._max_graphs = str(broken), 0
            return None

    def _capture(self, slot: _Slot, profile: int, given: _Shapes) -> _Captured:
        context = self._context(profile)
        # TensorRT does at the first run of new shapes what must not be in a graph.
        self._enqueue(context, slot, given)
        self._cuda.synchronize(self._compute)
        self._cuda.begin_capture(self._compute)
        try:
            self._execute(context)
        except BaseException:
            self._cuda.destroy_graph(self._cuda.end_capture(self._compute))
            raise
        return _Captured(self._cuda.end_capture(self._compute), context)

    def _forget(self, captured: _Captured | None) -> None:
        if captured is not None:
            self._cuda.synchronize(self._compute)
            self._cuda.destroy_graph(captured.graph)

    def _drop(self) -> None:
        """Give back what is TensorRT's, from the inside out, while its memory is still there."""
        try:
            self._cuda.synchronize(self._compute)
            while self._captured:
                self._forget(self._captured.popitem()[1])
        finally:
            self._captured.clear()
            self._contexts = []

    def _unload(self) -> None:
        self._how = self.kernels = None
        self._engine = self._runtime = None

    def _view(self, slot: _Slot, name: str, shape: _Shape) -> NDArray[Any]:
        """The beginning of a pinned buffer as an array."""
        dtype = self._tensors[name].dtype
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return slot.host[name][:size].view(dtype).reshape(shape)

    def _why(self) -> str:
        why, self._logger.last = self._logger.last, ""
        return why or "it does not say why"


def _within(shape: _Shape, least: _Shape, most: _Shape) -> bool:
    return len(shape) == len(least) and all(
        low <= axis <= high for low, axis, high in zip(least, shape, most, strict=True)
    )
