"""Our options in the terms of transformers' loop."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from rtx.runtime.errors import MissingExtraError
from rtx.trainer.batches import Numbered
from rtx.trainer.config import Schedule, TrainingArguments
from rtx.trainer.processes import join_processes
from rtx.trainer.sampler import BatchSampler

_SCHEDULES: dict[Schedule, str] = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class EpochLoader(DataLoader[Numbered]):
    """Tells the sampler which pass it is."""

    def __init__(self, rows: Dataset[Numbered], sampler: BatchSampler, **options: Any) -> None:
        super().__init__(rows, batch_sampler=sampler, **options)
        self._epochs = sampler

    def set_epoch(self, epoch: int) -> None:
        self._epochs.set_epoch(epoch)


def loop_arguments(
    arguments: TrainingArguments, checkpoints: Path, metric: str | None
) -> transformers.TrainingArguments:
    """Our options as those of transformers' loop, with all of its own reporting off but TensorBoard's.

    Args:
        arguments: ours.
        checkpoints: folder of the run.
        metric: what picks the best weights; None without an evaluator.

    Raises:
        MissingExtraError: TensorBoard is wanted and not installed.
    """
    if arguments.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "writing TensorBoard's event files")
    # Before transformers does, which gives a timeout to GPUs only.
    join_processes()
    save_steps = arguments.save_steps or arguments.eval_steps
    made = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        # Only for its reports: our sampler deals the rows out.
        per_device_train_batch_size=-(-arguments.batch_size // max(1, int(os.environ.get("WORLD_SIZE", "1")))),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        activation_checkpointing=arguments.gradient_checkpointing,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=_SCHEDULES[arguments.schedule],
        # Below 1 it is a share of the steps.
        warmup_steps=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        seed=arguments.seed,
        dataloader_num_workers=arguments.workers,
        eval_strategy="no" if metric is None else "steps" if arguments.eval_steps else "epoch",
        eval_steps=arguments.eval_steps,
        metric_for_best_model=None if metric is None else f"eval_{metric}",
        greater_is_better=True,
        save_strategy="steps" if save_steps else "epoch",
        **({"save_steps": save_steps} if save_steps else {}),
        logging_steps=arguments.log_steps,
        # Would replace a loss that is not a number by the average so far.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if arguments.tensorboard else "none",
        log_level="error",
        # Processes run different numbers of chunks: nothing may be exchanged in a forward pass.
        ddp_broadcast_buffers=False,
        # A checkpoint can have weights that its task does not use, such as BERT's pooler in an embedder.
        ddp_find_unused_parameters=True,
        use_cpu=torch.cuda.device_count() == 0,
    )
    # One process takes one GPU: several at once would each see a part of a chunk, through DataParallel.
    made._n_gpu = min(1, made.n_gpu)
    return made


@contextlib.contextmanager
def repeatable(device: torch.device, threads: int | None) -> Iterator[None]:
    """Sums in a fixed order: for a CPU a fixed number of threads, for a GPU algorithms that have one."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        # cuBLAS reads it when it starts; without it, a matrix product may pick its work space by what is free.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
