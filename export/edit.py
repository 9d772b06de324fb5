"""Edits of a graph that variants are derived by: nodes put in, values replaced, constants added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Editor:
    """Changes a graph in place.

    Args:
        graph: topologically sorted, and still so after every edit.
        prefix: begins the names of what is added.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self._prefix = prefix
        self._nodes = 0

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        *inputs: ir.Value | None,
        attributes: Mapping[str, int | float | str] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Put a node with one output of `dtype` before another, whose origin it takes over."""
        (output,) = self.insert_many(
            before, op_type, *inputs, outputs=1, attributes=attributes, dtype=dtype, domain=domain
        )
        output.shape = shape
        return output

    def insert_many(
        self,
        before: ir.Node,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        attributes: Mapping[str, int | float | str] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """As `insert`, with several outputs."""
        self._nodes += 1
        name = f"{self._prefix}_{self._nodes}_{op_type}"
        node = ir.node(op_type, list(inputs), dict(attributes or {}), name=name, domain=domain, num_outputs=outputs)
        node.metadata_props.update(before.metadata_props)
        for place, output in enumerate(node.outputs):
            output.name, output.type = f"{name}_{place}" if place else name, ir.TensorType(dtype)
        self.graph.insert_before(before, node)
        return node.outputs

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place of a node's only output, and remove the node."""
        self.replace_value(node.outputs[0], value)
        self.graph.remove(node, safe=True)

    def replace_value(self, old: ir.Value, value: ir.Value) -> None:
        """Let `value` take the place of another, whose node stays until `drop_dead`."""
        value.shape, value.type = old.shape, old.type
        if old.is_graph_output():
            old.name, value.name = value.name, old.name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)

    def constant(self, name: str, content: NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        tensor = ir.tensor(content, name=name)
        value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def drop_dead(graph: ir.Graph) -> None:
    """Remove nodes that nothing reads any more, and then initializers."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
