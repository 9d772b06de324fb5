"""PyTorch as an engine: the reference that every exported graph is measured against."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtx.runtime.errors import EngineError
from rtx.runtime.text import Batch, Encoded
from rtx.trainer.sharding import is_sharded

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch as a model takes it: without the digests of images, which serve caches of other engines."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items() if name != "image_digests"}


class TorchEngine:
    """Runs a RetrievalModel as its exported graph will run: with the Matryoshka cut, or with the activation.

    The model may be in training: it is switched to evaluation mode for the run, and back.

    Args:
        model: where it lies is where it runs.
    """

    name = "torch"
    packed = False

    def __init__(self, model: RetrievalModel) -> None:
        self.model = model
        # Two runs at once would switch the mode under each other.
        self._lock = threading.Lock()

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """[rows, dimension] float32 vectors, or [rows] float32 scores.

        Raises:
            EngineError: the batch could not be run.
        """
        model = self.model
        tensors = to_tensors(batch, model.device)
        # What a sharded model gathers it keeps for training, where tensors of the inference mode must not be.
        ungraded = torch.no_grad() if is_sharded(model) else torch.inference_mode()
        with self._lock, ungraded:
            was_training = model.training
            model.eval()
            try:
                output = model(tensors)
            except (RuntimeError, IndexError) as broken:
                shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
                raise EngineError(f"torch: a batch failed ({shapes}): {broken}") from broken
            finally:
                model.train(was_training)
            finished = model.finish(output) if model.task == "embed" else model.activate(output)
            return np.asarray(finished.cpu().numpy(), dtype=np.float32)

    def max_rows(self, longest: Encoded) -> int | None:  # noqa: ARG002 any number
        return None

    def close(self) -> None:
        """Nothing to give back: the model belongs to the caller."""
