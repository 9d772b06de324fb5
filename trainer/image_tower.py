"""What turns images into vectors in a model that has a tower for each modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtx.trainer import pooling
from rtx.trainer.layout import DenseConfig, ImageTower


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
        widths = [module.config.out_features for module in self.layout.head if isinstance(module.config, DenseConfig)]
        return widths[-1] if widths else int(self.backbone.config.hidden_size) * len(self.layout.pooling)

    @property
    def normalizes(self) -> bool:
        return bool(self.layout.head) and not isinstance(self.layout.head[-1].config, DenseConfig)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] float32 to [images, dimension] float32."""
        hidden: Tensor = self.backbone(pixel_values=pixel_values.to(self.backbone.dtype)).last_hidden_state
        everything = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        vectors = pooling.pool(hidden, everything, self.layout.pooling)
        for module in self.head:
            vectors = module(vectors)
        return vectors
