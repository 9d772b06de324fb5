"""Qwen3-VL as two modules that torch.onnx can export, around the weights and most of the modules of transformers.

transformers' own code reads sizes out of tensors: it cuts attention at the ends of images, counts positions in Python
and scatters image vectors by a boolean mask. Here each image is a row of its own, and what follows from grids and
placeholders is an input (`rtx.runtime.visual_tokens`). Nothing is copied: weights are those of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Added where nothing may be seen. Not the most negative number: in half precision that is infinite, and a row that sees
# nothing at all would be NaN. exp(-30000) is 0 in every precision.
MASKED = -3e4


class VisionTower(nn.Module):
    """Images to visual tokens.

    Args:
        visual: a Qwen3VLVisionModel, whose names its modules keep.
    """

    inv_freq: Tensor

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": _as_linear(visual.patch_embed.proj)})
        self.pos_embed = visual.pos_embed
        self.blocks = nn.ModuleList(_VisionBlock(block) for block in visual.blocks)
        self.merger = visual.merger
        self.deepstack_merger_list = visual.deepstack_merger_list
        self.deepstack_after = list(visual.deepstack_visual_indexes)
        self.register_buffer("inv_freq", visual.rotary_pos_emb.inv_freq.detach().float(), persistent=False)

    def forward(
        self, pixel_values: Tensor, interp_indices: Tensor, interp_weights: Tensor, pos_hw: Tensor, patch_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """One image a row, padded.

        Args:
            pixel_values: [I, P, patch_width] float32.
            interp_indices: [I, P, 4] int64, rows of the learned grid of positions.
            interp_weights: [I, P, 4] float32.
            pos_hw: [I, P, 2] int64, row and column of each patch.
            patch_mask: [I, P] int64, 1 for a patch and 0 for padding.

        Returns:
            Visual tokens [I * P / merge_size², D]: those that take the place of token embeddings, then those of each
            deepstack layer.
        """
        hidden = self.patch_embed["proj"](pixel_values)
        # Corner by corner: all four at once would be the largest tensor of the graph.
        for corner in range(4):
            hidden = hidden + self.pos_embed(interp_indices[..., corner]) * interp_weights[..., corner].unsqueeze(-1)
        angles = (pos_hw.unsqueeze(-1).to(self.inv_freq.dtype) * self.inv_freq).flatten(-2).unsqueeze(1)
        rotation = _cos_sin(angles)
        mask = torch.where(patch_mask != 0, 0.0, MASKED).unsqueeze(1).unsqueeze(1)
        deepstack = {}
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, rotation, mask)
            if index in self.deepstack_after:
                merge = self.deepstack_merger_list[self.deepstack_after.index(index)]
                deepstack[index] = merge(hidden)
        return self.merger(hidden), *(deepstack[index] for index in self.deepstack_after)


class _VisionBlock(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = _VisionAttention(block.attn)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), rotation, mask)
        result: Tensor = hidden + self.mlp(self.norm2(hidden))
        return result


class _VisionAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.heads, self.head_width = attention.num_heads, attention.head_dim
        self.scaling = attention.scaling

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Hidden [I, P, H], rotation [I, 1, P, head width] twice, mask [I, 1, 1, P]."""
        three = self.qkv(hidden).unflatten(-1, (3, self.heads, self.head_width))
        query, key, value = three.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = _rotate(query, *rotation), _rotate(key, *rotation)
        weights = (query @ key.transpose(-2, -1) * self.scaling + mask).softmax(dim=-1)
        result: Tensor = self.proj((weights @ value).transpose(1, 2).flatten(-2))
        return result


class TextDecoder(nn.Module):
    """Tokens of texts with visual tokens among them to hidden states.

    Args:
        language_model: a Qwen3VLTextModel whose attention is set to "eager", and whose names the modules keep.
        deepstack_layers: layers after which visual tokens are added once more.
    """

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, language_model: Any, deepstack_layers: int) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.norm = (
            language_model.embed_tokens,
            language_model.layers,
            language_model.norm,
        )
        self.deepstack_layers = deepstack_layers
        rotary = language_model.rotary_emb
        self.scaling = rotary.attention_scaling
        self.register_buffer("inv_freq", rotary.inv_freq.detach().float(), persistent=False)
        self.register_buffer("axis", _axis_of_frequency(rotary.mrope_section, len(rotary.inv_freq)), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        visual_index: Tensor,
        image_embeds: Tensor,
        deepstack: Tensor,
    ) -> Tensor:
        """Padding may be on either side.

        Args:
            input_ids, attention_mask: [B, T] int64.
            position_ids: [3, B, T] int64: time, height, width.
            visual_index: [B, T] int64: 0 for a token of text, j for the visual token in row j - 1 of the tables.
            image_embeds: [V, D] float32; V may be 0.
            deepstack: [layers, V, D] float32.

        Returns:
            [B, T, D].
        """
        is_visual = (visual_index != 0).unsqueeze(-1)
        hidden = torch.where(is_visual, _rows(image_embeds, visual_index), self.embed_tokens(input_ids))
        positions = position_ids.index_select(0, self.axis).permute(1, 2, 0)
        cos, sin = _cos_sin(positions.to(self.inv_freq.dtype) * self.inv_freq)
        rotation = cos * self.scaling, sin * self.scaling
        number = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen = (number <= number.unsqueeze(-1)) & (attention_mask != 0).unsqueeze(1)
        mask = torch.where(seen, 0.0, MASKED).unsqueeze(1)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, position_embeddings=rotation, attention_mask=mask)
            if index < self.deepstack_layers:
                hidden = hidden + _rows(deepstack[index], visual_index)
        result: Tensor = self.norm(hidden)
        return result


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [B, T, D] of a table [V, D] counted from 1; zeros for 0."""
    return nn.functional.embedding(index, torch.cat([table.new_zeros(1, table.shape[-1]), table]))


def _axis_of_frequency(sections: list[int], frequencies: int) -> Tensor:
    """Which position each frequency turns by, [frequencies] int64: 0 time, 1 height, 2 width, interleaved.

    Every third frequency is one of height and every third one of width, as far as their sections reach.
    """
    axis = torch.zeros(frequencies, dtype=torch.int64)
    for number in (1, 2):
        axis[number : 3 * sections[number] : 3] = number
    return axis


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of angles [..., head width / 2], for both halves of a head."""
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def _rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of numbers, the one in the first half and the other in the second, turned by an angle each."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat([-second, first], dim=-1) * sin


def _as_linear(convolution: nn.Conv3d) -> nn.Linear:
    """A convolution whose windows do not overlap, over windows that are flattened already; the weights are shared."""
    weight = convolution.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = convolution.bias  # type: ignore[assignment]
    return linear
