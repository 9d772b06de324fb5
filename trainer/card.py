"""The model card: README.md of a finetuned model, with front matter as the cards of Sentence Transformers have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from rtx.runtime.contract import Contract, Task
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.curve import CURVE_NAME
from rtx.trainer.data import TrainingData
from rtx.trainer.loss_table import DEFAULT_LOSS
from rtx.trainer.run import RunRecord
from rtx.trainer.train import Outcome


class Measured(NamedTuple):
    """The evaluation set of a run."""

    name: str
    queries: int
    documents: int
    candidates: bool


class _Kind(NamedTuple):
    words: str
    tags: tuple[str, ...]
    pipeline: str
    losses: dict[str, str]
    result: str


# Names as the hub and Sentence Transformers have them, so that their searches find the model.
_KINDS: dict[Task, _Kind] = {
    "embed": _Kind(
        "a text embedder",
        ("sentence-transformers", "sentence-similarity", "feature-extraction", "dense", "generated_from_trainer"),
        "sentence-similarity",
        {
            "info_nce": "MultipleNegativesRankingLoss",
            "gist": "GISTEmbedLoss",
            "cosent": "CoSENTLoss",
            "contrastive": "ContrastiveLoss",
            "online_contrastive": "OnlineContrastiveLoss",
            "triplet": "TripletLoss",
            "margin_mse": "MarginMSELoss",
            "kl": "DistillKLDivLoss",
        },
        "information-retrieval",
    ),
    "rerank": _Kind(
        "a reranker (cross-encoder)",
        ("sentence-transformers", "cross-encoder", "reranker", "generated_from_trainer"),
        "text-ranking",
        {
            "bce": "BinaryCrossEntropyLoss",
            "cross_entropy": "CrossEntropyLoss",
            "listnet": "ListNetLoss",
            "ranknet": "RankNetLoss",
            "lambda_ndcg": "LambdaLoss",
            "margin_mse": "MarginMSELoss",
        },
        "cross-encoder-reranking",
    ),
}

_USE: dict[Task, str] = {
    "embed": """\
```python
from rtx.runtime import Embedder

model = Embedder.open("{name}.rtx")
queries = model.embed(["a question"], prompt="query")  # [1, {dimension}] float32
documents = model.embed(["a text", "another text"], prompt="document")
```

The folder opens in sentence-transformers as it is:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["a question"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))
```
""",
    "rerank": """\
```python
from rtx.runtime import Reranker

model = Reranker.open("{name}.rtx")
ranked = model.rank("a question", ["a text", "another text"], top_k=10)
```

The folder opens in sentence-transformers as it is:

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
ranked = model.rank("a question", ["a text", "another text"])
```
""",
}
_USE_ON_TOP = """\
It was trained on top of a first stage: {weight} times that stage's score is added to its logit.

```python
from rtx.runtime import Reranker

model = Reranker.open("{name}.rtx")
ranked = model.rank("a question", ["a text", "another text"], first_stage=[0.61, 0.58], top_k=10)
```

sentence-transformers opens the folder and gives the logit alone:

```python
import numpy as np
from sentence_transformers import CrossEncoder

logits = CrossEncoder("{name}").predict([("a question", "a text"), ("a question", "another text")])
scores = logits + {weight} * np.array([0.61, 0.58])
```
"""


def render_card(
    config: FinetuneConfig,
    outcome: Outcome,
    *,
    base: str,
    contract: Contract,
    record: RunRecord,
    data: TrainingData,
    measured: Measured | None,
    command: str,
) -> str:
    """The card as Markdown.

    Args:
        config: the run's options.
        outcome: what it came to.
        base: name of the model it started from.
        contract: of the finetuned model.
        record: hashes and versions.
        data: what it was trained on.
        measured: the evaluation set, None if there was none.
        command: as it was typed.
    """
    name = Path(config.output).resolve().name
    limits = f"It takes up to {contract.max_tokens} tokens"
    if config.task == "embed":
        limits += f" and gives vectors of {contract.dimension} dimensions, compared by {contract.similarity} similarity"
    parts = [
        f"---\n{_front_matter(config, outcome, name, base, len(data), measured)}---\n",
        f"# {name}\n",
        f"{name} is {_KINDS[config.task].words}, finetuned from `{base}` with rtx. {limits}.\n",
        *_results(outcome, measured),
        f"## Use\n\n```bash\nrtx export {name} -o {name}.rtx\n```\n",
        _use(contract, name),
        _prompts(contract),
        "## Training data\n",
        _table(("file", "rows", "sha256"), [(f"`{s.name}`", f"{s.rows:,}", f"`{s.sha256}`") for s in data.sources]),
        "## Training\n",
        f"![Loss, learning rate and evaluations by step]({CURVE_NAME})\n" if outcome.losses else "",
        f"Loss: `{record.recipe['loss']}`. Started from `{base}`, sha256 of weights, tokenizer and contract "
        f"`{record.inputs['model']}`.\n",
        f"```bash\n{command}\n```\n",
        _table(("option", "value"), [(k, str(v)) for k, v in config.recipe().items() if v is not None]),
        _table(("version", ""), [(k, str(v)) for k, v in record.environment.items()]),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(
    config: FinetuneConfig, outcome: Outcome, name: str, base: str, examples: int, measured: Measured | None
) -> str:
    kind = _KINDS[config.task]
    names = (["MatryoshkaLoss"] if config.matryoshka else []) + [kind.losses[config.loss or DEFAULT_LOSS[config.task]]]
    results = None
    if measured is not None:
        results = [
            EvalResult(
                task_type=kind.result,
                dataset_type="unknown",
                dataset_name=measured.name,
                metric_type=metric.replace("@", "_at_"),
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for metric, value in outcome.after.items()
        ]
    data = ModelCardData(
        base_model=base,
        library_name="sentence-transformers",
        pipeline_tag=kind.pipeline,
        tags=[*kind.tags, f"dataset_size:{examples}", *(f"loss:{name}" for name in names)],
        metrics=[metric.replace("@", "_at_") for metric in outcome.after] or None,
        model_name=name,
        eval_results=results,
    )
    return f"{data.to_yaml()}\n"


def _results(outcome: Outcome, measured: Measured | None) -> list[str]:
    if measured is None or outcome.interval is None:
        return []
    ranked = "first-stage candidates of each query" if measured.candidates else "whole corpus"
    low, high = outcome.interval
    ndcg = next(metric for metric in outcome.after if metric.startswith("ndcg@"))
    columns = {"first stage": outcome.first_stage} if outcome.first_stage else {}
    columns |= {"before": outcome.before, "after": outcome.after}
    rows = [
        (metric, *(f"{values[metric]:.4f}" for values in columns.values()), f"{after - outcome.before[metric]:+.4f}")
        for metric, after in outcome.after.items()
    ]
    against = ""
    if outcome.first_stage_interval is not None:
        first_low, first_high = outcome.first_stage_interval
        against = f" Of the difference to the first stage's own order: {first_low:+.4f} to {first_high:+.4f}."
    return [
        "## Results\n",
        f"On the evaluation set `{measured.name}` ({measured.queries:,} queries, {measured.documents:,} documents), "
        f"ranking the {ranked}, before finetuning and after {outcome.best_step} of {outcome.steps} steps:\n",
        _table(("metric", *columns, "change"), rows),
        f"95 % bootstrap interval of the change in {ndcg} over the queries: {low:+.4f} to {high:+.4f}.{against}\n",
    ]


def _use(contract: Contract, name: str) -> str:
    weight = contract.first_stage_weight
    text = _USE_ON_TOP if weight else _USE[contract.task]
    return text.format(name=name, dimension=contract.dimension, weight=f"{weight:g}")


def _prompts(contract: Contract) -> str:
    prompts = {name: text for name, text in contract.prompts.items() if text}
    if not prompts:
        return ""
    return "Prompts that go before a text:\n\n" + _table(("name", "text"), [(k, f"`{v}`") for k, v in prompts.items()])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
