"""The op `pool` (contract: `rtx.kernels.pool`) in PyTorch, and what follows it: Dense and L2 normalisation.

All of it traces with `torch.export` at dynamic shapes: no branch on data, no boolean indexing, no `.item()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtx.kernels.pool import NORM_EPSILON


def pool(
    hidden: Tensor,
    attention_mask: Tensor,
    modes: Sequence[str],
    *,
    pooling_mask: Tensor | None = None,
) -> Tensor:
    """One vector for each row of token vectors.

    Args:
        hidden: [rows, tokens, dim], any floating type.
        attention_mask: [rows, tokens], 1 for a token and 0 for padding.
        modes: from `rtx.kernels.pool.MODES`, concatenated in this order.
        pooling_mask: [rows, tokens], 1 for a token that is pooled; None for all that are attended.

    Returns:
        [rows, dim * len(modes)], at least float32; zeros for a row in which nothing is pooled.
    """
    mask = attention_mask if pooling_mask is None else pooling_mask
    return torch.cat([_pool_one(hidden, mask, attention_mask, mode) for mode in modes], dim=-1)


def _pool_one(hidden: Tensor, mask: Tensor, attention_mask: Tensor, mode: str) -> Tensor:
    pooled = (mask != 0).unsqueeze(-1)
    if mode in ("cls", "lasttoken"):
        columns = mask.shape[1]
        number = torch.arange(1, columns + 1, device=mask.device)
        # The first column is the last one counted from the other end. Not an argmax: ONNX Runtime has none for int64.
        count = number if mode == "lasttoken" else columns + 1 - number
        found = (count * pooled.squeeze(-1)).amax(dim=1, keepdim=True)
        index = found - 1 if mode == "lasttoken" else columns - found
        index = index.clamp(min=0).clamp(max=columns - 1).unsqueeze(-1).expand(-1, 1, hidden.shape[2])
        token = at_least_float32(torch.gather(hidden, 1, index).squeeze(1))
        return torch.where(found > 0, token, 0.0)
    if mode == "max":
        largest = torch.where(pooled, at_least_float32(hidden), -torch.inf).amax(dim=1)
        return torch.where(pooled.any(dim=1), largest, 0.0)
    # A choice, not a product: what an attention leaves at padding may be NaN, and NaN times zero is NaN.
    tokens = torch.where(pooled, at_least_float32(hidden), 0.0)
    weights = pooled.to(tokens.dtype)
    if mode == "weightedmean":
        weights = weights * (attention_mask != 0).long().cumsum(dim=1).unsqueeze(-1).to(tokens.dtype)
        tokens = tokens * weights
    elif mode not in ("mean", "mean_sqrt_len_tokens"):
        raise ValueError(f"pooling mode '{mode}' does not exist")
    divisor = weights.sum(dim=1)
    if mode == "mean_sqrt_len_tokens":
        divisor = divisor.sqrt()
    return tokens.sum(dim=1) / divisor.clamp(min=1.0)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; float64, in which gradients are checked, stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def l2_normalize(vectors: Tensor) -> Tensor:
    """Vectors [..., dim] divided by their L2 norm, at least float32; a zero vector stays zero."""
    return nn.functional.normalize(at_least_float32(vectors), p=2.0, dim=-1, eps=NORM_EPSILON)


class Normalize(nn.Module):
    """`l2_normalize` as a link of the chain that follows pooling."""

    def forward(self, vectors: Tensor) -> Tensor:
        return l2_normalize(vectors)


class Dense(nn.Module):
    """A linear layer with an activation, and the residual that Sentence Transformers has since 5.7.

    activation(linear(x)), and if `use_residual` plus x, or plus residual(x) where the widths differ. The parameters are
    named as in a Sentence Transformers checkpoint.

    Args:
        in_features, out_features: widths.
        bias: whether the linear layer has one; the residual never has.
        activation: applied to the linear layer's result.
        use_residual: add the input to the result.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, activation: nn.Module, use_residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = use_residual
        self.residual = (
            nn.Linear(in_features, out_features, bias=False) if use_residual and in_features != out_features else None
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """[rows, in_features] float32 to [rows, out_features] float32."""
        vectors = vectors.to(self.linear.weight.dtype)
        result: Tensor = self.activation(self.linear(vectors))
        if self.use_residual:
            result = result + (vectors if self.residual is None else self.residual(vectors))
        return at_least_float32(result)
