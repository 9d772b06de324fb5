"""The int4 variant: linear layers equal the reference of the op, nothing is left out, nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rtx.export.derive import derive
from rtx.export.graph import constant_matrix, is_scoring
from rtx.export.int4 import quantize_int4
from rtx.export.int8 import quantize_int8
from rtx.kernels.int4_linear import int4_linear, quantize_weight
from rtx.kernels.int8_linear import quantize_rows
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.errors import ExportError
from rtx.runtime.golden import deviation
from rtx.trainer.model import RetrievalModel


@pytest.mark.parametrize(("inputs", "out"), [(32, 8), (40, 5), (7, 33), (100, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_reference(inputs, out, bias):
    random = np.random.default_rng(inputs)
    weight, x = (random.normal(size=shape).astype(np.float32) for shape in ((inputs, out), (2, 3, inputs)))
    b = random.normal(size=out).astype(np.float32) if bias else None
    found = run(weight, x, b)
    assert np.abs(found - int4_linear(x, quantize_weight(weight), b)).max() < 1e-4


@pytest.mark.parametrize("given", [{"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}])
@pytest.mark.parametrize(("variant", "quantize"), [("int4", quantize_int4), ("int8", quantize_int8)])
def test_a_gemm_that_does_more_is_refused(given, variant, quantize):
    weight = ir.tensor(np.ones((32, 8), dtype=np.float32), name="w")
    x = ir.Value(name="x", shape=ir.Shape([32, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    value = ir.Value(name="w", shape=ir.Shape([32, 8]), type=ir.TensorType(weight.dtype), const_value=weight)
    node = ir.node("Gemm", [x, value], attributes=given, name="product")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", "model", "model.backbone", "op"])
    node.metadata_props["pkg.torch.onnx.class_hierarchy"] = repr(["M", "M", "M", "op"])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="by hand")
    with pytest.raises(ExportError, match=f"^{variant}: .*a Gemm that scales or transposes its input"):
        quantize(ir.Model(graph, ir_version=10))


def run(weight, x, bias):
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="by hand")
    given = ir.Value(name="x", shape=ir.Shape(["a", "b", x.shape[-1]]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(given)
    values = {}
    for name, content in (("w", weight), ("b", bias)):
        if content is not None:
            tensor = ir.tensor(content, name=name)
            values[name] = ir.Value(
                name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(values[name])
    product = ir.node("MatMul", [given, values["w"]], name="product")
    nodes = [product]
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], values["b"]], name="sum"))
    for node in nodes:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", "model", "model.backbone", "op"])
        node.metadata_props["pkg.torch.onnx.class_hierarchy"] = repr(["M", "M", "M", "op"])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
    nodes[-1].outputs[0].name = "y"
    nodes[-1].outputs[0].shape = ir.Shape(["a", "b", weight.shape[1]])
    graph.outputs.append(nodes[-1].outputs[0])
    model = ir.Model(graph, ir_version=10)
    quantize_int4(model)
    return OnnxEngine(ir.to_proto(model).SerializeToString(), output="y").run({"x": x})


def test_every_layer_of_the_backbone_is_quantised(exported):
    each = exported("qwen3")
    layers, variant = quantize_int8(each.graph.clone()), each.graph.clone()
    assert quantize_int4(variant) == layers
    products = [node for node in variant.graph if node.op_type in ("MatMul", "Gemm") and not is_scoring(node)]
    assert not any(constant_matrix(node.inputs[1]) for node in products)


def test_a_weight_that_holds_nan_is_refused(exported):
    plain = exported("qwen3").graph.clone()
    products = (node for node in plain.graph if node.op_type == "MatMul" and not is_scoring(node))
    weight = next(found for node in products if (found := constant_matrix(node.inputs[1])) is not None)
    content = weight.const_value.numpy().copy()
    content[0, 0] = np.nan
    weight.const_value = ir.tensor(content, name=weight.name)
    with pytest.raises(ExportError, match=r"int4: .*the weight holds NaN or infinity"):
        quantize_int4(plain)


def test_the_whole_graph_runs_with_the_rounded_weights(exported):
    """As PyTorch does with the same weights rounded by the reference."""
    each = exported("qwen3")
    engine = OnnxEngine(ir.to_proto(derive("int4", each.graph)).SerializeToString(), output="sentence_embedding")
    rounded = RetrievalModel.load(each.model.backbone.name_or_path)
    rounded.load_state_dict(each.model.state_dict())
    with torch.no_grad():
        for module in rounded.backbone.modules():
            if isinstance(module, torch.nn.Linear):
                weight = quantize_weight(module.weight.numpy().T).dequantize()
                module.weight.copy_(torch.from_numpy(weight.T))
        table = rounded.backbone.get_input_embeddings().weight
        table.copy_(torch.from_numpy(quantize_rows(table.numpy()).dequantize()))
    for batch in each.batches():
        assert deviation(engine.run(batch), rounded.engine().run(batch)).max_abs < 1e-5
        assert deviation(engine.run(batch), each.model.engine().run(batch)).max_abs > 1e-2
