"""PyTorch to one plain ONNX graph: dynamic batch and length, with pooling, head, norm and Matryoshka cut inside."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from rtx.runtime.contract import Contract
from rtx.runtime.errors import ExportError
from rtx.runtime.manifest import CONTRACT_KEY
from rtx.trainer.model import RetrievalModel

# Opset 23 has an Attention operator that TensorRT-RTX and ONNX Runtime do not take in every form.
OPSET = 20
_BACKBONES = ("model.backbone", "model.image_tower.backbone")
# Where the transformer ends and the score begins in the classification models of transformers: what these modules do,
# and what the classification model itself does between them.
_SCORING = ("classifier", "pre_classifier", "score", "pooler", "head")
_CLASSIFICATION_MODEL = "ForSequenceClassification"
# What the exporter notes at each node: where it comes from. Read while variants are derived, not written to disk, since
# it holds paths of this machine.
_NOTES = "pkg.torch."


class Exported(nn.Module):
    """The model as its graph: named inputs, float32 outputs."""

    direction: Tensor
    bias: Tensor

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.model = model
        if model.layout.logit_score is not None:
            # As constants: the graph has no use for the other rows of the language model's head.
            direction, bias = model.score_direction()
            self.register_buffer("direction", direction.detach())
            self.register_buffer("bias", bias.detach())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pooling_mask": pooling_mask,
        }
        batch = {name: tensor for name, tensor in given.items() if tensor is not None}
        if self.model.layout.logit_score is not None:
            hidden = self.model.encode_tokens(batch)
            logits = self.model.score_last_token(hidden, batch, self.direction, self.bias)
            return (self.model.activate(logits),)
        if self.model.task == "rerank":
            return (self.model.activate(self.model(batch)),)
        if self.model.layout.features:
            return (self.model.finish(self.model(batch)),)
        hidden = self.model.encode_tokens(batch)
        return self.model.finish(self.model.pool(hidden, batch)), hidden.float()


class _ExportedImages(nn.Module):
    """What images go through that become vectors by themselves."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.finish(self.model.encode_images(pixel_values))


def export_graph(model: RetrievalModel) -> ir.Model:
    """Export a model in float32.

    Inputs are those of the contract, [batch, tokens] int64. Outputs are `sentence_embedding` [batch, dimension] and,
    but for a dual encoder, `last_hidden_state` [batch, tokens, hidden] (for loaders that pool by themselves), or
    `scores` [batch]; all float32.

    Args:
        model: on the CPU, in float32.

    Raises:
        ExportError: torch.onnx cannot export this architecture.
    """
    contract = model.contract
    inputs = example_inputs(model)
    batch_axis = torch.export.Dim("batch", min=1, max=1 << 20)
    axes: dict[int, Any] = {0: batch_axis}
    if not contract.fixed_tokens:
        axes[1] = torch.export.Dim("tokens", min=2, max=max(contract.max_tokens, 2))
    with exporting(model, model.backbone):
        name = type(model.backbone).__name__
        graph = to_graph(Exported(model), inputs, output_names(model), dict.fromkeys(inputs, axes), name=name)
    return with_contract(graph, contract)


def example_inputs(model: RetrievalModel) -> dict[str, Tensor]:
    """Two rows for each input of the contract, [2, tokens] int64, the second with padding."""
    contract = model.contract
    # At least two rows and columns: torch.export takes a size of one for a constant. And a tensor for each input: it
    # takes one that is given twice for one input.
    tokens = contract.fixed_tokens or max(2, min(8, contract.max_tokens))
    mask = torch.ones((2, tokens), dtype=torch.int64)
    mask[1, tokens // 2 :] = 0
    inputs: dict[str, Tensor] = {
        name: mask.clone() if name.endswith("mask") else torch.zeros_like(mask) for name in contract.inputs
    }
    inputs["input_ids"] = torch.randint(
        0, model.backbone.config.get_text_config().vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)
    )
    return inputs


def output_names(model: RetrievalModel) -> list[str]:
    """Of the graph of what has tokens."""
    with_tokens = model.contract.task == "embed" and not model.layout.features
    return [model.contract.output, *(["last_hidden_state"] if with_tokens else [])]


def with_contract(graph: ir.Model, contract: Contract) -> ir.Model:
    """The graph, which now holds the contract."""
    graph.metadata_props[CONTRACT_KEY] = json.dumps(contract.to_dict(), sort_keys=True)
    return graph


def export_image_graph(model: RetrievalModel) -> ir.Model:
    """Export what images go through that become vectors by themselves, in float32.

    Input is `pixel_values` [images, 3, height, width], output `sentence_embedding` [images, dimension]; all float32.

    Args:
        model: on the CPU, in float32, with a tower for images.

    Raises:
        ExportError: torch.onnx cannot export this architecture.
    """
    contract = model.contract
    assert contract.images is not None
    backbone = model.backbone if model.image_tower is None else model.image_tower.backbone
    # Two images, as above.
    inputs = {"pixel_values": torch.zeros((2, 3, contract.images.height, contract.images.width))}
    axes = {"pixel_values": {0: torch.export.Dim("images", min=1, max=1 << 20)}}
    with exporting(model, backbone):
        return to_graph(_ExportedImages(model), inputs, [contract.output], axes, name=type(backbone).__name__)


def to_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: Mapping[str, Any],
    *,
    name: str,
) -> ir.Model:
    """A module as a graph whose nodes know the modules that they come from.

    Args:
        module: to be exported, in evaluation mode for the time.
        inputs: examples, by name.
        outputs: names of what it gives.
        dynamic_shapes: by input, as torch.export takes them.
        name: what messages call it.

    Raises:
        ExportError: torch.onnx cannot export it.
    """
    try:
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(dynamic_shapes),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as broken:
        # The exporter's own message is advice on debugging it; what went wrong is where it comes from.
        cause: BaseException = broken
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ExportError(f"torch.onnx cannot export {name}: {reason}") from broken
    assert program is not None
    graph = cast(ir.Model, program.model)
    graph.producer_name = "rtx"
    graph.producer_version = importlib.metadata.version("rtx-retrieval")
    _complete_notes(graph)
    return graph


def _complete_notes(model: ir.Model) -> None:
    """A node that the exporter's own optimiser made has no notes: it belongs where its result goes."""
    for node in reversed(list(model.graph)):
        if not _note(node, "name_scopes"):
            reader = next((use.node for output in node.outputs for use in output.uses()), None)
            if reader is not None:
                node.metadata_props.update(reader.metadata_props)


def strip_notes(model: ir.Model) -> None:
    """Remove in place what the exporter noted about sources and stack frames."""
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for key in [key for key in model.graph.metadata_props if key.startswith(_NOTES)]:
        del model.graph.metadata_props[key]


def module_of(node: ir.Node) -> str:
    """The module that a node comes from, as `RetrievalModel.named_modules` calls it; "" for the model itself."""
    return next((name for name in reversed(_modules(node)) if name), "").partition(".")[2]


def is_scoring(node: ir.Node) -> bool:
    """Whether a node belongs to pooling, head or classifier, which stay float32 in every variant."""
    modules, kinds = _modules(node), _classes(node)
    # Of a language model only the transformer in it is run, and not the module around both.
    inside = any(name == backbone or name.startswith(f"{backbone}.") for name in modules for backbone in _BACKBONES)
    if not inside or kinds[-1].endswith(_CLASSIFICATION_MODEL):
        return True
    return any(name.rpartition(".")[2] in _SCORING for name in modules)


def is_norm(node: ir.Node) -> bool:
    """Whether a node belongs to a LayerNorm, RMSNorm or the like."""
    return node.op_type == "LayerNormalization" or any(name.endswith("Norm") for name in _classes(node))


def constant_matrix(value: ir.Value | None) -> ir.Value | None:
    """The value if it is a two-dimensional floating point weight of the graph, else None."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    tensor = value.const_value
    return value if len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT else None


def _modules(node: ir.Node) -> list[str]:
    """Names of the modules that a node comes from, outermost first: "", "model", "model.backbone", ..."""
    return _note(node, "name_scopes")[:-1]


def _classes(node: ir.Node) -> list[str]:
    """Class names of the modules that a node comes from, outermost first."""
    return [name.rpartition(".")[2] for name in _note(node, "class_hierarchy")[:-1]]


def _note(node: ir.Node, key: str) -> list[str]:
    return cast(list[str], ast.literal_eval(node.metadata_props.get(f"{_NOTES}onnx.{key}", "[]")))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of exporters and optimisers, which mean nothing to who exports a model."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def exporting(model: RetrievalModel, backbone: Any, *, attention: str = "eager") -> Iterator[None]:
    """Evaluation mode, attention written out or of another name, no gradients."""
    # Written out it is MatMul, Softmax, MatMul; the fused form exports with a check for NaN in every layer, which costs
    # time and hides the pattern from graph optimisers.
    chosen = backbone.config._attn_implementation
    was_training = model.training
    model.eval()
    backbone.set_attn_implementation(attention)
    try:
        with quiet(), torch.no_grad():
            yield
    finally:
        backbone.set_attn_implementation(chosen)
        model.train(was_training)
