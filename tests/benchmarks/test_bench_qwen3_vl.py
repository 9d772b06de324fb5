"""The benchmark of Qwen3-VL-Embedding-2B, at a tiny size."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_qwen3_vl.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_qwen3_vl", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_is_the_published_one(bench: ModuleType) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Qwen3VLConfig(**bench.config_of("2b"))
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(config)
    assert sum(weight.numel() for weight in model.parameters()) == 2_127_532_032
    assert config.vision_config.deepstack_visual_indexes == [5, 11, 17]
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)
    assert bench.config_of("2b", 4)["vision_config"]["deepstack_visual_indexes"] == [0, 1, 2]


@pytest.mark.slow
def test_from_checkpoint_to_table(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "files"
    arguments = ["--size", "tiny", "--page-pixels", "16384", "--threads", "1", "--folder", str(folder)]

    def here(stage: str, options: Namespace, variant: str | None = None) -> dict[str, dict[str, object]]:
        """As `run_stage`, without the seconds that a process takes to import torch."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            bench.STAGES[stage](Namespace(**{**vars(options), "variant": variant}))
        lines = [json.loads(line) for line in said.getvalue().splitlines()]
        return {line.pop("step"): {**line, "own_gib": 0.0, "all_gib": 0.0} for line in lines if len(line) > 1}

    monkeypatch.setattr(bench, "run_stage", here)
    bench.main(arguments)
    table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    found = json.loads(last)
    assert [line.split()[0] for line in table.splitlines()[-4:]] == ["PyTorch", "fp32", "int8", "int4"]
    stages = found["qwen3_vl"]
    assert stages["write"]["weights"]["parameters"] == 397_760
    # A sheet of A4 within 128 by 128 pixels, in patches of 16: 8 by 6 are the most that fit.
    assert stages["reference"]["prepare"]["page_patches"] == 48
    fp32, int8, int4 = (stages[name]["run"] for name in ("fp32", "int8", "int4"))
    assert 0 < fp32["page_distance"] < 1e-5
    assert 1e-3 < int8["page_distance"] < 0.1
    assert int8["page_distance"] < int4["page_distance"] < 0.5
    sizes = stages["export"]
    assert sizes["int8"]["tokens_bytes"] < sizes["fp32"]["tokens_bytes"] / 2
    assert sizes["int4"]["image_bytes"] == sizes["fp32"]["image_bytes"]
    assert not folder.exists()


def test_a_folder_that_exists_is_left_alone(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="is in the way"):
        bench.main(["--size", "tiny", "--folder", str(tmp_path)])
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("distance", [2e-4, float("nan")])
def test_fp32_that_is_off_ends_it_before_anything_is_said(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    distance: float,
) -> None:
    steps = {"run": {"query_distance": 0.0, "page_distance": distance}}
    monkeypatch.setattr(bench, "run_stage", lambda *_: steps)
    with pytest.raises(SystemExit, match=r"further than 0\.0001 from PyTorch"):
        bench.main(["--size", "tiny", "--folder", str(tmp_path / "files")])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "files").exists()


def test_vectors_are_held_against_those_of_pytorch(bench: ModuleType) -> None:
    expected = np.eye(4, 8, dtype=np.float32)
    found = expected.copy()
    found[0, 7], found[2, 6] = 0.25, 0.5
    assert bench.compare(found[:1], found[1:], expected) == {
        "query_cosine": pytest.approx(1 / (1 + 0.25**2) ** 0.5),
        "page_cosine": pytest.approx(1 / (1 + 0.5**2) ** 0.5),
        "query_distance": 0.25,
        "page_distance": 0.5,
        "max_abs": 0.5,
    }


def test_a_stage_is_a_process_whose_memory_is_watched(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stages.py"
    script.write_text(
        "import json, sys, time\n"
        "print(json.dumps({'step': 'hold'}), flush=True)\n"
        "held = b'1' * 2**28\n"
        "time.sleep(0.3)\n"
        "print(json.dumps({'step': 'hold', 'seconds': 0.3, 'arguments': sys.argv[1:]}), flush=True)\n"
        "sys.exit(3 if '--variant' in sys.argv else 0)\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    options = Namespace(size="tiny", layers=5, page_pixels=7, threads=2, folder=tmp_path)
    begun = time.monotonic()
    told = bench.run_stage("write", options)["hold"]
    assert time.monotonic() - begun > 0.3
    assert 0.25 < told["own_gib"] <= told["all_gib"] < 0.5
    expected = f"--stage write --size tiny --page-pixels 7 --threads 2 --folder {tmp_path} --layers 5"
    assert told["arguments"] == expected.split()
    with pytest.raises(SystemExit, match=r"open fp32: hold: the process ended with 3"):
        bench.run_stage("open", options, "fp32")
