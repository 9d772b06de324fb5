"""What the ops ask of the tensors that they are given, and the GPU on which a kernel is started."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def expect(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device, why: str = ""
) -> None:
    """
    Raises:
        ValueError: a tensor has another shape, type or device, or is not contiguous; `why` says where that is from.
    """
    fits = tuple(tensor.shape) == tuple(shape) and tensor.dtype in dtypes and tensor.device == device
    if not fits or not tensor.is_contiguous():
        wanted = f"{list(shape)} {names(dtypes)}, contiguous, on {device}{why}"
        raise ValueError(f"{name}: expected {wanted}, got {told(tensor)}")


def expect_offsets(name: str, offsets: Tensor, device: torch.device) -> None:
    """
    Raises:
        ValueError: where sequences begin and end is not [name + 1] int64, with at least one number.
    """
    fits = offsets.dim() == 1 and len(offsets) > 0 and offsets.dtype == torch.int64 and offsets.is_contiguous()
    if not fits or offsets.device != device:
        raise ValueError(f"offsets: expected [{name} + 1] int64, contiguous, on {device}, got {told(offsets)}")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Types as they are called in errors: "float16 or float32"."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def told(tensor: Tensor) -> str:
    """A tensor as it is called in errors: "[2, 3] float16 on cuda:0, not contiguous"."""
    contiguous = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{list(tensor.shape)} {names([tensor.dtype])} on {tensor.device}{contiguous}"


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels start on the tensor's GPU; without effect for one in the interpreter."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)
