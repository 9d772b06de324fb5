"""The plain graph and PyTorch agree for every architecture at every shape."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rtx.export.edit import Editor
from rtx.export.graph import CONTRACT_KEY, OPSET, export_graph, is_norm, is_scoring, module_of, strip_notes
from rtx.runtime.contract import Contract
from rtx.runtime.errors import ExportError
from rtx.trainer.model import RetrievalModel

# Some hundred float32 terms in another order: see rtx.export.gate.limits.
FP32 = 1e-5


def test_graph_and_pytorch_agree_at_every_shape(each):
    assert max(found.max_abs for found in each.deviations()) < FP32


def test_inputs_and_outputs_are_those_of_the_contract(each):
    contract, graph = each.model.contract, each.graph.graph
    assert each.graph.opset_imports == {"": OPSET}
    assert [value.name for value in graph.inputs] == list(contract.inputs)
    assert all(value.dtype == ir.DataType.INT64 for value in graph.inputs)
    assert all([str(side) for side in value.shape] == ["batch", "tokens"] for value in graph.inputs)
    outputs = {value.name: [str(side) for side in value.shape] for value in graph.outputs}
    if contract.task == "embed":
        hidden = each.model.backbone.config.hidden_size
        expected = {"sentence_embedding": ["batch", "32"], "last_hidden_state": ["batch", "tokens", str(hidden)]}
    else:
        expected = {"scores": ["batch"]}
    assert outputs == expected
    # The one that loaders take is the first.
    assert graph.outputs[0].name == contract.output
    assert all(value.dtype == ir.DataType.FLOAT for value in graph.outputs)


def test_the_contract_travels_in_the_metadata(each):
    found = Contract.from_dict(json.loads(each.graph.metadata_props[CONTRACT_KEY]))
    assert found == each.model.contract


def test_nothing_of_this_machine_is_left_without_notes(each):
    noted = ir.to_proto(each.graph).SerializeToString()
    assert b'File "' in noted
    strip_notes(each.graph)
    written = ir.to_proto(each.graph).SerializeToString()
    for trace in (b'File "', b"site-packages", b"pkg.torch", b"torch.nn", b"rtx/export"):
        assert trace not in written
    assert CONTRACT_KEY.encode() in written


def test_every_node_that_computes_is_known_by_its_module(each):
    modules = dict(each.model.named_modules())
    computing = [node for node in each.graph.graph if node.outputs[0].dtype == ir.DataType.FLOAT]
    assert len(computing) > 30
    # Those that the exporter's optimiser made, as the Split of ModernBERT's gate, too.
    assert all(node.metadata_props for node in each.graph.graph)
    assert {module_of(node) for node in computing} <= set(modules)
    norms = {module_of(node) for node in computing if is_norm(node)}
    expected = {
        name
        for name, module in modules.items()
        if type(module).__name__.endswith("Norm") and type(module).__name__ != "Norm" and _is_used(each, name)
    }
    assert norms == expected


def test_scoring_is_what_follows_the_transformer(each):
    scoring = {module_of(node) for node in each.graph.graph if is_scoring(node)}
    transformer = {module_of(node) for node in each.graph.graph if not is_scoring(node)}
    if each.model.task == "embed":
        assert all(name == "backbone" or name.startswith("backbone.") for name in transformer)
        assert scoring == {"", "head.0"}
    else:
        inner = f"backbone.{each.model.backbone.base_model_prefix}"
        assert all(name == inner or name.startswith(f"{inner}.") for name in transformer)
        # BERT's pooler belongs to its transformer, by name; it turns one token into what is classified.
        assert not any(name.startswith(f"{inner}.") and "pooler" not in name for name in scoring)


def _is_used(each, name):
    """transformers makes some norms that its forward does not call."""
    called = []
    module = each.model.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: called.append(name))
    try:
        each.model.engine().run(each.batch(1, 3))
    finally:
        handle.remove()
    return bool(called)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_and_head_in_the_graph(exported, side):
    """All that may follow the transformer, at once, with the prompt left out and padding on either side."""
    found = exported(
        "qwen3",
        pooling=("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
        include_prompt=False,
        prompts={"query": "find: "},
        dense=(16,),
        normalize=True,
        truncate_dim=12,
    )
    contract = found.model.contract
    assert contract.inputs == ("input_ids", "attention_mask", "pooling_mask")
    reference, engine = found.model.engine(), found.engine()
    for batch in found.batches():
        turned = {name: array[:, ::-1].copy() for name, array in batch.items()}
        chosen = batch if side == contract.padding_side else turned
        vectors = engine.run(chosen)
        assert vectors.shape == (len(batch["input_ids"]), 12)
        np.testing.assert_allclose(vectors, reference.run(chosen), atol=FP32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=FP32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("architecture", "activation"), [("qwen3-chat", "sigmoid"), ("qwen3-plain", "identity")])
def test_a_language_models_head_is_one_dot_product(exported, architecture, activation, side):
    # Without fields of its own it is the one that all tests share.
    found = exported(architecture, "rerank", **({} if activation == "sigmoid" else {"activation": activation}))
    reference, engine = found.model.engine(), found.engine()
    for batch in found.batches():
        turned = {name: array[:, ::-1].copy() for name, array in batch.items()}
        chosen = batch if side == found.model.contract.padding_side else turned
        np.testing.assert_allclose(engine.run(chosen), reference.run(chosen), atol=FP32)
    graph, vocabulary = found.graph.graph, found.model.backbone.config.vocab_size
    as_large = [value for value in graph.initializers.values() if vocabulary in value.shape]
    # The embeddings, which are looked up and not multiplied by.
    assert [list(value.shape) for value in as_large] == [[vocabulary, 32]]
    assert [use.node.op_type for use in as_large[0].uses()] == ["Gather"]
    assert not any(vocabulary in output.shape for node in graph for output in node.outputs if output.shape)
    direction = found.model.score_direction()[0].detach().numpy()
    constants = {value: value.const_value.numpy().ravel() for value in graph.initializers.values()}
    same = [value for value, content in constants.items() if np.array_equal(content, direction)]
    assert len(same) == 1
    (use,) = same[0].uses()
    assert is_scoring(use.node)


def test_the_model_is_left_as_it_was(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("distilbert"), attn_implementation="sdpa")
    model.train()
    model.backbone.eval()
    export_graph(model)
    assert model.backbone.config._attn_implementation == "sdpa"
    assert model.training


def test_a_model_that_cannot_be_traced_is_named(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("distilbert"))

    class Branches(torch.nn.Module):
        def forward(self, hidden):
            return hidden if hidden.sum() > 0 else -hidden

    model.head.append(Branches())
    with pytest.raises(ExportError, match=r"cannot export DistilBertModel: .*data-dependent") as caught:
        export_graph(model)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 9


def test_an_edit_keeps_the_name_of_an_output(exported):
    found = exported("distilbert")
    graph = found.graph.graph
    editor = Editor(graph, "twice")
    last = graph.outputs[0].producer()
    editor.replace(last, editor.insert(last, "Mul", last.inputs[0], editor.constant("two", np.float32(2)[None])))
    assert [value.name for value in graph.outputs] == ["sentence_embedding", "last_hidden_state"]
    batch = found.batch(2, 5)
    assert found.engine().run(batch).shape == (2, 32)
