"""Trained by test_fsdp in two processes that share each model, and again in one that has all of it.

Sharded, this is started as a user of GPUs starts `rtx finetune`, by `accelerate launch`. Only one thing is overruled:
that accelerate offers FSDP to accelerators alone.
"""

import gc
import io
import os
import sys
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from rich.console import Console
from torch.distributed.tensor import DTensor

from rtx.runtime.cli import main as rtx
from rtx.runtime.errors import TrainingError, UsageError
from rtx.trainer import RetrievalModel, Trainer, TrainingArguments, losses
from rtx.trainer.evaluation import Evaluator
from rtx.trainer.processes import is_main, world_size
from rtx.trainer.progress import Progress

WORDS = ["how", "are", "what", "code", "list", "file", "model", "text", "query", "the", "with", "that"]
# The processes have rows of different lengths, so that they would run different numbers of chunks.
ROWS = [
    {
        "query": f"{WORDS[i % 12]} {i}",
        "positive": " ".join([WORDS[(i + 5) % 12], str(i)] * (1 + i % 5)),
        "negatives": [f"{WORDS[(i + 3) % 12]} {i + 1}"] * (i % 3),
    }
    for i in range(22)
]


def worse(queries, documents, targets):
    """What it trains is best at the beginning."""
    return -losses.info_nce(queries, documents, targets)


# What both numbers of processes train, without dropout, which each process draws for itself.
SMALL = {"chunk_tokens": 30, "activation_tokens": 0}
RUNS = {
    "plain": {},
    "chunks": {"chunk_tokens": 30},
    "cached": SMALL,
    "accumulated, half cached": {"gradient_accumulation_steps": 2, "chunk_tokens": 30, "activation_tokens": 60},
    "frozen, recomputed": {"freeze": ["embeddings", "layers:0"], "gradient_checkpointing": True},
    "lora": {"lora_rank": 4, **SMALL},
    "evaluated": {"loss": worse, "save_steps": 2, "epochs": 2, "keep_checkpoints": 99, **SMALL},
}
# As `evaluated`, but for what `rtx finetune` has no other way to be told.
COMMAND = ["--task", "embed", "--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-3", "--threads", "1"]
COMMAND += ["--dropout", "0", "--log-steps", "1"]


class Stop(transformers.TrainerCallback):
    """Ends a run at a step as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):  # noqa: ARG002
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Shares(transformers.TrainerCallback):
    """How much of the model this process holds."""

    def on_step_end(self, args, state, control, model, **_):  # noqa: ARG002
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        held = sum(parameter.to_local().numel() for parameter in parameters)
        # What does not divide by two is on one side.
        assert held < 0.55 * sum(parameter.numel() for parameter in parameters)


def build(checkpoint, output, *, evalset=None, loss=losses.info_nce, model=None, **options):
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "threads": 1, "log_steps": 1, "dropout": 0.0}
    rows = ROWS
    if model is None:
        model = RetrievalModel.load(checkpoint)
    if model.task == "rerank":
        rows, loss = [{**row, "negatives": ["the", row["query"]]} for row in ROWS], losses.cross_entropy
    built = Trainer(
        model,
        TrainingArguments(output=str(output), **{**settings, **options}),
        train_dataset=rows,
        loss=loss,
        evaluator=Evaluator.from_beir(evalset) if evalset else None,
        progress=Progress(Console(file=io.StringIO())),
    )
    if world_size() > 1:
        built.add_callback(Shares())
    return built


def train(checkpoint, output, *, resume=False, **options):
    """The finished model in `output/final`, and what was reported of its course beside it."""
    built = build(checkpoint, output, **options)
    outcome = built.train(resume=resume)
    assert built.model is built._whole
    if is_main():
        built.model.save(output / "final")
        course = [outcome.losses, outcome.before, outcome.evaluations, outcome.after, outcome.best_step]
        (output / "course.txt").write_text(repr(course))


def train_all(checkpoint, language_model, evalset, out):
    for name, options in RUNS.items():
        train(checkpoint, out / name, evalset=evalset if name == "evaluated" else None, **options)
    # accelerate keeps the names of the blocks that it split the first model at.
    AcceleratorState._reset_state()
    train(language_model, out / "language model", **SMALL)
    AcceleratorState._reset_state()


def stop_and_resume(checkpoint, evalset, out):
    """Runs that stop at a step, and those that do not; with dropout."""
    for name, own, points in (("whole", {}, (3, 6)), ("adapters", {"lora_rank": 4}, (3,))):
        options = {"epochs": 2, "save_steps": 2, "dropout": 0.2, "evalset": evalset, **SMALL, **own}
        train(checkpoint, out / f"unbroken {name}", **options)
        # Between two checkpoints, and before the last evaluation.
        for step in points:
            stopped = build(checkpoint, out / f"stopped {name} {step}", **options)
            if step == 6:
                stopped.evaluate = interrupt_at(stopped, step)
            else:
                stopped.add_callback(Stop(step))
            try:
                stopped.train()
            except KeyboardInterrupt:
                train(checkpoint, out / f"stopped {name} {step}", resume=True, **options)


def interrupt_at(built, step):
    evaluate = built.evaluate

    def interrupted(*args, **kwargs):
        if built.state.global_step == step:
            # As if it had been killed after the checkpoint of the last step.
            built._save_checkpoint(built.model, None)
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    return interrupted


def hold_and_replay(checkpoint, out):
    """Dropout is drawn once a chunk, whether its activations are held or computed again."""
    for name, held in (("held", None), ("replayed", 0)):
        train(checkpoint, out / name, dropout=0.3, chunk_tokens=30, activation_tokens=held)


def fail(checkpoint, out):
    """Every process stops with the same words."""

    def flat(queries, documents, targets):  # noqa: ARG001
        return (queries * 0).sum().sqrt()

    said = {}
    for name, options in {"gradient": {"loss": flat}, "heads": {"model": unseeded(checkpoint)}}.items():
        try:
            build(checkpoint, out / name, **options).train()
        except (TrainingError, UsageError) as error:
            said[name] = str(error)
    try:
        build(checkpoint, out / "estimate").estimate()
    except UsageError as error:
        said["estimate"] = str(error)
    (out / f"said-{torch.distributed.get_rank()}.txt").write_text(repr(said))


def unseeded(checkpoint):
    model = RetrievalModel.load(checkpoint)
    with torch.no_grad():
        next(model.parameters()).add_(torch.distributed.get_rank())
    return model


def main(checkpoint, language_model, evalset, out):
    begin = AcceleratorState.__init__

    def on_cpus_too(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = on_cpus_too
    # Each run collects garbage, of which the modules hold none.
    gc.freeze()
    train_all(checkpoint, language_model, evalset, out)
    hold_and_replay(checkpoint, out)
    stop_and_resume(checkpoint, evalset, out)
    fail(checkpoint, out)
    # Without a policy the model is one part, which is gathered as long as it runs.
    AcceleratorState._reset_state()
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"
    inputs = ["--model", checkpoint, "--train", f"{out.parent}/pairs.jsonl", "--eval", evalset]
    rtx(["finetune", *inputs, *COMMAND, "-o", f"{out}/command"])


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
