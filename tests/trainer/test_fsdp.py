"""Two processes that share a model by FSDP2 end with the weights of one that had all of it, and all of the batch."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rtx.runtime.embedder import Embedder
from rtx.trainer.model import RetrievalModel

SCRIPT = Path(__file__).parent / "sharded_runs.py"
SHARDED = runpy.run_path(str(SCRIPT))
RUNS = [*SHARDED["RUNS"], "language model"]
GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def evalset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evalset")
    rows = SHARDED["ROWS"]
    corpus = [{"_id": f"d{i}", "text": row["positive"]} for i, row in enumerate(rows)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(rows)))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


@pytest.fixture(scope="module")
def runs(once, tiny_checkpoint, evalset):
    """Folders `one` and `two`, of one process and of two."""
    return once("fsdp", lambda folder: train(folder, tiny_checkpoint, evalset))


def train(folder, tiny_checkpoint, evalset):
    inputs = [str(tiny_checkpoint("bert")), str(tiny_checkpoint("qwen3-chat", "rerank")), str(evalset)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SHARDED["ROWS"]))
    # The configuration that the guide gives.
    (folder / "fsdp.yaml").write_text(GUIDE.read_text().partition("```yaml\n# fsdp.yaml\n")[2].partition("```")[0])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml")]
    done = subprocess.run(
        [*launch, "--num_processes", "2", "--main_process_port", "0", str(SCRIPT), *inputs, str(folder / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    SHARDED["train_all"](*inputs, folder / "one")


def course_of(folder: Path):
    return ast.literal_eval((folder / "course.txt").read_text())


def assert_same_weights(one: Path, two: Path, tolerance: float) -> None:
    found, expected = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        # A softmax does not see what all keys have in common: this gradient is rounding, and Adam makes a step of it.
        if tolerance and name.endswith("key.bias"):
            continue
        assert torch.allclose(found[name], weights, rtol=0, atol=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one_with_the_whole_model_and_the_joined_batch(runs, run):
    assert_same_weights(runs / "one" / run / "final", runs / "two" / run / "final", 1e-5)
    one, two = (course_of(runs / name / run)[0] for name in ("one", "two"))
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)


@pytest.mark.slow
def test_both_measure_the_same_and_keep_the_best_weights(runs):
    _, before, evaluations, after, best = course_of(runs / "two" / "evaluated")
    _, expected_before, expected, expected_after, expected_best = course_of(runs / "one" / "evaluated")
    assert [step for step, _ in evaluations] == [step for step, _ in expected] == [3, 6]
    assert len({metrics["ndcg@10"] for _, metrics in expected}) == 2
    for (_, found), (_, wanted) in zip(evaluations, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)
    assert before == pytest.approx(expected_before, abs=1e-6)
    assert after == pytest.approx(expected_after, abs=1e-6)
    assert best == expected_best != 6
    assert_same_weights(runs / "two" / "evaluated" / "final", checkpoint(runs, "two", "evaluated", best), 0)


def checkpoint(runs: Path, processes: str, run: str, step: int) -> Path:
    return runs / processes / run / "checkpoints" / f"step-{step}"


@pytest.mark.slow
@pytest.mark.parametrize(("run", "step"), [("evaluated", 2), ("lora", 3), ("language model", 3)])
def test_a_checkpoint_is_whole_and_opens_as_a_model(runs, run, step):
    one, two = (checkpoint(runs, processes, run, step) for processes in ("one", "two"))
    assert {file.name for file in two.iterdir()} - {"rng_state_0.pth", "rng_state_1.pth"} == {
        file.name for file in one.iterdir()
    } - {"rng_state.pth"}
    assert_same_weights(one, two, 1e-5)
    model = RetrievalModel.load(two)
    if model.task == "embed":
        expected = RetrievalModel.load(one)
        vectors = [Embedder(m.preprocessor, m.engine()).embed(["what is code", "the"]) for m in (model, expected)]
        assert abs(vectors[0] - vectors[1]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("run", "step"), [("evaluated", 2), ("lora", 3)])
def test_a_checkpoint_has_the_optimizer_of_one_process(runs, run, step):
    one, two = (
        torch.load(checkpoint(runs, processes, run, step) / "optimizer.pt", weights_only=True)
        for processes in ("one", "two")
    )
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    assert len(one["state"]) > 10
    for place, values in one["state"].items():
        for name, value in values.items():
            # Plain tensors, which load without a process group.
            assert type(two["state"][place][name]) is torch.Tensor
            assert torch.allclose(two["state"][place][name], value, rtol=0, atol=1e-6), (place, name)


@pytest.mark.slow
def test_held_and_replayed_chunks_draw_the_same_dropout(runs):
    assert_same_weights(runs / "two" / "held" / "final", runs / "two" / "replayed" / "final", 1e-6)
    losses = [loss for _, loss in course_of(runs / "two" / "held")[0]]
    assert losses != pytest.approx([loss for _, loss in course_of(runs / "two" / "chunks")[0]], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "step"), [("whole", 3), ("whole", 6), ("adapters", 3)])
def test_a_run_that_was_stopped_and_resumed_gives_the_same_bits(runs, what, step):
    unbroken, resumed = runs / "two" / f"unbroken {what}", runs / "two" / f"stopped {what} {step}"
    assert course_of(resumed) == course_of(unbroken)
    assert_same_weights(unbroken / "final", resumed / "final", 0)


@pytest.mark.slow
def test_the_command_writes_a_whole_model(runs):
    written = runs / "two" / "command"
    assert "ndcg@10" in (written / "README.md").read_text()
    model = RetrievalModel.load(written)
    assert model.task == "embed"
    steps = sorted(int(path.name.removeprefix("step-")) for path in (written / "checkpoints").glob("step-*"))
    assert_same_weights(written / "checkpoints" / f"step-{steps[-1]}", written, 0)


@pytest.mark.slow
def test_every_process_stops_for_the_same_reason(runs):
    said = [ast.literal_eval((runs / "two" / f"said-{rank}.txt").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0]["gradient"].startswith("step 1: the norm of the gradient is nan; the batch: row")
    assert said[0]["heads"].startswith("FSDP: the processes hold different models")
    assert said[0]["estimate"].startswith("FSDP: cannot be estimated")
