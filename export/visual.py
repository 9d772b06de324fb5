"""A vision-language model to two plain ONNX graphs: one for images, and one for tokens with visual tokens among them.

    vision   pixel_values, interp_indices, interp_weights, pos_hw, patch_mask            -> image_embeds, deepstack
    text     input_ids, attention_mask, position_ids, visual_index, image_embeds, deepstack
                                                                              -> sentence_embedding, or scores

One artifact of each serves all sizes and numbers of images. `rtx.runtime.backends.visual` runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from rtx.export.graph import quiet, to_graph
from rtx.export.visual_modules import TextDecoder, VisionTower
from rtx.runtime.errors import ExportError
from rtx.runtime.visual_tokens import VisualTokens, text_inputs, vision_inputs

ARCHITECTURE = "qwen3_vl"
VISION_OUTPUTS = ("image_embeds", "deepstack")
_BACKBONE = "model.backbone"

# What becomes of hidden states [B, T, D] and an attention mask [B, T]: vectors [B, dimension], or scores [B].
Finish = Callable[[Tensor, Tensor], Tensor]
# Frequencies that follow from the length of a row, which a graph for all lengths does not have.
_UNSUPPORTED_ROPE = ("dynamic", "longrope")


def visual_rules(config: Any) -> VisualTokens:
    """How a model sees images, out of its configuration.

    Raises:
        ExportError: the architecture is not Qwen3-VL, or not as its checkpoints have it.
    """
    kind = getattr(config, "model_type", None)
    if kind != ARCHITECTURE:
        raise ExportError(
            f"images among the tokens of a text: no graph can be made of a {kind} model; expected {ARCHITECTURE}"
        )
    vision, text = config.vision_config, config.text_config
    side = round(vision.num_position_embeddings**0.5)
    if side**2 != vision.num_position_embeddings:
        raise ExportError(f"num_position_embeddings: expected a square number, got {vision.num_position_embeddings}")
    if (rope := text.rope_parameters["rope_type"]) in _UNSUPPORTED_ROPE:
        raise ExportError(f"rope_type: {rope} changes with the length of a row, which is not supported")
    deepstack = len(vision.deepstack_visual_indexes)
    if not 1 <= deepstack <= text.num_hidden_layers:
        raise ExportError(
            f"deepstack_visual_indexes: expected 1 to {text.num_hidden_layers} (text layers), got {deepstack}"
        )
    return VisualTokens(
        image_token_id=config.image_token_id,
        merge_size=vision.spatial_merge_size,
        patch_width=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        position_grid=side,
        hidden=text.hidden_size,
        deepstack_layers=deepstack,
    )


def export_vision(backbone: Any) -> ir.Model:
    """Export the images' side of a vision-language model in float32.

    Inputs are those of `rtx.runtime.visual_tokens.vision_inputs`; outputs are `image_embeds` [I, P / merge_size², D]
    and `deepstack` [layers, I, P / merge_size², D].

    Args:
        backbone: Qwen3VLModel or Qwen3VLForConditionalGeneration, on the CPU, in float32.

    Raises:
        ExportError: the architecture is not Qwen3-VL, or torch.onnx cannot export it.
    """
    rules = visual_rules(backbone.config)
    model, path = _model_of(backbone)
    # Two images of different sizes, the smaller one padded.
    side = rules.merge_size
    grids = np.array([[1, side, 2 * side], [1, side, side]])
    pixels = np.zeros((grids.prod(axis=1).sum(), rules.patch_width), dtype=np.float32)
    inputs = vision_inputs(pixels, grids, rules)
    images, tokens = Dim("images", min=1), Dim("image_tokens", min=1)
    shapes = {name: {0: images, 1: side**2 * tokens} for name in inputs}
    with _exporting(backbone, model.language_model):
        module = _Vision(f"{path}.visual", VisionTower(model.visual))
        graph = to_graph(module, _tensors(inputs), VISION_OUTPUTS, shapes, name=ARCHITECTURE)
    shape = ("images", "image_tokens", rules.hidden)
    graph.graph.outputs[0].shape, graph.graph.outputs[1].shape = (
        ir.Shape(shape),
        ir.Shape((rules.deepstack_layers, *shape)),
    )
    return graph


def export_text(backbone: Any, finish: Finish, *, output: str) -> ir.Model:
    """Export the tokens' side of a vision-language model in float32.

    Inputs are input_ids and attention_mask [B, T] int64, those of `rtx.runtime.visual_tokens.text_inputs`, and the
    table of visual tokens: `image_embeds` [V, D] and `deepstack` [layers, V, D] float32, where V may be 0.

    Args:
        backbone: Qwen3VLModel or Qwen3VLForConditionalGeneration, on the CPU, in float32.
        finish: pooling and what follows, or the score: hidden states [B, T, D] and the attention mask [B, T] to what
            the graph gives. Weights that it has become constants of the graph, and stay float32 in every variant.
        output: name of what it gives, `sentence_embedding` or `scores`.

    Raises:
        ExportError: the architecture is not Qwen3-VL, or torch.onnx cannot export it.
    """
    rules = visual_rules(backbone.config)
    model, path = _model_of(backbone)
    ids = np.array([[0, rules.image_token_id, rules.image_token_id, 0], [0, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    grids = np.array([[1, rules.merge_size, 2 * rules.merge_size]])
    inputs = {"input_ids": ids, "attention_mask": mask, **text_inputs(ids, mask, grids, rules)}
    inputs["image_embeds"] = np.zeros((2, rules.hidden), dtype=np.float32)
    inputs["deepstack"] = np.zeros((rules.deepstack_layers, 2, rules.hidden), dtype=np.float32)
    rows, tokens, visual = Dim("batch", min=1), Dim("tokens", min=2), Dim("visual_tokens", min=0)
    shapes = {name: {0: rows, 1: tokens} for name in inputs}
    shapes |= {"position_ids": {1: rows, 2: tokens}, "image_embeds": {0: visual}, "deepstack": {1: visual}}
    with _exporting(backbone, model.language_model):
        decoder = TextDecoder(model.language_model, rules.deepstack_layers)
        module = _Text(f"{path}.language_model", decoder, finish)
        return to_graph(module, _tensors(inputs), (output,), shapes, name=ARCHITECTURE)


def _tensors(inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _model_of(backbone: Any) -> tuple[Any, str]:
    """The model without the language model's head, and what a RetrievalModel with this backbone calls it."""
    return (backbone.model, f"{_BACKBONE}.model") if hasattr(backbone, "lm_head") else (backbone, _BACKBONE)


class _Vision(nn.Module):
    """The vision graph, its modules named as in a RetrievalModel."""

    def __init__(self, path: str, tower: VisionTower) -> None:
        super().__init__()
        self._path = path
        _put(self, path, tower)

    def forward(
        self, pixel_values: Tensor, interp_indices: Tensor, interp_weights: Tensor, pos_hw: Tensor, patch_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        tower = self.get_submodule(self._path)
        found = tower(pixel_values, interp_indices, interp_weights, pos_hw, patch_mask)
        # Here and not in the tower: what belongs to no module of the backbone stays float32 in every variant, and so do
        # the graph's outputs.
        image_embeds, *deepstack = (rows.reshape(pixel_values.shape[0], -1, rows.shape[-1]).float() for rows in found)
        return image_embeds, torch.stack(deepstack)


class _Text(nn.Module):
    """The text graph, its modules named as in a RetrievalModel."""

    def __init__(self, path: str, decoder: TextDecoder, finish: Finish) -> None:
        super().__init__()
        self._path = path
        _put(self, path, decoder)
        self.finish = finish

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        visual_index: Tensor,
        image_embeds: Tensor,
        deepstack: Tensor,
    ) -> Tensor:
        decoder = self.get_submodule(self._path)
        hidden = decoder(input_ids, attention_mask, position_ids, visual_index, image_embeds, deepstack)
        return self.finish(hidden, attention_mask).float()


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the submodule `path` of `root`: what variants do with a node depends on its module's name."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


@contextlib.contextmanager
def _exporting(backbone: Any, language_model: Any) -> Iterator[None]:
    """Evaluation mode, attention written out, no gradients."""
    chosen, was_training = language_model.config._attn_implementation, backbone.training
    backbone.eval()
    language_model.set_attn_implementation("eager")
    try:
        with quiet(), torch.no_grad():
            yield
    finally:
        language_model.set_attn_implementation(chosen)
        backbone.train(was_training)
