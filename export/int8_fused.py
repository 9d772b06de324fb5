"""The linear layers of the packed graph in 8 bits: each with its bias and its activation one `rtx::Int8Linear`.

The arithmetic is that of `rtx.export.int8`, which writes it in standard operators; `rtx.kernels.int8_linear` has the
contract and the reference of both.
"""

from __future__ import annotations

import onnx_ir as ir

from rtx.export.edit import Editor
from rtx.export.graph import constant_matrix, is_scoring, module_of
from rtx.export.int8 import check_gemm, content_of, refuse_left_out, replace_embedding
from rtx.kernels.int8_linear import quantize_weight
from rtx.kernels.library import DOMAIN

INT8_LINEAR = "Int8Linear"


def quantize_int8_fused(model: ir.Model) -> list[str]:
    """Quantise a packed graph in place; what of it, and what is returned and raised, is as for `quantize_int8`."""
    graph = model.graph
    editor = Editor(graph, "int8")
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    done: dict[str, None] = {}
    for node in list(graph):
        if is_scoring(node) or node.graph is None:
            continue
        if node.op_type in ("MatMul", "Gemm") and (weight := constant_matrix(node.inputs[1])):
            _replace_linear(editor, node, weight)
        elif node.op_type == "Gather" and _holds(node.inputs[1], ids) and (table := constant_matrix(node.inputs[0])):
            replace_embedding("int8-packed", editor, node, table)
        else:
            continue
        done[module_of(node)] = None
    editor.drop_unused()
    graph.opset_imports[DOMAIN] = 1
    refuse_left_out(graph, "int8-packed")
    return list(done)


def _replace_linear(editor: Editor, node: ir.Node, weight: ir.Value) -> None:
    """MatMul or Gemm, with an Add of a bias and an activation behind it where there are some."""
    check_gemm("int8-packed", node)
    transposed = bool(node.attributes.get_int("transB", False))
    content = content_of("int8-packed", node, weight)
    quantized = quantize_weight(content.T if transposed else content)
    name = f"{weight.name}_transposed" if transposed else f"{weight.name}"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    chain = [node]
    if bias is None and (added := _only_reader(node, "Add")) is not None:
        other = next((value for value in added.inputs if value is not node.outputs[0]), None)
        if _is_bias(other, len(quantized.scale)):
            bias = other
            chain.append(added)
    activation = ""
    if (gelu := _only_reader(chain[-1], "Gelu")) is not None:
        tanh = gelu.attributes.get_string("approximate", "none") == "tanh"
        activation = "gelu_tanh" if tanh else "gelu"
        chain.append(gelu)

    def constant(suffix: str, values: object) -> ir.Value:
        known = editor.graph.initializers.get(f"{name}_{suffix}")
        return known if known is not None else editor.constant(f"{name}_{suffix}", values)  # type: ignore[arg-type]

    weights = (
        constant("int8", quantized.values),
        constant("scale", quantized.scale),
        constant("column_sum", quantized.column_sum),
    )
    result = editor.insert(
        node,
        INT8_LINEAR,
        node.inputs[0],
        *weights,
        *(() if bias is None else (bias,)),
        attributes={"activation": activation},
        domain=DOMAIN,
    )
    editor.replace(chain.pop(), result)
    for left in reversed(chain):
        editor.graph.remove(left, safe=True)


def _only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node that alone reads what a node gives, if it is of this type."""
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader: ir.Node = next(iter(uses)).node
    return reader if reader.op_type == op_type and not is_scoring(reader) else None


def _is_bias(value: ir.Value | None, columns: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return value.const_value.dtype == ir.DataType.FLOAT and list(value.const_value.shape) == [columns]


def _holds(value: ir.Value | None, ids: ir.Value) -> bool:
    """Whether a value is the ids, or those of them that were packed."""
    while value is not None and value is not ids:
        producer = value.producer()
        if producer is None or producer.op_type not in ("Reshape", "Gather", "Unsqueeze"):
            return False
        value = producer.inputs[0]
    return value is ids
