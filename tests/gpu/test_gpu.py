"""For the first machine with an NVIDIA GPU: `make test-gpu`. Everywhere else each of these is skipped, and says why.

Nobody has run them yet.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rtx.export.engines import EngineOptions
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.export.tensorrt import capability_names, load_tensorrt
from rtx.export.variants import VariantName
from rtx.kernels import operators
from rtx.runtime.bench import BenchOptions, bench
from rtx.runtime.cli import main
from rtx.runtime.doctor import examine
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import EngineError, ExportError
from rtx.runtime.gpu import find_gpu, find_gpus
from rtx.runtime.verification import verify_bundle
from rtx.trainer.losses import embed
from rtx.trainer.losses.targets import Targets

TEXTS = [
    "how to reset the pump",
    "a",
    "what the code of the query is for",
    *(f"text {place} of the file" for place in range(40)),
]
VARIANTS: tuple[VariantName, ...] = ("fp16", "fp32")


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
    """The driver tells what all processes take together: to be run where nothing else uses the GPU."""
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


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines for the first GPU: of TensorRT-RTX, or where that does not know it of TensorRT."""
    folder = tmp_path_factory.mktemp("engines") / "tiny.rtx"
    capability = find_gpu(0).capability
    variants = VARIANTS[:1] if capability == 75 else VARIANTS  # TensorRT-RTX has no product in float32 for it
    try:
        known = capability_names(load_tensorrt("tensorrt-rtx"))
        rtx = EngineOptions(target="tensorrt-rtx", capabilities=(capability,))
        options = rtx if capability in known else EngineOptions(target="tensorrt")
        options.check(variants, 512)
    except ExportError as missing:
        pytest.skip(str(missing))
    checkpoint = str(tiny_checkpoint("bert"))
    export_bundle(checkpoint, folder, ExportOptions(variants=variants, threads=1, engines=options))
    return folder


def test_every_engine_agrees_with_pytorch(served: Path) -> None:
    findings = verify_bundle(served, device="tensorrt")
    assert [finding.check for finding in findings if finding.check.endswith("outputs")]
    assert not [finding for finding in findings if not finding.ok]


def test_an_engine_gives_each_of_several_callers_its_own(served: Path) -> None:
    with Embedder.open(served, variant="fp16", device="tensorrt") as model, ThreadPoolExecutor(4) as pool:
        alone = np.concatenate([model.embed([text]) for text in TEXTS])
        for vectors in pool.map(lambda _: model.embed(TEXTS), range(32)):
            assert (vectors * alone).sum(axis=1).min() > 0.999
        assert getattr(model.engine, "graph_problem", None) is None


on_pytorch = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")


@on_pytorch
@pytest.mark.parametrize("op", operators.OPS)
def test_triton_kernels_are_within_their_contracts(op: str) -> None:
    trial = pytest.importorskip("rtx.kernels.gpu.trial")
    assert trial.try_kernel(op, torch.device("cuda", 0)) is None


@on_pytorch
def test_a_large_batch_has_the_loss_of_a_small_ones_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [torch.randn(count, 384, device="cuda", requires_grad=True) for count in (1024, 3072)]
    targets = Targets.of([(1, 0, 0)] * 1024).to(torch.device("cuda"))
    found = []
    for large in (1 << 62, 1):
        monkeypatch.setattr(embed, "_LARGE", large)
        loss = embed.info_nce(sides[0], sides[1], targets, false_negative_margin=0.1)
        found.append([loss.detach(), *torch.autograd.grad(loss, sides)])
    assert operators.in_triton("info_nce", sides[0].device)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()
