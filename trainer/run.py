"""What a run leaves on disk beside its weights, and how it is found again. Free of torch.

    OUT/checkpoints/run.json     what the run is made of: recipe, hashes of model and data, the metrics before it
    OUT/checkpoints/ndcg-N.npy   NDCG of each query in the evaluation at step N, 0 for before
    OUT/checkpoints/stopped-N.json   why the run stopped in step N, and the rows of that step
    OUT/checkpoints/step-N/      a checkpoint: the model as a Sentence Transformers folder, optimizer, schedule, RNG

A checkpoint has its name only once it is whole, and loses it before a file of it goes: one that is there is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import ArtifactError, UsageError

RUN_FILE = "run.json"
_FORMAT = 1
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is made of. Two runs with equal `recipe` and `inputs` on equal machines give the same weights.

    Attributes:
        recipe: options and loss.
        inputs: a hash of everything that is read: "model", each training file by its place, the evaluation set.
        environment: versions and threads; where they differ, the last bits of the weights may.
        before: metrics of the model before training, empty without an evaluation.
    """

    recipe: dict[str, Any]
    inputs: dict[str, str]
    environment: dict[str, Any]
    before: dict[str, float]

    def differences(self, other: RunRecord) -> list[str]:
        """What in recipe and inputs another run has otherwise, in words."""
        found = [
            f"{name}: was {_shown(self.recipe, name)}, now {_shown(other.recipe, name)}"
            for name in sorted({*self.recipe, *other.recipe})
            if self.recipe.get(name) != other.recipe.get(name)
        ]
        for name in sorted({*self.inputs, *other.inputs}):
            if name not in self.inputs:
                found.append(f"{name}: is new")
            elif name not in other.inputs:
                found.append(f"{name}: is not there any more")
            elif self.inputs[name] != other.inputs[name]:
                found.append(f"{name}: has other content now")
        return found


class RunFolder:
    """The checkpoints of one run.

    Args:
        output: the folder that the finetuned model will be in.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.path = self.output / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for item in self.path.iterdir() if (match := _CHECKPOINT.fullmatch(item.name)))

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.checkpoint(steps[-1]) if steps else None

    def read(self) -> RunRecord | None:
        """The record, None where no run has begun.

        Raises:
            ArtifactError: it is damaged or of another format version.
        """
        file = self.path / RUN_FILE
        try:
            content = json.loads(file.read_bytes())
            version = content.pop("format")
            if version == _FORMAT:
                return RunRecord(**content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as broken:
            raise ArtifactError(f"{file}: is damaged: {broken}") from broken
        raise ArtifactError(f"{file}: is of format {version}; expected {_FORMAT}")

    def holds_nothing(self) -> bool:
        """Whether a kill before the end of the first evaluation left the folder, with nothing to go on from."""
        return self.path.is_dir() and not any(
            item.name == RUN_FILE or _CHECKPOINT.fullmatch(item.name) for item in self.path.iterdir()
        )

    def write(self, record: RunRecord) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path / RUN_FILE) as stream:
            stream.write(json.dumps({"format": _FORMAT, **vars(record)}, indent=2).encode())

    def write_ndcg(self, step: int, ndcg: NDArray[np.float64]) -> None:
        """Keep [queries] NDCG of the evaluation at a step; 0 is before training."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path / f"ndcg-{step}.npy") as stream:
            np.save(stream, ndcg)

    def read_ndcg(self, step: int) -> NDArray[np.float64]:
        return cast(NDArray[np.float64], np.load(self.path / f"ndcg-{step}.npy"))

    def write_stopped(self, step: int, problem: str, rows: Sequence[str]) -> None:
        """Keep why a run stopped at a step, and the rows that the step was made of."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path / f"stopped-{step}.json") as stream:
            stream.write(json.dumps({"step": step, "problem": problem, "rows": list(rows)}, indent=2).encode())

    def check_same(self, record: RunRecord) -> None:
        """
        Raises:
            UsageError: a run with another recipe or other inputs began here; says what differs.
        """
        begun = self.read()
        if begun is not None and (differences := begun.differences(record)):
            raise UsageError(
                f"{self.output}: cannot resume, this is not the run that began there: " + "; ".join(differences)
            )

    def clean(self) -> None:
        """Remove what a killed process left: what was half written or half removed."""
        for pattern in (".*.partial", ".*.old"):
            for item in self.path.glob(pattern):
                shutil.rmtree(item)
        for item in self.path.glob("*.tmp"):
            item.unlink()

    def keep(self, newest: int, best: int | None) -> None:
        """Remove all checkpoints but the newest few and the best."""
        for step in self.steps()[:-newest]:
            if step != best:
                # Under another name first: a kill in the middle must not leave a half that looks whole.
                doomed = self.checkpoint(step).rename(self.path / f".step-{step}.old")
                shutil.rmtree(doomed)


def _shown(recipe: Mapping[str, Any], name: str) -> str:
    return repr(recipe[name]) if name in recipe else "not set"
