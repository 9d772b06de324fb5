"""Two processes that share a batch end with the weights of one process that had all of it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

# Run by torchrun in each of the processes, and here in one.
WORKER = """
import functools, gc, io, sys
import torch
from rich.console import Console
from rtx.trainer import RetrievalModel, Trainer, TrainingArguments, TrainingData, losses
from rtx.trainer.evaluation import Evaluator
from rtx.trainer.processes import is_main, world_size
from rtx.trainer.progress import Progress

# Each run collects garbage, of which the modules hold none.
gc.freeze()
embedder, reranker, evalset, out = sys.argv[1:]
WORDS = ["how", "are", "what", "code", "list", "file", "model", "text", "query", "the", "with", "that"]
rows = [
    {
        "query": f"{WORDS[i % 12]} {i}",
        "positive": " ".join([WORDS[(i + 5) % 12], str(i)] * (1 + i % 5)),
        "negatives": [f"{WORDS[(i + 3) % 12]} {i + 1}"] * (i % 3),
    }
    for i in range(22)
]

def train(name, checkpoint, loss, rows, evaluator=None, resume=False, **options):
    settings = dict(epochs=1, batch_size=8, learning_rate=1e-3, dropout=0, threads=1, log_steps=1, seed=1, **options)
    arguments = TrainingArguments(output=f"{out}/{name}", **settings)
    model = RetrievalModel.load(checkpoint)
    trainer = Trainer(model, arguments, train_dataset=rows, loss=loss, evaluator=evaluator,
                      progress=Progress(Console(file=io.StringIO())))
    outcome = trainer.train(resume=resume)
    if is_main():
        model.save(f"{out}/{name}/final")
        with open(f"{out}/{name}/losses.txt", "w") as stream:
            stream.write(repr(outcome.losses))
    return outcome

symmetric = functools.partial(losses.info_nce, directions=("query_to_doc", "doc_to_query"))
train("plain", embedder, symmetric, rows)
if world_size() > 1:
    # An evaluation by the main process may take longer than the half hour that gloo waits by itself.
    options = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() >= 24 * 3600, options._timeout
train("cached", embedder, symmetric, rows, activation_tokens=0, chunk_tokens=30)
train("accumulated", embedder, losses.info_nce, rows, gradient_accumulation_steps=2)
lists = [{"query": r["query"], "positive": r["positive"], "negatives": ["the", r["positive"] + " a"]} for r in rows]
train("reranker", reranker, losses.cross_entropy, lists)
for row in lists:
    row["first_stage"] = [0.5, 0.25, len(row["query"]) / 20]
on_top = f"{out}/on_top_start"
if is_main():
    model = RetrievalModel.load(reranker)
    model.configure(first_stage_weight=20, activation="identity")
    model.save(on_top)
if world_size() > 1:
    torch.distributed.barrier()
train("on_top", on_top, losses.cross_entropy, lists)
outcome = train("evaluated", embedder, losses.info_nce, rows, Evaluator.from_beir(evalset), save_steps=1)
assert outcome.after["ndcg@10"] >= 0
again = train("evaluated", embedder, losses.info_nce, rows, Evaluator.from_beir(evalset), save_steps=1, resume=True)
assert again.after == outcome.after and again.best_step == outcome.best_step
"""
RUNS = ("plain", "cached", "accumulated", "reranker", "on_top", "evaluated")


@pytest.fixture(scope="module")
def runs(once, tiny_checkpoint, toy_evalset):
    return once("processes", lambda folder: train(folder, tiny_checkpoint, toy_evalset))


def train(folder, tiny_checkpoint, toy_evalset):
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    inputs = [str(tiny_checkpoint("bert")), str(tiny_checkpoint("bert", "rerank")), str(toy_evalset)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(worker), *inputs, str(folder / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with mock.patch.object(sys, "argv", [str(worker), *inputs, str(folder / "one")]):
        runpy.run_path(str(worker))


@pytest.fixture(scope="module")
def toy_evalset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evalset")
    (folder / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "d{i}", "text": "{word} {i}"}}\n' for i, word in enumerate(["how", "code", "list", "file"]))
    )
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "how 0"}\n{"_id": "q2", "text": "list 2"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t1\nq2\td2\t1\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one_with_the_joined_batch(runs, run):
    one, two = (load_file(runs / name / run / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        # A softmax does not see what all keys, or all logits of a list, have in common: this gradient is rounding,
        # and Adam makes a step of it.
        if name.endswith(("key.bias", "classifier.bias")):
            continue
        assert torch.allclose(two[name], weights, rtol=0, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_report_the_loss_of_the_joined_batch(runs, run):
    one, two = (eval((runs / name / run / "losses.txt").read_text()) for name in ("one", "two"))
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)
