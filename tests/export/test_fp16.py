"""The fp16 variant: which nodes are in half precision, and that nothing overflows."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir

from rtx.export.emulation import emulate
from rtx.export.fp16 import to_bf16, to_fp16
from rtx.export.gate import limits
from rtx.export.graph import is_norm, is_scoring, module_of
from rtx.runtime.golden import deviation

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def dtypes(node):
    """Floating types that a node computes with."""
    return {value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.dtype in FLOATS}


def computing(graph):
    return [node for node in graph.graph if node.op_type != "Cast" and dtypes(node)]


def test_each_node_has_the_precision_that_the_docstring_says(each):
    to_fp16(each.graph)
    half = {ir.DataType.FLOAT16}
    for node in computing(each.graph):
        precise = is_scoring(node) or is_norm(node) or node.op_type in ("Softmax", "Log", "Ceil", "Cos", "Sin")
        weighs = node.op_type in ("MatMul", "Gelu") and not _is_position(node)
        assert len(dtypes(node)) == 1, f"{node.op_type} {module_of(node)} mixes types"
        if precise:
            assert dtypes(node) == {ir.DataType.FLOAT}, f"{node.op_type} {module_of(node)}"
        elif weighs:
            assert dtypes(node) == half, f"{node.op_type} {module_of(node)}"
    by_operator = {(node.op_type, dtypes(node) == half) for node in computing(each.graph)}
    assert {("MatMul", True), ("Add", True), ("Gather", True), ("Softmax", False)} <= by_operator


def _is_position(node):
    return "rotary" in module_of(node)


def test_weights_are_stored_in_half(each):
    full = sum(value.const_value.nbytes for value in each.graph.graph.initializers.values())
    to_fp16(each.graph)
    stored = each.graph.graph.initializers.values()
    assert sum(value.const_value.nbytes for value in stored) < 0.62 * full  # norms and classifier stay
    for value in stored:
        if value.const_value.shape.rank() == 2 and value.dtype == ir.DataType.FLOAT:
            assert all(is_scoring(use.node) or is_norm(use.node) for use in value.uses()), value.name


def test_masks_are_finite_in_half(each):
    to_fp16(each.graph)
    constants = [
        value.const_value.numpy()
        for value in each.graph.graph.initializers.values()
        if value.dtype in FLOATS and not all(is_scoring(use.node) for use in value.uses())
    ]
    assert min(content.min() for content in constants if content.size) == -3e4
    # Norms have an epsilon of 1e-12, which is 0 in half: they are in float32.
    assert all(np.isfinite(content.astype(np.float16)).all() for content in constants)


def test_the_variant_is_near_to_pytorch(each):
    to_fp16(each.graph)
    allowed = limits("fp16", each.model.task, 1.0).parity
    assert all(found.within(allowed) for found in each.deviations())


def test_a_row_that_is_masked_all_over_gives_no_nan(exported):
    """With left padding a causal model's first queries see nothing: with -inf their softmax would be NaN."""
    found = exported("qwen3")
    to_fp16(found.graph)
    batch = found.batch(2, 9)
    turned = {name: array[:, ::-1].copy() for name, array in batch.items()}
    result = found.engine().run(turned)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result, found.model.engine().run(turned), atol=5e-3)


def test_positions_of_deberta_are_exact(exported):
    """Their buckets are rounded logarithms: in half precision some land in the next one."""
    found = exported("deberta-v2")
    names = [node.outputs[0].name for node in found.graph.graph if node.op_type in ("Log", "Ceil")]
    assert len(names) == 2
    to_fp16(found.graph)
    values = {value.name: value.dtype for node in found.graph.graph for value in node.outputs}
    assert {values[name] for name in names} == {ir.DataType.FLOAT}


def test_a_decoder_in_half_opens_in_onnx_runtime_with_all_its_optimisations(exported, tmp_path):
    """ONNX Runtime 1.32 crashes on graphs like this one if masks and norms are converted too, so in another process."""
    for task in ("embed", "rerank"):
        found = exported("qwen3", task)
        to_fp16(found.graph)
        ir.save(found.graph, tmp_path / f"{task}.onnx")
        code = (
            "import sys, onnxruntime as ort; options = ort.SessionOptions(); "
            "options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL; "
            "ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider']); print('opened')"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path / f"{task}.onnx"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "opened\n"), done.stderr


def test_weights_beyond_half_are_bounded(exported):
    found = exported("distilbert")
    weight = next(v for v in found.graph.graph.initializers.values() if v.name.endswith("word_embeddings.weight"))
    content = weight.const_value.numpy().copy()
    content[7, 3], content[8, 3] = 1e6, -1e30
    weight.const_value = ir.tensor(content, name=weight.name)
    to_fp16(found.graph)
    stored = found.graph.graph.initializers[f"{weight.name}_fp16"].const_value.numpy()
    assert (stored.dtype, stored[7, 3], stored[8, 3]) == (np.float16, 65504, -65504)


def test_bfloat16_has_the_same_nodes_and_less_precision(some):
    half, brain = some.graph.clone(), some.graph.clone()
    to_fp16(half)
    to_bf16(brain)
    assert [node.op_type for node in half.graph] == [node.op_type for node in brain.graph]
    for one, other in zip(half.graph, brain.graph, strict=True):
        pairs = [(value.dtype, twin.dtype) for value, twin in zip(one.outputs, other.outputs, strict=True)]
        assert all((dtype == ir.DataType.FLOAT16) == (twin == ir.DataType.BFLOAT16) for dtype, twin in pairs)
    assert not any(value.dtype == ir.DataType.FLOAT16 for node in brain.graph for value in node.outputs)
    reference = some.model.engine()
    off = []
    for graph in (half, brain):
        engine = some._replace(graph=emulate(graph)).engine()
        off.append(max(deviation(engine.run(batch), reference.run(batch)).max_abs for batch in some.batches()))
    assert off[0] < off[1] < 0.2
