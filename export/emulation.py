"""What a graph in half precision gives on a GPU, computed on a CPU: in float32, each result rounded as it would be.

    node in half precision  ->  the same in float32 -> Cast to half precision -> Cast to float32

ONNX Runtime's CPU has hardly an operator in half precision: it computes in float32, and leaves out the rounding between
two such nodes. A graph that overflows on a GPU then passes on the CPU. Products on a GPU are summed in float32 and
rounded once, as here; sums are in another order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def emulate(model: ir.Model) -> ir.Model:
    """A copy of a graph with nodes in float16 or bfloat16, which rounds to these and computes in float32."""
    emulated = model.clone()
    graph = emulated.graph
    for value in list(graph.initializers.values()):
        if value.dtype in _HALF and (first := next((node for node in graph if value in node.inputs), None)):
            _widen(graph, value, before=first)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype in _HALF:
                _round(graph, node, value)
    return emulated


@contextlib.contextmanager
def emulated(path: Path) -> Iterator[Path]:
    """A graph's file as a file that rounds, for a while, in the same folder: large weights are shared."""
    file = path.with_name(f"emulated_{path.name}")
    try:
        ir.save(emulate(ir.load(path)), file)
        yield file
    finally:
        file.unlink(missing_ok=True)


def _widen(graph: ir.Graph, value: ir.Value, *, before: ir.Node) -> None:
    """Let all that reads a weight read it in float32."""
    cast = _cast(value, ir.DataType.FLOAT)
    readers = [(use.node, use.idx) for use in value.uses() if use.node is not cast]
    graph.insert_before(before, cast)
    for node, index in readers:
        node.replace_input_with(index, cast.outputs[0])


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let all that reads a result read it in float32, rounded."""
    half = value.dtype
    assert half is not None
    readers = [(use.node, use.idx) for use in value.uses()]
    after = node
    if node.op_type != "Cast":  # which has the type as an attribute, and rounds by itself
        value.type = ir.TensorType(ir.DataType.FLOAT)
        rounding = _cast(value, half)
        graph.insert_after(after, rounding)
        after, value = rounding, rounding.outputs[0]
    widening = _cast(value, ir.DataType.FLOAT)
    graph.insert_after(after, widening)
    for reader, index in readers:
        reader.replace_input_with(index, widening.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}_as_{dtype.name.lower()}")
    output = node.outputs[0]
    output.name, output.shape, output.type = node.name, value.shape, ir.TensorType(dtype)
    return node
