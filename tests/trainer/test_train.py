from __future__ import annotations

import dataclasses
import functools
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from torch._utils import ExceptionWrapper

from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import ArtifactError, CheckpointError, DataError, TrainingError, UsageError
from rtx.runtime.evaluation import Evaluation
from rtx.runtime.reranker import Reranker
from rtx.trainer import losses, train
from rtx.trainer.batches import Collator
from rtx.trainer.config import TrainingArguments
from rtx.trainer.data import Example, TrainingData
from rtx.trainer.describe import describe_loss
from rtx.trainer.model import RetrievalModel
from rtx.trainer.progress import Progress
from rtx.trainer.train import Trainer, set_dropout

WORDS = ["how", "are", "what", "code", "list", "file", "model", "text", "query", "the", "with", "that"]


def triples(count=30):
    return [
        {
            "query": f"{WORDS[i % 12]} {WORDS[(i // 12) % 12]} {i}",
            "positive": " ".join([WORDS[(i + 5) % 12], str(i)] * (1 + i % 5)),
            "negative": f"{WORDS[(i + 3) % 12]} {i + 1}",
        }
        for i in range(count)
    ]


class NormEvaluator:
    """A metric that follows from the weights, so that it repeats when a run does."""

    metric, sha256 = "ndcg@10", "of the evaluation set"

    def first_stage(self):
        return None

    def __call__(self, model, *, progress):
        progress(1, 1)
        return evaluation(float(sum(weights.detach().double().abs().sum() for weights in model.parameters())))


class ScriptedEvaluator(NormEvaluator):
    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, model, *, progress):
        del model, progress
        return evaluation(self.values.pop(0))


def evaluation(value):
    ndcg = value + np.linspace(-0.1, 0.1, 5)
    metrics = {"ndcg@10": value, "mrr@10": 0.25}
    return Evaluation("set", "hash", 5, 9, 0, 10, metrics, 0.0, ndcg, np.zeros((5, 1)), np.zeros((5, 1)))


def quiet():
    return Progress(Console(file=io.StringIO()))


def trainer(model, output, *, data=None, loss=None, evaluator=None, progress=None, **arguments):
    if not isinstance(model, RetrievalModel):
        model = RetrievalModel.load(model)
    arguments = {"batch_size": 8, "epochs": 3, "learning_rate": 1e-3, "log_steps": 1, "threads": 1, **arguments}
    return Trainer(
        model,
        TrainingArguments(output=str(output), **arguments),
        train_dataset=data or triples(),
        loss=loss,
        evaluator=evaluator,
        progress=progress or quiet(),
    )


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def steps(output):
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("bert", prompts={"query": "query: ", "document": "text: "})


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint):
    return tiny_checkpoint("bert", "rerank")


def test_an_embedder_learns_its_pairs(checkpoint, tmp_path):
    model = RetrievalModel.load(checkpoint)

    def accuracy():
        embedder, rows = Embedder(model.preprocessor, model.engine()), triples()
        queries = embedder.embed([row["query"] for row in rows], prompt="query")
        documents = embedder.embed([row["positive"] for row in rows], prompt="document")
        return float(((queries @ documents.T).argmax(axis=1) == np.arange(len(rows))).mean())

    before = accuracy()
    outcome = trainer(model, tmp_path, epochs=25, learning_rate=3e-3, save_steps=100).train()
    assert outcome.steps == 100
    assert accuracy() > before + 0.3
    assert outcome.losses[-1][1] < outcome.losses[0][1] - 0.5


def test_a_reranker_learns_its_labels(reranker, tmp_path):
    model = RetrievalModel.load(reranker)
    pairs = [{"query": row["query"], "document": row["positive"], "label": i % 2} for i, row in enumerate(triples(16))]
    outcome = trainer(model, tmp_path, data=pairs, epochs=40, learning_rate=3e-3, save_steps=80).train()
    assert outcome.losses[-1][1] < 0.2 < outcome.losses[0][1]
    scores = Reranker(model.preprocessor, model.engine()).score([(pair["query"], pair["document"]) for pair in pairs])
    assert ((scores > 0.5) == [pair["label"] for pair in pairs]).all()


@pytest.mark.parametrize("chunk_tokens", [1, 40, 10_000])
def test_the_loss_of_a_batch_is_that_of_its_texts_one_by_one(checkpoint, tmp_path, chunk_tokens):
    built = trainer(checkpoint, tmp_path, chunk_tokens=chunk_tokens)
    examples = list(TrainingData.from_rows(triples(6), needs="positives"))
    model = built.model.eval()
    with torch.no_grad():
        loss = built.compute_loss(model, built.data_collator(list(enumerate(examples))))
    # The runtime embeds each text by itself, with the contract's prompts.
    embedder = Embedder(model.preprocessor, model.engine())
    queries = [embedder.embed([example.query], prompt="query")[0] for example in examples]
    texts = [text for example in examples for text in example.documents]
    documents = [embedder.embed([text], prompt="document")[0] for text in texts]
    targets = losses.Targets.of([example.labels for example in examples])
    expected = losses.info_nce(torch.tensor(np.array(queries)), torch.tensor(np.array(documents)), targets)
    # Cosines agree to some 1e-6, the scale is 20.
    assert loss.item() == pytest.approx(expected.item(), abs=5e-5)


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(checkpoint, tmp_path):
    found = []
    for run, seed in enumerate([1, 1, 2]):
        built = trainer(checkpoint, tmp_path / str(run), seed=seed, evaluator=NormEvaluator())
        torch.rand(run)  # whatever happened before in the process
        found.append((built.train(), weights_of(built.model)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert same(found[0][1], found[1][1])
    assert not same(found[0][1], found[2][1])


def test_each_epoch_has_its_own_batches_and_a_resumed_one_goes_on_with_them(checkpoint, tmp_path):
    def seen(built, **options):
        batches, collate = [], built.data_collator
        built.data_collator = lambda rows: batches.append([example for _, example in rows]) or collate(rows)
        built.train(**options)
        return batches

    first = trainer(checkpoint, tmp_path, save_steps=6, keep_checkpoints=2)
    planned = [[first.train_dataset[row] for row in batch] for epoch in range(3) for batch in first.sampler.plan(epoch)]
    assert seen(first) == planned
    assert planned[:4] != planned[4:8] != planned[8:]
    shutil.rmtree(first.run.checkpoint(12))
    # Step 6 is in the middle of the second epoch.
    assert seen(trainer(checkpoint, tmp_path, save_steps=6), resume=True) == planned[6:]


class FirstGradient(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **_):  # noqa: ARG002
        if state.global_step == 0:
            self.values = {name: weights.grad.clone() for name, weights in model.named_parameters()}


def test_accumulated_batches_have_the_gradient_of_one_large_batch(reranker, tmp_path):
    rows = [{"query": row["query"], "document": row["positive"], "label": i % 2} for i, row in enumerate(triples(16))]
    found = []
    for batch_size, accumulated in [(16, 1), (4, 4)]:
        model, gradient = RetrievalModel.load(reranker), FirstGradient()
        options = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
        options["dropout"] = 0.0
        built = trainer(model, tmp_path / str(batch_size), data=rows, epochs=1, **options)
        built.add_callback(gradient)
        assert built.train().steps == 1
        found.append(gradient.values)
    assert max(float(values.abs().max()) for values in found[0].values()) > 0.01
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, atol=1e-6), name


KILLED = """
import io, os, shutil, signal, sys, threading
sys.path.insert(0, {tests!r})
from rich.console import Console
import rtx.trainer.train as train
import test_train as t

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(calls, function):
    def counted(*args, **kwargs):
        counted.left -= 1
        return die() if counted.left == 0 else function(*args, **kwargs)
    counted.left = calls
    return counted

def run(point, output):
    if point == "between":
        train.Trainer.training_step = after(9, train.Trainer.training_step)
    elif point == "writing":
        # The last file of a checkpoint.
        train.TrainerState.save_to_json = after(2, train.TrainerState.save_to_json)
    elif point == "removing":
        remove = shutil.rmtree
        shutil.rmtree = lambda path, **o: die() if str(path).endswith(".old") else remove(path, **o)
    t.trainer({checkpoint!r}, output, evaluator=t.NormEvaluator(), save_steps=3).train()

# Forked before any thread has started, so that torch is imported once.
for point in {points!r}:
    pid = os.fork()
    if pid == 0:
        run(point, os.path.join({output!r}, point))
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
"""


def test_a_killed_run_that_is_resumed_gives_the_same_bits(checkpoint, tmp_path):
    unbroken = trainer(checkpoint, tmp_path / "unbroken", evaluator=NormEvaluator(), save_steps=3)
    expected = unbroken.train()
    assert [step for step, _ in expected.evaluations] == [4, 8, 12]
    points = ["between", "writing", "removing"]
    code = KILLED.format(
        tests=str(Path(__file__).parent), checkpoint=str(checkpoint), output=str(tmp_path), points=points
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for point in points:
        resumed = trainer(checkpoint, tmp_path / point, evaluator=NormEvaluator(), save_steps=3)
        outcome = resumed.train(resume=True)
        assert outcome == expected, point
        assert same(weights_of(resumed.model), weights_of(unbroken.model)), point
        assert not list((tmp_path / point / "checkpoints").glob(".step*")), point


def test_a_run_that_was_stopped_after_its_last_step_is_still_measured(checkpoint, tmp_path, monkeypatch):
    unbroken = trainer(checkpoint, tmp_path / "unbroken", evaluator=NormEvaluator(), save_steps=4)
    expected = unbroken.train()
    stopped = trainer(checkpoint, tmp_path / "stopped", evaluator=NormEvaluator(), save_steps=4)
    measure = Trainer._measure

    def interrupted(self, step):
        if step == 12:
            raise KeyboardInterrupt
        return measure(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
    assert stopped.run.newest().name == "step-12"
    resumed = trainer(checkpoint, tmp_path / "stopped", evaluator=NormEvaluator(), save_steps=4)
    assert resumed.train(resume=True) == expected
    assert same(weights_of(resumed.model), weights_of(unbroken.model))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(checkpoint, tmp_path):
    unbroken = trainer(checkpoint, tmp_path / "unbroken")
    unbroken.train()
    killed = trainer(checkpoint, tmp_path / "killed")
    killed.run.write(killed._record())
    said = io.StringIO()
    resumed = trainer(checkpoint, tmp_path / "killed", progress=Progress(Console(file=said)))
    resumed.train(resume=True)
    assert "no checkpoint yet: starting from the beginning" in said.getvalue()
    assert same(weights_of(resumed.model), weights_of(unbroken.model))


def test_another_machine_is_a_warning_on_resume(checkpoint, tmp_path):
    begun = trainer(checkpoint, tmp_path)
    record = begun._record()
    begun.run.write(dataclasses.replace(record, environment={**record.environment, "torch": "1.0", "threads": 1}))
    said = io.StringIO()
    trainer(checkpoint, tmp_path, progress=Progress(Console(file=said, width=500))).train(resume=True)
    assert f"warning: torch 1.0 → {torch.__version__}: the weights may differ in their last bits" in said.getvalue()


def test_resuming_another_run_says_what_differs(checkpoint, tiny_checkpoint, tmp_path):
    trainer(checkpoint, tmp_path, epochs=1).train()
    with pytest.raises(UsageError) as error:
        trainer(
            tiny_checkpoint("bert", seed=1),
            tmp_path,
            data=triples(31),
            loss=functools.partial(losses.info_nce, scale=5.0),
            evaluator=NormEvaluator(),
            epochs=2,
            learning_rate=2e-3,
            log_steps=7,
            keep_checkpoints=3,
        ).train(resume=True)
    assert str(error.value) == (
        f"{tmp_path}: cannot resume, this is not the run that began there: "
        "epochs: was 1, now 2; learning_rate: was 0.001, now 0.002; "
        "loss: was 'info_nce', now 'info_nce(scale=5.0)'; metric: was None, now 'ndcg@10'; "
        "evaluation set: is new; model: has other content now; training data 1: has other content now"
    )


def test_a_run_is_not_overwritten_by_another(checkpoint, tmp_path):
    trainer(checkpoint, tmp_path, max_steps=1).train()
    with pytest.raises(UsageError, match="holds a run already; resume it, or train into another folder"):
        trainer(checkpoint, tmp_path, max_steps=1).train()
    (tmp_path / "checkpoints" / "run.json").write_text('{"format": 1, "recipe": ')
    with pytest.raises(ArtifactError, match=r"run\.json: is damaged"):
        trainer(checkpoint, tmp_path, max_steps=1).train(resume=True)
    (tmp_path / "checkpoints" / "run.json").write_text('{"format": 9}')
    with pytest.raises(ArtifactError, match=r"run\.json: is of format 9; expected 1"):
        trainer(checkpoint, tmp_path, max_steps=1).train(resume=True)


def test_the_best_weights_are_kept_and_are_what_the_model_has_in_the_end(checkpoint, tmp_path):
    evaluator = ScriptedEvaluator(0.5, 0.6, 0.7, 0.7, 0.4)
    built = trainer(checkpoint, tmp_path, evaluator=evaluator, epochs=4)
    outcome = built.train()
    assert outcome.before == {"ndcg@10": 0.5, "mrr@10": 0.25}
    assert [(step, metrics["ndcg@10"]) for step, metrics in outcome.evaluations] == [
        (4, 0.6), (8, 0.7), (12, 0.7), (16, 0.4)
    ]  # fmt: skip
    assert (outcome.best_step, outcome.steps, outcome.after["ndcg@10"]) == (8, 16, 0.7)
    assert outcome.interval == pytest.approx((0.2, 0.2))
    assert steps(tmp_path) == [8, 16]
    assert same(weights_of(built.model), weights_of(RetrievalModel.load(tmp_path / "checkpoints" / "step-8")))


def test_the_best_is_that_of_training_even_if_the_untrained_model_was_better(checkpoint, tmp_path):
    outcome = trainer(checkpoint, tmp_path, evaluator=ScriptedEvaluator(0.9, 0.3, 0.2, 0.1)).train()
    assert (outcome.best_step, outcome.after["ndcg@10"], outcome.before["ndcg@10"]) == (4, 0.3, 0.9)


@pytest.mark.parametrize(
    ("options", "evaluated", "kept"),
    [
        ({}, [4, 8, 12], [12]),
        ({"keep_checkpoints": 2}, [4, 8, 12], [8, 12]),
        ({"eval_steps": 5, "keep_checkpoints": 9}, [5, 10, 12], [5, 10, 12]),
        # The best one is at 4: kept although checkpoints are written at other steps.
        ({"save_steps": 5, "keep_checkpoints": 9}, [4, 8, 12], [4, 5, 10, 12]),
        ({"max_steps": 6, "keep_checkpoints": 9}, [4, 6], [4, 6]),
        ({"epochs": 1.5, "keep_checkpoints": 9}, [4, 6], [4, 6]),
    ],
)
def test_when_it_evaluates_and_which_checkpoints_stay(checkpoint, tmp_path, options, evaluated, kept):
    values = [0.5, 0.9, 0.8, 0.7] if "save_steps" in options else [0.5, 0.6, 0.7, 0.8]
    outcome = trainer(checkpoint, tmp_path, evaluator=ScriptedEvaluator(*values), **options).train()
    assert [step for step, _ in outcome.evaluations] == evaluated
    assert steps(tmp_path) == kept


def test_a_finished_run_that_is_resumed_measures_and_trains_nothing(checkpoint, tmp_path):
    first = trainer(checkpoint, tmp_path, evaluator=ScriptedEvaluator(0.5, 0.9, 0.7, 0.6))
    expected = first.train()
    again = trainer(checkpoint, tmp_path, evaluator=ScriptedEvaluator())
    assert again.train(resume=True) == expected
    assert same(weights_of(again.model), weights_of(first.model))


def test_a_finished_run_that_ended_within_an_epoch_takes_no_further_step(checkpoint, tmp_path):
    first = trainer(checkpoint, tmp_path, max_steps=6)
    expected = first.train()
    again = trainer(checkpoint, tmp_path, max_steps=6)
    assert again.train(resume=True) == expected
    assert expected.steps == 6
    assert same(weights_of(again.model), weights_of(first.model))


def test_a_checkpoint_opens_as_a_model(checkpoint, tmp_path):
    built = trainer(checkpoint, tmp_path, max_steps=2)
    built.train()
    saved = RetrievalModel.load(tmp_path / "checkpoints" / "step-2")
    assert same(weights_of(saved), weights_of(built.model))
    assert saved.contract == built.model.contract


def test_processes_that_tokenise_ahead_change_nothing(checkpoint, tmp_path):
    alone, ahead = (trainer(checkpoint, tmp_path / str(n), workers=n, max_steps=6) for n in (0, 1))
    assert alone.train() == ahead.train()
    assert same(weights_of(alone.model), weights_of(ahead.model))
    pickle.loads(pickle.dumps(ahead.data_collator))  # where processes are not forked


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(checkpoint, tmp_path):
    calls = []

    def loss(queries, documents, targets):
        calls.append(1)
        return losses.info_nce(queries, documents, targets) * (float("nan") if len(calls) == 6 else 1.0)

    built = trainer(checkpoint, tmp_path, loss=loss, save_steps=2)
    with pytest.raises(TrainingError) as error:
        built.train()
    good = tmp_path / "checkpoints" / "step-4"
    listed = tmp_path / "checkpoints" / "stopped-6.json"
    batch = [built.train_dataset.where(row) for row in [*built.sampler.plan(1)][1]]
    assert str(error.value).startswith(
        f"step 6: the loss is nan; the batch: {', '.join(batch[:3])} and so on, {len(batch)} rows, all in {listed}; "
        f"last good checkpoint: {good}. "
    )
    assert json.loads(listed.read_text()) == {"step": 6, "problem": "the loss is nan", "rows": batch}
    assert all(torch.isfinite(weights).all() for weights in built.model.parameters())


def test_a_gradient_that_is_no_number_stops_before_it_spoils_the_weights(checkpoint, tmp_path):
    def loss(queries, documents, targets):
        # The square root of an exact zero: the value is finite, its slope is not.
        return losses.info_nce(queries, documents, targets) + (queries - queries.detach()).abs().sum().sqrt()

    built = trainer(checkpoint, tmp_path, loss=loss)
    with pytest.raises(TrainingError, match=r"step 1: the norm of the gradient is nan; .* none was written yet"):
        built.train()
    assert all(torch.isfinite(weights).all() for weights in built.model.parameters())


@pytest.mark.parametrize("evaluator", [None, NormEvaluator()])
def test_weights_that_the_last_step_spoiled_are_not_saved(checkpoint, tmp_path, evaluator):
    arguments = {"learning_rate": 1e38, "max_steps": 1, "warmup_ratio": 0}
    built = trainer(checkpoint, tmp_path, evaluator=evaluator, **arguments)
    with pytest.raises(TrainingError, match=r"step 1: the model's outputs are not finite after it; .* none was"):
        built.train()
    assert steps(tmp_path) == []


@pytest.mark.parametrize(("rank", "cut"), [(None, True), (2, True), (2, False)])
def test_a_damaged_checkpoint_is_one_error(checkpoint, tmp_path, rank, cut):
    def run():
        return trainer(checkpoint, tmp_path, lora_rank=rank, save_steps=2, epochs=1)

    run().train()
    state = tmp_path / "checkpoints" / "step-4" / "trainer_state.json"
    # As if killed after step 2.
    state.write_text(state.read_text().replace('"global_step": 4', '"global_step": 2'))
    own = ["model.safetensors"] if rank is None else ["adapter_state.safetensors"]
    for name in [*own, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]:
        content = (state.parent / name).read_bytes()
        if cut:
            (state.parent / name).write_bytes(content[: len(content) // 2])
        else:
            (state.parent / name).unlink()
        with pytest.raises(CheckpointError, match=re.escape(str(state.parent))):
            run().train(resume=True)
        (state.parent / name).write_bytes(content)
    run().train(resume=True)


def test_a_disk_that_is_full_is_one_error(checkpoint, tmp_path, monkeypatch):
    built = trainer(checkpoint, tmp_path, save_steps=2)
    save = torch.save

    def fills_up(state, path, **options):
        if built.state.global_step == 4 and str(path).endswith("optimizer.pt"):
            # What torch says then.
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 168704 vs 168596\nstack")
        save(state, path, **options)

    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(CheckpointError) as error:
        built.train()
    assert str(error.value).startswith(f"{tmp_path}/checkpoints/step-4: cannot be written, is the disk full? [enforce")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["run.json", "step-2"]


def test_a_loss_that_is_always_zero_is_a_warning(checkpoint, tmp_path):
    told = {}
    for size in (1, 8):
        console = Console(file=io.StringIO(), width=200)
        data = [{"query": row["query"], "positive": row["positive"]} for row in triples(8)]
        trainer(checkpoint, tmp_path / str(size), data=data, progress=Progress(console), batch_size=size).train()
        told[size] = console.file.getvalue()
    assert "warning: the loss was 0 in every batch, so nothing was learned" in told[1]
    assert "warning" not in told[8]


def test_bf16_rounds_the_forward_pass_and_neither_the_weights_nor_the_evaluation(checkpoint, tmp_path):
    class Vectors(NormEvaluator):
        def __call__(self, model, *, progress):
            vectors = Embedder(model.preprocessor, model.engine()).embed(["code"])
            # Numbers that bfloat16 cannot hold.
            self.exact = bool((torch.tensor(vectors).bfloat16().float().numpy() != vectors).any())
            return super().__call__(model, progress=progress)

    plain, rounded = (
        trainer(checkpoint, tmp_path / str(on), max_steps=1, bf16=on, evaluator=Vectors()) for on in (False, True)
    )
    first, second = plain.train(), rounded.train()
    assert first.losses != second.losses
    assert first.losses[0][1] == pytest.approx(second.losses[0][1], rel=0.05)
    assert {weights.dtype for weights in rounded.model.parameters()} == {torch.float32}
    assert rounded.evaluator.exact


@pytest.mark.parametrize(
    "architecture", ["bert", "distilbert", "roberta", "mpnet", "modernbert", "deberta-v2", "qwen3"]
)
def test_without_dropout_training_sees_what_evaluation_sees(tiny_checkpoint, architecture):
    model = RetrievalModel.load(tiny_checkpoint(architecture))
    batch = Collator(model.preprocessor, task="embed")([(0, Example("the code of a model", ("text",), (1.0,)))])
    chunk = {name: torch.from_numpy(array) for name, array in model.preprocessor.collate(batch.sides[0]).items()}
    with torch.no_grad():
        expected = model(chunk)
        set_dropout(model, 0.5)
        assert not torch.equal(model.train()(chunk), expected)
        set_dropout(model, 0.0)
        # Attention may take another path in training, so the last bits may differ.
        assert torch.allclose(model(chunk), expected, atol=1e-6)


def test_dropout_is_an_option_and_changes_nothing_that_is_saved(checkpoint, tmp_path):
    built = trainer(checkpoint, tmp_path, dropout=0.0, max_steps=1)
    assert {module.p for module in built.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    built.model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_text() == (checkpoint / "config.json").read_text()


def test_data_that_was_read_for_another_loss_is_an_error(checkpoint, tmp_path):
    pairs = TrainingData.from_rows([{"query": "q", "document": "d", "label": 1}], needs="labels")
    with pytest.raises(UsageError, match="loss info_nce: needs rows with positives; the data was read for labels"):
        trainer(checkpoint, tmp_path, data=pairs)


def test_a_guided_loss_without_guide_is_an_error(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="loss gist: needs a guide"):
        trainer(checkpoint, tmp_path, loss=losses.gist)


def test_a_guide_keeps_false_negatives_out(checkpoint, tmp_path):
    """A guide that finds all texts alike leaves no negative, and nothing to learn."""

    class Alike:
        def embed(self, texts, *, prompt):
            assert prompt in ("query", "document")
            return np.ones((len(texts), 3), dtype=np.float32)

    loss = functools.partial(losses.gist, guide_margin=0.5)
    built = Trainer(
        RetrievalModel.load(checkpoint),
        TrainingArguments(output=str(tmp_path), batch_size=8, max_steps=1, log_steps=1),
        train_dataset=triples(),
        loss=loss,
        guide=Alike(),
        progress=quiet(),
    )
    assert built.train().losses == [(1, 0.0)]


def test_a_diverging_loss_stops_the_run(checkpoint, tmp_path):
    calls = []

    def loss(queries, documents, targets):
        calls.append(1)
        return losses.info_nce(queries, documents, targets) * (1 if len(calls) < 25 else 100)

    built = trainer(checkpoint, tmp_path, loss=loss, epochs=20, save_steps=20)
    with pytest.raises(TrainingError, match=r"step 34: the loss diverges: at least .* in each of the last 10 batches"):
        built.train()


def test_a_run_stops_when_evaluations_get_no_better(checkpoint, tmp_path):
    values = [0.5, 0.6, 0.7, 0.6, 0.7, 0.9]
    built = trainer(checkpoint, tmp_path, evaluator=ScriptedEvaluator(*values), epochs=5, patience=2)
    outcome = built.train()
    # The third and the fourth are no better than the second.
    assert (outcome.steps, outcome.best_step, outcome.after["ndcg@10"]) == (16, 8, 0.7)
    again = trainer(checkpoint, tmp_path, evaluator=ScriptedEvaluator(), epochs=5, patience=2)
    assert again.train(resume=True) == outcome
    assert same(weights_of(again.model), weights_of(built.model))


def test_the_gradient_cache_trains_the_same_model(checkpoint, tmp_path):
    plain, cached = (
        trainer(checkpoint, tmp_path / str(held), activation_tokens=held, chunk_tokens=40, dropout=0.3, epochs=2)
        for held in (None, 0)
    )
    expected, found = plain.train(), cached.train()
    assert [loss for _, loss in found.losses] == pytest.approx([loss for _, loss in expected.losses], abs=1e-4)


def test_adapters_resume_bit_for_bit_and_are_merged_in_what_is_saved(checkpoint, tmp_path):
    options = {"lora_rank": 4, "lora_dropout": 0.1, "save_steps": 6, "keep_checkpoints": 2}
    unbroken = trainer(checkpoint, tmp_path / "unbroken", **options)
    unbroken.train()
    start = weights_of(RetrievalModel.load(checkpoint))
    # The weights below the adapters are those it started from.
    for name, weights in weights_of(unbroken.model).items():
        if "lora_" not in name:
            assert torch.equal(weights, start[name.replace(".base_layer", "")])
    shutil.copytree(tmp_path / "unbroken", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-12")
    resumed = trainer(checkpoint, tmp_path / "stopped", **options)
    resumed.train(resume=True)
    assert same(weights_of(resumed.model), weights_of(unbroken.model))
    saved = RetrievalModel.load(tmp_path / "unbroken" / "checkpoints" / "step-12")
    texts = ["how are you", "code"]
    vectors = [Embedder(model.preprocessor, model.engine()).embed(texts) for model in (saved, unbroken.model)]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6
    base = RetrievalModel.load(checkpoint)
    assert np.abs(vectors[0] - Embedder(base.preprocessor, base.engine()).embed(texts)).max() > 1e-3


def test_frozen_parts_stay_and_groups_have_their_own_rates(checkpoint, tmp_path):
    built = trainer(
        checkpoint, tmp_path, freeze=("embeddings", "layers:0"), learning_rates=("*.output.*=1e-9",), max_steps=2
    )
    before = weights_of(built.model)
    built.train()
    moved = {name: float((weights - before[name]).abs().max()) for name, weights in built.model.state_dict().items()}
    for name, change in moved.items():
        if "embeddings" in name or ".layer.0." in name:
            assert change == 0, name
        elif ".layer.1." in name and ".output." in name:
            assert 0 <= change < 1e-6, name
        elif ".layer.1." in name and "key.bias" not in name:
            assert change > 1e-5, name


@pytest.mark.parametrize("name", ["gradient_checkpointing"])
def test_checkpointed_activations_give_the_same_model(checkpoint, tmp_path, name):
    plain, other = (trainer(checkpoint, tmp_path / str(on), max_steps=3, **{name: on}) for on in (False, True))
    plain.train()
    other.train()
    assert other.model.backbone.is_gradient_checkpointing
    one, two = weights_of(plain.model), weights_of(other.model)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_losses_are_described_with_what_is_bound_to_them():
    assert describe_loss(losses.bce) == "bce"
    assert describe_loss(functools.partial(losses.info_nce, scale=30.0)) == "info_nce(scale=30.0)"


def test_progress_without_a_terminal_is_a_line_a_report(checkpoint, tmp_path, capfd):
    said = io.StringIO()
    progress = Progress(Console(file=said, width=200))
    options = {"log_steps": 2, "max_steps": 4, "evaluator": ScriptedEvaluator(0.5, 0.625)}
    trainer(checkpoint, tmp_path, progress=progress, **options).train()
    lines = said.getvalue().splitlines()
    assert lines[0] == "before training: ndcg@10 0.5000"
    assert [line.split("  ")[0] for line in lines[1:3]] == ["step 2/4", "step 4/4"]
    assert re.fullmatch(r"step 2/4  loss \d\.\d{4}  lr \d\.\d\de-\d\d  \d:\d\d, \d:\d\d left", lines[1])
    assert lines[3:] == ["step 4: ndcg@10 0.6250 (+0.1250)"]
    # Nothing of transformers' own: no bars, no dictionaries.
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(checkpoint, tmp_path):
    said = io.StringIO()
    progress = Progress(Console(file=said, width=100, force_terminal=True, color_system=None))
    trainer(checkpoint, tmp_path, max_steps=2, progress=progress, evaluator=NormEvaluator()).train()
    assert "step 2/2 ━" in said.getvalue()
    assert "left" in said.getvalue()
    assert "loss" in said.getvalue()


def test_reading_has_a_bar_of_rows():
    said = io.StringIO()
    progress = Progress(Console(file=said, width=100, force_terminal=True, color_system=None))
    with progress.reading() as report:
        report(50, 0.25)
        report(75, None)
    assert "reading" in said.getvalue()
    # The bars are free for the training then.
    with progress:
        pass


def test_an_error_out_of_a_worker_is_the_error_itself():
    try:
        raise DataError("training data: image 1.png: damaged")
    except DataError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 1")
    with pytest.raises(DataError) as caught:
        wrapped.reraise()
    assert "Traceback" in str(caught.value)
    assert str(train._out_of_a_worker(caught.value)) == "training data: image 1.png: damaged"
    plain = DataError("training data: empty")
    assert train._out_of_a_worker(plain) is plain
