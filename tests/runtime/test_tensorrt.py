"""Engines of TensorRT behind stand-ins for it and for the driver, which check lifetimes and the order of calls."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gc
import hashlib
import inspect
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rtx.runtime import bundle as bundle_module
from rtx.runtime import verification
from rtx.runtime.backends import cuda, kernel_cache, tensorrt
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.backends.tensorrt import TensorRtEngine, mismatch
from rtx.runtime.bundle import Bundle
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import BundleError, EngineError, MissingExtraError, UsageError
from rtx.runtime.golden import Deviation, Golden
from rtx.runtime.gpu import Gpu
from rtx.runtime.manifest import MANIFEST_FILE, EngineEntry, FileEntry
from rtx.runtime.subjects import open_variants
from rtx.runtime.text import Encoded
from rtx.runtime.verification import verify_bundle

sys.path.append(str(Path(__file__).parent))

from called import called
from stand_in_gpu import Context, DataType, Driver, Model, TensorRt

ENTRY = EngineEntry(
    target="tensorrt-rtx",
    version="1.7.1",
    graph="onnx/model.onnx",
    sources={},
    capabilities=(80, 89),
    profiles=({"batch": (1, 4, 16), "tokens": (2, 8, 8)}, {"batch": (1, 1, 4), "tokens": (9, 32, 32)}),
    layers={},
)
CLASSIC = dataclasses.replace(ENTRY, target="tensorrt", capabilities=())
L4 = Gpu(index=1, name="NVIDIA L4", capability=89, memory_bytes=24 << 30)
BOXES = [((1, 2), (4, 8), (16, 8)), ((1, 9), (1, 32), (4, 32))]
INPUTS = ("input_ids", "attention_mask")


def text_of(length: int) -> Encoded:
    return Encoded([1] * length, [0] * length)


def embed(ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float32]:
    kept = (ids * mask).astype(np.float32)
    return np.stack([kept.sum(1), kept.max(1), mask.sum(1).astype(np.float32)], axis=1)


MODEL = Model(
    inputs=dict.fromkeys(INPUTS, DataType.INT64),
    outputs={"sentence_embedding": DataType.FLOAT, "token_count": DataType.INT64},
    profiles=[dict.fromkeys(INPUTS, box) for box in BOXES],
    shapes=lambda given: {"sentence_embedding": (given["input_ids"][0], 3), "token_count": (given["input_ids"][0],)},
    compute=lambda arrays: {
        "sentence_embedding": embed(*arrays.values()),
        "token_count": arrays["attention_mask"].sum(1),
    },
)


@dataclasses.dataclass
class StandIn:
    driver: Driver
    trt: TensorRt

    def open(self, **options: Any) -> TensorRtEngine:
        settings = {"output": "sentence_embedding", "gpu": L4, "name": "toy", **options}
        return TensorRtEngine(settings.pop("content", b"an engine"), settings.pop("entry", ENTRY), **settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.setenv("RTX_CACHE", str(tmp_path / "cache"))
    driver = Driver()
    found = StandIn(driver, TensorRt(driver, {b"an engine": MODEL}))
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda _: found.trt)
    yield found
    assert driver.left() == 0  # whatever happens, all is given back


def batch(rows: int, tokens: int, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    mask = (np.arange(tokens) < random.integers(1, tokens + 1, size=(rows, 1))).astype(np.int64)
    return {"input_ids": random.integers(1, 1000, size=(rows, tokens)), "attention_mask": mask}


def same(engine: TensorRtEngine, given: dict[str, NDArray[np.int64]]) -> None:
    found = engine.run(given)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, embed(*given.values()))


def test_batches_of_every_profile(gpu: StandIn) -> None:
    engine = gpu.open()
    assert engine.input_names == INPUTS
    shapes = [(1, 2), (16, 8), (3, 5), (1, 9), (4, 32), (2, 17), (1, 2)]
    for seed, (rows, tokens) in enumerate(shapes):
        same(engine, batch(rows, tokens, seed))
    engine.close()


def test_what_a_caller_has_is_its_own(gpu: StandIn) -> None:
    engine = gpu.open()
    given, other = batch(2, 4, 1), batch(2, 4, 2)
    first = engine.run(given)
    engine.run(other)
    np.testing.assert_array_equal(first, embed(*given.values()))
    engine.close()


def test_inputs_that_are_not_contiguous(gpu: StandIn) -> None:
    engine = gpu.open()
    wide = batch(4, 16)
    same(engine, {name: array[::2, ::2] for name, array in wide.items()})
    engine.close()


def test_several_outputs(gpu: StandIn) -> None:
    engine, given = gpu.open(), batch(3, 6)
    count, vectors = engine.fetch(["token_count", "sentence_embedding"], given)
    np.testing.assert_array_equal(count, given["attention_mask"].sum(1))
    np.testing.assert_array_equal(vectors, embed(*given.values()))
    engine.close()


def test_shapes_that_come_again_are_graphs(gpu: StandIn) -> None:
    engine = gpu.open(entry=CLASSIC)
    launches = []
    for seed in range(4):
        same(engine, batch(2, 5, seed))
        same(engine, batch(1, 20, seed))
        launches.append(gpu.driver.launches)
    # Seen, captured, and from then on launched.
    assert launches == [0, 0, 2, 4]
    assert engine.graph_problem is None
    engine.close()


def test_no_more_graphs_than_allowed(gpu: StandIn) -> None:
    engine = gpu.open(entry=CLASSIC, max_graphs=2)
    for seed, tokens in itertools.product(range(3), (2, 3)):
        same(engine, batch(1, tokens, seed))
    assert (gpu.driver.launches, len(gpu.driver.graphs)) == (2, 2)
    for seed in range(3):
        same(engine, batch(1, 4, seed))
    assert len(gpu.driver.graphs) == 2  # the one that was not used for longest is gone
    same(engine, batch(1, 3, 9))
    same(engine, batch(1, 2, 9))
    assert gpu.driver.launches == 4
    engine.close()


def test_without_graphs(gpu: StandIn) -> None:
    engine = gpu.open(entry=CLASSIC, max_graphs=0)
    for seed in range(3):
        same(engine, batch(2, 5, seed))
    assert (gpu.driver.launches, gpu.driver.graphs) == (0, [])
    engine.close()


def test_tensorrt_rtx_makes_its_own_graphs(gpu: StandIn) -> None:
    with contextlib.closing(gpu.open()) as engine:
        for seed in range(4):
            same(engine, batch(2, 5, seed))
    assert (gpu.driver.launches, gpu.trt.graphs) == (0, {"whole graph"})
    with contextlib.closing(gpu.open(entry=CLASSIC)) as engine:
        assert engine.kernels is None
    assert gpu.trt.graphs == {"whole graph", "by hand"}


def test_where_capturing_fails_runs_go_on_without(gpu: StandIn) -> None:
    gpu.trt.refused.add("capture")
    engine = gpu.open(entry=CLASSIC)
    for seed in range(4):
        same(engine, batch(2, 5, seed))
    assert engine.graph_problem == "TensorRT does not run: no capture today"
    assert (gpu.driver.launches, gpu.driver.graphs) == (0, [])
    engine.close()


def test_what_was_compiled_is_there_at_the_next_start(gpu: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "kernels"
    engine = gpu.open(kernels=file)
    assert engine.kernels is not None
    assert not engine.kernels.found
    assert file.read_bytes() == b"kernels:context"
    for tokens, compiled in ((8, "context,profile 0"), (20, "context,profile 0,profile 1")):
        same(engine, batch(2, tokens))
        assert file.read_text() == f"kernels:{compiled}"
    written = file.stat().st_mtime_ns
    same(engine, batch(3, 20))
    engine.close()
    assert file.stat().st_mtime_ns == written
    engine = gpu.open(kernels=file)
    assert engine.kernels is not None
    assert engine.kernels.found
    same(engine, batch(2, 8))
    engine.close()
    assert file.stat().st_mtime_ns == written


def test_what_is_compiled_in_the_background_is_kept_too(gpu: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "kernels"
    engine = gpu.open(kernels=file)
    same(engine, batch(2, 8))
    assert engine.kernels is not None
    engine.kernels._cache.compiled.append("for [2, 8]")
    for seed in range(2, 16):
        same(engine, batch(2, 8, seed))
    assert "for [2, 8]" not in file.read_text()
    same(engine, batch(2, 8))  # the 16th
    assert "for [2, 8]" in file.read_text()
    engine.close()


def test_kernels_of_two_threads_are_kept_in_order(tmp_path: Path) -> None:
    cache = kernel_cache.KernelCache(Kernels.module, Kernels(), tmp_path / "kernels")
    older, newer = cache.take(), cache.take()
    cache.write(newer)
    cache.write(older)  # of a thread that was slower
    assert (tmp_path / "kernels").read_bytes() == b"2"
    assert cache.problem is None
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            list(pool.map(cache.write, [cache.take(), cache.take()]))
    assert cache.problem is None
    assert (tmp_path / "kernels").read_bytes() == b"102"


class Kernels:
    """A `IRuntimeCache` that counts, and all that leads to it."""

    module = SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=0),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=0),
    )

    def __init__(self) -> None:
        self.taken = 0

    def create_runtime_config(self) -> Kernels:
        return self

    def create_runtime_cache(self) -> Kernels:
        return self

    def set_execution_context_allocation_strategy(self, _: int) -> None:
        pass

    def set_runtime_cache(self, _: Kernels) -> None:
        pass

    def serialize(self) -> bytes:
        self.taken += 1
        return b"%d" % self.taken


def test_kernels_that_do_not_fit_are_compiled_anew(gpu: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "kernels"
    file.write_bytes(b"of another GPU")
    with contextlib.closing(gpu.open(kernels=file)) as engine:
        assert engine.kernels is not None
        assert not engine.kernels.found
        same(engine, batch(2, 8))
    assert file.read_bytes() == b"kernels:context,profile 0"


def test_kernels_that_cannot_be_kept_are_no_error(gpu: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with contextlib.closing(gpu.open(kernels=tmp_path / "file" / "kernels")) as engine:
        same(engine, batch(2, 8))
        assert engine.kernels is not None
        assert engine.kernels.problem is not None
        assert "file" in engine.kernels.problem


@pytest.mark.parametrize("broken", [RuntimeError("out of kernels"), TypeError("no None")], ids=str)
def test_a_capture_that_raises_costs_no_request(gpu: StandIn, broken: Exception, monkeypatch: Any) -> None:
    right = Context.infer_shapes
    asked = []

    def once(context: Context) -> list[str]:
        asked.append(context)
        if len(asked) == 5:  # the two profiles, two runs, and then the graph's own context
            raise broken
        return right(context)

    monkeypatch.setattr(Context, "infer_shapes", once)
    with contextlib.closing(gpu.open(entry=CLASSIC)) as engine:
        for seed in range(4):
            same(engine, batch(2, 5, seed))
        assert engine.graph_problem == str(broken)


def test_a_run_that_fails_does_not_void_the_capture_of_another(gpu: StandIn, monkeypatch: Any) -> None:
    """The stand-in's streams must not be waited for while they are captured."""
    capturing, failed = threading.Event(), threading.Event()
    right = tensorrt.TensorRtEngine._execute

    def slow(engine: TensorRtEngine, context: Any) -> None:
        if engine._compute.capturing is not None and not capturing.is_set():
            capturing.set()
            assert not failed.wait(0.3)  # it has to wait until the capture is done
        right(engine, context)

    monkeypatch.setattr(tensorrt.TensorRtEngine, "_execute", slow)
    with contextlib.closing(gpu.open(entry=CLASSIC)) as engine, ThreadPoolExecutor(1) as threads:
        same(engine, batch(2, 5))
        second = threads.submit(same, engine, batch(2, 5, 1))
        assert capturing.wait(30)
        gpu.driver.refused["cuMemcpyHtoDAsync"] = 0
        with pytest.raises(EngineError, match="cuMemcpyHtoDAsync"):
            engine.run(batch(1, 2))
        failed.set()
        second.result(30)
        gpu.driver.refused.clear()
        for seed in range(3):  # in whichever slot
            same(engine, batch(2, 5, seed))
        assert engine.graph_problem is None
        assert gpu.driver.launches > 0


def test_a_gpu_that_is_lost_leaves_nobody_waiting(gpu: StandIn) -> None:
    engine = gpu.open()
    gpu.driver.refused["cuStreamSynchronize"] = 0
    with pytest.raises(EngineError, match="cuStreamSynchronize"):
        engine.close()
    with pytest.raises(EngineError, match="toy: the engine is closed"):
        engine.run(batch(1, 2))
    assert engine._contexts == []
    assert engine._engine is None
    # What a lost GPU does not take back is gone with it.
    gpu.driver.__init__()  # type: ignore[misc]


def test_what_tensorrt_raises_when_it_opens_is_an_error_of_the_engine(gpu: StandIn, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a page of C++")

    monkeypatch.setattr(Context, "set_device_memory", broken)
    with pytest.raises(EngineError, match="toy: a page of C") as raised:
        gpu.open()
    # Contexts went before the memory that they work in, although the error is still held.
    assert raised.value.__cause__ is not None
    assert gpu.driver.left() == 0
    assert [kept for kept in gc.get_objects() if isinstance(kept, Context) and kept.trt is gpu.trt] == []


def test_the_context_of_the_caller_is_as_it_was(gpu: StandIn) -> None:
    gpu.driver.pushed().append("of another library")
    engine = gpu.open()
    same(engine, batch(1, 2))
    engine.close()
    assert gpu.driver.pushed() == ["of another library"]
    gpu.driver.pushed().clear()


def test_a_fork_has_no_engine(gpu: StandIn, monkeypatch: Any) -> None:
    engine = gpu.open()
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    with pytest.raises(EngineError, match="toy: the engine was opened before this process was forked off"):
        engine.run(batch(1, 2))
    engine.close()
    monkeypatch.setattr(os, "getpid", lambda: process)
    same(engine, batch(1, 2))
    engine.close()


def test_a_reason_is_told_once(gpu: StandIn) -> None:
    engine = gpu.open()
    gpu.trt.refused.add("run")
    with pytest.raises(EngineError, match="no run today"):
        engine.run(batch(1, 2))
    gpu.trt.refused.clear()
    gpu.trt.logger.log(gpu.trt.ILogger.Severity.ERROR, "something else")
    gpu.trt.silent.add("run")
    with pytest.raises(EngineError, match="does not run: it does not say why"):
        engine.run(batch(1, 2))
    gpu.trt.silent.clear()
    engine.close()


def test_several_callers_at_once(gpu: StandIn) -> None:
    engine = gpu.open(entry=CLASSIC, max_graphs=4)
    with ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda seed: same(engine, batch(1 + seed % 3, 4, seed)), range(200)))
    assert gpu.driver.launches > 0
    engine.close()


def test_closing_waits_for_what_runs_and_then_nothing_does(gpu: StandIn) -> None:
    engine = gpu.open()
    started = threading.Event()

    def run_on() -> None:
        for seed in itertools.count():
            same(engine, batch(2, 5, seed))
            started.set()

    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(run_on) for _ in range(3)]
        assert started.wait(30)
        engine.close()
        engine.close()
        for each in running:
            with pytest.raises(EngineError, match=r"toy: .*the engine is closed"):
                each.result(30)
    with pytest.raises(EngineError, match="toy: the engine is closed"):
        engine.run(batch(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.8.0"}, "it was built with tensorrt-rtx 1.8.0, and runs with that alone; here is 1.7.1"),
        ({"capabilities": (86, 120)}, "it was built for sm_86, sm_120; here is sm_89"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_loaded(gpu: StandIn, changes: Any, message: str) -> None:
    gpu.driver.refused["cuInit"] = 0
    with pytest.raises(EngineError, match=f"toy: {message}"):
        gpu.open(entry=dataclasses.replace(ENTRY, **changes))
    assert gpu.trt.loaded == 0


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        (("tensorrt", "tensorrt-cu12"), "tensorrt-cu12"),
        (("tensorrt", "tensorrt-cu13"), "tensorrt-cu13"),
        (("tensorrt",), "tensorrt"),
        ((), None),
    ],
)
def test_the_package_tells_which_cuda_it_is_for(
    installed: tuple[str, ...], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install tensorrt` brings one for a CUDA as well."""
    monkeypatch.setattr(tensorrt, "installed_version", lambda name: "10.14" if name in installed else None)
    assert tensorrt.tensorrt_package("tensorrt") == found


def test_classic_engines_are_of_no_known_capability() -> None:
    assert mismatch(CLASSIC, "1.7.1", {90}) is None
    assert mismatch(CLASSIC, None, {90}) == (
        "it was built with tensorrt 1.7.1, and runs with that alone; it is not installed here"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content": b"another"}, "toy: tensorrt-rtx cannot load the engine: it does not say why"),
        ({"output": "scores"}, r"no output 'scores' \(it has sentence_embedding, token_count\)"),
        ({"output": "input_ids"}, "no output 'input_ids'"),
        (
            {"entry": dataclasses.replace(ENTRY, profiles=ENTRY.profiles[:1])},
            "expected 1 profiles in the engine",
        ),
        (
            {"gpu": dataclasses.replace(L4, index=2)},
            "answers cuDeviceGet with error 101: it was refused",
        ),
    ],
)
def test_engines_that_cannot_be_opened(gpu: StandIn, options: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        gpu.open(**options)


@pytest.mark.parametrize("what", ["engine", "context", "profile"])
def test_tensorrt_says_why(gpu: StandIn, what: str) -> None:
    gpu.trt.refused.add(what)
    with pytest.raises(EngineError, match=f"no {what} today"):
        gpu.open()


@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemAllocHost", "cuStreamCreate", "cuEventCreate"])
def test_a_gpu_that_has_no_more_gives_back_what_was_taken(gpu: StandIn, call: str) -> None:
    for allowed in itertools.count():
        gpu.driver.refused = {call: allowed}
        try:
            engine = gpu.open()
        except EngineError as refused:
            assert str(refused).startswith("toy: ")  # noqa: PT017
            assert f"the NVIDIA driver answers {call} with error 2: it was refused" in str(refused)  # noqa: PT017
            if call == "cuMemAlloc":
                told = r"toy: \d+ MiB for (what TensorRT computes in|'\w+'), of 3 MiB that are free: .*--lengths"
                assert re.match(told, str(refused))  # noqa: PT017
            assert gpu.driver.left() == 0
        else:
            engine.close()
            break
    assert allowed >= 3


def test_types_that_numpy_does_not_have_are_named(gpu: StandIn) -> None:
    gpu.trt.models[b"an engine"] = dataclasses.replace(MODEL, outputs={**MODEL.outputs, "token_count": DataType.HALF})
    with pytest.raises(EngineError, match="toy: 'token_count' is HALF; expected one of FLOAT"):
        gpu.open()


def test_a_batch_that_no_profile_takes(gpu: StandIn) -> None:
    engine = gpu.open()
    for rows, tokens in [(17, 8), (5, 9), (1, 33), (1, 1)]:
        with pytest.raises(EngineError, match=rf"no profile of the engine takes .*input_ids \[{rows}, {tokens}\]"):
            engine.run(batch(rows, tokens))
    with pytest.raises(EngineError, match=r"built for input_ids of \[1, 2\] to \[16, 8\]; \[1, 9\] to \[4, 32\]"):
        engine.run(batch(17, 8))
    same(engine, batch(1, 2))
    engine.close()


def test_inputs_of_another_name_or_type(gpu: StandIn) -> None:
    engine, given = gpu.open(), batch(1, 4)
    with pytest.raises(EngineError, match="toy: expected input_ids, attention_mask, got input_ids"):
        engine.run({"input_ids": given["input_ids"]})
    with pytest.raises(EngineError, match="toy: 'attention_mask': expected int64, got int32"):
        engine.run({**given, "attention_mask": given["attention_mask"].astype(np.int32)})
    engine.close()


@pytest.mark.parametrize("what", ["run", "address"])
def test_a_run_that_fails_is_no_ones_but_its_own(gpu: StandIn, what: str) -> None:
    engine = gpu.open()
    gpu.trt.refused = {what}
    for _ in range(5):
        with pytest.raises(EngineError, match=rf"toy: running a batch failed \(input_ids \[2, 5\], .*no {what} today"):
            engine.run(batch(2, 5))
    gpu.trt.refused = set()
    for seed in range(4):
        same(engine, batch(2, 5, seed))
    engine.close()


def test_a_copy_that_fails(gpu: StandIn) -> None:
    engine = gpu.open()
    for allowed in range(2):
        gpu.driver.refused = {"cuMemcpyHtoDAsync": allowed}
        with pytest.raises(EngineError, match="answers cuMemcpyHtoDAsync with error 2"):
            engine.run(batch(2, 5))
    gpu.driver.refused = {}
    same(engine, batch(2, 5))
    engine.close()


def test_the_real_driver_has_what_is_called() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    nodes = ast.walk(ast.parse(inspect.getsource(cuda)))
    names = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    calls = {name for name in names if name.startswith("cu") and name.isalnum()}
    assert len(calls) >= 20
    assert [name for name in sorted(calls) if not hasattr(driver, name)] == []
    assert hasattr(driver.CUstreamCaptureMode, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING == 1
    assert driver.CUevent_flags.CU_EVENT_DISABLE_TIMING == 2


def test_the_real_tensorrt_has_what_is_called() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    kinds = {
        "engine": trt.ICudaEngine,
        "context": trt.IExecutionContext,
        "_engine": trt.ICudaEngine,
        "_runtime": trt.Runtime,
        "config": trt.IRuntimeConfig,
        "_cache": trt.IRuntimeCache,
    }
    for owner, kind in kinds.items():
        names = called(tensorrt, owner) | called(kernel_cache, owner)
        assert names
        assert [name for name in sorted(names) if not hasattr(kind, name)] == []
    assert called(tensorrt, "_trt") >= {"Runtime", "TensorIOMode", "ExecutionContextAllocationStrategy"}
    assert [name for name in sorted(called(tensorrt, "_trt")) if not hasattr(trt, name)] == []
    assert trt.DataType.FLOAT.name == "FLOAT"
    assert {"FLOAT", "INT64", "INT32", "BOOL"} <= {*trt.DataType.__members__}
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda _: TensorRt(Driver(), MODEL))
    with pytest.raises(EngineError, match="cuda:0: no NVIDIA driver: "):
        TensorRtEngine(b"", ENTRY, output="y", gpu=dataclasses.replace(L4, index=0))


def test_without_the_package_for_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'cuda-bindings', .*rtx-retrieval\[tensorrt-rtx\]"):
        cuda.Cuda(0)


def test_without_tensorrt() -> None:
    with pytest.raises(EngineError, match=r"tensorrt: it is not installed\. It comes with: pip install tensorrt"):
        tensorrt.load_tensorrt("tensorrt")


@pytest.fixture
def served(gpu: StandIn, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose engine computes what its graph does."""
    folder = tmp_path / "toy.rtx"
    shutil.copytree(toy_bundle, folder)
    bundle = Bundle.open(folder)
    graph = OnnxEngine(toy_bundle / "onnx" / "model.onnx", output="sentence_embedding", threads=1)
    boxes = dict.fromkeys(graph.input_names, ((1, 2), (16, 64), (64, 64)))
    gpu.trt.models[b"an engine"] = Model(
        inputs=dict.fromkeys(graph.input_names, DataType.INT64),
        outputs={"sentence_embedding": DataType.FLOAT},
        profiles=[boxes],
        shapes=lambda given: {"sentence_embedding": (given["input_ids"][0], 32)},
        compute=lambda arrays: {"sentence_embedding": graph.run(arrays)},
    )
    file, content = "engines/model.tensorrt-rtx.engine", b"an engine"
    (folder / file).parent.mkdir()
    (folder / file).write_bytes(content)
    sources = {ENTRY.graph: bundle.manifest.files[ENTRY.graph].sha256}
    entry = dataclasses.replace(ENTRY, profiles=ENTRY.profiles[:1], sources=sources)
    listed = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    manifest = dataclasses.replace(
        bundle.manifest, files={**bundle.manifest.files, file: listed}, engines={file: entry}
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    for module in (bundle_module, verification):
        monkeypatch.setattr(module, "find_gpu", lambda index: dataclasses.replace(L4, index=index))
    monkeypatch.setattr(bundle_module, "installed_tensorrt", lambda _: "1.7.1")
    return Bundle.open(folder)


def test_a_model_on_its_engine(served: Bundle, gpu: StandIn) -> None:
    texts = ["a cat", "a dog that ran home", "", "how far is it to the sea?"] * 5
    with Embedder.open(served.path) as model:
        expected = model.embed(texts, prompt="query")
    with Embedder.open(served.path, device="tensorrt:1") as model:
        assert model.engine.name == "toy.rtx:fp32"
        for _ in range(3):
            np.testing.assert_allclose(model.embed(texts, prompt="query"), expected, atol=1e-6)
    assert (gpu.trt.loaded, gpu.trt.graphs) == (1, {"whole graph"})
    (kept,) = (served.path.parent / "cache").iterdir()
    assert kept.name == f"kernels-{hashlib.sha256(b'an engine').hexdigest()[:16]}-NVIDIA_L4"


def test_more_rows_than_a_profile_takes_are_several_batches(served: Bundle, gpu: StandIn) -> None:
    model = gpu.trt.models[b"an engine"]
    boxes = [((1, 1), (2, 8), (16, 8)), ((1, 9), (2, 64), (4, 64))]
    profiles = [dict.fromkeys(model.inputs, box) for box in boxes]
    gpu.trt.models[b"an engine"] = dataclasses.replace(model, profiles=profiles)
    ((file, entry),) = served.manifest.engines.items()
    sizes = ({"batch": (1, 2, 16), "tokens": (1, 8, 8)}, {"batch": (1, 2, 4), "tokens": (9, 64, 64)})
    engines = {file: dataclasses.replace(entry, profiles=sizes)}
    (served.path / MANIFEST_FILE).write_bytes(dataclasses.replace(served.manifest, engines=engines).to_bytes())
    texts = [f"text {number}" for number in range(40)] + [f"a text of {'words ' * 9}{number}" for number in range(9)]
    with Embedder.open(served.path) as graph:
        expected = graph.embed(texts)
    with Embedder.open(served.path, device="tensorrt") as embedder:
        assert embedder.budget == Budget(max_batch_tokens=16_384, max_batch_items=256)
        lengths = (1, 8, 9, 64, 65)
        assert [embedder.engine.max_rows(text_of(length)) for length in lengths] == [16, 16, 4, 4, 0]
        np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)


def test_rows_of_a_fixed_length_take_shorter_texts(gpu: StandIn) -> None:
    boxes = dict.fromkeys(INPUTS, ((1, 16), (4, 16), (16, 16)))
    gpu.trt.models[b"an engine"] = dataclasses.replace(MODEL, profiles=[boxes])
    engine = gpu.open(entry=dataclasses.replace(ENTRY, profiles=({"batch": (1, 4, 16)},)))
    assert [engine.max_rows(text_of(length)) for length in (1, 16)] == [16, 16]
    engine.close()


def test_verify_holds_an_engine_to_pytorch(served: Bundle) -> None:
    found = {finding.check: finding for finding in verify_bundle(served.path, device="tensorrt")}
    assert found["fp32 outputs"].ok
    assert found["int8"].measured == "there is no engine of it"
    assert all(finding.ok for finding in found.values())


def test_what_measures_an_engine_gives_it_the_batches_that_it_would_get(
    served: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = []
    run = Golden.run

    def watched(golden: Golden, engine: Any, preprocessor: Any, budget: Budget) -> Deviation:
        budgets.append(budget)
        return run(golden, engine, preprocessor, budget)

    monkeypatch.setattr(Golden, "run", watched)
    verify_bundle(served.path, device="tensorrt")
    with contextlib.ExitStack() as models:
        (subject,) = open_variants(served, [], threads=1, device="tensorrt", models=models)
        budgets.append(subject.model.budget)
    assert budgets == [Budget.of("tensorrt")] * 3


def test_an_engine_that_was_changed_is_not_loaded(served: Bundle, gpu: StandIn) -> None:
    (served.path / "engines" / "model.tensorrt-rtx.engine").write_bytes(b"an engin3")
    with pytest.raises(BundleError, match=r"engines/model\.tensorrt-rtx\.engine was changed after it was written"):
        Embedder.open(served.path, device="tensorrt")
    found = {finding.check: finding for finding in verify_bundle(served.path, device="tensorrt")}
    assert "engines/model.tensorrt-rtx.engine is damaged" in found["fp32 graph"].problems[0]
    assert gpu.trt.loaded == 0


def test_which_variants_have_an_engine(served: Bundle) -> None:
    assert served.variant(device="tensorrt")[0] == "fp32"
    with pytest.raises(UsageError, match="variant 'int8' has no engine of TensorRT; these have one: fp32"):
        served.variant("int8", device="tensorrt:1")
    served.manifest = dataclasses.replace(served.manifest, engines={})
    with pytest.raises(UsageError, match="has no engine of TensorRT; `rtx build --target` builds them of fp32"):
        served.engine(device="tensorrt")


def test_a_bundle_of_which_none_can_be_built(served: Bundle) -> None:
    packed = dataclasses.replace(served.manifest.variants["fp32"], operators=True)
    served.manifest = dataclasses.replace(
        served.manifest, engines={}, variants={"fp32-packed": packed}, default_variant="fp32-packed"
    )
    with pytest.raises(UsageError, match="has no engine of TensorRT; export fp16 too, with --target"):
        served.engine(device="tensorrt")


def test_verify_does_not_blame_the_bundle_for_the_machine(served: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int) -> Gpu:
        raise EngineError("no NVIDIA driver")

    monkeypatch.setattr(verification, "find_gpu", none)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        verify_bundle(served.path, device="tensorrt")


def test_why_no_engine_fits_this_machine(served: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "installed_tensorrt", lambda _: "1.8.0")
    message = r"toy\.rtx:fp32: no engine can run on tensorrt: engines/model\.tensorrt-rtx\.engine: it was built with .*"
    message += r"here is 1\.8\.0\. `rtx build --target` builds others"
    with pytest.raises(EngineError, match=message):
        Embedder.open(served.path, device="tensorrt")


def test_onnx_runtime_opens_no_engine(toy_bundle: Path) -> None:
    with pytest.raises(UsageError, match="runs a graph on cpu or cuda, and an engine of TensorRT on tensorrt:1"):
        OnnxEngine(toy_bundle / "onnx" / "model.onnx", output="sentence_embedding", device="tensorrt:1")
