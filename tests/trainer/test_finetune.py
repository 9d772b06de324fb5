from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sentence_transformers import CrossEncoder

from rtx.runtime.candidates import Candidate, read_candidates, write_candidates
from rtx.runtime.cli import main
from rtx.runtime.errors import CheckpointError
from rtx.runtime.evalset import load_evalset
from rtx.runtime.evaluation import evaluate_candidates, evaluate_reranker
from rtx.runtime.reranker import Reranker
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.model import RetrievalModel
from rtx.trainer.train import Trainer

WORDS = ["how", "are", "what", "code", "list", "file", "model", "text", "query", "the", "with", "that"]


def rows(count=24):
    return [
        {
            "query": f"{WORDS[i % 12]} {i}",
            "positive": f"{WORDS[(i + 5) % 12]} {i} {WORDS[i // 12]}",
            "negative": f"the {i}",
        }
        for i in range(count)
    ]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with training data, an evaluation set and candidates, as the working directory."""
    write_jsonl(tmp_path / "pairs.jsonl", rows())
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_jsonl(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": row["positive"]} for i, row in enumerate(rows())])
    write_jsonl(beir / "queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows())])
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(24))
    (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    ranked = [{"query-id": f"q{i}", "corpus-ids": [f"d{(i + k) % 24}" for k in range(5)]} for i in range(24)]
    write_jsonl(tmp_path / "first.jsonl", ranked)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return str(tiny_checkpoint("bert"))


def rtx(line, **options):
    words = shlex.split(line)
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return CliRunner().invoke(main, ["finetune", *words])


def embed(base, line="", **options):
    defaults = {"batch_size": 8, "epochs": 2, "threads": 1, "learning_rate": 1e-3}
    return rtx(f"--task embed --train pairs.jsonl -o tuned {line}", model=base, **{**defaults, **options})


def weights_of(folder):
    return RetrievalModel.load(folder).state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_embedder_from_the_command_line(work, base):
    result = embed(base, eval="beir", max_tokens=32, log_steps=3)
    assert result.exit_code == 0, result.output
    model = RetrievalModel.load(work / "tuned")
    assert model.contract == dataclasses.replace(RetrievalModel.load(base).contract, max_tokens=32)
    assert not same(model.state_dict(), weights_of(base))
    assert "24 rows with 48 documents from pairs.jsonl" in result.stderr
    assert "step 3/6  loss " in result.stderr
    assert "│ ndcg@10     │ 0." in result.stdout
    assert "ndcg@10 changed by " in result.stdout
    assert "tuned: weights of step " in result.stdout
    assert sorted(path.name for path in work.iterdir()) == ["beir", "first.jsonl", "pairs.jsonl", "tuned"]
    assert not (work / "tuned" / "checkpoints" / "final").exists()
    card = (work / "tuned" / "README.md").read_text()
    typed = ["--task", "embed", "--train", "pairs.jsonl", "--output", "tuned", "--model", base, "--batch-size", "8"]
    typed += ["--epochs", "2.0", "--threads", "1", "--learning-rate", "0.001", "--eval", "beir"]
    typed += ["--max-tokens", "32", "--log-steps", "3"]
    assert f"\n{shlex.join(['rtx', 'finetune', *typed])}\n" in card


def test_a_reranker_from_a_file_of_options(work, base):
    (work / "run.toml").write_text(
        f'task = "rerank"\nmodel = "{base}"\ntrain = ["pairs.jsonl"]\noutput = "judge"\neval = "beir"\n'
        'candidates = "first.jsonl"\nmetric = "mrr@5"\nepochs = 9\nbatch_size = 16\nlearning_rate = 1e-3\nthreads = 1\n'
        'query_prompt = "judge: "\n'
    )
    result = rtx("--config run.toml --epochs 1")
    assert result.exit_code == 0, result.output
    assert "24 rows with 48 documents from pairs.jsonl" in result.stderr
    assert "before training: mrr@5 " in result.stderr
    model = RetrievalModel.load(work / "judge")
    assert model.task == "rerank"
    assert model.contract.prompt_text(model.contract.default_prompt) == "judge: "
    card = (work / "judge" / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card
    assert "ranking the first-stage candidates of each query" in card
    assert "| metric | first stage | before | after | change |" in card
    assert "loss:BinaryCrossEntropyLoss" in card
    candidates = read_candidates(work / "first.jsonl", load_evalset(work / "beir"))
    first = evaluate_candidates(load_evalset(work / "beir"), candidates, k=5).metrics["mrr@5"]
    assert f"│ mrr@5      │      {first:.4f} │" in result.stdout
    assert "ndcg@5 differs from the first stage's order by " in result.stdout
    assert "rtx finetune --config run.toml --epochs 1.0" in card
    # The head is new: it comes from the seed too.
    assert rtx("--config run.toml --epochs 1 -o again").exit_code == 0
    assert same(weights_of(work / "again"), weights_of(work / "judge"))


def test_every_option_is_a_flag():
    described = CliRunner().invoke(main, ["finetune", "--help"]).output
    for item in dataclasses.fields(FinetuneConfig):
        assert f"--{item.name.replace('_', '-')} " in described, item.name


@pytest.mark.parametrize(
    ("line", "exit_code", "message"),
    [
        ("--epoch 3", 2, "No such option '--epoch'. Did you mean '--epochs'?"),
        ("--task embed", 2, "error: options: missing key 'output'; missing key 'model'; missing key 'train'"),
        ("--task rank", 2, "'rank' is not one of 'embed', 'rerank'"),
        ("--config none.toml", 2, "error: none.toml: cannot be read"),
        ("--config bad.toml", 2, "error: bad.toml: unknown key 'batchsize' (did you mean 'batch_size'?"),
        ("--task embed -m BASE --train none.jsonl -o o", 4, "error: none.jsonl: cannot be read: No such file"),
        (
            "--task embed -m BASE --train first.jsonl -o o",
            4,
            "error: training data: 24 problems:\n  first.jsonl:1: has no",
        ),
        ("--task embed -m none --train pairs.jsonl -o o", 5, "error: none"),
        ("--task embed -m BASE --train pairs.jsonl -o o --eval none", 4, "error: none: is no evaluation set"),
        ("--task embed -m BASE --train pairs.jsonl -o o --eval beir --metric ndgc", 2, "error: metric 'ndgc' does not"),
        ("--task embed -m BASE --train pairs.jsonl -o o --max-tokens 65", 2, "error: max_tokens: expected at most 64"),
        ("--task embed -m BASE --train pairs.jsonl -o first.jsonl", 2, "error: first.jsonl: is in the way"),
        ("--task embed -m BASE --train pairs.jsonl -o beir", 2, "error: beir: is in the way: neither an empty folder"),
        ("--task embed -m BASE --train beir/p.jsonl -o beir", 2, "error: beir: the output folder holds beir/p.jsonl"),
        (
            "--task embed -m BASE --train pairs.jsonl -o o --resume --overwrite",
            2,
            "error: resume and overwrite: choose",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(work, base, line, exit_code, message):
    (work / "bad.toml").write_text('task = "embed"\nbatchsize = 3\n')
    result = rtx(line.replace("BASE", base))
    assert message in result.stderr
    assert result.exit_code == exit_code
    assert not (work / "o").exists()


def test_a_finished_output_is_replaced_only_when_told(work, base):
    assert embed(base, max_steps=1).exit_code == 0
    first = weights_of(work / "tuned")
    again = embed(base, max_steps=2)
    assert (again.exit_code, again.stderr) == (2, "error: tuned: holds a finished model; --overwrite replaces it\n")
    # Whatever is wrong is found before the old model goes.
    assert embed(base, "--overwrite --train none.jsonl", max_steps=2).exit_code == 4
    assert same(weights_of(work / "tuned"), first)
    # A finished run has nothing left to do.
    resumed = embed(base, "--resume", max_steps=1)
    assert resumed.exit_code == 0
    assert same(weights_of(work / "tuned"), first)
    assert embed(base, "--overwrite", max_steps=2).exit_code == 0
    assert not same(weights_of(work / "tuned"), first)


def test_a_run_that_was_killed_in_its_first_evaluation_is_not_in_the_way(work, base):
    folder = work / "tuned" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "ndcg-0.npy").write_bytes(b"half")
    assert embed(base, "--resume", max_steps=1).exit_code == 0
    assert (work / "tuned" / "config.json").is_file()
    # Whatever else lies there is nobody's run.
    (work / "other" / "checkpoints").mkdir(parents=True)
    (work / "other" / "notes.txt").write_text("mine")
    result = embed(base, "-o other", max_steps=1)
    assert (result.exit_code, (work / "other" / "notes.txt").read_text()) == (2, "mine")


def test_a_model_that_no_run_left_cannot_be_resumed(work, base):
    RetrievalModel.load(base).save(work / "tuned")
    result = embed(base, "--resume")
    assert (result.exit_code, result.stderr) == (
        2, "error: tuned: holds a model, but no run that could be resumed (no checkpoints/run.json)\n"
    )  # fmt: skip


def test_ctrl_c_says_how_to_go_on_and_going_on_gives_the_same_model(work, base, monkeypatch):
    assert embed(base).exit_code == 0
    expected = weights_of(work / "tuned")
    (work / "tuned").rename(work / "unbroken")
    step = Trainer.training_step

    def interrupted(self, *arguments):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        result = embed(base, save_steps=2)
    assert result.exit_code == 130
    newest = os.path.join("tuned", "checkpoints", "step-4")
    assert f"interrupted; newest checkpoint: {newest}\ncontinue with: rtx finetune --task embed" in result.stderr
    assert result.stderr.endswith(" --resume\n")
    blocked = embed(base)
    assert (blocked.exit_code, blocked.stderr) == (
        2,
        "error: tuned: holds an unfinished run (step-4); --resume continues it, --overwrite starts over\n",
    )
    with pytest.raises(CheckpointError):
        RetrievalModel.load(work / "tuned")
    command = result.stderr.rpartition("continue with: rtx finetune ")[2]
    resumed = rtx(command)
    assert resumed.exit_code == 0
    assert f"resuming from {newest}" in resumed.stderr
    assert same(weights_of(work / "tuned"), expected)


@pytest.mark.parametrize("moved", [0, 3])
def test_an_output_that_is_half_there_is_no_model(work, base, monkeypatch, moved):
    replace, left = os.replace, [moved]

    def stops(source, target):
        if "final" in str(source):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stops)
        assert embed(base, max_steps=1).exit_code == 130
    with pytest.raises(CheckpointError):
        RetrievalModel.load(work / "tuned")
    assert embed(base, "--resume", max_steps=1).exit_code == 0
    assert same(weights_of(work / "tuned"), weights_of(work / "tuned" / "checkpoints" / "step-1"))


@pytest.mark.usefixtures("work")
def test_a_loss_that_explodes_ends_the_run(base):
    result = embed(base, learning_rate=1e30, warmup_ratio=0.0, save_steps=1)
    assert result.exit_code == 7
    assert "error: step 1: the model's outputs are not finite after it" in result.stderr
    assert "last good checkpoint: none was written yet." in result.stderr


@pytest.mark.usefixtures("work")
def test_a_model_that_became_worse_is_kept_with_a_warning(base):
    result = embed(base, eval="beir", learning_rate=0.3, max_steps=4, eval_steps=4)
    assert result.exit_code == 0
    assert "warning: ndcg@10 is lower than before finetuning (0." in result.stderr
    assert "weights of step 4 of 4" in result.stdout


@pytest.mark.usefixtures("work")
def test_a_dry_run_says_what_a_run_will_need_and_writes_nothing(work, base):
    before = sorted(work.rglob("*"))
    result = embed(base, "--dry-run", epochs=3, matryoshka="32,16")
    assert result.exit_code == 0, result.output
    # 24 rows in batches of 8, three times.
    assert re.search(r"steps +9\b", result.stdout)
    assert re.search(r"rows a step +8 +24 texts", result.stdout)
    assert re.search(r"memory +[\d.]+ MiB +an estimate", result.stdout)
    assert sorted(work.rglob("*")) == before


def test_adapters_are_merged_and_saved_alone_and_the_card_shows_the_curve(work, base):
    line = "--lora-targets query --lora-targets value --tensorboard"
    result = embed(base, line, lora_rank=2, query_prompt="find: ", log_steps=1, max_steps=3)
    assert result.exit_code == 0, result.output
    tuned, start = weights_of(work / "tuned"), weights_of(base)
    moved = {name for name, weights in tuned.items() if not torch.equal(weights, start[name])}
    assert moved == {name for name in start if name.endswith((".query.weight", ".value.weight"))}
    assert RetrievalModel.load(work / "tuned").contract.prompts["query"] == "find: "
    adapter = json.loads((work / "tuned" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (2, str(base))
    assert "](training.svg)" in (work / "tuned" / "README.md").read_text()
    assert "</svg>" in (work / "tuned" / "training.svg").read_text()
    assert list((work / "tuned" / "checkpoints" / "runs").rglob("events.out.tfevents.*"))


def test_a_guide_on_the_command_line(work, base):
    result = embed(base, f"--loss gist --guide {base} --guide-margin 0.1", max_steps=1, log_steps=1)
    assert result.exit_code == 0, result.output
    assert "loss:GISTEmbedLoss" in (work / "tuned" / "README.md").read_text()
    assert "gist(guide_margin=0.1)" in (work / "tuned" / "README.md").read_text()


def test_a_reranker_on_top_of_a_first_stage(work, base):
    """From mined scores to a bundle: what is added in training is added in use."""
    run = CliRunner().invoke
    mined = run(main, ["mine", base, "pairs.jsonl", "-o", "lists.jsonl", "--first-stage", "--negatives", "3"])
    assert mined.exit_code == 0, mined.output
    assert run(main, ["eval", base, "beir", "--save-candidates", "found.jsonl", "--depth", "10"]).exit_code == 0
    result = rtx(
        "--task rerank --train lists.jsonl -o judge --loss cross_entropy --first-stage-weight 20 --eval beir "
        "--candidates found.jsonl --batch-size 8 --threads 1 --learning-rate 1e-3",
        model=base,
    )
    assert result.exit_code == 0, result.output
    model = RetrievalModel.load(work / "judge")
    assert (model.contract.first_stage_weight, model.contract.activation) == (20.0, "identity")
    card = (work / "judge" / "README.md").read_text()
    assert "first_stage=[0.61, 0.58], top_k=10)" in card
    assert "scores = logits + 20 * np.array([0.61, 0.58])" in card
    assert "Loss: `first_stage(loss=cross_entropy, weight=20.0)`" in card

    # Without the flag, what the model has counts; and a run that is told its steps ahead needs the scores too.
    further = rtx(
        "--task rerank --train lists.jsonl -o further --loss cross_entropy --threads 1 --max-steps 2 --save-steps 1 "
        "--batch-size 8 --gradient-accumulation-steps 2 --activation-tokens 0 --chunk-tokens 64",
        model=str(work / "judge"),
    )
    assert further.exit_code == 0, further.output
    assert RetrievalModel.load(work / "further").contract.first_stage_weight == 20.0
    planned = rtx("--task rerank --train lists.jsonl -o x --loss cross_entropy --dry-run", model=str(work / "judge"))
    assert planned.exit_code == 0, planned.output
    exported = run(main, ["export", "judge", "-o", "judge.rtx", "--eval", "beir", "--candidates", "found.jsonl"])
    assert exported.exit_code == 0, exported.output
    evalset = load_evalset(work / "beir")
    candidates = read_candidates(work / "found.jsonl", evalset)
    pairs = [(evalset.queries[query], evalset.corpus[one.document]) for query, row in candidates.items() for one in row]
    first_stage = [one.score for row in candidates.values() for one in row]
    with Reranker.open(work / "judge.rtx", threads=1) as judge:
        scores = judge.score(pairs, first_stage=first_stage)
        found = evaluate_reranker(judge, evalset, candidates)
    # sentence-transformers opens the same folder, and gives what is added to.
    logits = CrossEncoder(str(work / "judge"), device="cpu").predict(pairs)
    np.testing.assert_allclose(scores, logits + 20 * np.array(first_stage), atol=1e-4)
    assert f"{found.metrics['ndcg@10']:.4f}" in result.stdout

    unscored = {query: [Candidate(one.document) for one in row] for query, row in candidates.items()}
    write_candidates(unscored, work / "unscored.jsonl")
    refused = run(main, ["eval", "judge.rtx", "beir", "--candidates", "unscored.jsonl"])
    assert refused.exit_code == 4
    assert "query 'q0': document '" in refused.stderr
    # Found before anything that is there is removed.
    line = "--task rerank --train lists.jsonl -o judge --overwrite --eval beir --candidates unscored.jsonl --threads 1"
    copied = work / "start"
    (work / "judge").rename(copied)
    model.save(work / "judge")
    refused = rtx(f"{line} --loss cross_entropy", model=str(copied))
    assert refused.exit_code == 4, refused.output
    assert "a reranker on top of a first stage needs its scores" in refused.stderr
    assert (work / "judge" / "config.json").exists()


@pytest.mark.usefixtures("work")
def test_a_first_stage_that_the_data_does_not_have(base):
    result = rtx("--task rerank --train pairs.jsonl -o judge --first-stage-weight 20", model=base)
    assert result.exit_code == 4
    assert "pairs.jsonl:1: has no first_stage; it has negative, positive, query" in result.stderr
    result = rtx("--task embed --train pairs.jsonl -o tuned --first-stage-weight 20", model=base)
    assert result.exit_code == 2
    assert "first_stage_weight: only a reranker is on top of a first stage" in result.stderr


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_prompt_that_leaves_no_room_for_a_text(work, base, task):
    prompt = " ".join(WORDS)
    line = f"--task {task} --train pairs.jsonl -o tuned --max-tokens 60 --max-steps 1"
    assert rtx(line, model=base, query_prompt=prompt).exit_code == 0
    result = rtx(f"{line} --overwrite --max-tokens 8", model=base, query_prompt=prompt)
    assert result.exit_code == 2
    assert "prompt 'query': fills all of the 8 tokens of max_tokens; no text would be read" in result.stderr
    assert (work / "tuned" / "config.json").exists()
