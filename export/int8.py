"""int8 variant: linear layers with one activation scale per token, in standard ONNX operators.

    ReduceMax, ReduceMin -> centre, scale                      one range a token
    Sub, Div, QuantizeLinear                                   x to uint8
    MatMulInteger(x, W, 128, 128)                              exact product in int32
    Cast, Mul(scale_w), Mul(scale_x), Add(centre * column_sum) back to float32

`rtx.kernels.int8_linear` has the arithmetic and the reference. The word embeddings become int8 rows with a scale each.
Attention, norms, softmax, pooling and scoring stay float32. ONNX Runtime's own dynamic quantisation takes one scale for
the whole tensor instead: a token then depends on what else is in the batch, and a quiet one beside a loud one is lost.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.graph import constant_matrix, is_scoring, scopes
from rtx.kernels.int8_linear import LEVELS, SMALLEST_SCALE, ZERO_POINT, quantize_rows, quantize_weight


def quantize_int8(model: ir.Model) -> list[str]:
    """Quantise a plain graph in place.

    Every MatMul in the backbone by a constant matrix becomes an int8 linear layer, and the word embeddings int8 rows.

    Args:
        model: what `rtx.export.graph.export_graph` made.

    Returns:
        Names of the modules whose weights are now int8.
    """
    graph = model.graph
    builder = _Builder(graph)
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    done: list[str] = []
    for node in list(graph):
        if node.op_type == "MatMul" and not is_scoring(node) and (weight := constant_matrix(node.inputs[1])):
            done.append(scopes(node)[-2])
            builder.replace_linear(node, weight)
        elif node.op_type == "Gather" and node.inputs[1] is ids and (table := constant_matrix(node.inputs[0])):
            done.append(scopes(node)[-2])
            builder.replace_embedding(node, table)
    builder.drop_unused()
    return done


class _Tokens:
    """A quantised activation: shared by all layers that read it, as query, key and value do."""

    def __init__(self, values: ir.Value, scale: ir.Value, centre: ir.Value) -> None:
        self.values = values
        self.scale = scale
        self.centre = centre


class _Builder:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._tokens: dict[ir.Value, _Tokens] = {}
        self._weights: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}
        self._count = 0

    def replace_linear(self, node: ir.Node, weight: ir.Value) -> None:
        x = node.inputs[0]
        assert x is not None
        tokens = self._quantize_tokens(node, x)
        values, scale, column_sum = self._quantize_weight(weight)
        zero = self._constant("uint8_zero_point", np.array(ZERO_POINT, dtype=np.uint8))
        product = self._node(node, "MatMulInteger", tokens.values, values, zero, zero)
        real = self._node(node, "Cast", product, attributes={"to": ir.DataType.FLOAT})
        scaled = self._node(node, "Mul", self._node(node, "Mul", real, scale), tokens.scale)
        shift = self._node(node, "Mul", tokens.centre, column_sum)
        self._replace(node, self._node(node, "Add", scaled, shift))

    def replace_embedding(self, node: ir.Node, table: ir.Value) -> None:
        assert table.const_value is not None
        rows = quantize_rows(table.const_value.numpy())
        ids = node.inputs[1]
        values = self._node(node, "Gather", self._initializer(f"{table.name}_int8", rows.values), ids)
        scale = self._node(node, "Gather", self._initializer(f"{table.name}_scale", rows.scale), ids)
        real = self._node(node, "Cast", values, attributes={"to": ir.DataType.FLOAT})
        self._replace(node, self._node(node, "Mul", real, scale))

    def drop_unused(self) -> None:
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in self.graph.outputs:
                del self.graph.initializers[name]

    def _quantize_tokens(self, node: ir.Node, x: ir.Value) -> _Tokens:
        if x not in self._tokens:
            axes = self._constant("last_axis", np.array([-1], dtype=np.int64))
            high = self._node(node, "ReduceMax", x, axes, attributes={"keepdims": 1})
            low = self._node(node, "ReduceMin", x, axes, attributes={"keepdims": 1})
            half = self._constant("half", np.array(0.5, dtype=np.float32))
            centre = self._node(node, "Mul", self._node(node, "Add", high, low), half)
            step = self._constant("half_step", np.array(0.5 / LEVELS, dtype=np.float32))
            width = self._node(node, "Mul", self._node(node, "Sub", high, low), step)
            smallest = self._constant("smallest_scale", np.array(SMALLEST_SCALE, dtype=np.float32))
            scale = self._node(node, "Max", width, smallest)
            steps = self._node(node, "Div", self._node(node, "Sub", x, centre), scale)
            # QuantizeLinear with scale 1 rounds half to even and saturates.
            one = self._constant("one", np.array(1.0, dtype=np.float32))
            zero = self._constant("uint8_zero_point", np.array(ZERO_POINT, dtype=np.uint8))
            self._tokens[x] = _Tokens(self._node(node, "QuantizeLinear", steps, one, zero), scale, centre)
        return self._tokens[x]

    def _quantize_weight(self, weight: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        if weight not in self._weights:
            assert weight.const_value is not None
            quantized = quantize_weight(weight.const_value.numpy())
            self._weights[weight] = (
                self._initializer(f"{weight.name}_int8", quantized.values),
                self._initializer(f"{weight.name}_scale", quantized.scale),
                self._initializer(f"{weight.name}_column_sum", quantized.column_sum),
            )
        return self._weights[weight]

    def _node(
        self, before: ir.Node, op_type: str, *inputs: ir.Value | None, attributes: dict[str, object] | None = None
    ) -> ir.Value:
        self._count += 1
        node = ir.node(
            op_type,
            inputs=list(inputs),
            attributes=attributes,  # type: ignore[arg-type]
            name=f"int8_{self._count}_{op_type}",
        )
        node.outputs[0].name = f"int8_{self._count}"
        node.metadata_props.update(before.metadata_props)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value)
        self.graph.remove(node, safe=True)

    def _constant(self, name: str, content: NDArray[np.generic]) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = self._initializer(f"int8_{name}", content)
        return self._constants[name]

    def _initializer(self, name: str, content: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(content, name=name)
        value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value
