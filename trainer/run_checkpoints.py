"""A checkpoint of a run: the model as a Sentence Transformers folder, and beside it what the loop needs to go on.

Written whole or not at all, and the same whether the run is sharded over processes or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import CheckpointError
from rtx.runtime.folder import replace_folder
from rtx.trainer.adapters import ADAPTER_STATE_NAME, adapter_state, has_adapters, load_adapter_state
from rtx.trainer.model import RetrievalModel

# What the readers of torch, safetensors, JSON and pickle raise for a file that is damaged or another's.
_DAMAGE = (OSError, ValueError, LookupError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What changes from step to step, whole.

    Attributes:
        weights: by the names of the model's `state_dict`.
        optimizer, schedule: as their `state_dict` gives them.
        random_states: content by file name, of the random generators of all processes.
        state: the loop's own, with its log.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    random_states: Mapping[str, bytes]
    state: TrainerState


def write_checkpoint(target: Path, model: RetrievalModel, snapshot: Snapshot) -> None:
    """
    Args:
        target: the folder; it is not there yet.
        model: all of it but the weights is written as it is.
        snapshot: the rest.

    Raises:
        CheckpointError: it cannot be written.
    """
    with _writing(target), replace_folder(target, marker=TRAINER_STATE_NAME) as folder:
        model.write(folder, snapshot.weights)
        if has_adapters(model):
            save_file(adapter_state(model, snapshot.weights), folder / ADAPTER_STATE_NAME)
        torch.save(snapshot.optimizer, folder / OPTIMIZER_NAME)
        torch.save(snapshot.schedule, folder / SCHEDULER_NAME)
        for name, content in snapshot.random_states.items():
            (folder / name).write_bytes(content)
        snapshot.state.save_to_json(str(folder / TRAINER_STATE_NAME))


def rewrite_state(target: Path, state: TrainerState) -> None:
    """Bring what the loop knows up to date in a checkpoint that is there."""
    with atomic_file(target / TRAINER_STATE_NAME) as stream:
        stream.write(json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True).encode())


def read_state(checkpoint: Path) -> TrainerState:
    """
    Raises:
        CheckpointError: it is damaged.
    """
    with reading(checkpoint):
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def read_weights(checkpoint: Path, model: RetrievalModel) -> None:
    """Give a whole model the weights of a checkpoint of its run.

    Raises:
        CheckpointError: it is damaged.
    """
    if has_adapters(model):
        with reading(checkpoint):
            state = load_file(checkpoint / ADAPTER_STATE_NAME)
        load_adapter_state(model, state)
        return
    dtype = next(model.backbone.parameters()).dtype
    model.load_state_dict(RetrievalModel.load(checkpoint, task=model.task, dtype=dtype).state_dict())


@contextlib.contextmanager
def _writing(checkpoint: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: a file of a training checkpoint cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as broken:
        # Where the disk is full, torch has other words for it.
        raise CheckpointError(
            f"{checkpoint}: cannot be written, is the disk full? {str(broken).partition(chr(10))[0]}"
        ) from broken


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: a file of a training checkpoint is damaged or missing.
    """
    try:
        yield
    except _DAMAGE as broken:
        raise CheckpointError(
            f"{checkpoint}: is damaged: {str(broken).partition(chr(10))[0]}; "
            "remove it to go on from the checkpoint before it, or from the beginning"
        ) from broken
