"""Edits of a graph that variants are derived by: nodes put in, values replaced, constants added."""

from __future__ import annotations

from collections.abc import Mapping

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
        attributes: Mapping[str, int | str] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Put a node with one output of `dtype` before another, whose origin it takes over."""
        self._nodes += 1
        name = f"{self._prefix}_{self._nodes}_{op_type}"
        node = ir.node(op_type, list(inputs), dict(attributes or {}), name=name, domain=domain)
        node.metadata_props.update(before.metadata_props)
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(dtype), shape
        self.graph.insert_before(before, node)
        return output

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place of a node's only output, and remove the node."""
        old = node.outputs[0]
        value.shape, value.type = old.shape, old.type
        if old.is_graph_output():
            old.name, value.name = value.name, old.name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def constant(self, name: str, content: NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        tensor = ir.tensor(content, name=name)
        value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def drop_unused(self) -> None:
        """Remove initializers that nothing reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in self.graph.outputs:
                del self.graph.initializers[name]
