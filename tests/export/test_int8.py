"""The int8 variant: linear layers equal the reference of the op, nothing is left out, nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from rtx.export.gate import limits
from rtx.export.graph import is_scoring, module_of
from rtx.export.int8 import quantize_int8
from rtx.kernels.int8_linear import int8_linear, quantize_rows, quantize_weight
from rtx.runtime.errors import ExportError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Graph:
    """A graph by hand: `x` [rows, tokens, width] float32 or `input_ids`, and nodes of modules of the backbone."""

    def __init__(self, width):
        self.x = ir.Value(name="x", shape=ir.Shape(["rows", "tokens", width]), type=ir.TensorType(ir.DataType.FLOAT))
        self.ids = ir.Value(name="input_ids", shape=ir.Shape(["rows", "tokens"]), type=ir.TensorType(ir.DataType.INT64))
        graph = ir.Graph([self.ids, self.x], [], nodes=[], opset_imports={"": 20}, name="by hand")
        self.model = ir.Model(graph, ir_version=10)

    def weight(self, name, content):
        tensor = ir.tensor(content, name=name)
        value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def node(self, op_type, *inputs, module="backbone.layer", output=None, **attributes):
        node = ir.node(op_type, list(inputs), attributes, name=f"{module}/{op_type}")
        names = ["", *(f"model.{module}"[:end] for end in range(len(module) + 7) if f"model.{module}."[end] == ".")]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = repr([*names, "op"])
        node.metadata_props["pkg.torch.onnx.class_hierarchy"] = repr(["Module"] * len(names) + ["op"])
        value = node.outputs[0]
        value.name, value.type = output or f"{module}_{len(self.model.graph)}", ir.TensorType(ir.DataType.FLOAT)
        self.model.graph.append(node)
        if output:
            value.shape = ir.Shape(["rows", "tokens", None])
            self.model.graph.outputs.append(value)
        return value

    def run(self, **inputs):
        proto = ir.to_proto(self.model)
        onnx.checker.check_model(proto, full_check=True)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {"x": np.zeros((1, 1, self.x.shape[2]), np.float32), "input_ids": np.zeros((1, 1), np.int64)} | inputs
        return session.run(None, feeds)

    def count(self, op_type):
        return sum(node.op_type == op_type for node in self.model.graph)


@pytest.mark.parametrize(("rows", "tokens", "width", "out"), [(1, 1, 1, 1), (3, 5, 7, 11), (2, 40, 96, 64)])
def test_a_linear_layer_equals_the_reference(rows, tokens, width, out):
    graph, weight, bias = Graph(width), normal(width, out), normal(out, seed=1)
    product = graph.node("MatMul", graph.x, graph.weight("w", weight), module="backbone.layer.0.query")
    graph.node("Add", product, graph.weight("b", bias), module="backbone.layer.0.query", output="y")
    x = normal(rows, tokens, width, seed=2)
    x[..., 0] += 20  # off centre
    (before,) = graph.run(x=x)
    assert quantize_int8(graph.model) == ["backbone.layer.0.query"]
    (after,) = graph.run(x=x)
    expected = int8_linear(x, quantize_weight(weight), bias)
    # The same operations in the same order, so that no rounding step falls on the other side.
    np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max() + 0.1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gemm_equals_the_reference(transposed, biased):
    graph, weight, bias = Graph(8), normal(8, 6), normal(6, seed=1)
    flat = graph.node("Reshape", graph.x, graph.weight("shape", np.array([-1, 8])), module="backbone.layer")
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    inputs = [flat, graph.weight("w", stored), *([graph.weight("b", bias)] if biased else [])]
    graph.node("Gemm", *inputs, module="backbone.layer.fc", output="y", transB=int(transposed))
    graph.model.graph.outputs[0].shape = ir.Shape([None, 6])
    assert quantize_int8(graph.model) == ["backbone.layer.fc"]
    assert graph.count("Gemm") == 0
    x = normal(2, 3, 8, seed=2)
    expected = int8_linear(x.reshape(-1, 8), quantize_weight(weight), bias if biased else None)
    np.testing.assert_allclose(graph.run(x=x)[0], expected, rtol=1e-6, atol=1e-6)


def test_tokens_are_independent_of_each_other_bit_for_bit():
    graph = Graph(48)
    graph.node("MatMul", graph.x, graph.weight("w", normal(48, 32)), output="y")
    quantize_int8(graph.model)
    x = normal(4, 6, 48, seed=3)
    (together,) = graph.run(x=x)
    for row, token in np.ndindex(4, 6):
        (alone,) = graph.run(x=x[row : row + 1, token : token + 1])
        np.testing.assert_array_equal(alone[0, 0], together[row, token])
    x[1, 2] = 1e4  # a loud token
    (beside,) = graph.run(x=x)
    others = np.ones((4, 6), dtype=bool)
    others[1, 2] = False
    np.testing.assert_array_equal(beside[others], together[others])


def test_infinity_does_not_become_a_number():
    graph = Graph(8)
    graph.node("MatMul", graph.x, graph.weight("w", normal(8, 4)), output="y")
    quantize_int8(graph.model)
    x = normal(1, 3, 8, seed=1)
    x[0, 1, 5] = np.inf
    (y,) = graph.run(x=x)
    assert np.isfinite(y).all(axis=-1).tolist() == [[True, False, True]]


def test_layers_that_read_the_same_tokens_quantise_them_once():
    graph = Graph(16)
    for name in ("query", "key", "value"):
        graph.node("MatMul", graph.x, graph.weight(name, normal(16, 16)), module=f"backbone.{name}", output=name)
    assert quantize_int8(graph.model) == ["backbone.query", "backbone.key", "backbone.value"]
    assert (graph.count("QuantizeLinear"), graph.count("MatMulInteger")) == (1, 3)


def test_a_weight_that_two_nodes_share_is_stored_once():
    graph = Graph(16)
    weight = graph.weight("w", normal(16, 16))
    first = graph.node("MatMul", graph.x, weight, module="backbone.key", output="first")
    graph.node("MatMul", first, weight, module="backbone.key", output="second")
    x = normal(1, 2, 16, seed=1)
    assert quantize_int8(graph.model) == ["backbone.key"]
    quantized = quantize_weight(normal(16, 16))
    once = int8_linear(x, quantized)
    for found, expected in zip(graph.run(x=x), (once, int8_linear(once, quantized)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    stored = {name: value.dtype for name, value in graph.model.graph.initializers.items() if value.shape.rank() == 2}
    assert stored == {"w_int8": ir.DataType.UINT8}


def test_embeddings_become_rows_with_a_scale_each():
    graph, table = Graph(1), normal(50, 12) * np.linspace(0, 100, 50, dtype=np.float32)[:, None]
    graph.node("Gather", graph.weight("words", table), graph.ids, module="backbone.words", output="y")
    assert quantize_int8(graph.model) == ["backbone.words"]
    ids = np.array([[0, 7, 49], [49, 1, 0]])
    np.testing.assert_array_equal(graph.run(input_ids=ids)[0], quantize_rows(table).dequantize()[ids])


def test_other_tables_and_what_scores_stay_as_they_are():
    graph = Graph(8)
    positions = graph.node("Gather", graph.weight("positions", normal(9, 8)), graph.weight("first", np.array([0, 1])))
    hidden = graph.node("Add", graph.x, positions)
    scores = graph.weight("classifier", normal(8, 2))
    graph.node("MatMul", hidden, scores, module="backbone.classifier", output="logits")
    graph.node("MatMul", hidden, graph.weight("dense", normal(8, 2)), module="head.0", output="vectors")
    x = normal(1, 2, 8)
    before = graph.run(x=x)
    assert quantize_int8(graph.model) == []
    for one, other in zip(before, graph.run(x=x), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g: g.node("MatMul", g.weight("w", normal(4, 8)), g.x, output="y"), r"backbone\.layer \(MatMul\)"),
        (
            lambda g: g.node("MatMul", g.x, g.node("Transpose", g.weight("w", normal(4, 8)), perm=[1, 0]), output="y"),
            r"backbone\.layer \(Transpose\)",
        ),
        (
            lambda g: g.node("MatMul", g.x, g.weight("w", np.full((8, 2), np.nan, np.float32)), output="y"),
            r"backbone\.layer: the weight holds NaN or infinity",
        ),
        (
            lambda g: g.node("Gemm", g.x, g.weight("w", normal(8, 2)), output="y", alpha=0.5),
            r"backbone\.layer: a Gemm that scales",
        ),
    ],
)
def test_a_layer_that_cannot_be_quantised_is_named(build, message):
    graph = Graph(8)
    build(graph)
    with pytest.raises(ExportError, match=message):
        quantize_int8(graph.model)


def test_every_linear_layer_of_the_transformer_is_found(each):
    modules = dict(each.model.named_modules())
    used = {module_of(node) for node in each.graph.graph if not is_scoring(node)}
    linear = {name for name in used if isinstance(modules[name], torch.nn.Linear)}
    (words,) = {name for name in used if modules[name] is each.model.backbone.get_input_embeddings()}
    assert len(linear) >= 8
    assert sorted(quantize_int8(each.graph)) == sorted({*linear, words})
    # Position tables, norms and biases are all that is left in float32, and small.
    sizes = {
        value.name: value.const_value.size
        for value in each.graph.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and not all(is_scoring(use.node) for use in value.uses())
    }
    assert max(sizes.values()) <= 66 * 32
    assert not any("word" in name and not name.endswith("_scale") for name in sizes)


def test_attention_norms_pooling_and_classifier_are_untouched(each):
    def others():
        kept = ("LayerNormalization", "Softmax", "Gelu", "Pow", "Sqrt", "Tanh", "Sigmoid", "Gemm", "ReduceL2", "Where")
        graph = each.graph.graph
        attention = [
            node for node in graph if node.op_type == "MatMul" and not any(v.is_initializer() for v in node.inputs)
        ]
        scoring = [node for node in graph if is_scoring(node)]
        return [node.name for node in {*attention, *scoring, *(n for n in graph if n.op_type in kept)}]

    before = others()
    quantize_int8(each.graph)
    assert sorted(others()) == sorted(before)


def test_the_variant_is_near_to_pytorch_and_does_not_depend_on_the_batch(each):
    quantize_int8(each.graph)
    allowed = limits("int8", each.model.task, 1.0).parity
    assert all(found.within(allowed) for found in each.deviations())
    engine = each.engine()
    batch = each.batch(5, 19)
    together = engine.run(batch)
    for row in range(5):
        kept = batch["attention_mask"][row] == 1
        alone = engine.run({name: array[row : row + 1, kept] for name, array in batch.items()})
        np.testing.assert_allclose(alone[0], together[row], atol=2e-6)


def test_the_file_is_a_quarter_of_fp32():
    graph = Graph(512)
    value = graph.x
    for layer in range(4):
        value = graph.node("MatMul", value, graph.weight(f"w{layer}", normal(512, 512)), module=f"backbone.{layer}")
    graph.node("Identity", value, output="y")
    full = ir.to_proto(graph.model).ByteSize()
    quantize_int8(graph.model)
    assert 0.25 < ir.to_proto(graph.model).ByteSize() / full < 0.26
