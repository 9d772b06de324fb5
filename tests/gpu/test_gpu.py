"""For the first machine with an NVIDIA GPU: `make test-gpu`. Everywhere else each of these is skipped, and says why.

Nobody has run them yet.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.runtime.bench import BenchOptions, bench
from rtx.runtime.cli import main
from rtx.runtime.doctor import examine
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import EngineError
from rtx.runtime.gpu import find_gpus
from rtx.runtime.verification import verify_bundle

TEXTS = [
    "how to reset the pump",
    "a",
    "what the code of the query is for",
    *(f"text {place} of the file" for place in range(40)),
]


def why_not() -> str:
    try:
        if not find_gpus().devices:
            return "the NVIDIA driver finds no GPU"
    except EngineError as none:
        return str(none)
    return str(examine()["engines"]["onnx, cuda"]["problem"] or "")


reason = why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason or "there is a GPU")]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "tiny.rtx"
    export_bundle(str(tiny_checkpoint("bert")), folder, ExportOptions(variants=("fp32", "fp16", "bf16"), threads=1))
    return folder


def test_the_machine_is_found_fit(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", str(bundle), "--device", "cuda"])
    assert result.exit_code == 0, result.output


def test_every_variant_agrees_with_pytorch(bundle: Path) -> None:
    """Within the limits that the gate held it to on a CPU, with half precision as it is emulated there."""
    findings = verify_bundle(bundle, device="cuda")
    assert [finding.check for finding in findings if finding.check.endswith("outputs")]
    assert not [finding for finding in findings if not finding.ok]


@pytest.mark.parametrize("variant", ["fp32", "fp16", "bf16"])
def test_a_text_is_the_same_in_every_batch(bundle: Path, variant: str) -> None:
    with Embedder.open(bundle, variant=variant, device="cuda") as model:
        together, alone = model.embed(TEXTS), np.concatenate([model.embed([text]) for text in TEXTS])
    assert (together * alone).sum(axis=1).min() > (1 - 1e-5 if variant == "fp32" else 0.999)


def test_models_that_are_closed_leave_no_memory(bundle: Path) -> None:
    """In a process of its own: what others on the GPU take is not counted."""
    program = f"""
import ctypes
from rtx.runtime.embedder import Embedder
def used():
    driver, free, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t(), ctypes.c_size_t()
    assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return total.value - free.value
def turn():
    with Embedder.open({str(bundle)!r}, variant="fp16", device="cuda") as model:
        model.embed(["a text"] * 64)
        device, context = ctypes.c_int(0), ctypes.c_void_p()
        driver = ctypes.CDLL("libcuda.so.1")
        assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
        assert driver.cuCtxSetCurrent(context) == 0
        return used()
first = max(turn() for _ in range(3))
last = max(turn() for _ in range(20))
assert last <= first + (64 << 20), (first, last)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_measured(bundle: Path) -> None:
    result: Any = bench(bundle, BenchOptions(rounds=2, seconds=0.2, device="cuda"))
    assert result.device == "cuda"
    assert result.machine.gpus
    assert {subject.name for subject in result.subjects} == {"fp32", "fp16", "bf16"}
    for subject in result.subjects:
        assert subject.stats["latency_p50_ms"].median > 0
