"""Event files for TensorBoard, read back by TensorBoard itself."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rtx.runtime.errors import MissingExtraError
from rtx.trainer.config import TrainingArguments
from rtx.trainer.model import RetrievalModel
from rtx.trainer.progress import Progress
from rtx.trainer.train import Outcome, Trainer

ROWS = [{"query": f"how {number}", "positive": f"the file {number}"} for number in range(12)]


def train(model: Path, output: Path, *, tensorboard: bool, steps: int = 3, resume: bool = False) -> Outcome:
    arguments = TrainingArguments(
        output=str(output),
        batch_size=4,
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-3,
        log_steps=1,
        threads=1,
        tensorboard=tensorboard,
    )
    progress = Progress(Console(file=io.StringIO()))
    trainer = Trainer(RetrievalModel.load(model), arguments, train_dataset=ROWS, progress=progress)
    return trainer.train(resume=resume)


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    (folder,) = (output / "checkpoints" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_event_files_have_the_loss_and_the_learning_rate(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    outcome = train(tiny_checkpoint("bert"), tmp_path / "run", tensorboard=True)
    found = scalars(tmp_path / "run")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [value for _, value in found["train/loss"]] == pytest.approx([loss for _, loss in outcome.losses], rel=1e-6)
    assert len(found["train/learning_rate"]) == 3


def test_without_the_option_there_are_none(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    train(tiny_checkpoint("bert"), tmp_path / "run", tensorboard=False, steps=1)
    assert not (tmp_path / "run" / "checkpoints" / "runs").exists()


def test_without_tensorboard_the_extra_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"rtx-retrieval\[tensorboard\]"):
        train(tiny_checkpoint("bert"), tmp_path / "run", tensorboard=True)
