"""int4 variant: linear layers with weights in 4 bits, for what has tokens. Activations stay float32.

    MatMul(x, W) -> com.microsoft.MatMulNBits(x, packed W, scales, zero points)

`rtx.kernels.int4_linear` has the arithmetic and the reference. The word embeddings become int8 rows with a scale each,
as in the int8 variant. For ONNX Runtime only: no other engine knows the operator.
"""

from __future__ import annotations

import onnx_ir as ir

from rtx.export.edit import Editor, drop_dead
from rtx.export.graph import constant_matrix, is_scoring, module_of
from rtx.export.int8 import check_gemm, content_of, refuse_left_out, replace_embedding
from rtx.kernels.int4_linear import BLOCK, pack, quantize_weight

_DOMAIN = "com.microsoft"


def quantize_int4(model: ir.Model) -> list[str]:
    """Quantise a plain graph in place.

    Every product in the backbone by a constant matrix becomes an int4 linear layer, and the word embeddings int8 rows.

    Args:
        model: what `rtx.export.graphs.export_graphs` made.

    Returns:
        Names of the modules whose weights are now in few bits, as `RetrievalModel.named_modules` calls them.

    Raises:
        ExportError: a weight holds NaN or infinity, or is used in a way that is not known here.
    """
    model.graph.opset_imports[_DOMAIN] = 1
    embedded = [value for value in model.graph.inputs if value.name == "input_ids"]
    editor = Editor(model.graph, "int4")
    weights: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}
    done: dict[str, None] = {}
    for node in list(model.graph):
        if is_scoring(node):
            continue
        if node.op_type in ("MatMul", "Gemm") and (weight := constant_matrix(node.inputs[1])):
            _replace_linear(editor, node, weight, weights)
        elif node.op_type == "Gather" and node.inputs[1] in embedded and (table := constant_matrix(node.inputs[0])):
            replace_embedding("int4", editor, node, table)
        else:
            continue
        done[module_of(node)] = None
    drop_dead(editor.graph)
    refuse_left_out(model.graph, "int4")
    return list(done)


def _replace_linear(
    editor: Editor,
    node: ir.Node,
    weight: ir.Value,
    weights: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value, ir.Value]],
) -> None:
    """MatMul(x, weight), or Gemm(x, weight, bias)."""
    check_gemm("int4", node)
    transposed = bool(node.attributes.get_int("transB", False))
    assert weight.const_value is not None
    sides = weight.const_value.shape.numpy()
    inputs, out = reversed(sides) if transposed else sides
    if (weight, transposed) not in weights:
        content = content_of("int4", node, weight)
        quantized = quantize_weight(content.T if transposed else content)
        name = f"{weight.name}_transposed" if transposed else weight.name
        weights[weight, transposed] = (
            editor.constant(f"{name}_int4", pack(quantized.values)),
            editor.constant(f"{name}_scale", quantized.scale),
            editor.constant(f"{name}_zero", pack(quantized.zero)),
        )
    attributes = {"K": inputs, "N": out, "bits": 4, "block_size": BLOCK}
    result = editor.insert(
        node, "MatMulNBits", node.inputs[0], *weights[weight, transposed], attributes=attributes, domain=_DOMAIN
    )
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = editor.insert(node, "Add", result, node.inputs[2])
    editor.replace(node, result)
