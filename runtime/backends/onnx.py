"""ONNX Runtime, on the CPU or with its CUDA provider."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.library import DOMAIN, NOT_BUILT, library_file
from rtx.runtime.engine import check_threads, gpu_index, is_tensorrt
from rtx.runtime.errors import EngineError, MissingExtraError, UsageError
from rtx.runtime.text import Batch, Encoded

# From here on an item of a packed graph is long. To give memory back and ask for it again takes a tenth of the time of
# MiniLM's batches, and fragments what is left.
_LONG_TOKENS = 2048
_CUDA = "CUDAExecutionProvider"
# What ONNX Runtime prints of a library of the system that it cannot load.
_NOT_FOUND = re.compile(r"Failed to load [^/\\]+?: ")


class Watch(NamedTuple):
    """Who looks inside a graph while it runs: how an export sees what layers read.

    Attributes:
        outputs: names of outputs that are fetched in each run besides those that were asked for.
        tell: is given them by name after each run; they are valid until it returns.
        inputs: gives what the graph takes besides a batch, for each run.
    """

    outputs: Sequence[str]
    tell: Callable[[Mapping[str, NDArray[Any]]], None]
    inputs: Callable[[], Mapping[str, NDArray[Any]]] = dict


class OnnxEngine:
    """A graph in an ONNX Runtime session.

    Args:
        graph: the serialised model, or the path of its file (needed where the weights lie beside it).
        output: name of the output to fetch; others are never computed into a copy.
        threads: threads of one run; None for the cores that this process may use.
        name: what error messages call the graph.
        packed: whether the graph leaves out padding.
        device: "cpu", "cuda" or "cuda:N". A GPU that cannot be used is an error: ONNX Runtime alone would go on with
            the CPU after a warning.
        watch: what else is fetched, and who is told.

    Attributes:
        input_names: of the graph.
        metadata: what who wrote the graph noted in it.

    Raises:
        UsageError: `threads` is less than 1 or more than 1024, or there is no such kind of device.
        MissingExtraError: onnxruntime is not installed, or not the one with CUDA.
        EngineError: the graph cannot be loaded, or the GPU cannot be used.
    """

    def __init__(
        self,
        graph: bytes | Path,
        *,
        output: str,
        threads: int | None = None,
        name: str = "onnx",
        packed: bool = False,
        device: str = "cpu",
        watch: Watch | None = None,
    ) -> None:
        check_threads(threads)
        gpu = gpu_index(device)
        if is_tensorrt(device):
            raise UsageError(f"{name}: ONNX Runtime runs a graph on cpu or cuda, and an engine of TensorRT on {device}")
        try:
            import onnxruntime as ort
        except ImportError as missing:
            raise MissingExtraError("onnxruntime", "cpu", "running an ONNX graph") from missing
        self.name = name
        self.packed = packed
        self._output = output
        self._watch = watch
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        # 3 = errors: warnings about graph optimisation mean nothing to who embeds texts.
        options.log_severity_level = 3
        # Threads that wait for work spin while a batch runs, and never between two: with ONNX Runtime's defaults one
        # query keeps a core busy for some 40 ms, and 20 a second a whole one. They spin for 20 us, which is enough from
        # one operator to the next and leaves the core to others where one thread waits for longer (older versions know
        # no such limit). Threads are not bound to cores: that gained nothing, and two processes would share the same.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        # A plan of memory is kept for every shape of a batch, and few shapes ever come again.
        options.enable_mem_pattern = False
        # Grow by what is asked for, not to the next power of two, and give a run's surplus back: without both, one long
        # batch fixes the memory of the process at its own peak.
        self._giving_back, self._keeping = ort.RunOptions(), ort.RunOptions()
        self._giving_back.log_severity_level = self._keeping.log_severity_level = 3
        shrinking = "cpu:0" if gpu is None else f"cpu:0;gpu:{gpu}"
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrinking)
        providers = _providers(ort, gpu, f"running an ONNX graph on {device}")
        missing_libraries = "" if gpu is None else _load_cuda(ort)
        _register_operators(options)
        try:
            model = graph if isinstance(graph, bytes) else os.fspath(graph)
            self._session: Any = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as broken:  # onnxruntime raises classes of its own that share no base but Exception
            # What it says of an operator that it does not know begins with its domain.
            hint = f" ({NOT_BUILT})" if f"{DOMAIN}:" in str(broken) and library_file() is None else ""
            where = "" if gpu is None else f" on {device}"
            reason = f"ONNX Runtime {ort.__version__} cannot load the graph{where}: {broken}{hint}"
            raise EngineError(f"{name}: {reason}") from broken
        # A provider that did not load is left out without an exception.
        if gpu is not None and _CUDA not in self._session.get_providers():
            raise EngineError(
                f"{name}: ONNX Runtime {ort.__version__} cannot use {device}, and would have gone on with the CPU. Its "
                "CUDA provider needs an NVIDIA driver, and the CUDA and cuDNN that this onnxruntime-gpu was built for"
                f"{missing_libraries}"
            )
        self.input_names = tuple(node.name for node in self._session.get_inputs())
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        outputs = [node.name for node in self._session.get_outputs()]
        if output not in outputs:
            raise EngineError(f"{name}: the graph has no output '{output}' (it has {', '.join(outputs)})")

    def run(self, batch: Batch) -> NDArray[np.float32]:
        # A copy: what ONNX Runtime gives lies in its arena, which could not shrink as long as somebody has a vector.
        return self.fetch([self._output], batch)[0].copy()

    def fetch(self, outputs: Sequence[str], batch: Batch) -> list[NDArray[np.float32]]:
        """Some of the graph's outputs.

        Raises:
            EngineError: the batch could not be run.
        """
        session = self._session
        if session is None:
            raise EngineError(f"{self.name}: the engine is closed")
        options = self._giving_back if self._may_be_large(batch) else self._keeping
        watched = () if self._watch is None else self._watch.outputs
        given = batch if self._watch is None else {**batch, **self._watch.inputs()}
        try:
            results: list[NDArray[np.float32]] = session.run([*outputs, *watched], given, options)
        except Exception as broken:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items())
            raise EngineError(f"{self.name}: running a batch failed ({shapes}): {broken}") from broken
        if self._watch is not None:
            self._watch.tell(dict(zip(watched, results[len(outputs) :], strict=True)))
        return results[: len(outputs)]

    def max_rows(self, longest: Encoded) -> int | None:  # noqa: ARG002 any number
        return None

    def close(self) -> None:
        self._session = None

    def _may_be_large(self, batch: Batch) -> bool:
        """Whether a batch may need much more memory than others, so that it is worth its time to give that back."""
        if not self.packed or not batch:
            return True  # attention with padding takes the square of the longest
        rows, tokens = next(iter(batch.values())).shape
        return bool(rows == 1 and tokens >= _LONG_TOKENS)  # all others stay within a budget


def _providers(ort: Any, gpu: int | None, purpose: str) -> list[tuple[str, dict[str, object]]]:
    """What runs a graph: the CPU, behind a GPU if there is to be one.

    Raises:
        MissingExtraError: this ONNX Runtime was built without CUDA.
    """
    growing = {"arena_extend_strategy": "kSameAsRequested"}
    cpu: tuple[str, dict[str, object]] = ("CPUExecutionProvider", {**growing})
    if gpu is None:
        return [cpu]
    if _CUDA not in ort.get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "gpu", purpose)
    # Without TF32: a float32 graph is held to PyTorch's float32.
    return [(_CUDA, {"device_id": gpu, "use_tf32": 0, **growing}), cpu]


@functools.cache
def _load_cuda(ort: Any) -> str:
    """Load CUDA and cuDNN from packages of Python, which the provider does not find by itself; what was not found."""
    if (preload := getattr(ort, "preload_dlls", None)) is None:  # before 1.21
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        preload()
    # It looks in packages, by path, and for what it did not get there wherever the system looks, by name.
    lines = [line for line in said.getvalue().splitlines() if _NOT_FOUND.match(line)]
    return f" ({'; '.join(lines)})" if lines else ""


def _register_operators(options: Any) -> None:
    """Let a session know the operators of rtx; one that does without them is loaded also where they cannot be."""
    if (library := library_file()) is not None:
        # A library for another machine: ONNX Runtime names what a graph then misses.
        with contextlib.suppress(Exception):
            options.register_custom_ops_library(str(library))


def usable_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _cgroup_cores(Path("/sys/fs/cgroup/cpu.max")) or affinity))


def _cgroup_cores(cpu_max: Path) -> int | None:
    """Cores that a container's CPU limit is worth, rounded up; None without a limit (cgroup v2, docs.kernel.org)."""
    try:
        quota_us, period_us = cpu_max.read_text().split()
        return -(-int(quota_us) // int(period_us))
    except (OSError, ValueError):  # no such file outside of containers; "max" where there is no limit
        return None
