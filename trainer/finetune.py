"""A whole run of `rtx finetune`: read, train, and put the finished model where it belongs."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rtx.runtime.atomic import sync
from rtx.runtime.cli import open_model
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import UsageError
from rtx.runtime.folder import replace_folder
from rtx.runtime.hashing import sha256_of
from rtx.runtime.text import Encoded
from rtx.trainer import losses
from rtx.trainer.adapters import has_adapters, save_adapter
from rtx.trainer.card import Measured, render_card
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.curve import CURVE_NAME, draw_curve
from rtx.trainer.data import TrainingData
from rtx.trainer.estimate import Estimate
from rtx.trainer.evaluation import Evaluator
from rtx.trainer.loss_table import DEFAULT_LOSS
from rtx.trainer.model import RetrievalModel
from rtx.trainer.processes import from_main, is_main, join_processes
from rtx.trainer.progress import Progress
from rtx.trainer.run import RunFolder
from rtx.trainer.train import Outcome, Trainer

# Without config.json no loader takes the folder for a model, so it is the last file that goes in and the first that
# goes out. A model of two towers has none in its root, and is none without its list of modules.
_LAST_FILES = ("modules.json", "config.json")
# To count what a pass leaves out, it has to be planned whole.
_COUNTED_ROWS = 100_000


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "rtx finetune",
    progress: Progress | None = None,
) -> Outcome:
    """Train, and write the model with its card to `config.output`.

    Args:
        config: the run.
        resume: continue the run that began in the output folder; begin it if there is none.
        overwrite: remove what an earlier run left there.
        command: for the card, as it was typed.
        progress: where to report; None for standard error.

    Raises:
        UsageError: options that do not fit, or an output folder that holds something else.
        DataError: training data or an evaluation set that cannot be used.
        CheckpointError: the model cannot be read.
        TrainingError: the run cannot go on.
    """
    progress = progress or Progress()
    run = RunFolder(config.output)
    join_processes()
    if is_main():
        check_output(config, resume=resume, overwrite=overwrite)
    trainer = build_trainer(config, progress)
    # Only now, with everything read, does anything go.
    if is_main() and (overwrite or (not resume and run.read() is not None)):
        _remove(run)
    from_main(None)
    progress.say(_summary(trainer))
    outcome = trainer.train(resume=resume)
    if not is_main():
        return outcome
    record = run.read()
    assert record is not None
    evaluator, measured = trainer.evaluator, None
    if evaluator is not None:
        evalset = evaluator.evalset
        measured = Measured(
            evalset.name, len(evalset.queries), len(evalset.corpus), candidates=evaluator.candidates is not None
        )
    card = render_card(
        config,
        outcome,
        # A name on the hub is no path here.
        base=Path(config.model).resolve().name if Path(config.model).exists() else config.model,
        contract=trainer.model.contract,
        record=record,
        data=trainer.data,
        measured=measured,
        command=command,
    )
    _publish(trainer.model, card, _curve(config, outcome), run, base=config.model)
    if outcome.after and outcome.after[config.metric] < outcome.before[config.metric]:
        progress.say(
            f"warning: {config.metric} is lower than before finetuning "
            f"({outcome.before[config.metric]:.4f} → {outcome.after[config.metric]:.4f})"
        )
    return outcome


def dry_run(config: FinetuneConfig) -> Estimate:
    """What a run will need, measured on some of its batches. Nothing is trained, and nothing stays on disk.

    Raises:
        UsageError, DataError, CheckpointError: as `finetune`.
    """
    with tempfile.TemporaryDirectory() as nothing:
        return build_trainer(dataclasses.replace(config, output=nothing), Progress()).estimate()


def build_trainer(config: FinetuneConfig, progress: Progress) -> Trainer:
    """Read all that a run reads.

    Raises:
        UsageError, DataError, CheckpointError: as `finetune`.
    """
    evaluator = None
    if config.eval is not None:
        evaluator = Evaluator.from_beir(config.eval, metric=config.metric, candidates=config.candidates)
    # A reranker may start with a new head.
    torch.manual_seed(config.seed)
    model = RetrievalModel.load(
        config.model, task=config.task, max_tokens=config.max_tokens, processor_kwargs=config.processor_kwargs
    )
    if config.first_stage_weight is not None:
        # A sum of a logit and a score is no probability.
        activation = "identity" if config.first_stage_weight else model.contract.activation
        model.configure(first_stage_weight=config.first_stage_weight, activation=activation)
    given = {"query": config.query_prompt, "document": config.document_prompt}
    if prompts := {name: text for name, text in given.items() if text is not None}:
        # A pair has one prompt, the default one.
        default = {"default_prompt": "query"} if config.task == "rerank" else {}
        model.configure(prompts={**model.contract.prompts, **prompts}, **default)
    _check_prompts(model)
    if config.matryoshka and max(config.matryoshka) > model.full_dimension:
        raise UsageError(
            f"matryoshka: expected dimensions of at most {model.full_dimension}, the model's; "
            f"got {max(config.matryoshka)}"
        )
    with progress.reading() as report:
        data = TrainingData.read(
            config.train,
            needs=config.loss_spec.needs,
            with_first_stage=model.contract.first_stage_weight > 0,
            contract=model.contract,
            report=report,
        )
    return Trainer(
        model,
        config,
        train_dataset=data,
        loss=build_loss(config),
        evaluator=evaluator,
        guide=_open_guide(config.guide) if config.guide is not None else None,
        reads={"guide": _hash_of(config.guide)} if config.guide is not None else None,
        progress=progress,
    )


def _check_prompts(model: RetrievalModel) -> None:
    """
    Raises:
        UsageError: a prompt that is used in training leaves no room for a text.
    """
    text, limit = model.preprocessor, model.contract.max_tokens
    if model.task == "embed":
        found = {name: text.encode([""], prompt=name)[0] for name in ("query", "document")}
    else:
        found = {model.contract.default_prompt or "query": text.encode_pairs([("", "")])[0]}
    for name, encoded in found.items():
        if isinstance(encoded, Encoded) and len(encoded.ids) >= limit:
            raise UsageError(f"prompt '{name}': fills all of the {limit} tokens of max_tokens; no text would be read")


def build_loss(config: FinetuneConfig) -> Callable[..., Tensor]:
    """The run's loss with its options bound.

    Raises:
        UsageError: an option does not fit the loss.
    """
    room = losses.embed if config.task == "embed" else losses.rerank
    loss: Callable[..., Tensor] = getattr(room, config.loss or DEFAULT_LOSS[config.task])
    if config.loss_options:
        loss = functools.partial(loss, **config.loss_options)
    return losses.matryoshka(loss, config.matryoshka) if config.matryoshka else loss


def _open_guide(path: str) -> Embedder:
    guide = open_model(path)
    if not isinstance(guide, Embedder):
        raise UsageError(f"guide: expected an embedder, {path} is a reranker")
    return guide


def _hash_of(model: str) -> str:
    """Of a folder's content; a name on the hub stands for itself."""
    return sha256_of(Path(model)) if Path(model).exists() else model


def check_output(config: FinetuneConfig, *, resume: bool, overwrite: bool) -> None:
    """
    Raises:
        UsageError: the output folder holds what neither option allows for, or something that the run reads.
    """
    run = RunFolder(config.output)
    output = run.output
    if resume and overwrite:
        raise UsageError("resume and overwrite: choose one")
    folder = output.resolve()
    for path in (config.model, config.eval, config.candidates, *config.train):
        if path is not None and folder in (Path(path).resolve(), *Path(path).resolve().parents):
            raise UsageError(f"{output}: the output folder holds {path}, which the run reads; choose another")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if output.is_dir() and [item.name for item in output.iterdir()] == [run.path.name] and run.holds_nothing():
        return
    begun, finished = run.read() is not None, _holds_model(output)
    if not begun and not finished:
        raise UsageError(f"{output}: is in the way: neither an empty folder nor one that a run left")
    if overwrite or (resume and begun):
        return
    if resume:
        raise UsageError(f"{output}: holds a model, but no run that could be resumed (no checkpoints/run.json)")
    if finished:
        raise UsageError(f"{output}: holds a finished model; --overwrite replaces it")
    if (newest := run.newest()) is not None:
        raise UsageError(
            f"{output}: holds an unfinished run ({newest.name}); --resume continues it, --overwrite starts over"
        )
    # A run that has no checkpoint yet holds nothing that could be lost.


def _holds_model(folder: Path) -> bool:
    routes = (folder / "router_config.json").is_file() and (folder / "modules.json").is_file()
    return routes or (folder / "config.json").is_file()


def _remove(run: RunFolder) -> None:
    if run.output.exists():
        _unlink_last(run.output)
        shutil.rmtree(run.output)


def _unlink_last(folder: Path) -> None:
    """Let nothing be taken for a model while its files change."""
    for name in reversed(_LAST_FILES):
        (folder / name).unlink(missing_ok=True)


def _curve(config: FinetuneConfig, outcome: Outcome) -> str | None:
    """The course of the run as a picture; None where nothing was reported."""
    if not outcome.losses:
        return None
    measured = [(0, outcome.before[config.metric])] if outcome.before else []
    measured += [(step, metrics[config.metric]) for step, metrics in outcome.evaluations]
    return draw_curve(
        outcome.losses,
        evaluations=measured,
        learning_rates=outcome.learning_rates,
        metric=config.metric,
        best_step=outcome.best_step,
    )


def _summary(trainer: Trainer) -> str:
    data = trainer.data
    text = (
        f"{len(data):,} rows with {data.documents:,} documents from {', '.join(source.name for source in data.sources)}"
    )
    if len(data) <= _COUNTED_ROWS and (left_out := len(data) - sum(map(len, trainer.sampler.plan(0)))):
        text += f"; {left_out:,} left out of an epoch, as too many others share their text"
    return text


def _publish(model: RetrievalModel, card: str, curve: str | None, run: RunFolder, *, base: str) -> None:
    """Put the model beside its checkpoints. A folder with them cannot be replaced in one go, so the files go in one by
    one, and until the last of them is there, none of them is taken for a model."""
    staged = run.path / "final"
    with replace_folder(staged) as folder:
        model.write(folder)
        if has_adapters(model):
            (folder / "adapter").mkdir()
            save_adapter(model, folder / "adapter", base=base)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if curve is not None:
            (folder / CURVE_NAME).write_text(curve, encoding="utf-8")
    _unlink_last(run.output)
    names = [item.name for item in staged.iterdir() if item.name not in _LAST_FILES]
    for name in names:
        if (run.output / name).is_dir():
            shutil.rmtree(run.output / name)
        os.replace(staged / name, run.output / name)
    sync(run.output)
    for name in _LAST_FILES:
        if (staged / name).is_file():
            os.replace(staged / name, run.output / name)
    sync(run.output)
    staged.rmdir()
