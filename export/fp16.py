"""fp16 variant: linear layers, attention products and embeddings in half precision, for GPUs.

Norms, softmax, rotary tables, pooling, head and scoring stay float32: sums of squares overflow fp16's 65504, and scores
that tie in half precision reorder rankings.
"""

from __future__ import annotations

import warnings

import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from rtx.export.graph import classes, is_norm, is_scoring

# Attention masks are the most negative float32, which fp16 does not have; exp(-30000) is 0 all the same.
_LARGEST = 3e4
_FP32_OPERATORS = ("Softmax", "ReduceSum", "ReduceMean", "ReduceL2", "Pow", "Sqrt", "Cos", "Sin", "Exp", "Range")


def to_fp16(model: ir.Model) -> ir.Model:
    """A copy of a plain graph in half precision; inputs and outputs stay as they are.

    Args:
        model: what `rtx.export.graph.export_graph` made.
    """
    keep = [
        str(node.name)
        for node in model.graph
        if is_scoring(node) or is_norm(node) or any("Rotary" in name for name in classes(node))
    ]
    with warnings.catch_warnings():
        # It says for each tiny weight that it becomes zero or subnormal; the gate measures what that does.
        warnings.simplefilter("ignore")
        converted = convert_float_to_float16(
            ir.to_proto(model),
            max_finite_val=_LARGEST,
            keep_io_types=True,
            disable_shape_infer=False,
            op_block_list=list(_FP32_OPERATORS),
            node_block_list=keep,
        )
    half: ir.Model = ir.from_proto(converted)
    return half
