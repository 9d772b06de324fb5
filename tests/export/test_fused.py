"""The fused variant: ONNX Runtime's own operators, the same values."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rtx.export.fused import fuse
from rtx.runtime.errors import ExportError

OPERATORS = {
    "bert": {"Attention", "BiasGelu", "SkipLayerNormalization"},
    "distilbert": {"Attention", "BiasGelu", "SkipLayerNormalization"},
    "roberta": {"Attention", "BiasGelu", "SkipLayerNormalization"},
    "xlm-roberta": {"Attention", "BiasGelu", "SkipLayerNormalization"},
    "mpnet": {"BiasGelu", "FusedMatMul", "SkipLayerNormalization"},
    "modernbert": {"MultiHeadAttention"},
    "deberta-v2": {"BiasGelu", "FusedMatMul", "SkipLayerNormalization"},
    "qwen3": {"MultiHeadAttention", "SkipSimplifiedLayerNormalization"},
    "qwen3-chat": {"MultiHeadAttention", "SkipSimplifiedLayerNormalization"},
}


def test_fused_operators_give_the_values_of_the_plain_graph(each, architecture_and_task, capfd):
    plain = len(each.graph.graph)
    assert set(fuse(each.graph)) == OPERATORS[architecture_and_task[0]]
    assert len(each.graph.graph) <= plain + 4
    assert capfd.readouterr() == ("", "")
    assert max(found.max_abs for found in each.deviations()) < 1e-5


def test_a_graph_with_nothing_to_fuse_is_refused():
    x, y = (ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT)) for name in "xy")
    node = ir.node("Sinh", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 20}, name="nothing")
    with pytest.raises(ExportError, match="has no operators for what this graph is made of"):
        fuse(ir.Model(graph, ir_version=10))
