"""PyTorch as an engine: the reference that every exported graph is measured against."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from rtx.runtime.errors import EngineError
from rtx.runtime.text import Batch
from rtx.trainer.sharding import is_sharded

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel


class TorchEngine:
    """Runs a RetrievalModel as its exported graph will run: with the Matryoshka cut, or with the activation.

    The model may be in training: it is switched to evaluation mode for the run, and back.

    Args:
        model: where it lies is where it runs.
    """

    name = "torch"

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
        tensors = {name: torch.from_numpy(array).to(model.device) for name, array in batch.items()}
        # What a sharded model gathers it keeps for training, where tensors of the inference mode must not be.
        ungraded = torch.no_grad() if is_sharded(model) else torch.inference_mode()
        with self._lock, ungraded:
            was_training = model.training
            model.eval()
            try:
                output = model(tensors)
            except (RuntimeError, IndexError) as broken:
                raise EngineError(f"torch: a batch of shape {batch['input_ids'].shape} failed: {broken}") from broken
            finally:
                model.train(was_training)
            finished = model.finish(output) if model.task == "embed" else model.activate(output)
            return np.asarray(finished.cpu().numpy(), dtype=np.float32)

    def close(self) -> None:
        """Nothing to give back: the model belongs to the caller."""
