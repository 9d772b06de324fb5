"""Half precision on a CPU: each result is rounded, which ONNX Runtime by itself leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rtx.export.emulation import emulate, emulated
from rtx.export.fp16 import to_fp16
from rtx.runtime.backends.onnx import OnnxEngine

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def graph_of(*nodes: ir.Node, inputs: list[ir.Value], output: ir.Value) -> ir.Model:
    graph = ir.Graph(inputs, [output], nodes=list(nodes), opset_imports={"": 20}, name="by hand")
    return ir.Model(graph, ir_version=10)


def typed(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(["rows", 4])
    return value


def chain(*scales: float) -> ir.Model:
    """x, multiplied by numbers one after the other in half precision."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", 4]), type=ir.TensorType(FLOAT))
    nodes = [ir.node("Cast", [x], {"to": HALF}, name="down")]
    value = typed(nodes[0].outputs[0], HALF, "half")
    weights = []
    for place, scale in enumerate(scales):
        tensor = ir.tensor(np.float16(scale), name=f"w{place}")
        weights.append(ir.Value(name=tensor.name, shape=ir.Shape([]), type=ir.TensorType(HALF), const_value=tensor))
        nodes.append(ir.node("Mul", [value, weights[-1]], name=f"mul{place}"))
        value = typed(nodes[-1].outputs[0], HALF, f"y{place}")
    nodes.append(ir.node("Cast", [value], {"to": FLOAT}, name="up"))
    model = graph_of(*nodes, inputs=[x], output=typed(nodes[-1].outputs[0], FLOAT, "y"))
    for weight in weights:
        model.graph.register_initializer(weight)
    return model


def run(model: ir.Model, x: Any) -> Any:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return OnnxEngine(proto.SerializeToString(), output="y", threads=1).run({"x": np.asarray(x, dtype=np.float32)})


def test_each_result_is_rounded() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    model = chain(1.1, 0.7, 3.3)
    expected = x.astype(np.float16)
    for scale in (1.1, 0.7, 3.3):
        # In float32, and then rounded once.
        expected = (expected.astype(np.float32) * np.float32(np.float16(scale))).astype(np.float16)
    assert (run(emulate(model), x) == expected.astype(np.float32)).all()
    # The graph itself is as it was: and its roundings between nodes are missing on a CPU.
    assert (run(model, x) != expected.astype(np.float32)).any()


def test_what_overflows_does() -> None:
    model = chain(1000.0, 0.001)
    x = [[1.0, 100.0, -100.0, 0.5]]
    assert np.isfinite(run(model, x)).all()  # ONNX Runtime's CPU hides it
    found = run(emulate(model), x)
    np.testing.assert_array_equal(np.isfinite(found), [[True, False, False, True]])


def test_every_model(some: Any) -> None:
    """Nothing is left in half precision but what is rounded to and at once widened."""
    to_fp16(some.graph)
    graph = emulate(some.graph).graph
    for node in graph:
        if any(value.dtype == HALF for value in node.outputs):
            assert node.op_type == "Cast"
            assert {use.node.op_type for value in node.outputs for use in value.uses()} == {"Cast"}
        if node.op_type != "Cast":
            assert not any(value is not None and value.dtype == HALF for value in node.inputs)
    half = [value for node in some.graph.graph for value in node.outputs if value.dtype == HALF]
    casts = [value for node in graph for value in node.outputs if value.dtype == HALF]
    assert len(casts) == len(half) > 50
    onnx.checker.check_model(ir.to_proto(emulate(some.graph)), full_check=True)


def test_bfloat16() -> None:
    model = chain(1.0)
    for value in (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)):
        if value.dtype == HALF:
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
    model.graph[0].attributes["to"] = ir.AttrInt64("to", ir.DataType.BFLOAT16)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(1.0, dtype=ir.DataType.BFLOAT16, name=value.name)
    x = np.array([[1.0, 1 + 2**-7, 1 + 2**-9, 1e38]], dtype=np.float32)
    # 8 bits of significand, the range of float32.
    np.testing.assert_allclose(run(emulate(model), x), [[1.0, 1 + 2**-7, 1.0, 1e38]], rtol=2**-8)
    assert run(emulate(model), x)[0, 2] == 1.0


def test_a_file_for_a_while(tmp_path: Any) -> None:
    ir.save(chain(1.5), tmp_path / "model.onnx")
    with emulated(tmp_path / "model.onnx") as file:
        assert file.parent == tmp_path
        assert OnnxEngine(file, output="y").run({"x": np.ones((1, 4), np.float32)}).tolist() == [[1.5] * 4]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(RuntimeError, match="inside"), emulated(tmp_path / "model.onnx"):
        raise RuntimeError("inside")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
