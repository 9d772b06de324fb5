"""The trainer: load, finetune and save retrieval models. Needs the extra `train`.

Names are imported when they are asked for, so that `rtx.trainer.config` can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtx.runtime.lazy import load

if TYPE_CHECKING:
    from rtx.trainer.config import TrainingArguments as TrainingArguments
    from rtx.trainer.data import TrainingData as TrainingData
    from rtx.trainer.evaluation import Evaluator as Evaluator
    from rtx.trainer.model import RetrievalModel as RetrievalModel
    from rtx.trainer.train import Trainer as Trainer

# Public name -> the module that defines it.
_MODULES = {
    "Evaluator": "rtx.trainer.evaluation",
    "RetrievalModel": "rtx.trainer.model",
    "Trainer": "rtx.trainer.train",
    "TrainingArguments": "rtx.trainer.config",
    "TrainingData": "rtx.trainer.data",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    return load(__name__, _MODULES, name, extra="train")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
