"""A model to its plain graphs: one for what has tokens, and where the model takes images, one for those.

texts alone          tokens -> sentence_embedding, or scores
a tower for each     tokens -> sentence_embedding;  pixels -> sentence_embedding
images as tokens     pixels -> visual tokens;  tokens, visual tokens -> sentence_embedding, or scores
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import NamedTuple

import onnx_ir as ir
from torch import Tensor, nn

from rtx.export.graph import export_graph, export_image_graph
from rtx.export.int4_blocks import Factors
from rtx.export.scales import Scales
from rtx.export.visual import export_text, export_vision, visual_rules
from rtx.runtime.errors import ExportError
from rtx.runtime.manifest import CONTRACT_KEY
from rtx.trainer.model import RetrievalModel


class Graphs(NamedTuple):
    """The graphs of a model.

    Attributes:
        tokens: what has tokens goes through; holds the contract.
        image: what images go through, first or by themselves; None for a model that takes none.
        packed: what has tokens goes through without padding; why there is none; or None where nobody asked for it.
        scales: of what the layers of `tokens` read; empty as long as nothing was calibrated.
        image_scales: of what those of `image` read.
        factors: of what the layers of `tokens` read, for weights in 4 bits; likewise.
    """

    tokens: ir.Model
    image: ir.Model | None = None
    packed: ir.Model | ExportError | None = None
    scales: Scales = MappingProxyType({})
    image_scales: Scales = MappingProxyType({})
    factors: Factors = MappingProxyType({})


def check_exportable(model: RetrievalModel) -> None:
    """
    Raises:
        ExportError: no graph can be made of this architecture, which is known before any work is done.
    """
    if model.contract.visual is not None:
        visual_rules(model.backbone.config)


def export_graphs(model: RetrievalModel) -> Graphs:
    """Export a model in float32.

    Args:
        model: on the CPU, in float32.

    Raises:
        ExportError: no graph can be made of this architecture.
    """
    if model.contract.visual is not None:
        tokens = export_text(model.backbone, _Finish(model), output=model.contract.output)
        tokens.metadata_props[CONTRACT_KEY] = json.dumps(model.contract.to_dict(), sort_keys=True)
        return Graphs(tokens, export_vision(model.backbone))
    if model.contract.images is not None:
        return Graphs(export_graph(model), export_image_graph(model))
    return Graphs(export_graph(model))


class _Finish(nn.Module):
    """What follows the last hidden states of a model whose images are tokens: pooling and head, or the score."""

    direction: Tensor
    bias: Tensor

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        # Not a submodule: of its weights the exporter would make constants of this graph, used or not.
        self._model = (model,)
        self.head = model.head
        if model.layout.logit_score is not None:
            direction, bias = model.score_direction()
            self.register_buffer("direction", direction.detach())
            self.register_buffer("bias", bias.detach())

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        (model,) = self._model
        batch = {"attention_mask": attention_mask}
        if model.layout.logit_score is not None:
            return model.activate(model.score_last_token(hidden, batch, self.direction, self.bias))
        return model.finish(model.pool(hidden, batch))
