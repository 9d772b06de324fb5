"""The trainer: Hugging Face's loop with our data, step, loss, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from rtx.runtime.candidates import check_scored
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, TrainingError, UsageError
from rtx.runtime.metrics import Interval, bootstrap_interval
from rtx.trainer import losses
from rtx.trainer.adapters import add_lora
from rtx.trainer.batches import Batch, Chunk, Collator, NumberedRows, plan_chunks
from rtx.trainer.config import TrainingArguments
from rtx.trainer.data import Row, TrainingData
from rtx.trainer.describe import describe_loss, environment, hash_model
from rtx.trainer.estimate import Estimate, Plan, estimate, sample_batches
from rtx.trainer.evaluation import Evaluator
from rtx.trainer.loop import EpochLoader, loop_arguments, repeatable
from rtx.trainer.loss_table import DEFAULT_LOSS, SUFFICES, spec_of
from rtx.trainer.losses.first_stage import first_stage
from rtx.trainer.model import RetrievalModel
from rtx.trainer.parameters import freeze, parameter_groups
from rtx.trainer.processes import from_main, gather_objects, is_main, world_size
from rtx.trainer.progress import Progress
from rtx.trainer.run import RunFolder, RunRecord
from rtx.trainer.run_checkpoints import Snapshot, read_state, read_weights, reading, rewrite_state, write_checkpoint
from rtx.trainer.sampler import BatchSampler
from rtx.trainer.sharding import (
    copy_to_shard,
    gather_optimizer,
    gather_weights,
    is_wanted,
    load_optimizer,
    load_weights,
    whole,
)
from rtx.trainer.step import align_chunks, backward, batch_run, joined_loss, live_chunks, loss_of
from rtx.trainer.watch import LossWatch, out_of_patience

# Short chunks leave out padding, and on a CPU they cost little else; elsewhere, few large ones keep the device busy.
_CHUNK_TOKENS_CPU, _CHUNK_TOKENS = 1024, 16384


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
        learning_rates: step and learning rate.
        first_stage: of a reranker, the metrics of its candidates' own order; else empty.
        first_stage_interval: as `interval`, of the change from the candidates' order to the reranker's.
    """

    steps: int
    best_step: int
    before: dict[str, float]
    after: dict[str, float]
    evaluations: list[tuple[int, dict[str, float]]]
    interval: Interval | None
    losses: list[tuple[int, float]]
    learning_rates: list[tuple[int, float]]
    first_stage: dict[str, float] = dataclasses.field(default_factory=dict)
    first_stage_interval: Interval | None = None


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """Finetunes a model in place. Everything that is random follows from the seed.

    Args:
        model: what to train.
        arguments: how.
        train_dataset: examples, or rows with their columns (a list of dicts, a `datasets.Dataset`).
        loss: from rtx.trainer.losses, with options bound by functools.partial, or any function of that form; None for
            InfoNCE, or BCE for a reranker.
        evaluator: measures the model before, during and after; its metric picks the weights that are kept.
        guide: a second embedder whose vectors of the same texts the loss is given (for `gist`).
        reads: hashes of what else the run depends on, such as the guide, by name: a resumed run needs the same.
        progress: where to report; None for standard error.

    Raises:
        DataError: rows that cannot be used.
        UsageError: parts that do not fit together.
    """

    # Our losses are means over a batch, so the loop divides by the number of accumulated batches.
    loss_is_scaled_for_ga = False
    control: Any
    optimizer: Any

    def __init__(
        self,
        model: RetrievalModel,
        arguments: TrainingArguments,
        *,
        train_dataset: TrainingData | Iterable[Row],
        loss: Callable[..., Tensor] | None = None,
        evaluator: Evaluator | None = None,
        guide: Embedder | None = None,
        reads: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.arguments = arguments
        self.run = RunFolder(arguments.output)
        self.loss = loss or getattr(losses, DEFAULT_LOSS[model.task])
        spec = spec_of(self.loss, model.task)
        # What a model adds in use is added in training.
        weight = model.contract.first_stage_weight
        if weight:
            self.loss = first_stage(self.loss, weight)
            if isinstance(train_dataset, TrainingData) and not train_dataset.with_first_stage:
                raise UsageError(
                    f"first_stage: the model adds {weight:g} times the first stage's scores; the data was read without"
                )
            if evaluator is not None and evaluator.candidates is not None:
                check_scored(evaluator.candidates, evaluator.evalset.name)
        if spec is not None and spec.guided and guide is None:
            raise UsageError(f"loss {describe_loss(self.loss)}: needs a guide, a second embedder")
        needs = spec.needs if spec is not None else "positives" if model.task == "embed" else "labels"
        if not isinstance(train_dataset, TrainingData):
            train_dataset = TrainingData.from_rows(
                train_dataset, needs=needs, with_first_stage=weight > 0, contract=model.contract
            )
        elif spec is not None and train_dataset.needs not in SUFFICES[needs]:
            raise UsageError(
                f"loss {describe_loss(self.loss)}: needs rows with {needs}; the data was read for {train_dataset.needs}"
            )
        _prepare(model, arguments)
        self.guide = guide
        self._reads = dict(reads or {})
        self.evaluator = evaluator
        self.progress = progress or Progress()
        self._watch = LossWatch()
        # The rows since the last step of the optimizer: what a loss that is not finite came from.
        self._rows: list[int] = []
        super().__init__(
            model=model,
            args=loop_arguments(arguments, self.run.path, None if evaluator is None else evaluator.metric),
            train_dataset=cast(Dataset[Any], train_dataset),
            # Only asked whether it is there: `evaluate` below does the work.
            eval_dataset=evaluator,
            callbacks=[self.progress],
        )
        self.remove_callback(PrinterCallback)
        self._whole = model
        self._sharded = self._prepare_to_shard()
        if not is_main():
            self.progress.silence()
        self.sampler = BatchSampler(
            train_dataset,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            no_duplicates=spec.in_batch if spec is not None else model.task == "embed",
            mixing=arguments.mixing,
            process=self.args.process_index,
            processes=world_size(),
        )
        on_cpu = self.args.device.type == "cpu"
        self._chunk_tokens = arguments.chunk_tokens or (_CHUNK_TOKENS_CPU if on_cpu else _CHUNK_TOKENS)
        self.data_collator = Collator(model.preprocessor, task=model.task, where=train_dataset.where)

    def _prepare_to_shard(self) -> bool:
        """Whether the launcher asks for it; then a copy of the model is what trains.

        Raises:
            UsageError: it asks, and accelerate does not do it here, or the model takes images: a process whose chunk
                has none would not gather the layers that another waits for.
        """
        wanted = self.is_fsdp_enabled or is_wanted(os.environ)
        if wanted and self._whole.contract.takes_images:
            raise UsageError("FSDP: models that take images are not sharded; start with torchrun, without FSDP")
        if not self.is_fsdp_enabled:
            if wanted:
                raise UsageError("FSDP: accelerate has it for GPUs only, and there is none; start with torchrun")
            return False
        self.model = self.model_wrapped = copy_to_shard(self._whole)
        # Gradients that wait for the last batch of a step would wait unsharded.
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        return True

    @property
    def data(self) -> TrainingData:
        """What it trains on."""
        return cast(TrainingData, self.train_dataset)

    def estimate(self) -> Estimate:
        """What the run will need, measured on some of its batches; nothing is trained or written.

        Raises:
            UsageError: the run is to be sharded.
        """
        if self._sharded:
            raise UsageError(
                "FSDP: cannot be estimated; estimate for one process: weights, gradients and AdamW's moments are then "
                "divided by the number of processes"
            )
        arguments = self.arguments
        accumulated = arguments.gradient_accumulation_steps
        steps = arguments.max_steps or math.ceil(arguments.epochs * math.ceil(len(self.sampler) / accumulated))
        plan = Plan(
            steps=steps,
            batch_size=arguments.batch_size,
            chunk_tokens=self._chunk_tokens,
            activation_tokens=arguments.activation_tokens,
            accumulated=accumulated,
            processes=world_size(),
            bf16=arguments.bf16,
            gradient_checkpointing=arguments.gradient_checkpointing,
            guided=self.guide is not None,
        )
        with repeatable(self.args.device, arguments.threads):
            return estimate(self.model, sample_batches(self.get_train_dataloader()), self.loss, plan)

    def train(self, *, resume: bool = False) -> Outcome:
        """Train to the end. The model then has the best weights that were evaluated; without evaluator, the last.

        Args:
            resume: continue from the newest checkpoint of the same run; from the beginning if there is none.

        Raises:
            UsageError: a run has begun in the output folder and `resume` is false, or it is another run.
            TrainingError: the loss or the gradient is not finite, nothing was updated by it; or the loss diverges.
            DataError: a text gives no token.
        """
        begun = from_main(self.run.read() if is_main() else None)
        if begun is not None and not resume:
            raise UsageError(f"{self.run.output}: holds a run already; resume it, or train into another folder")
        with self.progress, repeatable(self.args.device, self.arguments.threads):
            self._known = self._record()
            self._begins = begun is None
            if begun is not None:
                self.run.check_same(self._known)
                if is_main():
                    self.run.clean()
                before = begun.before[self.evaluator.metric] if self.evaluator is not None else None
                self.progress.resumed(self.run.newest(), begun.environment, self._known.environment, before)
                self._known = dataclasses.replace(self._known, before=begun.before)
            self._loop(from_main(self.run.newest()))
            return self._finish()

    def _loop(self, newest: Path | None) -> None:
        if newest is not None:
            state = read_state(newest)
            if state.global_step >= state.max_steps or self._out_of_patience(state):
                # Killed after the last step: the loop of transformers would take one more.
                self._prepare_to_measure()
                self._load_from_checkpoint(str(newest))
                self.state = state
                return
            self._watch.resume([entry["loss"] for entry in state.log_history if "loss" in entry])
        transformers.set_seed(self.arguments.seed + self.args.process_index)
        try:
            super().train(resume_from_checkpoint=str(newest) if newest is not None else None)
        except DataError as wrong:
            raise _out_of_a_worker(wrong) from None

    def _prepare_for_training(self, *arguments: Any) -> Any:
        found = super()._prepare_for_training(*arguments)
        self._begin()
        return found

    def _prepare_to_measure(self) -> None:
        """Put the model where it trains, for a run that will not."""
        if self._sharded:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
        self._begin()

    def _begin(self) -> None:
        """A new run is there once its model is measured: sharded, if it is to be, since it may fit nowhere else."""
        if self._begins:
            self._known = dataclasses.replace(self._known, before=self._measure(0))
            self._begins = False
            if is_main():
                self.run.write(self._known)

    def _finish(self) -> Outcome:
        """The best weights into the model, and what came of the run."""
        if self._watch.always_zero:
            self.progress.say(
                "warning: the loss was 0 in every batch, so nothing was learned; in-batch losses need batches of "
                "several rows or negatives, the others labels that differ"
            )
        best = last = self.state.global_step
        interval = first_stage_interval = None
        first_stage: dict[str, float] = {}
        if self.evaluator is not None:
            if last not in dict(_logged(self.state, "eval_")):
                self._determine_best_metric(self.evaluate(), None)
            best = self.state.best_global_step
        self._make_whole(best)
        if self.evaluator is not None and is_main():
            interval = bootstrap_interval(self.run.read_ndcg(best) - self.run.read_ndcg(0))
            if (found := self.evaluator.first_stage()) is not None:
                first_stage = found.metrics
                first_stage_interval = bootstrap_interval(self.run.read_ndcg(best) - found.ndcg)
        evaluations = _logged(self.state, "eval_")
        return Outcome(
            steps=last,
            best_step=best,
            before=self._known.before,
            after=dict(evaluations).get(best, {}),
            evaluations=evaluations,
            interval=interval,
            losses=self._reported("loss"),
            learning_rates=self._reported("learning_rate"),
            first_stage=first_stage,
            first_stage_interval=first_stage_interval,
        )

    def _make_whole(self, best: int) -> None:
        """The weights of a step, the last one or one with a checkpoint, into the model that was given."""
        if best != self.state.global_step:
            read_weights(self.run.checkpoint(best), self._whole)
        elif self._sharded:
            load_weights(self._whole, gather_weights(self.model))
        self.model = self.model_wrapped = self._whole

    def _reported(self, name: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[name]) for entry in self.state.log_history if name in entry]

    def _measure(self, step: int) -> dict[str, float]:
        """The main process measures; the others wait for the numbers, or help to run a sharded model."""
        if self.evaluator is None:
            return {}
        metrics: dict[str, float] = {}
        if is_main() or self._sharded:
            with self.progress.evaluating() as report:
                evaluation = self.evaluator(self.model, progress=report)
            metrics = evaluation.metrics
            if is_main():
                self.progress.measured(step, self.evaluator.metric, metrics)
                self.run.write_ndcg(step, evaluation.ndcg)
        return cast(dict[str, float], from_main(metrics))

    def _out_of_patience(self, state: TrainerState) -> bool:
        if self.evaluator is None:
            return False
        values = [metrics[self.evaluator.metric] for _, metrics in _logged(state, "eval_")]
        return out_of_patience(values, self.arguments.patience)

    def _record(self) -> RunRecord:
        data = self.data
        inputs = {"model": hash_model(self._whole)}
        if self._sharded and len(set(gather_objects(inputs["model"]))) > 1:
            raise UsageError("FSDP: the processes hold different models; seed torch before a new head is made")
        inputs |= {f"training data {number}": source.sha256 for number, source in enumerate(data.sources, start=1)}
        inputs |= self._reads
        if self.evaluator is not None:
            inputs["evaluation set"] = self.evaluator.sha256
        metric = self.evaluator.metric if self.evaluator is not None else None
        return RunRecord(
            # Each process draws its own dropout, so their number is part of the recipe.
            recipe={
                **self.arguments.recipe(),
                "loss": describe_loss(self.loss),
                "metric": metric,
                "processes": world_size(),
            },
            inputs=inputs,
            environment=environment(self.args.device),
            before={},
        )

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: ARG002 - the signature of transformers
        num_items_in_batch: object = None,  # noqa: ARG002
    ) -> Tensor:
        """The loss of a batch, with the graph of all of it."""
        chunks = plan_chunks(inputs, chunk_tokens=self._chunk_tokens)
        if self._sharded:
            chunks, _ = align_chunks(chunks, live_chunks(chunks, None))
        loss: Tensor = loss_of(self._runner(model, inputs), chunks, self._joined_loss(inputs), context=self._precision)
        return loss

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: object = None) -> Tensor:  # noqa: ARG002
        """Add the gradient of a batch, and give its share of the step's loss."""
        model.train()
        self._rows += [row for row, _ in inputs.rows]
        accumulated = self.current_gradient_accumulation_steps
        value = backward(
            self._runner(model, inputs),
            plan_chunks(inputs, chunk_tokens=self._chunk_tokens),
            self._joined_loss(inputs),
            activation_tokens=self.arguments.activation_tokens,
            in_step=self._sharded,
            propagate=lambda scalar: self.accelerator.backward(scalar / accumulated),
            context=self._precision,
            # Gradients of a sharded model are added up in shares, or they would need the memory of all of it.
            unsynchronised=contextlib.nullcontext if self._sharded else lambda: self.accelerator.no_sync(model),
            check=lambda loss: self._check_finite("loss", loss),
        )
        if (problem := self._watch.add(value.item())) is not None:
            self._stop(problem)
        share: Tensor = value / accumulated
        return share

    def _runner(self, model: Any, batch: Batch) -> Callable[[Chunk], Tensor]:
        return batch_run(model, batch, self.model.preprocessor.collate, self.args.device)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.arguments.bf16)

    def _joined_loss(self, batch: Batch) -> Callable[..., Tensor]:
        targets = batch.targets
        if self.guide is not None:
            examples = [example for _, example in batch.rows]
            queries = self.guide.embed([example.query for example in examples], prompt="query")
            texts = [text for example in examples for text in example.documents]
            documents = self.guide.embed(texts, prompt="document")
            targets = targets._replace(guide=(torch.from_numpy(queries), torch.from_numpy(documents)))
        return joined_loss(self.loss, targets.to(self.args.device))

    def _get_num_items_in_batch(self, *_: Any) -> None:
        """A mean over rows is not scaled by a number of tokens."""

    def floating_point_ops(self, inputs: Batch) -> int:  # noqa: ARG002 - the signature of transformers
        """Not counted."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm)))
        # A finite loss can have a gradient that is not; after the step, all weights would be NaN.
        self._check_finite("norm of the gradient", norm)
        self._rows = []
        return norm

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            self._stop(f"the {what} is {value.item()}")

    def _stop(self, problem: str) -> NoReturn:
        data = self.data
        rows = [row for rows in gather_objects(self._rows) for row in rows]
        step = self.state.global_step + 1
        listed = self.run.path / f"stopped-{step}.json"
        if is_main():
            self.run.write_stopped(step, problem, [data.where(row) for row in rows])
        newest = self.run.newest()
        raise TrainingError(
            f"step {step}: {problem}; the batch: {', '.join(map(data.where, rows[:3]))} "
            f"and so on, {len(rows)} rows, all in {listed}; last good checkpoint: {newest or 'none was written yet'}. "
            "A lower learning rate, a longer warm-up or gradient clipping may help"
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not through accelerate: the sampler has dealt the rows out to the processes, and a chunk moves by itself.
        return EpochLoader(
            NumberedRows(self.data),
            self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ARG002 - the signature of transformers
        if self.optimizer is None:
            groups = parameter_groups(
                self.model,
                learning_rate=self.arguments.learning_rate,
                weight_decay=self.arguments.weight_decay,
                rates=self.arguments.rates,
                layer_decay=self.arguments.layer_decay,
            )
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def _check_output(self) -> None:
        """A step too long spoils weights that no loss has seen yet: they are neither measured nor saved."""
        self.model.eval()
        batch = Collator(self.model.preprocessor, task=self.model.task)([NumberedRows(self.data)[0]])
        run = self._runner(self.model, batch)
        with torch.no_grad():
            outputs = [run(chunk) for chunk in plan_chunks(batch, chunk_tokens=self._chunk_tokens)]
        if not all(torch.isfinite(output).all() for output in outputs):
            raise TrainingError(
                f"step {self.state.global_step}: the model's outputs are not finite after it; "
                f"last good checkpoint: {self.run.newest() or 'none was written yet'}. "
                "A lower learning rate, a longer warm-up or gradient clipping may help"
            )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self._check_output()
        metrics = {f"eval_{name}": value for name, value in self._measure(self.state.global_step).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._out_of_patience(self.state):
            self.progress.say(f"stopped: {self.arguments.patience} evaluations without a better one")
            self.control.should_training_stop = True
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
        """The main process writes, also what only the others know: the states of their random generators."""
        self._check_output()
        target = self.run.checkpoint(self.state.global_step)
        if from_main(target.exists()):
            # Written at this step already, before the evaluation at the end of the epoch: only what is known changed.
            if is_main():
                rewrite_state(target, self.state)
        else:
            snapshot = self._snapshot()
            if is_main():
                write_checkpoint(target, self._whole, snapshot)
        if is_main():
            self.run.keep(self.arguments.keep_checkpoints, self.state.best_global_step)
        from_main(None)

    def _snapshot(self) -> Snapshot:
        """All that changes; of a sharded model, only the main process is given it."""
        with tempfile.TemporaryDirectory() as own:
            self._save_rng_state(own)
            states = gather_objects({file.name: file.read_bytes() for file in Path(own).iterdir()})
        return Snapshot(
            weights=gather_weights(self.model, keep=is_main()),
            optimizer=gather_optimizer(self.optimizer, keep=is_main()),
            schedule=self.lr_scheduler.state_dict(),
            random_states={name: content for state in states for name, content in state.items()},
            state=self.state,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        read_weights(Path(resume_from_checkpoint), self._whole)
        if self._sharded:
            load_weights(self.model, self._whole.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(Path(checkpoint)):
            found = [
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            ]
            load_optimizer(self.optimizer, found[0])
            self.lr_scheduler.load_state_dict(found[1])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint)):
                if not any(Path(checkpoint).glob("rng_state*.pth")):
                    raise FileNotFoundError("rng_state.pth is missing")
                super()._load_rng_state(checkpoint)


def _logged(state: TrainerState, prefix: str) -> list[tuple[int, dict[str, float]]]:
    """Step and values of each entry of the log with such names; a checkpoint keeps them over a resume."""
    found = [
        (entry["step"], {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)})
        for entry in state.log_history
    ]
    return [(step, values) for step, values in found if values]


def _prepare(model: RetrievalModel, arguments: TrainingArguments) -> None:
    """What of a model is trained, and with which dropout. In place."""
    if arguments.dropout is not None:
        set_dropout(model, arguments.dropout)
    if arguments.lora_rank is not None:
        # The adapters start at random.
        torch.manual_seed(arguments.seed)
        add_lora(
            model,
            rank=arguments.lora_rank,
            alpha=arguments.lora_alpha or arguments.lora_rank,
            dropout=arguments.lora_dropout,
            targets=arguments.lora_targets or None,
        )
    if arguments.freeze:
        freeze(model, arguments.freeze)
    if arguments.gradient_checkpointing:
        # The loop does it too, but only after the first evaluation: a model that cannot do it says so now.
        model.activation_checkpointing_enable()


def set_dropout(model: nn.Module, probability: float) -> None:
    """Change the dropout of a loaded model; what is saved of its configuration stays as it was."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        # Some attention layers keep the number alone and hand it to a fused kernel.
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, probability)


def _out_of_a_worker(error: DataError) -> DataError:
    """The error itself: what a worker process raises comes with its whole traceback as the message."""
    marker = f"{DataError.__module__}.{DataError.__qualname__}: "
    return DataError(str(error).rpartition(marker)[2].strip()) if marker in str(error) else error
