"""`rtx bench`: what is measured, what refuses to be measured, and what is written. No test looks at a speed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from rtx.runtime import bench as bench_module
from rtx.runtime import bundle as bundle_module
from rtx.runtime import subjects as subjects_module
from rtx.runtime.bench import BenchOptions, BenchResult, Judgements, Texts, bench
from rtx.runtime.bench_page import bench_page, conditions, headline, result_rows, where_of
from rtx.runtime.bundle import Bundle
from rtx.runtime.candidates import Candidate
from rtx.runtime.cli import main
from rtx.runtime.coldstart import Start
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import BundleError, CheckpointError, UsageError
from rtx.runtime.evalset import EvalSet, write_evalset
from rtx.runtime.evaluation import Evaluation, evaluate_embedder
from rtx.runtime.image_cache import DEFAULT_CACHE_BYTES
from rtx.runtime.manifest import GOLDEN_FILE, MANIFEST_FILE, Manifest
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.schema import parse
from rtx.runtime.subjects import checkpoint_bytes
from rtx.runtime.text import Batch

_LATENCIES = {"latency_p50_ms", "latency_p95_ms", "latency_p99_ms"}
_STAGES = {f"stage_{stage}_ms" for stage in ("tokenize", "collate", "run", "rest")}
_LENGTHS = {"throughput_per_s_at_16_tokens", "throughput_per_s_at_64_tokens"}
_NUMBERS = _LATENCIES | _STAGES | _LENGTHS | {"throughput_per_s", "cold_start_s"}


@pytest.fixture
def quick() -> BenchOptions:
    return BenchOptions(rounds=2, seconds=0.001, threads=1)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, int]]:
    """Instead of starting processes: which variant was started and how many further items it was sent."""
    seen: list[tuple[str | None, int]] = []

    def measure(_path: str, *, variant: str | None, further: Any, **_: Any) -> Start:
        seen.append((variant, len(further)))
        return Start(len(seen) / 10, 100_000_000 + len(seen))

    monkeypatch.setattr(bench_module.coldstart, "measure", measure)
    return seen


@pytest.fixture(scope="module")
def evalset() -> EvalSet:
    return EvalSet(
        "toy-set",
        {"q1": "reset the device", "q2": "sort the list", "q3": "parse a file"},
        {"d1": "how do i reset it", "d2": "sort a list with a function", "d3": "file to parse", "d4": "make coffee"},
        {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 2, "d4": 0}},
    )


@pytest.fixture(scope="module")
def result(toy_bundle: Path, evalset: EvalSet) -> BenchResult:
    """One whole benchmark, processes and all."""
    options = BenchOptions(rounds=2, seconds=0.001, threads=1)
    return bench(toy_bundle, options, judgements=Judgements(evalset), texts=Texts(("parse a file", "reset")))


def test_everything_is_measured_in_every_round(result: BenchResult) -> None:
    assert [(s.name, s.precision) for s in result.subjects] == [("fp32", "fp32"), ("int8", "int8")]
    assert (result.bundle, result.task, result.baseline, result.threads) == ("toy", "embed", "fp32", 1)
    for subject in result.subjects:
        assert subject.stats.keys() == _NUMBERS
        assert all(len(stat.rounds) == 2 for stat in subject.stats.values())
        assert all(stat.median > 0 for name, stat in subject.stats.items() if name != "stage_rest_ms")
        assert all((stat.ratio is None) == (subject.name == "fp32") for stat in subject.stats.values())
        p50, p95, p99 = (subject.stats[name].median for name in sorted(_LATENCIES))
        assert p50 <= p95 <= p99
    assert result.workload.lengths == (16, 64)
    assert result.workload.calls >= 20
    assert result.workload.items >= 32


def test_stages_add_up_to_the_time_of_an_item(result: BenchResult) -> None:
    for subject in result.subjects:
        for turn in range(2):
            total_ms = sum(subject.stats[name].rounds[turn] for name in _STAGES)
            assert total_ms == pytest.approx(1000 / subject.stats["throughput_per_s"].rounds[turn])
            assert all(subject.stats[name].rounds[turn] > 0 for name in _STAGES)


def test_quality_is_measured_and_compared_with_the_baseline(result: BenchResult) -> None:
    fp32, int8 = (subject.quality for subject in result.subjects)
    assert fp32 is not None
    assert int8 is not None
    assert (fp32.evalset, fp32.queries, fp32.documents, fp32.comparison) == ("toy-set", 3, 4, None)
    assert 0 < fp32.metrics["ndcg@10"] <= 1
    assert int8.comparison is not None
    assert int8.comparison.difference == pytest.approx(int8.metrics["ndcg@10"] - fp32.metrics["ndcg@10"])


@pytest.mark.usefixtures("starts")
def test_a_variant_that_ranks_worse_is_a_loss_and_its_queries_are_named(
    toy_bundle: Path, quick: BenchOptions, evalset: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(embedder: Embedder, given: EvalSet) -> Evaluation:
        found = evaluate_embedder(embedder, given)
        lost = embedder.engine.name.endswith("int8")
        return dataclasses.replace(found, ndcg=np.array([0.0, 0.0, 1.0]) if lost else np.ones(3))

    monkeypatch.setattr(bench_module, "evaluate_embedder", evaluate)
    result = bench(toy_bundle, quick, judgements=Judgements(evalset))
    quality = result.subjects[1].quality
    assert quality is not None
    assert quality.comparison is not None
    assert quality.comparison.difference == pytest.approx(-2 / 3)
    assert result_rows(result)["Quality"][0].cells[1].note.startswith("−0.6667 (")
    by_default = dataclasses.replace(result, default_variant="int8")
    assert "Its NDCG@10 is 0.3333, 0.6667 below fp32 (95 % interval −1.0000 to 0.0000)." in headline(by_default)
    words = " ".join(ElementTree.fromstring(bench_page(result)).itertext())
    assert "What int8 ranks differently" in words
    assert "2 of 3 queries fell, 0 improved." in words
    assert "reset the device" in words


def test_size_is_that_of_graph_and_tokenizer(result: BenchResult, toy_bundle: Path) -> None:
    for subject, graph in zip(result.subjects, ("onnx/model.onnx", "onnx/model_int8.onnx"), strict=True):
        expected = (toy_bundle / graph).stat().st_size + (toy_bundle / "tokenizer.json").stat().st_size
        assert subject.size_bytes == expected


def test_the_result_is_plain_data(result: BenchResult) -> None:
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (data["kind"], data["version"]) == ("rtx-bench", 1)
    assert {"cpu", "cores", "instruction_sets", "versions", "commit", "load"} <= data["machine"].keys()
    assert {"python", "numpy", "onnxruntime"} <= data["machine"]["versions"].keys()
    speed = data["subjects"][1]["stats"]["throughput_per_s"]
    assert speed.keys() == {"median", "low", "high", "ratio", "ratio_low", "ratio_high", "rounds"}
    base = data["subjects"][0]["stats"]["throughput_per_s"]["rounds"]
    ratios = [value / other for value, other in zip(speed["rounds"], base, strict=True)]
    assert speed["ratio"] == pytest.approx(np.median(ratios))


def test_the_page_is_well_formed_and_has_every_plot(result: BenchResult) -> None:
    root = ElementTree.fromstring(bench_page(result))
    titles = [plot[0].text for plot in root.iter("svg")]
    assert titles == [
        "NDCG@10 over throughput",
        "Throughput by length",
        "Latency of a single query",
        "Where the time goes",
        "Cold start",
        "Peak memory",
        "NDCG@10 against fp32",
    ]
    words = " ".join(root.itertext())
    assert headline(result) in words
    assert "toy-set: 3 queries, 4 documents" in words
    assert result.machine.cpu in words


def test_every_row_has_a_cell_for_each_subject(result: BenchResult) -> None:
    groups = result_rows(result)
    assert list(groups) == ["Quality", "Latency of a single query", "Throughput", "Footprint"]
    assert all(len(row.cells) == 2 for rows in groups.values() for row in rows)
    assert all(value for value in conditions(result).values())


def test_the_first_start_is_for_memory_and_the_others_are_interleaved(
    toy_bundle: Path, quick: BenchOptions, starts: list[tuple[str | None, int]]
) -> None:
    result = bench(toy_bundle, quick)
    mix = result.workload.items
    assert starts == [("fp32", mix), ("int8", mix), ("fp32", 0), ("int8", 0), ("int8", 0), ("fp32", 0)]
    assert [s.peak_rss_bytes for s in result.subjects] == [100_000_001, 100_000_002]
    assert [s.stats["cold_start_s"].rounds for s in result.subjects] == [(0.3, 0.6), (0.4, 0.5)]
    assert result.workload.source == "words of the tokenizer's vocabulary"


@pytest.mark.usefixtures("starts")
def test_variants_can_be_chosen(toy_bundle: Path, quick: BenchOptions) -> None:
    result = bench(toy_bundle, dataclasses.replace(quick, variants=("int8", "int8")))
    assert [subject.name for subject in result.subjects] == ["int8"]
    assert result.baseline == "int8"
    assert result.subjects[0].stats["throughput_per_s"].ratio is None
    assert headline(result).startswith("int8 embeds ")


@pytest.mark.usefixtures("starts")
def test_a_reranker_is_measured_on_pairs(toy_reranker_bundle: Path, quick: BenchOptions, evalset: EvalSet) -> None:
    candidates = {query: [Candidate(key) for key in evalset.corpus] for query in evalset.queries}
    result = bench(toy_reranker_bundle, quick, judgements=Judgements(evalset, candidates))
    assert result.workload.call == "a query with 10 documents"
    assert result.subjects[0].quality is not None
    rows = result_rows(result)
    assert rows["Throughput"][0].unit == "pairs/s"
    assert "reranks a query with 10 documents in" in headline(result)
    ElementTree.fromstring(bench_page(result))


def test_the_quality_of_a_reranker_needs_candidates(
    toy_reranker_bundle: Path, quick: BenchOptions, evalset: EvalSet
) -> None:
    with pytest.raises(UsageError, match="needs candidates"):
        bench(toy_reranker_bundle, quick, judgements=Judgements(evalset))


def test_candidates_that_an_embedder_would_not_read_are_refused(
    toy_bundle: Path, quick: BenchOptions, evalset: EvalSet
) -> None:
    with pytest.raises(UsageError, match=r"^candidates: only a reranker has them; an embedder ranks the whole corpus$"):
        bench(toy_bundle, quick, judgements=Judgements(evalset, {query: [] for query in evalset.queries}))


@pytest.fixture
def rewritten(toy_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the toy bundle with other tolerances."""

    def rewrite(**tolerance: float) -> Path:
        folder = tmp_path / "changed.rtx"
        shutil.copytree(toy_bundle, folder)
        data = json.loads((folder / MANIFEST_FILE).read_bytes())
        del data["sha256"]
        for variant in data["variants"].values():
            variant["tolerance"] |= tolerance
        (folder / MANIFEST_FILE).write_bytes(parse(Manifest, data, source="test").to_bytes())
        return folder

    return rewrite


def test_what_is_out_of_tolerance_is_not_timed(
    rewritten: Callable[..., Path], quick: BenchOptions, starts: list[tuple[str | None, int]]
) -> None:
    path = rewritten(max_abs=1e-12)
    noted: list[str] = []
    with pytest.raises(BundleError) as raised:
        bench(path, quick, note=noted.append)
    message = str(raised.value)
    assert f"{path}: fails on this machine, so nothing was measured" in message
    assert "variant 'fp32': golden item" in message
    assert "variant 'int8': golden item" in message
    assert "(at most 1.00e-12 expected)" in message
    assert not starts
    assert all("round" not in note for note in noted)


def test_a_damaged_file_is_found_before_anything_is_timed(rewritten: Callable[..., Path], quick: BenchOptions) -> None:
    path = rewritten()
    content = bytearray((path / GOLDEN_FILE).read_bytes())
    content[100] ^= 1
    (path / GOLDEN_FILE).write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"golden\.npz was changed after it was written"):
        bench(path, quick)


@pytest.fixture
def checkpoint(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that opens as the toy's own checkpoint would: with its fp32 graph in the place of PyTorch."""
    folder = tmp_path / "toy"
    sizes = {"model.safetensors": 1000, "tokenizer.json": 10, "2_Dense/model.safetensors": 200}
    # Other formats of the same weights, and the state of a training run, are not what a user of the model needs.
    sizes |= {"pytorch_model.bin": 3000, "onnx/model.onnx": 5000, "checkpoint-10/model.safetensors": 7000}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    bundle = Bundle.open(toy_bundle)
    monkeypatch.setattr(
        subjects_module,
        "open_model",
        lambda _path, *, threads: Embedder(bundle.preprocessor(), bundle.engine("fp32", threads=threads)),
    )
    return folder


def test_pytorch_is_the_baseline_and_starts_twice(
    toy_bundle: Path, checkpoint: Path, quick: BenchOptions, starts: list[tuple[str | None, int]]
) -> None:
    result = bench(toy_bundle, dataclasses.replace(quick, rounds=3), against=str(checkpoint))
    assert result.baseline == "PyTorch"
    assert [s.name for s in result.subjects] == ["PyTorch", "fp32", "int8"]
    pytorch, fp32, _ = result.subjects
    assert pytorch.size_bytes == 1210
    assert len(pytorch.stats["cold_start_s"].rounds) == 2
    assert len(fp32.stats["cold_start_s"].rounds) == 3
    assert [variant for variant, _ in starts].count(None) == 3
    assert "as many texts a second as PyTorch" in headline(result)
    assert " ms instead of " in headline(result)
    assert "Its vectors have a cosine of 1.0000 or more to those of PyTorch." in headline(result)


def test_another_model_than_the_bundles_is_no_baseline(
    toy_bundle: Path, checkpoint: Path, quick: BenchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(toy_bundle)
    monkeypatch.setattr(
        subjects_module, "open_model", lambda _path, **_: Embedder(bundle.preprocessor(), _Shifted(bundle))
    )
    with pytest.raises(CheckpointError, match=r"is not the model that .*toy\.rtx was made of: golden item \d+ has cos"):
        bench(toy_bundle, quick, against=str(checkpoint))


class _Shifted:
    """The engine of another model."""

    name = "other"
    packed = False
    max_rows = staticmethod(lambda _: None)

    def __init__(self, bundle: Bundle) -> None:
        self._engine = bundle.engine("fp32", threads=1)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        return np.asarray(np.roll(self._engine.run(batch), 1, axis=1))

    def close(self) -> None:
        self._engine.close()


def test_another_contract_than_the_bundles_is_named(
    toy_bundle: Path, checkpoint: Path, quick: BenchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(toy_bundle)
    contract = dataclasses.replace(bundle.manifest.contract, max_tokens=32, normalize=False)
    preprocessor = Preprocessor(contract, bundle.preprocessor().tokenizer_json)
    monkeypatch.setattr(
        subjects_module, "open_model", lambda _path, **_: Embedder(preprocessor, bundle.engine("fp32", threads=1))
    )
    expected = "max_tokens is 32 instead of 64; normalize is False instead of True"
    with pytest.raises(CheckpointError, match=expected):
        bench(toy_bundle, quick, against=str(checkpoint))


def test_a_bundle_is_no_baseline(toy_bundle: Path, quick: BenchOptions) -> None:
    with pytest.raises(UsageError, match="is a bundle; expected the checkpoint that"):
        bench(toy_bundle, quick, against=str(toy_bundle))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"seconds": 0.0}, "seconds: expected more than 0, got 0.0"),
        ({"seconds": math.nan}, "seconds: expected more than 0, got nan"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        BenchOptions(**option)
    assert str(raised.value) == message


def test_a_gpu(toy_bundle: Path, quick: BenchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device goes to every engine and every process that starts, and what is shown names the GPU."""
    asked: list[str] = []
    real = Bundle.engine

    def engine(bundle: Bundle, variant: str | None = None, *, device: str, **options: Any) -> Any:
        asked.append(device)
        return real(bundle, variant, **options)

    def start(_path: str, *, device: str, **_: Any) -> Start:
        asked.append(device)
        return Start(0.1, 1)

    monkeypatch.setattr(Bundle, "engine", engine)
    monkeypatch.setattr(bench_module.coldstart, "measure", start)
    result = bench(toy_bundle, dataclasses.replace(quick, device="cuda:1"))
    assert {*asked} == {"cuda:1"}
    assert len(asked) > 2
    # int8 has operators that are of the CPU alone.
    assert [subject.name for subject in result.subjects] == ["fp32"]
    assert (result.device, result.machine.gpus) == ("cuda:1", ())
    assert where_of(result).startswith("cuda:1, beside 1 threads of ")
    known = dataclasses.replace(result.machine, gpus=("NVIDIA L4", "Tesla T4"))
    assert where_of(dataclasses.replace(result, machine=known)).startswith("Tesla T4, beside")
    assert where_of(dataclasses.replace(result, device="cpu")) == f"{known.cpu}, 1 threads"
    with pytest.raises(UsageError, match=r"PyTorch runs on the CPU here, and is nothing to hold cuda against"):
        bench(toy_bundle, dataclasses.replace(quick, device="cuda"), against=str(toy_bundle))
    with pytest.raises(UsageError, match="device: expected cpu, cuda or cuda:N, tensorrt or tensorrt:N, got 'tpu'"):
        BenchOptions(device="tpu")


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.usefixtures("starts")
def test_the_command_prints_one_line_of_json_and_writes_the_page(
    toy_bundle: Path, evalset: EvalSet, tmp_path: Path
) -> None:
    write_evalset(evalset, tmp_path / "toy-set")
    page = tmp_path / "bench.html"
    quick = ("--rounds", "1", "--seconds", "0.001", "--threads", "1")
    done = _run(toy_bundle, *quick, "--eval", tmp_path / "toy-set", "--json", "-", "--html", page)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    data = json.loads(done.stdout)
    assert data["workload"]["source"] == "corpus and queries of toy-set"
    assert [subject["name"] for subject in data["subjects"]] == ["fp32", "int8"]
    assert "Latency of a single query" in done.stderr
    assert ElementTree.fromstring(page.read_text(encoding="utf-8")).tag == "html"
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []


@pytest.mark.usefixtures("starts")
def test_the_command_prints_a_table_and_writes_json(toy_bundle: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"body": "parse a file"}\n{"body": " "}\n{"body": "sort the list"}\n')
    quick = ("--rounds", "1", "--seconds", "0.001", "--threads", "1", "--variant", "int8")
    done = _run(toy_bundle, *quick, "--texts", texts, "--text-column", "body", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.stderr
    for said in ("int8", "Latency of a single query", "p99", "Natural mix", "Cold start", "int8 embeds"):
        assert said in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["workload"]["source"] == "2 texts of texts.jsonl"


def test_the_command_refuses_what_cannot_work_before_it_measures(
    toy_bundle: Path, tmp_path: Path, starts: list[tuple[str | None, int]]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}\n')
    cases: list[tuple[tuple[str | Path, ...], int, str]] = [
        ((toy_bundle, "--variant", "int9"), 2, "has no variant 'int9' (did you mean 'int8'? known: fp32, int8)"),
        ((toy_bundle, "--variant", "fp16"), 2, "did not pass the gate: NDCG@10 fell by 0.0100"),
        ((toy_bundle, "--html", tmp_path / "no" / "x.html"), 2, f"the folder {tmp_path / 'no'} does not exist"),
        ((toy_bundle, "--candidates", "x.jsonl"), 2, "--candidates needs --eval"),
        ((toy_bundle, "--rounds", "0"), 2, "rounds: expected at least 1, got 0"),
        ((toy_bundle, "--texts", tmp_path / "empty.txt"), 4, "empty.txt: holds no text"),
        ((toy_bundle, "--texts", tmp_path / "numbers.jsonl"), 4, "numbers.jsonl:1"),
        ((toy_bundle, "--eval", tmp_path), 4, "is no evaluation set in the BEIR layout"),
        ((tmp_path / "none.rtx",), 5, "does not exist; expected a bundle folder"),
    ]
    for arguments, code, message in cases:
        done = _run(*arguments)
        assert (done.exit_code, done.stdout) == (code, ""), (arguments, done.output)
        assert message in done.stderr
    assert not starts


def test_size_of_a_checkpoint_counts_its_weights_once(tmp_path: Path) -> None:
    for name, size in {
        "model.safetensors": 100,
        "tokenizer.json": 10,
        "2_Dense/model.safetensors": 5,
        "onnx/model.safetensors": 1000,
        "checkpoints/step-3/model.safetensors": 1000,
        "checkpoints/step-3/tokenizer.json": 1000,
        "checkpoint-500/model.safetensors": 1000,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert checkpoint_bytes(tmp_path) == 115


def test_what_was_made_of_images_is_not_kept_between_rounds(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    opened = bundle_module.open_graphs

    def open_graphs(*arguments: Any, **settings: Any) -> Any:
        asked.append(settings["cache_bytes"])
        return opened(*arguments, **settings)

    monkeypatch.setattr(bundle_module, "open_graphs", open_graphs)
    with ExitStack() as models:
        subjects_module.open_variants(Bundle.open(toy_bundle), ["fp32"], threads=1, models=models)
    Bundle.open(toy_bundle).engine("fp32", threads=1).close()
    assert asked == [0, DEFAULT_CACHE_BYTES]
