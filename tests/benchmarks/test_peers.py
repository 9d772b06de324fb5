"""The comparison with peers, run with fake ones: nothing is installed, and no model is opened."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from benchmarks.peers import comparison, environments, run, stage, workloads
from benchmarks.peers.catalogue import (
    BASELINE,
    GPU_PEERS,
    OURS,
    OURS_ON_GPU,
    PEERS,
    Peer,
    chosen,
    script_of,
)
from benchmarks.peers.comparison import fitting, held_against
from benchmarks.peers.environments import OWN, REQUIREMENTS, ensure_environment
from benchmarks.peers.process import Worker
from benchmarks.peers.quality import Agreement, Quality, compare_rankings, compare_scores, compare_vectors
from benchmarks.peers.report import Figure, Result, figure, figures, tables
from benchmarks.peers.stage import HERE, Load, Stage, Subject
from benchmarks.peers.tokens import in_batches, mean_pooled, padded
from benchmarks.peers.worker import Source
from benchmarks.peers.workloads import Amounts, Cutter, Judged, Workloads, log_uniform, make_workloads
from rtx.runtime.errors import EngineError

ROOT = Path(__file__).parents[2]
# Vectors are the lengths of texts, beside the number of items in the call and the batch size.
FAKE = """
import os, sys, time
sys.path.append({root!r})
import numpy as np
from benchmarks.peers.worker import attempt, serve

def load(source, form, threads):
    print("a library says something")
    if form == "broken":
        raise ImportError("no such thing\\nat all")
    def run(items, batch_size):
        if items[0] == "die":
            print("last words", file=sys.stderr)
            os._exit(7)
        if items[0] == "sleep":
            time.sleep(60)
        if form == "nan":
            return np.full((len(items), 2), np.nan, dtype=np.float32)
        if source.task == "rerank":
            return np.array([len(passage) for _, passage in items], dtype=np.float32)
        return np.array([[len(item), len(items), batch_size] for item in items], dtype=np.float32)
    return run

def prepare(source, order):
    failed = {{}}
    for form in order.forms:
        with attempt(form, failed):
            if form == "unmade":
                raise ValueError("cannot be made")
            with (source.artifact / "made").open("a") as made:
                made.write(order.calibration.read_text())
    return failed

serve(load=load, prepare=prepare, packages=("numpy",))
"""
SOURCE = {"checkpoint": "/c", "artifact": "/a", "task": "embed"}
LOAD = {**SOURCE, "do": "load", "form": "good", "threads": 1}
RUN = {"do": "run", "items": ["a", "bcd", "ef"], "batch_size": 4, "call_items": None, "out": None}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "with_fake.py"
    path.write_text(FAKE.format(root=str(ROOT)), encoding="utf-8")
    return path


@pytest.fixture
def worker(script: Path, tmp_path: Path) -> Iterator[Worker]:
    made = Worker("fake", [sys.executable, "-P", str(script)], environment=dict(os.environ), log=tmp_path / "log")
    yield made
    made.close()


def state_of(pid: int) -> str:
    """As the system has it: R, S, T for stopped, Z; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_worker_answers_a_line_by_a_line(worker: Worker, tmp_path: Path) -> None:
    answer = worker.ask(LOAD, timeout_s=30)
    assert answer == {"versions": {"numpy": np.__version__}}
    out = tmp_path / "out.npy"
    answer = worker.ask({**RUN, "call_items": 2, "out": str(out)}, timeout_s=30)
    assert np.load(out).tolist() == [[1, 2, 4], [3, 2, 4], [2, 1, 4]]
    assert len(answer["seconds"]) == 2
    assert all(0 <= seconds < 1 for seconds in answer["seconds"])
    assert answer["peak_rss_bytes"] > 5_000_000
    assert len(worker.ask(RUN, timeout_s=30)["seconds"]) == 1
    assert "a library says something" in (tmp_path / "log").read_text()


def test_an_error_is_a_sentence_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(EngineError, match=r"^fake: run: ValueError: run: nothing is loaded$"):
        worker.ask(RUN, timeout_s=30)
    with pytest.raises(EngineError, match=r"^fake: load: ImportError: no such thing$"):
        worker.ask({**LOAD, "form": "broken"}, timeout_s=30)
    assert worker.ask(LOAD, timeout_s=30)["versions"]


def test_a_worker_that_ends_or_hangs_is_named(worker: Worker) -> None:
    worker.ask(LOAD, timeout_s=30)
    with pytest.raises(EngineError, match=r"^fake: run: the process ended with 7: .*last words$"):
        worker.ask({**RUN, "items": ["die"]}, timeout_s=30)
    worker.ask(LOAD, timeout_s=30)
    with pytest.raises(EngineError, match=r"^fake: run: no answer within 0\.3 s$"):
        worker.ask({**RUN, "items": ["sleep"]}, timeout_s=0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_stands_still_until_it_is_asked(worker: Worker) -> None:
    worker.ask(LOAD, timeout_s=30)
    assert worker.pid is not None
    deadline = time.monotonic() + 5
    while state_of(worker.pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(worker.pid) == "T"
    assert worker.ask(RUN, timeout_s=30)["seconds"]
    pid = worker.pid
    worker.close()
    worker.close()
    assert state_of(pid) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a process ends with its parent")
def test_no_worker_outlives_a_driver_that_is_killed(script: Path, tmp_path: Path) -> None:
    driver = f"""
import os, sys, time
sys.path.append({str(ROOT)!r})
from pathlib import Path
from benchmarks.peers.process import Worker
command = [sys.executable, "-P", {str(script)!r}]
worker = Worker("fake", command, environment=dict(os.environ), log=Path({str(tmp_path / "log")!r}))
worker.ask({LOAD!r}, timeout_s=30)
print(worker.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert state_of(pid) != ""
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while state_of(pid) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(pid) in ("", "Z")


@pytest.fixture
def fake_stage(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Its environments are "fake" and "own", of which "own" cannot be had."""
    monkeypatch.setattr(stage, "HERE", script.parent)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"")
    (tmp_path / "calibration").write_text("calibrated ")
    return Stage(checkpoint, "embed", {"fake": Path(sys.executable)}, tmp_path, threads=1, note=lambda _: None)


def fake(name: str, form: str = "good", *, environment: str = "fake", artifact: str | None = None) -> Peer:
    return Peer(name, environment, form, ("minilm",), artifact)


def test_a_peer_that_fails_is_named_and_the_others_go_on(fake_stage: Stage, tmp_path: Path) -> None:
    peers = [
        fake(BASELINE),
        fake("made", artifact="fake"),
        fake("unmade", "unmade", artifact="fake"),
        fake("broken", "broken"),
        fake("nan", "nan"),
        fake("nowhere", environment="own"),
        fake("from nowhere", artifact="own"),
    ]
    with fake_stage.opened(peers, tmp_path / "calibration", {"fake": "1"}):
        pids = [subject.worker.pid for subject in fake_stage.running.values()]
        fake_stage.tune(["text"] * 8, (4, 8))
        vectors = fake_stage.vectors(["a", "bc"])
        loads = [Load("all", ("a", "b", "c")), Load("each", ("a", "b"), call_items=1, latency=True)]
        measured = fake_stage.measure([*loads, Load("last", ("die",))], 2)
    assert vectors[BASELINE][:, :2].tolist() == [[1, 2], [2, 2]]
    assert set(measured["all"]["made"]) == {"per_s"}
    assert len(measured["all"]["made"]["per_s"]) == 1  # it died at the end of the first round
    assert set(measured["each"][BASELINE]) == {"p50_ms", "p95_ms"}
    assert "last" not in measured
    reasons = {name: subject.failed for name, subject in fake_stage.subjects.items()}
    assert reasons["unmade"] == "ValueError: cannot be made"
    assert reasons["broken"] == "broken: load: ImportError: no such thing"
    assert reasons["nan"] == "nan: gave numbers that are not finite"
    assert reasons["nowhere"] == "there is no environment own"
    assert reasons["from nowhere"] == "there is no environment own"
    assert re.match("made: run: the process ended with 7", reasons["made"] or "")
    assert fake_stage.subjects[BASELINE].batch_size in (4, 8)
    assert set(fake_stage.subjects[BASELINE].tuned) == {4, 8}
    assert all(pid is not None and state_of(pid) == "" for pid in pids)


def test_an_artifact_is_made_once_for_a_key(fake_stage: Stage, tmp_path: Path) -> None:
    peers = [fake("made", artifact="fake"), fake("unmade", "unmade", artifact="fake")]
    for key, count, texts, made in (
        ("1", 1, "first", "first"),
        ("1", 2, "second", "second"),  # a form more
        ("1", 2, "third", "second"),
        ("2", 2, "fourth", "fourth"),
        ("2", 1, "fifth", "fourth"),
    ):
        (tmp_path / "calibration").write_text(texts)
        with fake_stage.opened(peers[:count], tmp_path / "calibration", {"fake": key}):
            assert list(fake_stage.running) == ["made"]
        reasons = [subject.failed for subject in fake_stage.subjects.values()]
        assert reasons == [None, "ValueError: cannot be made"][:count]
        assert (tmp_path / "fake" / "made").read_text() == made


def test_a_peer_that_memory_does_not_hold_is_left_out(fake_stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "available_bytes", lambda: 500_000_000)
    with fake_stage.opened([fake("made")], Path("calibration"), {}):
        assert fake_stage.subjects["made"].failed == "memory: 0.7 GB are needed, 0.5 GB are free"


def test_starts_are_processes_of_their_own(fake_stage: Stage, tmp_path: Path) -> None:
    with fake_stage.opened([fake("made")], tmp_path / "calibration", {}):
        fake_stage.subjects["made"].batch_size = 16
    found = fake_stage.cold_start("query", ["a", "b"], 2)["made"]
    assert all(0.02 < seconds < 10 for seconds in found["cold_start_s"])
    assert len(found["peak_rss_mb"]) == 2


def test_a_worker_is_told_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = stage.variables(3)
    assert {found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"], found["RAYON_NUM_THREADS"]} == {"3"}
    assert "PYTHONPATH" not in found
    assert found["PATH"] == os.environ["PATH"]


def test_batches_are_of_similar_length_and_come_back_in_order() -> None:
    seen: list[list[int]] = []

    def forward(places: list[int]) -> np.ndarray:
        seen.append(places)
        return np.array([[place, place] for place in places], dtype=np.float32)

    assert in_batches([3, 9, 5, 1, 7], 2, forward)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert seen == [[1, 4], [2, 0], [3]]
    assert padded([[1, 2, 3], [4]], 0).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_the_mean_leaves_padding_out() -> None:
    hidden = np.array([[[3, 0], [0, 4], [9, 9]], [[0, 2], [9, 9], [9, 9]]], dtype=np.float32)
    pooled = mean_pooled(hidden, np.array([[1, 1, 0], [1, 0, 0]]))
    np.testing.assert_allclose(pooled, [[0.6, 0.8], [0, 1]], atol=1e-7)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # What a checkpoint brings with it must not count.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_texts_are_cut_to_a_number_of_tokens(tokenizer_file: Path) -> None:
    cutter = Cutter(tokenizer_file)
    assert cutter.count("one two") == 4
    assert cutter.cut("one two three  four", 5) == "one two three"
    assert cutter.cut("one two", 5) == "one two"
    texts = iter(["one two", "three four", "five six seven eight"])
    assert cutter.take(texts, 5) == "one two\nthree"
    assert cutter.take(texts, 6) == "five six seven eight"


def test_lengths_are_log_uniform() -> None:
    lengths = log_uniform((16, 256), 200, np.random.default_rng(0))
    assert (min(lengths), max(lengths)) == (16, 254)
    assert sum(length <= 32 for length in lengths) == pytest.approx(50, abs=2)
    assert sum(length <= 64 for length in lengths) == pytest.approx(100, abs=2)
    assert lengths != sorted(lengths)
    assert lengths == log_uniform((16, 256), 200, np.random.default_rng(0))


def test_the_same_packages_make_the_same_texts(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(f"    value_{row} = first + second * {row}" for row in range(12))
    functions = [
        SimpleNamespace(
            identifier=str(number), docstring=f"Add the numbers of list {number} up.", code=f"def f{number}():\n{code}"
        )
        for number in range(20)
    ]
    found = SimpleNamespace(
        queries=[SimpleNamespace(query=f"query {number}", function=functions[number]) for number in (3, 1)],
        documents=functions[:5],
    )
    monkeypatch.setattr(workloads, "installed", list)
    monkeypatch.setattr(workloads, "_functions", lambda _: functions)
    monkeypatch.setattr(workloads, "build", lambda *_: SimpleNamespace(eval=found))
    amounts = Amounts(mix=32, long=3, queries=4)
    made = make_workloads(tokenizer_file, amounts)
    cutter = Cutter(tokenizer_file)
    assert made == make_workloads(tokenizer_file, amounts)
    assert made.mix != make_workloads(tokenizer_file, amounts, seed=1).mix
    assert sorted(made.mix_tokens) == sorted(log_uniform((16, 256), 32, np.random.default_rng()))
    assert list(made.mix_tokens) == [cutter.count(text) for text in made.mix]
    assert [cutter.count(text) for text in made.long] == [512] * 3
    assert all(8 <= cutter.count(text) <= 12 for text in made.queries)
    assert made.pairs[7:9] == ((made.queries[0], made.mix[7]), (made.queries[1], made.mix[8]))
    assert made.judged.queries == ("query 3", "query 1")
    assert made.judged.answers == (3, 1)
    assert all(cutter.count(text) <= 256 for text in made.judged.documents)


JUDGED = Judged(("a", "b"), tuple(f"d{number}" for number in range(12)), (0, 1))


def test_quality_is_told_beside_the_baseline() -> None:
    documents = np.eye(12, dtype=np.float32)
    baseline = np.concatenate([documents[:2] + 0.01 * np.arange(12, 0, -1), documents]).astype(np.float32)
    assert compare_rankings(baseline, baseline, JUDGED) == Quality(
        pytest.approx(1), pytest.approx(1), overlap=1.0, ndcg=1.0, baseline_ndcg=1.0
    )
    # The second query finds the third document first, and its own second.
    found = baseline.copy()
    found[1] = baseline[1] + 2 * documents[2]
    worse = compare_rankings(found, baseline, JUDGED)
    assert worse.ndcg == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert worse.baseline_ndcg == 1.0
    assert worse.min_cosine < 0.6 < worse.mean_cosine < 1


def test_where_nobody_runs_nothing_is_measured(fake_stage: Stage, tmp_path: Path) -> None:
    with fake_stage.opened([fake("broken", "broken")], tmp_path / "calibration", {}):
        fake_stage.tune(["text"], (4, 8))
        assert fake_stage.measure([Load("all", ("a",))], 2) == {}
    assert fake_stage.cold_start("a", ["b"], 1) == {}


def test_what_all_vectors_have_in_common_says_nothing() -> None:
    own = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float32)
    turned = own[:, ::-1]
    assert compare_vectors(own + 100, own + 100).min_cosine == pytest.approx(1)
    assert compare_vectors(turned + 100, own + 100).mean_cosine == pytest.approx(0, abs=1e-6)


def test_scores_agree_by_correlation() -> None:
    baseline = np.array([0, 1, 2], dtype=np.float32)
    assert compare_scores(2 * baseline, baseline) == Agreement(pytest.approx(1), 2.0)


class _Process:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def subject(name: str, **values: object) -> Subject:
    return Subject(fake(name), _Process(), **values)  # type: ignore[arg-type]


def test_vectors_of_another_model_are_not_measured() -> None:
    stage = SimpleNamespace(subjects={name: subject(name) for name in (BASELINE, "near", "far")})
    vectors = {BASELINE: np.ones((2, 2)), "near": np.ones((2, 2)), "far": np.ones((2, 2))}
    cosines = {BASELINE: 1.0, "near": 0.9, "far": float("nan")}
    names = iter(vectors)
    found = held_against(stage, vectors, lambda *_: Quality(cosine := cosines[next(names)], cosine))  # type: ignore[arg-type]
    assert list(found) == [BASELINE, "near", "far"]
    assert stage.subjects["near"].failed is None
    assert stage.subjects["far"].failed == f"vectors: mean cosine to {BASELINE} is nan"
    assert stage.subjects["far"].worker.closed


def test_the_slowest_peer_says_how_many_items_fit() -> None:
    subjects = [subject("fast", batch_size=4, tuned={4: 90.0}), subject("slow", tuned={4: 99.0, 8: 10.0})]
    assert fitting(subjects, 5, least=8) == 50
    assert fitting(subjects, 5, least=64) == 64
    assert fitting(subjects, 5, least=8, most=20) == 20
    assert fitting([], 5, least=8) == 8


def test_ratios_are_within_a_round() -> None:
    assert figure([2, 9, 4], [1, 3]) == Figure(4, 2, 9, 2.5, 2.0, 3.0, (2, 9, 4))
    assert figure([5.0], []) == Figure(5.0, 5.0, 5.0, None, None, None, (5.0,))
    found = figures({"a": {"per_s": [1.0]}, "gone": {}})
    assert found == {"a": {"per_s": Figure(1.0, 1.0, 1.0, None, None, None, (1.0,))}}


def test_tables() -> None:
    rounds = {
        BASELINE: {"p50_ms": [10.0, 12.0], "p95_ms": [20.0, 20.0]},
        "other": {"p50_ms": [4.0, 6.0], "p95_ms": [10.0, 5.0]},
        OURS: {"p50_ms": [1.0, 1.5], "p95_ms": [2.0, 2.0]},
    }
    result = Result(
        name="minilm",
        figures={"single queries": figures(rounds)},
        quality={BASELINE: Quality(1, 1), "other": Quality(0.99996, 0.5)},
        batch_sizes={BASELINE: 8, "other": 4, OURS: 16},
        tuned={},
        counts={"single queries": 64},
        versions={},
        failed={"third": "third: load: no"},
    )
    assert "\n".join(tables(result)).splitlines() == [
        "",
        "### minilm: single queries, 64 a round",
        "",
        "|  | batch | p50, ms | ratio (least–most) | p95, ms | ratio (least–most) | rtx, int8-packed / this |",
        "|---|---|---|---|---|---|---|",
        f"| {BASELINE} | 8 | 11 | 1 | 20 | 1 | 0.11 (0.10–0.12) |",
        "| other | 4 | 5 | 0.45 (0.40–0.50) | 7.5 | 0.38 (0.25–0.50) | 0.25 (0.25–0.25) |",
        f"| {OURS} | 16 | 1.25 | 0.11 (0.10–0.12) | 2 | 0.10 (0.10–0.10) |  |",
        "",
        f"### minilm: against {BASELINE}",
        "",
        "|  | mean cosine | min cosine |",
        "|---|---|---|",
        f"| {BASELINE} | 1.0000 | 1.0000 |",
        "| other | 1.0000 | 0.5000 |",
        "",
        "- minilm, third: not measured, or not all of it: load: no",
    ]


def test_every_peer_has_a_script_and_requirements() -> None:
    for peers, ours in ((PEERS, OURS), (GPU_PEERS, OURS_ON_GPU)):
        names = [peer.name for peer in peers]
        assert len(set(names)) == len(names)
        assert {BASELINE, ours} <= set(names)
    every = (*PEERS, *GPU_PEERS)
    for environment in {name for peer in every for name in (peer.environment, peer.artifact) if name is not None}:
        assert (HERE / script_of(environment)).is_file()
        if environment != OWN:
            lines = (REQUIREMENTS / f"{environment}.txt").read_text().splitlines()
            assert all("==" in line for line in lines if not line.startswith("#"))
    assert [peer.name for peer in chosen(("RTX, fp32",))] == [BASELINE, "rtx, fp32", "rtx, fp32-packed"]
    assert chosen(()) == list(PEERS)
    assert [peer.name for peer in chosen(("engines",), gpu=True)] == [BASELINE, OURS_ON_GPU]


def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "run.py"), "--gpu", "--out", str(tmp_path / "out"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "--gpu: no NVIDIA driver" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_ours_is_the_one_that_is_asked_for() -> None:
    rounds = {BASELINE: {"per_s": [1.0]}, OURS_ON_GPU: {"per_s": [4.0]}}
    found = Result("minilm", {"mix": figures(rounds)}, {}, dict.fromkeys(rounds, 8), {}, {}, {}, {}, ours=OURS_ON_GPU)
    assert list(tables(found))[1:] == [
        f"|  | batch | a second | ratio (least–most) | {OURS_ON_GPU} / this |",
        "|---|---|---|---|---|",
        f"| {BASELINE} | 8 | 1 | 1 | 4.00 (4.00–4.00) |",
        f"| {OURS_ON_GPU} | 8 | 4 | 4.00 (4.00–4.00) |  |",
    ]


def test_an_environment_is_made_anew_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    (tmp_path / "peer.txt").write_text("thing==1\n")
    (tmp_path / "peer.no_deps.txt").write_text("other==1\n")
    calls: list[list[str]] = []

    def install(_: Path, arguments: list[str]) -> None:
        calls.append([os.path.basename(argument) for argument in arguments])

    monkeypatch.setattr(environments.venv, "create", lambda place, **_: place.mkdir(parents=True))
    monkeypatch.setattr(environments, "_install", install)
    python, key = ensure_environment("peer", tmp_path / "venvs")
    assert python == tmp_path / "venvs" / "peer" / "bin" / "python"
    assert key == "torch==1\nthing==1\nother==1\n"
    assert calls == [["-c", "constraints.txt", "-r", "peer.txt"], ["--no-deps", "-r", "peer.no_deps.txt"]]
    ensure_environment("peer", tmp_path / "venvs")
    assert len(calls) == 2
    (tmp_path / "peer.txt").write_text("thing==2\n")
    ensure_environment("peer", tmp_path / "venvs")
    assert len(calls) == 4
    (tmp_path / "peer.constraints.txt").write_text("torch==2\n")
    assert ensure_environment("peer", tmp_path / "venvs")[1] == "torch==2\nthing==2\nother==1\n"
    assert calls[4] == ["-c", "peer.constraints.txt", "-r", "peer.txt"]


def test_what_pip_cannot_find_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: old\nERROR: Could not find a version\nERROR: No matching distribution found for thing==9\n"
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(EngineError, match=r"^pip: ERROR: No matching distribution found for thing==9$"):
        environments._install(Path("python"), [])


def test_from_peers_to_tables(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [fake(BASELINE), fake("broken", "broken"), fake(OURS)]
    peers = [dataclasses.replace(peer, checkpoints=("minilm", "pairs")) for peer in both]
    peers.append(fake("absent", environment="absent"))
    for name in ("minilm", "pairs"):
        checkpoint = tmp_path / name / "checkpoint"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"")
    words = ["a " * length for length in range(1, 33)]
    texts = Workloads(
        mix=tuple(words),
        mix_tokens=tuple(range(3, 35)),
        long=("a " * 510,) * 4,
        queries=("a query",) * 4,
        pairs=tuple(("a query", word) for word in words),
        judged=Judged(("a", "b"), ("a a", "b b b"), (0, 1)),
    )

    def ensure(environment: str) -> tuple[Path, str]:
        if environment == "absent":
            raise EngineError("pip: no such package")
        return Path(sys.executable), ""

    monkeypatch.setattr(stage, "HERE", script.parent)
    monkeypatch.setattr(comparison, "ensure_environment", ensure)
    monkeypatch.setattr(comparison, "make_workloads", lambda *_: texts)
    monkeypatch.setattr(run, "chosen", lambda _, **__: peers)
    monkeypatch.setattr(run, "_end_on_sigterm", lambda: None)
    out = tmp_path / "out" / "peers.json"
    done = CliRunner().invoke(run.main, ["--brief", "--threads", "2", "--folder", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    titles = [line for line in done.stdout.splitlines() if line.startswith("### ")]
    assert [title.split(",")[0] for title in titles] == [
        "### minilm: natural mix",
        "### minilm: natural mix",
        "### minilm: single queries",
        "### minilm: passages of 512 tokens",
        "### minilm: start and memory",
        "### minilm: against sentence-transformers",
        "### pairs: query–passage pairs",
        "### pairs: against sentence-transformers",
    ]
    assert f"| {OURS} | 1.0000 | 0.0000 |" in done.stdout
    assert "- minilm, broken: not measured, or not all of it: load: ImportError: no such thing" in done.stdout
    assert "- absent: not installed: pip: no such package" in done.stdout
    assert "minilm: round 2 of 2: single queries, rtx, int8-packed" in done.stderr
    report = json.loads(out.read_text())
    assert report["threads"] == 2
    model = report["models"][0]
    assert len(model["figures"]["natural mix"][OURS]["per_s"]["rounds"]) == 2
    assert model["figures"]["start and memory"][OURS]["cold_start_s"]["ratio"] > 0
    assert model["versions"][OURS] == {"numpy": np.__version__}


ROUTER = """#!{python}
import argparse, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

given = argparse.ArgumentParser()
for name in ("model-id", "dtype", "max-client-batch-size", "hostname", "port"):
    given.add_argument(f"--{{name}}", required=True)
given = given.parse_args()
(Path(given.model_id) / "pid").write_text(str(os.getpid()))
assert given.dtype == "float16"

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {{"version": "1.9.3"}} if self.path == "/info" else None)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        inputs = asked["inputs"]
        assert asked["truncate"]
        if "too long" in inputs:
            self.answer(413, {{"error": "Batch size error"}})
        elif self.path == "/embed" and asked["normalize"]:
            self.answer(200, [[len(text), len(inputs)] for text in inputs])
        elif self.path == "/predict" and asked["raw_scores"]:
            self.answer(200, [[{{"score": len(two) - len(one), "label": "LABEL_0"}}] for one, two in inputs])

    def answer(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass

ThreadingHTTPServer((given.hostname, int(given.port)), Handler).serve_forever()
"""


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_server_is_started_asked_and_ended(task: str, tmp_path: Path) -> None:
    router = tmp_path / "bin" / "text-embeddings-router"
    router.parent.mkdir()
    router.write_text(ROUTER.format(python=sys.executable))
    router.chmod(0o755)
    peer = next(peer for peer in GPU_PEERS if peer.environment == "text_embeddings_inference")
    command = [sys.executable, "-P", str(HERE / peer.script)]
    environment = {**os.environ, "PATH": f"{router.parent}:{os.environ['PATH']}", "http_proxy": "http://127.0.0.1:9"}
    load = {**LOAD, "checkpoint": str(tmp_path), "task": task}
    out = tmp_path / "out.npy"
    worker = Worker("server", command, environment=environment, log=tmp_path / "log")
    try:
        assert worker.ask(load, timeout_s=60) == {"versions": {"text-embeddings-router": "1.9.3"}}
        pid = int((tmp_path / "pid").read_text())
        items = [["a", "b"], ["abc", "de"], ["a", "defg"]] if task == "rerank" else ["a", "bcd", "ef"]
        answer = worker.ask({**RUN, "items": items, "batch_size": 2, "out": str(out)}, timeout_s=30)
        wait_for(pid, "T")  # it stands still with the worker
        # The server's memory is part of it.
        assert answer["peak_rss_bytes"] > 2 * 8_000_000
        assert answer["peak_rss_bytes"] > peak_of(worker.pid) + 0.9 * peak_of(pid)
        if task == "embed":
            assert np.load(out).tolist() == [[1, 2], [3, 2], [2, 1]]
            with pytest.raises(EngineError, match=r"run: RuntimeError: 413: .*Batch size error"):
                worker.ask({**RUN, "items": ["too long"]}, timeout_s=30)
        else:
            assert np.load(out).tolist() == [0, -1, 3]
        if task == "rerank":  # a driver that is killed ends its workers so, and cannot end what they started
            os.kill(worker.pid or 0, signal.SIGKILL)
            wait_for(pid, "", "Z")
    finally:
        worker.close()
    wait_for(pid, "", "Z")


def wait_for(pid: int, *states: str) -> None:
    deadline = time.monotonic() + 10
    while state_of(pid) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(pid) in states


def peak_of(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(HERE / script_of("text_embeddings_inference"))]
    environment = {**os.environ, "PATH": str(tmp_path)}
    worker = Worker("server", command, environment=environment, log=tmp_path / "log")
    try:
        with pytest.raises(EngineError, match="load: FileNotFoundError: text-embeddings-router is not on the PATH"):
            worker.ask(LOAD, timeout_s=60)
        (tmp_path / "text-embeddings-router").symlink_to("/bin/false")
        with pytest.raises(EngineError, match="load: RuntimeError: text-embeddings-router ended with 1"):
            worker.ask(LOAD, timeout_s=60)
    finally:
        worker.close()


def test_what_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, **options: object) -> None:
            assert options == {
                "model": "/c",
                "runner": "pooling",
                "dtype": "float16",
                "gpu_memory_utilization": 0.3,
                "enable_prefix_caching": False,
            }

        def embed(self, prompts: list[str], *, use_tqdm: bool) -> list[SimpleNamespace]:
            assert not use_tqdm
            return [SimpleNamespace(outputs=SimpleNamespace(embedding=[len(text), 1.0])) for text in prompts]

        def score(
            self, queries: list[str], passages: list[str], *, pooling_params: SimpleNamespace, use_tqdm: bool
        ) -> list[SimpleNamespace]:
            assert not use_tqdm
            assert not pooling_params.use_activation
            pairs = zip(queries, passages, strict=True)
            return [SimpleNamespace(outputs=SimpleNamespace(score=len(p) - len(q))) for q, p in pairs]

    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "1")  # as the script does, and for this test alone
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, PoolingParams=SimpleNamespace))
    module = importlib.import_module("benchmarks.peers.with_vllm")
    embed = module.load(Source(Path("/c"), Path("/a"), "embed"), "fp16", 1)
    assert embed(["a", "bcd"], 8).tolist() == [[1, 1], [3, 1]]
    score = module.load(Source(Path("/c"), Path("/a"), "rerank"), "fp16", 1)
    found = score([["a", "bcd"], ["ab", "c"]], 8)
    assert (found.tolist(), found.dtype) == ([2, -1], np.float32)


def test_models_are_named() -> None:
    assert run.models_of("qwen3, minilm") == ["minilm", "qwen3"]
    with pytest.raises(click.BadParameter, match="expected some of minilm, base, qwen3, got large"):
        run.models_of("minilm,large")
