from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard

from rtx.runtime.contract import Contract
from rtx.runtime.metrics import Interval
from rtx.trainer.card import Measured, render_card
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.data import Source
from rtx.trainer.run import RunRecord
from rtx.trainer.train import Outcome

CONFIG = FinetuneConfig(
    task="embed", model="models/base", train=("a/pairs.jsonl", "mined.csv"), output="out/manuals", eval="beir/manuals"
)
CONTRACT = Contract(
    task="embed",
    inputs=("input_ids", "attention_mask"),
    max_tokens=128,
    pad_token_id=0,
    dimension=384,
    prompts={"query": "find | this:\n", "document": ""},
)
OUTCOME = Outcome(
    steps=120,
    best_step=80,
    before={"ndcg@10": 0.51234, "mrr@10": 0.4},
    after={"ndcg@10": 0.61239, "mrr@10": 0.39},
    evaluations=[],
    interval=Interval(0.08, 0.1204),
    learning_rates=[(1, 1e-5)],
    losses=[],
)
RECORD = RunRecord(
    recipe={**CONFIG.recipe(), "loss": "info_nce(scale=20.0)"},
    inputs={"model": "cafe" * 16, "training data 1": "beef" * 16},
    environment={"torch": "2.13.0", "threads": 2},
    before={},
)


class Data:
    sources = (Source("pairs.jsonl", 3900, "beef" * 16), Source("mined.csv", 12, "f00d" * 16))

    def __len__(self):
        return 3912


MEASURED = Measured("manuals", 500, 3012, candidates=False)
COMMAND = "rtx finetune --config run.toml"


def card(config=CONFIG, outcome=OUTCOME, contract=CONTRACT, measured=MEASURED):
    return render_card(
        config,
        outcome,
        base="base",
        contract=contract,
        record=RECORD,
        data=Data(),
        measured=measured,
        command=COMMAND,
    )


def test_front_matter_is_what_the_hub_reads():
    data = ModelCard(card()).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "base",
        "sentence-transformers",
        "sentence-similarity",
    )
    assert {"sentence-transformers", "dataset_size:3912", "loss:MultipleNegativesRankingLoss"} <= set(data.tags)
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("manuals", "ndcg_at_10", 0.6124),
        ("manuals", "mrr_at_10", 0.39),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "# manuals",
        "It takes up to 128 tokens and gives vectors of 384 dimensions, compared by cosine similarity.",
        "On the evaluation set `manuals` (500 queries, 3,012 documents), ranking the whole corpus, before finetuning",
        "after 80 of 120 steps:",
        "| ndcg@10 | 0.5123 | 0.6124 | +0.1000 |",
        "| mrr@10 | 0.4000 | 0.3900 | -0.0100 |",
        "95 % bootstrap interval of the change in ndcg@10 over the queries: +0.0800 to +0.1204.",
        f"| `pairs.jsonl` | 3,900 | `{'beef' * 16}` |",
        f"| `mined.csv` | 12 | `{'f00d' * 16}` |",
        "Loss: `info_nce(scale=20.0)`. Started from `base`",
        f"`{'cafe' * 16}`",
        COMMAND,
        "| learning_rate | 2e-05 |",
        "| torch | 2.13.0 |",
        'model = SentenceTransformer("manuals")',
        'model = Embedder.open("manuals.rtx")',
        "| query | `find \\| this: ` |",
    ],
)
def test_what_a_card_says(line):
    assert line in card()


def test_paths_of_the_machine_are_not_in_it(tmp_path):
    config = dataclasses.replace(CONFIG, model=str(tmp_path / "base"), output=str(tmp_path / "manuals"))
    assert str(tmp_path) not in card(config)
    assert card(config) == card()


def test_a_reranker_is_opened_as_one():
    config = dataclasses.replace(CONFIG, task="rerank", candidates="run.txt")
    contract = Contract(task="rerank", inputs=("input_ids", "attention_mask"), max_tokens=64, pad_token_id=0)
    text = card(config, contract=contract, measured=MEASURED._replace(candidates=True))
    assert ModelCard(text).data.pipeline_tag == "text-ranking"
    assert "ranking the first-stage candidates of each query" in text
    assert 'model = CrossEncoder("manuals")' in text
    assert 'model = Reranker.open("manuals.rtx")' in text


def test_without_an_evaluation_there_are_no_results():
    text = card(outcome=dataclasses.replace(OUTCOME, before={}, after={}, interval=None), measured=None)
    assert "## Results" not in text
    assert ModelCard(text).data.eval_results is None
