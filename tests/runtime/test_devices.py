"""A GPU that is asked for and not there: one clear sentence, and never the CPU without a word."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from click.testing import CliRunner

from rtx.runtime.backends import onnx
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import gpu_index, is_tensorrt
from rtx.runtime.errors import EngineError, MissingExtraError, UsageError
from rtx.runtime.verification import verify_bundle

CUDA = "CUDAExecutionProvider"


def test_names_of_devices() -> None:
    assert gpu_index("cpu") is None
    assert gpu_index("cuda") == 0
    assert gpu_index("cuda:3") == 3
    assert (gpu_index("tensorrt"), gpu_index("tensorrt:2")) == (0, 2)
    assert [is_tensorrt(name) for name in ("cpu", "cuda:1", "tensorrt", "tensorrt:1")] == [False, False, True, True]
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda:²", "tensorrt:", "trt", ""):
        with pytest.raises(UsageError, match="device: expected cpu, cuda or cuda:N, tensorrt or tensorrt:N, got"):
            gpu_index(wrong)


def test_without_the_package_for_gpus(toy_bundle: Path) -> None:
    assert CUDA not in ort.get_available_providers()
    with pytest.raises(MissingExtraError, match=r"on cuda:1 needs .*'onnxruntime-gpu', .*rtx-retrieval\[gpu\]"):
        Embedder.open(toy_bundle, device="cuda:1")
    result = CliRunner().invoke(main, ["verify", str(toy_bundle), "--device", "cuda"])
    assert result.exit_code == MissingExtraError.exit_code
    assert "rtx-retrieval[gpu]" in result.output


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back_to_the_cpu(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with the package for GPUs on a machine without a driver: ONNX Runtime opens the graph, on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    said = (
        "Failed to load /packages/nvidia/libcublas.so.12: wrong ELF class",  # and then found elsewhere
        "Failed to load libcudart.so.12: /lib/libcudart.so.12: no such file",
        "Please read on",
    )
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("\n".join(said)))
    onnx._load_cuda.cache_clear()
    told = (
        r"toy\.rtx:fp32: .* cannot use cuda, and would have gone on with the CPU.* "
        r"was built for \(Failed to load libcudart\.so\.12: /lib/libcudart\.so\.12: no such file\)$"
    )
    with pytest.raises(EngineError, match=told):
        Embedder.open(toy_bundle, device="cuda")
    assert capsys.readouterr().out == ""
    checks = verify_bundle(toy_bundle, device="cuda")
    failed = {found.check: found.problems for found in checks if not found.ok}
    assert "would have gone on with the CPU" in failed["fp32 graph"][0]


def test_a_version_that_loads_no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ort, "preload_dlls")
    onnx._load_cuda.cache_clear()
    assert onnx._load_cuda(ort) == ""


def test_what_onnx_runtime_is_told(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    real = ort.InferenceSession

    class Session:
        def __init__(self, model: bytes, options: Any, providers: Any, enable_fallback: int) -> None:
            told.update(providers=dict(providers), fallback=enable_fallback)
            self.inner = real(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return list(told["providers"])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: told.update(preloaded=True))
    onnx._load_cuda.cache_clear()
    with Embedder.open(toy_bundle, device="cuda:2") as model:
        assert model.engine.name == "toy.rtx:fp32"
    assert told["preloaded"]
    assert list(told["providers"]) == [CUDA, "CPUExecutionProvider"]
    assert told["providers"][CUDA] == {"device_id": 2, "arena_extend_strategy": "kSameAsRequested", "use_tf32": 0}
    assert told["fallback"] == 0


def test_variants_on_a_gpu(toy_bundle: Path) -> None:
    bundle = Bundle.open(toy_bundle)
    fp32 = bundle.manifest.variants["fp32"]
    packed = dataclasses.replace(fp32, operators=True)
    variants = {"int8-packed": packed, "fp32": fp32, "fp16": dataclasses.replace(fp32, precision="fp16")}
    bundle.manifest = dataclasses.replace(bundle.manifest, variants=variants, default_variant="int8-packed")
    assert bundle.variant(device="cuda")[0] == "fp16"
    with pytest.raises(UsageError, match="is not for ONNX Runtime on a GPU; these run on a GPU: fp32, fp16"):
        bundle.variant("int8-packed", device="cuda")
    with pytest.raises(UsageError, match="is not for ONNX Runtime on a GPU"):
        Bundle.open(toy_bundle).variant("int8", device="cuda")
    del variants["fp16"]
    assert bundle.variant(device="cuda:1")[0] == "fp32"
    bundle.manifest = dataclasses.replace(bundle.manifest, variants={"int8-packed": packed})
    with pytest.raises(
        UsageError, match="is not for ONNX Runtime on a GPU; export fp16 or fp32 for one that runs on a GPU"
    ):
        bundle.variant(device="cuda")


def test_variants_on_a_cpu(toy_bundle: Path) -> None:
    bundle = Bundle.open(toy_bundle)
    fp32 = bundle.manifest.variants["fp32"]
    bf16 = dataclasses.replace(fp32, precision="bf16")
    bundle.manifest = dataclasses.replace(
        bundle.manifest, variants={"bf16": bf16, "fp32": fp32}, default_variant="bf16"
    )
    assert bundle.variant()[0] == "fp32"
    assert bundle.variant(device="cuda")[0] == "bf16"
    with pytest.raises(UsageError, match=r"'bf16' is in bf16, which .* on GPUs alone; these run on a CPU: fp32"):
        bundle.variant("bf16")
    bundle.manifest = dataclasses.replace(bundle.manifest, variants={"bf16": bf16})
    with pytest.raises(UsageError, match="these run on a CPU: none"):
        bundle.variant()


def test_nothing_that_could_be_verified(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(toy_bundle)
    packed = dataclasses.replace(bundle.manifest.variants["fp32"], operators=True)
    bundle.manifest = dataclasses.replace(bundle.manifest, variants={"fp32": packed})
    monkeypatch.setattr(Bundle, "open", lambda _: bundle)
    found = {finding.check: finding for finding in verify_bundle(toy_bundle, device="cuda")}
    assert found["fp32"].skipped
    assert found["fp32"].measured == "ONNX Runtime does not run it on cuda"
    assert found["files"].ok
    result = CliRunner().invoke(main, ["verify", str(toy_bundle), "--device", "cuda"])
    assert result.exit_code == 0
    assert "all checks hold, 1 could not be made" in result.stdout
    assert "–       fp32" in result.stdout
    with pytest.raises(UsageError, match="variant 'fp32' is not for ONNX Runtime on a GPU"):
        verify_bundle(toy_bundle, variant="fp32", device="cuda")


def test_a_checkpoint_has_no_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("a text")
    files = [str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.npy")]
    result = CliRunner().invoke(main, ["embed", str(tmp_path), *files, "--device", "cuda"])
    assert result.exit_code == UsageError.exit_code
    assert "bundles alone run on a device ('cuda')" in result.output


def test_an_engine_alone(toy_bundle: Path) -> None:
    graph = toy_bundle / "onnx" / "model.onnx"
    with pytest.raises(UsageError, match="device: expected cpu"):
        OnnxEngine(graph, output="sentence_embedding", device="tpu")
