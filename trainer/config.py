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
from rtx.runtime.errors import UsageError, nearest
from rtx.runtime.schema import parse
from rtx.trainer.loss_table import (
    DEFAULT_LOSS,
    LOSS_OPTIONS,
    LOSSES,
    Direction,
    Distance,
    LossSpec,
    MarginStrategy,
    Partition,
    Similarity,
)

Schedule = Literal["linear", "cosine", "constant"]
Mixing = Literal["joined", "proportional", "in_turn"]


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
        int,
        Option(
            "Rows of a step, over all processes; in-batch losses have each other's documents as negatives.", at_least=1
        ),
    ] = 64
    mixing: Annotated[
        Mixing,
        Option(
            "How several training files meet: joined (one pool), or each batch from one file, in proportion to their "
            "sizes or in turn until the smallest is used up."
        ),
    ] = "joined"
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
    learning_rates: Annotated[
        tuple[str, ...],
        Option(
            "PATTERN=RATE: another peak for the parameters of these names, as in 'layers:0-5=1e-5'. May be repeated."
        ),
    ] = ()
    layer_decay: Annotated[
        float,
        Option("Factor on the learning rate from each block of the transformer to the one below.", above=0, at_most=1),
    ] = 1.0
    freeze: Annotated[
        tuple[str, ...],
        Option(
            "Parameters that stay as they are: 'embeddings', 'layers:0-5', 'images', 'images.layers:0-5', or a "
            "pattern. May be repeated."
        ),
    ] = ()
    lora_rank: Annotated[
        int | None,
        Option("Train low-rank adapters of this rank instead of the backbone's weights; they are merged.", at_least=1),
    ] = None
    lora_alpha: Annotated[
        float | None, Option("The adapters' scale is alpha / rank; by default alpha is the rank.", above=0)
    ] = None
    lora_dropout: Annotated[float, Option("Dropout before the adapters.", at_least=0, at_most=0.9)] = 0.0
    lora_targets: Annotated[
        tuple[str, ...],
        Option(
            "Modules that get adapters; by default all linear ones of the blocks, of a model whose images are tokens "
            "those of the language model alone. May be repeated."
        ),
    ] = ()
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
    activation_tokens: Annotated[
        int | None,
        Option(
            "Gradient cache: padded tokens of a batch whose activations are held; the rest runs twice, chunk by chunk. "
            "0 holds one chunk at a time. Default: all.",
            at_least=0,
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Option("Hold the activations of block boundaries only, and compute the rest again.")
    ] = False
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
    patience: Annotated[int | None, Option("Stop after so many evaluations without a better one.", at_least=1)] = None
    keep_checkpoints: Annotated[
        int, Option("Newest checkpoints that stay on disk; the best one always stays.", at_least=1, weights=False)
    ] = 1
    log_steps: Annotated[int, Option("Report the loss after every so many steps.", at_least=1, weights=False)] = 10
    tensorboard: Annotated[
        bool, Option("Write TensorBoard's event files to checkpoints/runs in the output folder.", weights=False)
    ] = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {problem}"
            for name, option in options(type(self)).items()
            if (problem := option.problem(getattr(self, name))) is not None
        ]
        for rate in self.learning_rates:
            pattern, _, number = rate.rpartition("=")
            try:
                usable = bool(pattern) and 0 < float(number) < math.inf
            except ValueError:
                usable = False
            if not usable:
                problems.append(f"learning_rates: expected PATTERN=RATE with a rate above 0, got '{rate}'")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_dropout or self.lora_targets):
            problems.append("lora_rank: expected with the other options of LoRA")
        self._raise(problems)

    @property
    def rates(self) -> dict[str, float]:
        """Pattern -> learning rate."""
        return {pattern: float(rate) for pattern, _, rate in (item.rpartition("=") for item in self.learning_rates)}

    @staticmethod
    def _raise(problems: list[str]) -> None:
        if problems:
            raise ValueError("; ".join(problems))

    def recipe(self) -> dict[str, Any]:
        """The options that the weights depend on."""
        values = {name: getattr(self, name) for name, option in options(type(self)).items() if option.weights}
        # As JSON has them.
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingArguments):
    """A whole run of `rtx finetune`. Paths do not count as part of the recipe: what is in the files does."""

    task: Annotated[
        Task, Option("What to train: embed (a vector for each text or image) or rerank (a score for each pair).")
    ]
    model: Annotated[
        str,
        Option("Checkpoint to start from: a folder of sentence-transformers or transformers.", "-m", weights=False),
    ]
    train: Annotated[
        tuple[str, ...],
        Option(
            "Training data: jsonl, csv, tsv, parquet, or a folder that datasets saved. Columns: query, positive, "
            'negative(s), or for rerank also query, document, label; an image is {"image": path}. May be repeated.',
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
    max_pixels: Annotated[
        int | None,
        Option(
            "Pixels of the largest image, where the model takes images of any size (Qwen-VL); larger ones are scaled "
            "down, in training and in use. By default the model's own.",
            at_least=1,
        ),
    ] = None
    min_pixels: Annotated[
        int | None, Option("Pixels of the smallest image, likewise; smaller ones are scaled up.", at_least=1)
    ] = None
    query_prompt: Annotated[
        str | None,
        Option(
            "Text before every query, for a reranker before every pair (a language model's instruction); kept in the "
            "model. By default the checkpoint's own."
        ),
    ] = None
    document_prompt: Annotated[
        str | None, Option("Text before every document, kept in the model; by default the checkpoint's own.")
    ] = None
    loss: Annotated[
        str | None,
        Option(
            "embed: info_nce (default), gist, cosent, contrastive, online_contrastive, triplet, margin_mse, kl. "
            "rerank: bce (default), cross_entropy, listnet, ranknet, lambda_ndcg, margin_mse."
        ),
    ] = None
    scale: Annotated[
        float | None,
        Option("Factor of similarities or logits in the loss, 1 / temperature; by default the loss's own.", above=0),
    ] = None
    directions: Annotated[
        tuple[Direction, ...],
        Option("info_nce, gist: which texts are told apart from which. May be repeated."),
    ] = ()
    partition: Annotated[
        Partition | None, Option("info_nce: one softmax over all directions (the default), or one for each.")
    ] = None
    false_negative_margin: Annotated[
        float | None,
        Option("info_nce: leave out negatives whose cosine is more than this above the positive's.", at_least=0),
    ] = None
    guide_margin: Annotated[
        float | None, Option("gist: leave out what the guide finds nearer than the positive less this; by default 0.")
    ] = None
    guide_margin_strategy: Annotated[
        MarginStrategy | None, Option("gist: whether the margin is a share of the positive's cosine or absolute.")
    ] = None
    similarity: Annotated[
        Similarity | None, Option("margin_mse, kl: what a teacher's scores are compared with; by default dot.")
    ] = None
    distance: Annotated[Distance | None, Option("triplet, contrastive: cosine (the default) or euclidean.")] = None
    margin: Annotated[float | None, Option("triplet, contrastive: the distance to keep.", at_least=0)] = None
    temperature: Annotated[float | None, Option("kl: of teacher and student; by default 1.", above=0)] = None
    pos_weight: Annotated[float | None, Option("bce: factor of the positives' part of the loss.", above=0)] = None
    sigma: Annotated[float | None, Option("ranknet, lambda_ndcg: factor of differences of logits.", above=0)] = None
    mu: Annotated[
        float | None, Option("lambda_ndcg: weight of NDCGLoss2 beside LambdaRank; by default 10.", at_least=0)
    ] = None
    k: Annotated[int | None, Option("lambda_ndcg: cutoff of the NDCG; by default none.", at_least=1)] = None
    first_stage_weight: Annotated[
        float | None,
        Option(
            "rerank: train on top of a first stage. Its score of each document, the column first_stage of the training "
            "data and the scores of the candidates, times this is added to the logit, in training and in use; kept in "
            "the model. For a new head the scale of the embedder's loss, 20. By default the model's own.",
            at_least=0,
        ),
    ] = None
    guide: Annotated[
        str | None, Option("gist: an embedder, bundle or checkpoint, that tells false negatives.", weights=False)
    ] = None
    matryoshka: Annotated[
        tuple[int, ...],
        Option("Sum the loss over vectors cut to each of these dimensions (name the full one too). As in 384,256,128."),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not self.train:
            problems.append("train: expected at least one file")
        if self.task == "embed" and self.candidates is not None:
            problems.append("candidates: only a reranker has them; an embedder is evaluated on the whole corpus")
        if self.patience is not None and self.eval is None:
            problems.append("patience: expected with eval, whose metric it waits for")
        if self.task == "rerank" and self.matryoshka:
            problems.append("matryoshka: only an embedder has dimensions")
        if any(dimension < 1 for dimension in self.matryoshka):
            problems.append(f"matryoshka: expected dimensions of at least 1, got {list(self.matryoshka)}")
        if self.task == "embed" and self.first_stage_weight is not None:
            problems.append("first_stage_weight: only a reranker is on top of a first stage")
        if self.task == "rerank" and self.document_prompt is not None:
            problems.append("document_prompt: a reranker has one prompt for a pair, query_prompt")
        problems += self._loss_problems()
        if self.task == "rerank" and (self.eval is None) != (self.candidates is None):
            problems.append("eval and candidates: a reranker is evaluated on both together, or not at all")
        self._raise(problems)

    @property
    def processor_kwargs(self) -> dict[str, int]:
        """Settings of the image processor in place of the checkpoint's."""
        given = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def loss_spec(self) -> LossSpec:
        return LOSSES[self.task][self.loss or DEFAULT_LOSS[self.task]]

    @property
    def loss_options(self) -> dict[str, Any]:
        """The loss's keywords, those that were set."""
        found = {name: getattr(self, name) for name in sorted(LOSS_OPTIONS)}
        return {name: value for name, value in found.items() if value not in (None, ())}

    def _loss_problems(self) -> list[str]:
        name = self.loss or DEFAULT_LOSS[self.task]
        if name not in LOSSES[self.task]:
            return [f"loss: '{name}' does not exist for the task '{self.task}' ({nearest(name, LOSSES[self.task])})"]
        spec = LOSSES[self.task][name]
        having = ", ".join(spec.options) or "none"
        problems = [
            f"{option}: is no option of the loss {name}; it has: {having}"
            for option in self.loss_options
            if option not in spec.options
        ]
        if spec.guided != (self.guide is not None):
            problems.append(f"guide: the loss {name} {'needs one' if spec.guided else 'takes none'}")
        return problems

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
        hints = typing.get_type_hints(cls)
        if file is not None:
            try:
                values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
            except OSError as broken:
                raise UsageError(f"{file}: cannot be read: {broken.strerror}") from broken
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
                raise UsageError(f"{file}: is not valid TOML: {broken}") from broken
        # One text where a list is expected is a list of one.
        values = {
            name: [value] if isinstance(value, str) and hints.get(name) == tuple[str, ...] else value
            for name, value in values.items()
        }
        return parse(cls, {**values, **flags}, source=str(file) if file is not None else "options")
