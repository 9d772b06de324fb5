"""What a run is made of, as data: its loss in words, its model as a hash, its machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel


def describe_loss(loss: Any) -> str:
    """The name of a loss with the options that were bound to it: "info_nce(scale=20.0)"."""
    if isinstance(loss, functools.partial):
        options = ", ".join(f"{name}={_shown(value)}" for name, value in sorted(loss.keywords.items()))
        return f"{describe_loss(loss.func)}({options})"
    if dataclasses.is_dataclass(loss) and not isinstance(loss, type):
        options = ", ".join(f"{item.name}={_shown(getattr(loss, item.name))}" for item in dataclasses.fields(loss))
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(loss).__name__).lower()
        return f"{name}({options})"
    return str(getattr(loss, "__name__", type(loss).__name__))


def _shown(value: object) -> str:
    return describe_loss(value) if callable(value) else repr(value)


def hash_model(model: RetrievalModel) -> str:
    """SHA-256 of all that a model is: its contract, its tokenizer, and every weight with name, shape and type."""
    digest = hashlib.sha256(json.dumps(model.contract.to_dict(), sort_keys=True).encode())
    digest.update(model.preprocessor.tokenizer_json.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # numpy has no bfloat16: look at the bytes.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on beside its recipe."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
