"""All options of a finetuning run, in one place: the command line's flags and the TOML file's keys are made from it.

Free of torch, so that `rtx finetune --help` and a misspelt key answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rtx.runtime.contract import Task
from rtx.runtime.errors import UsageError
from rtx.runtime.schema import parse

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Option:
    """What a field's flag and its check need beside its name, type and default.

    Attributes:
        help: one sentence for `--help`.
        short: a second spelling of the flag.
        at_least, above, at_most: bounds of a number.
        weights: whether the weights that come out depend on it; if so, a resumed run has to have the same value.
    """

    help: str
    short: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    weights: bool = True

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, as "expected …, got …"; None if nothing is."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not math.isfinite(value):
            return f"expected a finite number, got {value}"
        if self.at_least is not None and value < self.at_least:
            return f"expected at least {self.at_least}, got {value}"
        if self.above is not None and value <= self.above:
            return f"expected more than {self.above}, got {value}"
        if self.at_most is not None and value > self.at_most:
            return f"expected at most {self.at_most}, got {value}"
        return None


def options(cls: type[TrainingArguments]) -> dict[str, Option]:
    """The Option of every field, in the order of the fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name].__metadata__[0] for item in dataclasses.fields(cls)}


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """How to train, whatever the model and the data are.

    Raises:
        ValueError: names every value out of its bounds.
    """

    output: Annotated[
        str,
        Option("Folder for the finetuned model; checkpoints go to its subfolder checkpoints.", "-o", weights=False),
    ]
    epochs: Annotated[float, Option("Passes over the training data; may be a fraction.", above=0)] = 1.0
    max_steps: Annotated[int | None, Option("Stop after so many steps, whatever epochs says.", at_least=1)] = None
    batch_size: Annotated[
        int, Option("Rows of a step; an embedder's queries have each other's documents as negatives.", at_least=1)
    ] = 64
    gradient_accumulation_steps: Annotated[
        int,
        Option("Batches whose gradients are averaged for a step; in-batch negatives stay within one.", at_least=1),
    ] = 1
    learning_rate: Annotated[float, Option("Peak learning rate of AdamW.", above=0)] = 2e-5
    schedule: Annotated[Schedule, Option("Course of the learning rate after the warm-up.")] = "linear"
    warmup_ratio: Annotated[
        float, Option("Share of the steps in which the learning rate rises from 0.", at_least=0, at_most=0.99)
    ] = 0.1
    weight_decay: Annotated[float, Option("AdamW's weight decay; biases and norms have none.", at_least=0)] = 0.01
    max_grad_norm: Annotated[float, Option("Clip the gradient to this L2 norm; 0 does not clip.", at_least=0)] = 1.0
    bf16: Annotated[bool, Option("Run forward passes in bfloat16; weights, loss and optimizer stay float32.")] = False
    dropout: Annotated[
        float | None,
        Option("Dropout in the transformer; by default the checkpoint's own. 0 is faster.", at_least=0, at_most=0.9),
    ] = None
    chunk_tokens: Annotated[
        int | None,
        Option(
            "Padded tokens of a forward pass: a batch is sorted by length and run in such chunks; by default 1024 on a "
            "CPU and 16384 elsewhere.",
            at_least=1,
        ),
    ] = None
    threads: Annotated[int | None, Option("CPU threads of PyTorch; by default PyTorch decides.", at_least=1)] = None
    workers: Annotated[
        int, Option("Processes that tokenise ahead; 0 tokenises between steps.", at_least=0, weights=False)
    ] = 0
    seed: Annotated[
        int,
        Option("The same seed on the same machine gives the same weights, bit for bit.", at_least=0, at_most=2**32 - 1),
    ] = 0
    eval_steps: Annotated[
        int | None, Option("Evaluate after every so many steps and at the end; by default each epoch.", at_least=1)
    ] = None
    save_steps: Annotated[
        int | None,
        Option(
            "Write a checkpoint after every so many steps; by default with each evaluation.", at_least=1, weights=False
        ),
    ] = None
    keep_checkpoints: Annotated[
        int, Option("Newest checkpoints that stay on disk; the best one always stays.", at_least=1, weights=False)
    ] = 1
    log_steps: Annotated[int, Option("Report the loss after every so many steps.", at_least=1, weights=False)] = 10

    def __post_init__(self) -> None:
        self._raise(
            [
                f"{name}: {problem}"
                for name, option in options(type(self)).items()
                if (problem := option.problem(getattr(self, name))) is not None
            ]
        )

    @staticmethod
    def _raise(problems: list[str]) -> None:
        if problems:
            raise ValueError("; ".join(problems))

    def recipe(self) -> dict[str, Any]:
        """The options that the weights depend on."""
        return {name: getattr(self, name) for name, option in options(type(self)).items() if option.weights}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingArguments):
    """A whole run of `rtx finetune`. Paths do not count as part of the recipe: what is in the files does."""

    task: Annotated[Task, Option("What to train: embed (a vector for each text) or rerank (a score for each pair).")]
    model: Annotated[
        str,
        Option("Checkpoint to start from: a folder of sentence-transformers or transformers.", "-m", weights=False),
    ]
    train: Annotated[
        tuple[str, ...],
        Option(
            "Training data: jsonl, csv, tsv, parquet, or a folder that datasets saved. Columns: query, positive, "
            "negative(s), or for rerank also query, document, label. May be repeated.",
            weights=False,
        ),
    ]
    eval: Annotated[
        str | None, Option("Evaluation set: a folder in the BEIR layout (corpus, queries, qrels).", weights=False)
    ] = None
    candidates: Annotated[
        str | None,
        Option(
            "For rerank: a first stage's ranking of the evaluation set, as a TREC run file or as jsonl of "
            '{"query-id", "corpus-ids"}.',
            weights=False,
        ),
    ] = None
    metric: Annotated[str, Option("The metric that picks the best checkpoint.")] = "ndcg@10"
    max_tokens: Annotated[
        int | None,
        Option("Longest input in training, evaluation and the saved model; by default the model's own.", at_least=2),
    ] = None
    scale: Annotated[float, Option("For embed: factor of the cosine in the loss (1 / temperature).", above=0)] = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not self.train:
            problems.append("train: expected at least one file")
        if self.task == "embed" and self.candidates is not None:
            problems.append("candidates: only a reranker has them; an embedder is evaluated on the whole corpus")
        if self.task == "rerank" and (self.eval is None) != (self.candidates is None):
            problems.append("eval and candidates: a reranker is evaluated on both together, or not at all")
        self._raise(problems)

    @classmethod
    def read(cls, file: str | Path | None, flags: Mapping[str, Any]) -> FinetuneConfig:
        """Options from a TOML file, from flags, or from both; a flag wins over the file.

        Args:
            file: TOML file whose top-level keys are fields of this class. Paths in it are relative to the working
                directory, as they are in flags.
            flags: field name to value, only those that were given.

        Raises:
            UsageError: the file cannot be read; or lists every unknown key, missing key and bad value.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
            except OSError as broken:
                raise UsageError(f"{file}: cannot be read: {broken.strerror}") from broken
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
                raise UsageError(f"{file}: is not valid TOML: {broken}") from broken
        return parse(cls, {**values, **flags}, source=str(file) if file is not None else "options")
