"""What turns images into vectors in a model that has a tower for each modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtx.trainer import pooling
from rtx.trainer.backbone import Source, load_image_backbone
from rtx.trainer.head import check_widths, load_module, normalizes, output_width
from rtx.trainer.layout import ImageTower


class ImageEncoder(nn.Module):
    """A vision transformer, pooling over its tokens, and what follows.

    Args:
        backbone: a model of transformers that takes `pixel_values` and gives `last_hidden_state`.
        head: the modules after pooling, as `layout.head` describes them.
        layout: of the tower.
    """

    def __init__(self, backbone: Any, head: Sequence[nn.Module], layout: ImageTower) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleList(head)
        self.layout = layout

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return output_width(self.layout, int(self.backbone.config.hidden_size))

    @property
    def normalizes(self) -> bool:
        return normalizes(self.layout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] float32 to [images, dimension] float32."""
        hidden: Tensor = self.backbone(pixel_values=pixel_values.to(self.backbone.dtype)).last_hidden_state
        everything = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        vectors = pooling.pool(hidden, everything, self.layout.pooling)
        for module in self.head:
            vectors = module(vectors)
        return vectors


def load_image_tower(
    source: Source,
    described: ImageTower,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> ImageEncoder:
    """A tower with its weights; `pooling_dimension` of its layout is set.

    Args:
        source: the checkpoint that it is in.
        described: as the checkpoint describes it.
        dtype: of the transformer.
        trust_remote_code, attn_implementation: as for `rtx.trainer.backbone.load_backbone`.

    Raises:
        CheckpointError: its transformer is no model of images alone, or its weights are not whole.
    """
    backbone = load_image_backbone(
        source,
        described.folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    width = int(backbone.config.hidden_size)
    check_widths(described, width, source.name)
    layout = dataclasses.replace(described, pooling_dimension=width)
    return ImageEncoder(backbone, [load_module(source, module) for module in layout.head], layout)
