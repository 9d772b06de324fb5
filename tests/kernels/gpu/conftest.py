"""Kernels of Triton run in its interpreter here: tests/conftest.py says so before triton is imported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rtx.kernels.rounding import ROUNDING, Rounding

pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86-64")


@pytest.fixture
def rounding() -> Callable[[torch.dtype], Rounding]:
    """What rounding to a type costs in the interpreter."""

    def find(kind: torch.dtype) -> Rounding:
        found = ROUNDING[str(kind).removeprefix("torch.")]
        # That of Triton 3.9 truncates float32 to bfloat16, which GPUs round: a whole unit in the last place.
        return found._replace(relative=2 * found.relative) if kind == torch.bfloat16 else found

    return find
