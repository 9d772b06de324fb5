"""int8 variant: linear layers with one activation scale per token, in standard ONNX operators.

    ReduceMax, ReduceMin -> centre, scale                      one range a token
    Sub, Reciprocal, Mul, QuantizeLinear                       x to uint8
    MatMulInteger(x, W, 128, 128)                              exact product in int32
    Cast, Mul(scale_w), Mul(scale_x), Add(centre * column_sum) back to float32

`rtx.kernels.int8_linear` has the arithmetic and the reference. The word embeddings become int8 rows with a scale each.
Attention, norms, softmax, pooling and scoring stay float32. ONNX Runtime's own dynamic quantisation takes one scale for
the whole tensor instead: a token then depends on what else is in the batch, and a quiet one beside a loud one is lost.

Infinity in an activation stays visible in the result. NaN need not: ONNX leaves open what ReduceMax makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.edit import Editor, drop_dead
from rtx.export.graph import constant_matrix, is_scoring, module_of
from rtx.kernels.int8_linear import LEVELS, SMALLEST_SCALE, ZERO_POINT, quantize_rows, quantize_weight
from rtx.runtime.errors import ExportError

# Operators that take a weight as a factor, or bring one into shape for it.
_PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv", "Transpose")


def quantize_int8(model: ir.Model, keep: Collection[str] = ()) -> list[str]:
    """Quantise a plain graph in place.

    Every product in the backbone by a constant matrix becomes an int8 linear layer, and the word embeddings int8 rows.

    Args:
        model: what `rtx.export.graph.export_graph` made.
        keep: modules whose weights stay float32, named as what is returned.

    Returns:
        Names of the modules whose weights are now int8, as `RetrievalModel.named_modules` calls them.

    Raises:
        ExportError: a weight holds NaN or infinity, or is used in a way that is not known here.
    """
    quantizer = _Quantizer(Editor(model.graph, "int8"))
    done: dict[str, None] = {}
    for node, weight in list(quantizable(model.graph)):
        if module_of(node) in keep:
            continue
        if node.op_type == "Gather":
            replace_embedding("int8", quantizer.editor, node, weight)
        else:
            quantizer.replace_linear(node, weight)
        done[module_of(node)] = None
    drop_dead(quantizer.editor.graph)
    refuse_left_out(model.graph, "int8", keep)
    return list(done)


def quantizable(
    graph: ir.Graph, holds_ids: Callable[[ir.Value | None, ir.Value], bool] = lambda value, ids: value is ids
) -> Iterator[tuple[ir.Node, ir.Value]]:
    """The nodes whose weights become int8, each with its weight: MatMul and Gemm, and Gather of the word embeddings.

    Args:
        graph: a plain one, or a packed one.
        holds_ids: whether a value is the token ids, which are the graph's input that is given with it.
    """
    embedded = [value for value in graph.inputs if value.name == "input_ids"]
    for node in graph:
        if is_scoring(node):
            continue
        if node.op_type in ("MatMul", "Gemm"):
            weight = constant_matrix(node.inputs[1])
        elif node.op_type == "Gather" and any(holds_ids(node.inputs[1], ids) for ids in embedded):
            weight = constant_matrix(node.inputs[0])
        else:
            continue
        if weight is not None:
            yield node, weight


def refuse_left_out(graph: ir.Graph, variant: str, keep: Collection[str] = ()) -> None:
    """Raise ExportError for a layer left in float32 unnoticed: the variant would be larger and slower than it says."""
    left = {
        f"{module_of(node)} ({node.op_type})": None
        for node in graph
        if node.op_type in _PRODUCTS
        and not is_scoring(node)
        and module_of(node) not in keep
        and any(constant_matrix(value) for value in node.inputs)
    }
    if left:
        raise ExportError(f"{variant}: layers that are written in a way that is not known here: {', '.join(left)}")


class _Tokens(NamedTuple):
    """A quantised activation: shared by all layers that read it, as query, key and value do."""

    values: ir.Value
    scale: ir.Value
    centre: ir.Value


class _Quantizer:
    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._tokens: dict[ir.Value, _Tokens] = {}
        self._weights: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}

    def replace_linear(self, node: ir.Node, weight: ir.Value) -> None:
        """MatMul(x, weight), or Gemm(x, weight, bias)."""
        insert = self.editor.insert
        check_gemm("int8", node)
        x = node.inputs[0]
        assert x is not None
        tokens = self._quantize_tokens(node, x)
        values, scale, column_sum = self._quantize_weight(node, weight, bool(node.attributes.get_int("transB", False)))
        zero = self._zero_point()
        product = insert(node, "MatMulInteger", tokens.values, values, zero, zero, dtype=ir.DataType.INT32)
        real = insert(node, "Cast", product, attributes={"to": ir.DataType.FLOAT})
        scaled = insert(node, "Mul", insert(node, "Mul", real, scale), tokens.scale)
        result = insert(node, "Add", scaled, insert(node, "Mul", tokens.centre, column_sum))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = insert(node, "Add", result, node.inputs[2])
        self.editor.replace(node, result)

    def _quantize_tokens(self, node: ir.Node, x: ir.Value) -> _Tokens:
        if x not in self._tokens:
            insert, constant = self.editor.insert, self._constant
            axes = constant("last_axis", np.array([-1], dtype=np.int64))
            high = insert(node, "ReduceMax", x, axes, attributes={"keepdims": 1})
            low = insert(node, "ReduceMin", x, axes, attributes={"keepdims": 1})
            centre = insert(node, "Mul", insert(node, "Add", high, low), constant("half", np.float32(0.5)))
            width = insert(node, "Mul", insert(node, "Sub", high, low), constant("half_step", np.float32(0.5 / LEVELS)))
            scale = insert(node, "Max", width, constant("smallest_scale", np.float32(SMALLEST_SCALE)))
            steps = insert(node, "Mul", insert(node, "Sub", x, centre), insert(node, "Reciprocal", scale))
            # With a scale of 1 it rounds half to even, adds the zero point and saturates.
            one = constant("one", np.float32(1.0))
            values = insert(node, "QuantizeLinear", steps, one, self._zero_point(), dtype=ir.DataType.UINT8)
            self._tokens[x] = _Tokens(values, scale, centre)
        return self._tokens[x]

    def _quantize_weight(
        self, node: ir.Node, weight: ir.Value, transposed: bool
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        if (weight, transposed) not in self._weights:
            content = content_of("int8", node, weight)
            quantized = quantize_weight(content.T if transposed else content)
            name = f"{weight.name}_transposed" if transposed else weight.name
            self._weights[weight, transposed] = (
                self.editor.constant(f"{name}_int8", quantized.values),
                self.editor.constant(f"{name}_scale", quantized.scale),
                self.editor.constant(f"{name}_column_sum", quantized.column_sum),
            )
        return self._weights[weight, transposed]

    def _zero_point(self) -> ir.Value:
        return self._constant("zero_point", np.uint8(ZERO_POINT))

    def _constant(self, name: str, content: np.generic | NDArray[np.generic]) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = self.editor.constant(f"int8_{name}", np.asarray(content))
        return self._constants[name]


def check_gemm(variant: str, node: ir.Node) -> None:
    """Look whether a Gemm is one with a weight and a bias, and no more; a MatMul is.

    Raises:
        ExportError: it scales, or transposes its input.
    """
    given = node.attributes
    scales = given.get_float("alpha", 1.0) != 1.0 or given.get_float("beta", 1.0) != 1.0
    if scales or given.get_int("transA", False):
        raise ExportError(f"{variant}: {module_of(node)}: a Gemm that scales or transposes its input is not supported")


def replace_product(editor: Editor, node: ir.Node, x: ir.Value, weight: ir.Value) -> None:
    """Let x @ weight take the place of a MatMul, or of a Gemm with its bias.

    Args:
        editor: of the graph.
        node: the MatMul or Gemm.
        x: [..., in].
        weight: [in, out].
    """
    result = editor.insert(node, "MatMul", x, weight, shape=node.outputs[0].shape)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = editor.insert(node, "Add", result, node.inputs[2], shape=node.outputs[0].shape)
    editor.replace(node, result)


def replace_embedding(variant: str, editor: Editor, node: ir.Node, table: ir.Value) -> None:
    """Let int8 rows take the place of the table of Gather(table, ids).

    Args:
        variant: that it is for, for messages.
        editor: of the graph.
        node: the Gather.
        table: its first input, a constant.

    Raises:
        ExportError: the table holds NaN or infinity.
    """
    insert, constant = editor.insert, editor.constant
    rows = quantize_rows(content_of(variant, node, table))
    ids = node.inputs[1]
    values = insert(node, "Gather", constant(f"{table.name}_int8", rows.values), ids, dtype=ir.DataType.INT8)
    scale = insert(node, "Gather", constant(f"{table.name}_scale", rows.scale), ids)
    real = insert(node, "Cast", values, attributes={"to": ir.DataType.FLOAT})
    editor.replace(node, insert(node, "Mul", real, scale))


def content_of(variant: str, node: ir.Node, weight: ir.Value) -> NDArray[np.float32]:
    """The numbers of a weight.

    Raises:
        ExportError: it holds NaN or infinity.
    """
    assert weight.const_value is not None
    content = weight.const_value.numpy()
    if not np.isfinite(content).all():
        raise ExportError(f"{variant}: {module_of(node)}: the weight holds NaN or infinity")
    return content
