from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rtx.runtime.backends import onnx as backend
from rtx.runtime.backends.onnx import OnnxEngine, usable_cores
from rtx.runtime.errors import EngineError, MissingExtraError, UsageError
from rtx.runtime.text import Batch


@pytest.fixture(scope="module")
def graph() -> bytes:
    """Two outputs: `doubled`, and `folded`, the sum of its left and its right half."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Add", ["input_ids", "input_ids"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["doubled"], to=TensorProto.FLOAT),
        helper.make_node("Split", ["doubled"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Add", ["left", "right"], ["folded"]),
    ]
    outputs = [value(name, TensorProto.FLOAT, ["batch", "any"]) for name in ("doubled", "folded")]
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "tokens"])]
    made = helper.make_graph(nodes, "doubling", inputs, outputs)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture
def engine(graph: bytes) -> Iterator[OnnxEngine]:
    engine = OnnxEngine(graph, output="doubled", threads=1, name="toy:fp32")
    yield engine
    engine.close()


BATCH = {"input_ids": np.array([[1, 2, 3]], dtype=np.int64)}


def test_the_named_output_is_fetched(engine: OnnxEngine):
    assert engine.run(BATCH).tolist() == [[2.0, 4.0, 6.0]]
    assert engine.run(BATCH).dtype == np.float32
    assert engine.input_names == ("input_ids",)
    assert engine.name == "toy:fp32"


def test_a_graph_can_be_given_by_its_path(graph: bytes, tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(graph)
    engine = OnnxEngine(tmp_path / "model.onnx", output="folded", threads=1)
    assert engine.run({"input_ids": np.array([[1, 2, 3, 4]])}).tolist() == [[8.0, 12.0]]


def test_a_graph_without_the_output_names_those_it_has(graph: bytes):
    with pytest.raises(EngineError, match=r"^toy: the graph has no output 'scores' \(it has doubled, folded\)$"):
        OnnxEngine(graph, output="scores", threads=1, name="toy")


def test_a_damaged_graph_is_an_engine_error(graph: bytes):
    with pytest.raises(EngineError, match=r"^toy: ONNX Runtime [\d.]+ cannot load the graph: "):
        OnnxEngine(graph[:-30], output="doubled", threads=1, name="toy")
    with pytest.raises(EngineError, match=r"^onnx: ONNX Runtime [\d.]+ cannot load the graph: .*nowhere"):
        OnnxEngine(Path("nowhere.onnx"), output="doubled", threads=1)


def test_a_batch_that_fails_tells_its_shapes(engine: OnnxEngine):
    batch = {**BATCH, "attention_mask": np.ones((1, 3), dtype=np.int64)}
    message = r"^toy:fp32: running a batch failed \(input_ids \[1, 3\], attention_mask \[1, 3\]\): .*attention_mask"
    with pytest.raises(EngineError, match=message):
        engine.run(batch)
    with pytest.raises(EngineError, match=r"running a batch failed \(\): .*input_ids"):
        engine.run({})
    assert engine.run(BATCH).tolist() == [[2.0, 4.0, 6.0]]


def test_a_closed_engine_says_so(engine: OnnxEngine):
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"^toy:fp32: the engine is closed$"):
        engine.run(BATCH)


def test_nothing_spins_between_two_runs(graph: bytes):
    engine = OnnxEngine(graph, output="doubled", threads=3)
    engine.run(BATCH)
    start = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - start < 0.02
    engine.close()


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_given_back_where_a_batch_may_be_large(graph: bytes, packed: bool):
    """With padding after every batch; packed after a long item, which alone can go beyond a budget."""

    class Session:
        def run(self, _outputs: object, batch: Batch, options: object) -> list[NDArray[np.float32]]:
            used.append(options is engine._giving_back)
            return [np.zeros(len(batch["input_ids"]), dtype=np.float32)]

    used: list[bool] = []
    engine = OnnxEngine(graph, output="doubled", threads=1, packed=packed)
    engine._session = Session()
    for rows, tokens in ((1, 12), (64, 512), (1, 8192), (2, 2048)):
        engine.run({"input_ids": np.zeros((rows, tokens), dtype=np.int64)})
    assert used == ([False, False, True, False] if packed else [True] * 4)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(graph: bytes, threads: int):
    with pytest.raises(UsageError, match=f"^threads: expected at least 1, got {threads}$"):
        OnnxEngine(graph, output="doubled", threads=threads)


def test_without_onnxruntime_the_extra_is_named(graph: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        OnnxEngine(graph, output="doubled")
    assert str(caught.value) == (
        "running an ONNX graph needs the package 'onnxruntime', which is not installed. "
        "Install it with: pip install 'rtx-retrieval[cpu]'"
    )


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000\n", 2), ("5000 100000\n", 1), ("", None)],
)
def test_cores_of_a_containers_limit(tmp_path: Path, content: str, cores: int | None):
    (tmp_path / "cpu.max").write_text(content)
    assert backend._cgroup_cores(tmp_path / "cpu.max") == cores
    assert backend._cgroup_cores(tmp_path / "absent") is None


def test_usable_cores_are_the_least_of_the_limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    for limit, expected in ((None, 3), (2, 2), (8, 3)):
        monkeypatch.setattr(backend, "_cgroup_cores", lambda _, limit=limit: limit)
        assert usable_cores() == expected
