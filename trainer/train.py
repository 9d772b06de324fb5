"""The trainer: Hugging Face's loop with our data, loss, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from rtx.runtime.atomic import atomic_file
from rtx.runtime.contract import Task
from rtx.runtime.errors import TrainingError, UsageError
from rtx.runtime.folder import replace_folder
from rtx.runtime.metrics import Interval, bootstrap_interval
from rtx.trainer.batches import BatchSampler, Collator, EmbedBatch, RerankBatch, Side
from rtx.trainer.config import Schedule, TrainingArguments
from rtx.trainer.data import Row, TrainingData
from rtx.trainer.evaluation import Evaluator
from rtx.trainer.losses import Loss, bce, info_nce
from rtx.trainer.model import RetrievalModel
from rtx.trainer.progress import Progress
from rtx.trainer.run import RunFolder, RunRecord

_DEFAULT_LOSS: dict[Task, Loss] = {"embed": info_nce, "rerank": bce}
# Short chunks leave out padding, and on a CPU they cost little else; elsewhere, few large ones keep the device busy.
_CHUNK_TOKENS_CPU, _CHUNK_TOKENS = 1024, 16384
_SCHEDULES: dict[Schedule, str] = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        steps: optimizer steps in all.
        best_step: the step that the model's weights are from: the best evaluated one, or the last without an evaluator.
        before: metrics of the model before training; empty without an evaluator, like the next two.
        after: metrics of the weights that it has now.
        evaluations: step and metrics of each evaluation.
        interval: 95 % bootstrap interval, over the queries, of the change in NDCG from `before` to `after`.
        losses: step and mean loss since the last report.
    """

    steps: int
    best_step: int
    before: dict[str, float]
    after: dict[str, float]
    evaluations: list[tuple[int, dict[str, float]]]
    interval: Interval | None
    losses: list[tuple[int, float]]


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """Finetunes a model in place. Everything that is random follows from the seed.

    Args:
        model: what to train.
        arguments: how.
        train_dataset: examples, or rows with their columns (a list of dicts, a `datasets.Dataset`).
        loss: (queries, documents) or (logits, labels) -> scalar; None for InfoNCE, or BCE for a reranker.
        evaluator: measures the model before, during and after; its metric picks the weights that are kept.
        progress: where to report; None for standard error.

    Raises:
        DataError: rows that cannot be used.
        UsageError: the data is for another task than the model.
    """

    # Our losses are means over a batch, so the loop divides by the number of accumulated batches.
    loss_is_scaled_for_ga = False
    control: Any

    def __init__(
        self,
        model: RetrievalModel,
        arguments: TrainingArguments,
        *,
        train_dataset: TrainingData | Iterable[Row],
        loss: Loss | None = None,
        evaluator: Evaluator | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(train_dataset, TrainingData):
            train_dataset = TrainingData.from_rows(train_dataset, task=model.task)
        if train_dataset.task != model.task:
            raise UsageError(f"the data is for the task '{train_dataset.task}', the model for '{model.task}'")
        self.arguments = arguments
        self.run = RunFolder(arguments.output)
        self.loss = loss or _DEFAULT_LOSS[model.task]
        self.evaluator = evaluator
        self.progress = progress or Progress()
        self.sampler = BatchSampler(train_dataset, batch_size=arguments.batch_size, seed=arguments.seed)
        super().__init__(
            model=model,
            args=_loop_arguments(arguments, self.run.path, evaluator),
            train_dataset=cast(Dataset[Any], train_dataset),
            # Only asked whether it is there: `evaluate` below does the work.
            eval_dataset=evaluator,
            callbacks=[self.progress],
        )
        self.remove_callback(PrinterCallback)
        on_cpu = self.args.device.type == "cpu"
        chunk_tokens = arguments.chunk_tokens or (_CHUNK_TOKENS_CPU if on_cpu else _CHUNK_TOKENS)
        self.data_collator = Collator(model.preprocessor, chunk_tokens=chunk_tokens)
        if arguments.dropout is not None:
            set_dropout(model, arguments.dropout)

    def train(self, *, resume: bool = False) -> Outcome:
        """Train to the end. The model then has the best weights that were evaluated; without evaluator, the last.

        Args:
            resume: continue from the newest checkpoint of the same run; from the beginning if there is none.

        Raises:
            UsageError: a run has begun in the output folder and `resume` is false, or it is another run.
            TrainingError: the loss or the gradient is not finite; nothing was updated by it.
            DataError: a text gives no token.
        """
        begun = self.run.read()
        if begun is not None and not resume:
            raise UsageError(f"{self.run.output}: holds a run already; resume it, or train into another folder")
        with self.progress, _repeatable(self.args.device, self.arguments.threads):
            record = self._record()
            if begun is None:
                record = dataclasses.replace(record, before=self._measure(0))
                self.run.write(record)
            else:
                self.run.check_same(record)
                self.run.clean()
                before = begun.before[self.evaluator.metric] if self.evaluator is not None else None
                self.progress.resumed(self.run.newest(), begun.environment, record.environment, before)
                record = dataclasses.replace(record, before=begun.before)
            self._loop(self.run.newest())
            return self._finish(record)

    def _loop(self, newest: Path | None) -> None:
        if newest is not None:
            state = TrainerState.load_from_json(str(newest / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                # Killed after the last step: the loop of transformers would take one more.
                self._load_from_checkpoint(str(newest))
                self.state = state
                return
        transformers.set_seed(self.arguments.seed)
        super().train(resume_from_checkpoint=str(newest) if newest is not None else None)

    def _finish(self, record: RunRecord) -> Outcome:
        """The best weights into the model, and what came of the run."""
        best = last = self.state.global_step
        interval = None
        if self.evaluator is not None:
            if last not in dict(self._logged("eval_")):
                self._determine_best_metric(self.evaluate(), None)
            best = self.state.best_global_step
            if best != last:
                self._load_from_checkpoint(str(self.run.checkpoint(best)))
            interval = bootstrap_interval(self.run.read_ndcg(best) - self.run.read_ndcg(0))
        evaluations = self._logged("eval_")
        return Outcome(
            steps=last,
            best_step=best,
            before=record.before,
            after=dict(evaluations).get(best, {}),
            evaluations=evaluations,
            interval=interval,
            losses=[(entry["step"], entry["loss"]) for entry in self.state.log_history if "loss" in entry],
        )

    def _measure(self, step: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        with self.progress.evaluating() as report:
            evaluation = self.evaluator(self.model, progress=report)
        self.progress.measured(step, self.evaluator.metric, evaluation.metrics)
        self.run.write_ndcg(step, evaluation.ndcg)
        return evaluation.metrics

    def _logged(self, prefix: str) -> list[tuple[int, dict[str, float]]]:
        """Step and values of each entry of the log with such names; a checkpoint keeps them over a resume."""
        found = [
            (entry["step"], {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)})
            for entry in self.state.log_history
        ]
        return [(step, values) for step, values in found if values]

    def _record(self) -> RunRecord:
        data = cast(TrainingData, self.train_dataset)
        inputs = {"model": hash_model(self.model)}
        inputs |= {f"training data {number}": source.sha256 for number, source in enumerate(data.sources, start=1)}
        if self.evaluator is not None:
            inputs["evaluation set"] = self.evaluator.sha256
        metric = self.evaluator.metric if self.evaluator is not None else None
        return RunRecord(
            recipe={**self.arguments.recipe(), "loss": describe_loss(self.loss), "metric": metric},
            inputs=inputs,
            environment=environment(self.args.device),
            before={},
        )

    def compute_loss(
        self,
        model: Any,
        inputs: EmbedBatch | RerankBatch,
        return_outputs: bool = False,  # noqa: ARG002 - the signature of transformers
        num_items_in_batch: object = None,  # noqa: ARG002
    ) -> Tensor:
        with torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.arguments.bf16):
            if self.model.task == "rerank":
                pairs = cast(RerankBatch, inputs)
                outputs, targets = _run(model, pairs["pairs"]), pairs["labels"]
            else:
                texts = cast(EmbedBatch, inputs)
                outputs, targets = _run(model, texts["queries"]), _run(model, texts["documents"])
        loss = self.loss(outputs, targets)
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A finite loss can have a gradient that is not; after the step, all weights would be NaN.
        self._check_finite("norm of the gradient", torch.as_tensor(norm))
        return norm

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            newest = self.run.newest()
            raise TrainingError(
                f"step {self.state.global_step + 1}: the {what} is {value.item()}; "
                f"last good checkpoint: {newest or 'none was written yet'}. "
                "A lower learning rate, a longer warm-up or gradient clipping may help"
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {f"eval_{name}": value for name, value in self._measure(self.state.global_step).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics, trial))
        # What is best has to be on disk, whatever the interval of checkpoints.
        self.control.should_save = self.control.should_save or best
        return best

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        found = super()._init_training_state(max_steps, *args)
        # A checkpoint brings its own intervals; they may have been changed for the rest of the run.
        self.state.compute_steps(self.args, max_steps)
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002 - the signature of transformers
        target = self.run.checkpoint(self.state.global_step)
        if target.exists():
            # Written at this step already, before the evaluation at the end of the epoch: only what is known changed.
            with atomic_file(target / TRAINER_STATE_NAME) as stream:
                stream.write(json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True).encode())
        else:
            with replace_folder(target, marker=TRAINER_STATE_NAME) as folder:
                self.model.write(folder)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_rng_state(str(folder))
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.run.keep(self.arguments.keep_checkpoints, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        saved = RetrievalModel.load(
            resume_from_checkpoint, task=self.model.task, dtype=next(self.model.backbone.parameters()).dtype
        )
        self.model.load_state_dict(saved.state_dict())


def set_dropout(model: nn.Module, probability: float) -> None:
    """Change the dropout of a loaded model; what is saved of its configuration stays as it was."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        # Some attention layers keep the number alone and hand it to a fused kernel.
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, probability)


def describe_loss(loss: Loss) -> str:
    """The name of a loss with the options that were bound to it: "info_nce(scale=20.0)"."""
    if isinstance(loss, functools.partial):
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(loss.keywords.items()))
        return f"{describe_loss(loss.func)}({options})"
    return str(getattr(loss, "__name__", type(loss).__name__))


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


def _run(model: Any, side: Side) -> Tensor:
    """[texts, dim] or [pairs], in the order in which they were given."""
    return torch.cat([model(chunk) for chunk in side["chunks"]])[side["places"]]


def _loop_arguments(
    arguments: TrainingArguments, checkpoints: Path, evaluator: Evaluator | None
) -> transformers.TrainingArguments:
    """Our options as those of transformers' loop, with all of its own reporting off."""
    save_steps = arguments.save_steps or arguments.eval_steps
    return transformers.TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=_SCHEDULES[arguments.schedule],
        # Below 1 it is a share of the steps.
        warmup_steps=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        seed=arguments.seed,
        dataloader_num_workers=arguments.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="no" if evaluator is None else "steps" if arguments.eval_steps else "epoch",
        eval_steps=arguments.eval_steps,
        metric_for_best_model=None if evaluator is None else f"eval_{evaluator.metric}",
        greater_is_better=True,
        save_strategy="steps" if save_steps else "epoch",
        **({"save_steps": save_steps} if save_steps else {}),
        logging_steps=arguments.log_steps,
        # Would replace a loss that is not a number by the average so far.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )


@contextlib.contextmanager
def _repeatable(device: torch.device, threads: int | None) -> Iterator[None]:
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
