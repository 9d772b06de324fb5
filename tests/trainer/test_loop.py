from __future__ import annotations

import transformers

from rtx.trainer.config import TrainingArguments
from rtx.trainer.loop import loop_arguments


def test_a_process_with_several_gpus_takes_one(tmp_path, monkeypatch):
    class OnFour(transformers.TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(transformers, "TrainingArguments", OnFour)
    assert loop_arguments(TrainingArguments(output=str(tmp_path)), tmp_path, None).n_gpu == 1
