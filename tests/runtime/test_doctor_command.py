"""`rtx doctor`: the machine as it is, and with GPUs that only a stand-in for the driver has."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from rtx.runtime import doctor, gpu
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.doctor import examine, optional_packages
from rtx.runtime.errors import EngineError, UsageError
from rtx.runtime.gpu import Gpu, Gpus, find_gpus
from rtx.runtime.manifest import EngineEntry

REQUIREMENTS = [
    "numpy>=1.26",
    'onnxruntime>=1.20; extra == "cpu"',
    'torch>=2.9; extra == "train"',
    "transformers<6,>=5; extra == 'train'",
    'rtx-retrieval[cpu,train]; extra == "export"',
    'onnx-ir>=0.1; python_version >= "3.11" and extra == "export"',
    'rtx-retrieval[export]; extra == "demo"',
]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines as on a terminal that is wide enough for all of them."""
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def lines_of(*arguments: object) -> list[str]:
    """The lines that the command prints, with single spaces."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def installed(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str]) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "requires", lambda _: REQUIREMENTS)
    monkeypatch.setattr(metadata, "version", version)


def test_the_machine_shows_python_engines_and_extras():
    lines = lines_of()
    assert lines[0] == f"rtx {metadata.version('rtx-retrieval')} on this machine"
    assert f"Python {platform.python_version()}" in lines
    assert f"onnx bundles, on the CPU {metadata.version('onnxruntime')} yes" in lines
    assert f"cpu onnxruntime {metadata.version('onnxruntime')}" in lines
    assert not any(line.startswith("dev ") for line in lines)


def test_the_machine_as_json():
    result = run("--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["kind"]) == (0, "machine")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["versions"]["python"] == platform.python_version()
    assert found["engines"]["onnx"]["version"] == metadata.version("onnxruntime")
    assert found["extras"]["cpu"] == {
        "packages": {"onnxruntime": metadata.version("onnxruntime")},
        "includes": [],
        "install": None,
    }
    assert {"cpu", "gpu", "parquet", "train", "export", "demo", "dev"} <= set(found["extras"])


def test_missing_extras_name_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, {"rtx-retrieval": "0.1.0", "onnxruntime": "1.20.0", "onnx-ir": "0.1.0", "torch": "2.9.0"})
    found = examine()
    # transformers is missing: so is what includes it, though its own packages are there.
    assert {extra: entry["install"] for extra, entry in found["extras"].items()} == {
        "cpu": None,
        "train": "pip install 'rtx-retrieval[train]'",
        "export": "pip install 'rtx-retrieval[export]'",
        "demo": "pip install 'rtx-retrieval[demo]'",
    }
    assert found["extras"]["train"]["packages"] == {"torch": "2.9.0", "transformers": None}
    lines = lines_of()
    assert "train torch 2.9.0, transformers missing pip install 'rtx-retrieval[train]'" in lines
    assert "export cpu, train, onnx-ir 0.1.0 pip install 'rtx-retrieval[export]'" in lines


def test_an_engine_that_cannot_run_says_what_would_bring_it(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, {"rtx-retrieval": "0.1.0"})
    lines = lines_of()
    assert "onnx bundles, on the CPU missing: pip install 'rtx-retrieval[cpu]'" in lines
    assert "torch checkpoints missing: pip install 'rtx-retrieval[train]'" in lines
    assert "onnx, cuda bundles, on GPUs missing: pip install 'rtx-retrieval[gpu]'" in lines
    assert "tensorrt engines, on GPUs missing: pip install tensorrt 'cuda-bindings>=12.9.1,<14'" in lines
    installed(monkeypatch, {"rtx-retrieval": "0.1.0", "onnxruntime-gpu": "1.20.1"})
    assert "onnx bundles, on the CPU 1.20.1 yes" in lines_of()


def test_optional_packages_are_read_off_the_requirements():
    assert optional_packages(REQUIREMENTS) == {
        "cpu": (["onnxruntime"], []),
        "train": (["torch", "transformers"], []),
        "export": (["onnx-ir"], ["cpu", "train"]),
        "demo": ([], ["export"]),
    }


def test_no_engine_is_imported_to_tell_its_version():
    modules: dict[str, Any] = {name: sys.modules.pop(name) for name in ("torch", "onnxruntime") if name in sys.modules}
    try:
        examine()
        assert not {"torch", "onnxruntime"} & set(sys.modules)
    finally:
        sys.modules.update(modules)


# -- GPUs ----------------------------------------------------------------------------------------------------------


class Driver:
    """Answers as the driver does: results go where pointers show."""

    def __init__(self, *gpus: tuple[str, int, int], start: int = 0, fails: str = "", version: int = 12080) -> None:
        self.gpus, self.start, self.fails, self.version = gpus, start, fails, version

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            return 999 if name == self.fails else int(self._answer(name, *arguments) or 0)

        return call

    def _answer(self, name: str, *arguments: Any) -> int | None:
        where = getattr(arguments[0], "_obj", None) if arguments else None
        if name == "cuInit":
            return self.start
        if name == "cuGetErrorString":
            arguments[1]._obj.value = {999: b"unknown error", 3: b"initialization error"}.get(arguments[0], b"other")
        elif name == "cuDeviceGetName":
            arguments[0].value = self.gpus[arguments[2].value][0].encode()
        elif name == "cuDeviceGetAttribute":
            capability = self.gpus[arguments[2].value][1]
            where.value = capability // 10 if arguments[1] == 75 else capability % 10
        elif name == "cuDeviceTotalMem_v2":
            where.value = self.gpus[arguments[1].value][2]
        else:
            where.value = {"cuDriverGetVersion": self.version, "cuDeviceGetCount": len(self.gpus)}.get(
                name, arguments[-1]
            )
        return None


L4, T4 = ("NVIDIA L4", 89, 24 << 30), ("Tesla T4", 75, 16 << 30)


def with_driver(monkeypatch: pytest.MonkeyPatch, *gpus: Any, **options: Any) -> None:
    monkeypatch.setattr(gpu, "_load", lambda: Driver(*gpus, **options))


def test_what_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, L4, T4)
    assert find_gpus() == Gpus("12.8", (Gpu(0, "NVIDIA L4", 89, 24 << 30), Gpu(1, "Tesla T4", 75, 16 << 30)))
    with_driver(monkeypatch, start=100)
    assert find_gpus() == Gpus("12.8", ())
    with_driver(monkeypatch, L4, start=3)
    with pytest.raises(EngineError, match="answers cuInit with error 3: initialization error"):
        find_gpus()
    with_driver(monkeypatch, L4, fails="cuDeviceGetName")
    with pytest.raises(EngineError, match="answers cuDeviceGetName with error 999: unknown error"):
        find_gpus()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Any:
        raise OSError("no such file")

    monkeypatch.setattr(gpu, "_load", nothing)
    with pytest.raises(EngineError, match=r"no NVIDIA driver: .* cannot be loaded \(no such file\)"):
        find_gpus()
    assert any(line.startswith("GPU no NVIDIA driver: ") for line in lines_of())
    result = run("--device", "cuda")
    assert result.exit_code == EngineError.exit_code
    assert "error: cuda: missing: pip" in result.stderr
    assert run("--device", "cpu").exit_code == 0
    assert run("--device", "tpu").exit_code == 2


def test_gpus_without_the_package_for_them(monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:
    """A graph is tried on each: ONNX Runtime for the CPU cannot, and the reason is shown."""
    with_driver(monkeypatch, L4, T4)
    lines = lines_of(toy_bundle)
    assert "GPU 2, by a driver for CUDA 12.8" in lines
    assert "cuda:0 NVIDIA L4 sm_89 25.8 GB" in lines
    assert "cpu fp32 fp32 yes" in lines
    (line,) = (line for line in lines if line.startswith("cuda:1 fp32 fp32"))
    assert "needs the package 'onnxruntime-gpu'" in line


def test_gpus_that_run(monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:
    with_driver(monkeypatch, L4)
    opened: list[str] = []
    real = doctor.OnnxEngine

    def on_cpu(graph: bytes, *, device: str, **options: Any) -> Any:
        opened.append(device)
        return real(graph, **options)  # the graph itself is run, where there is no GPU

    monkeypatch.setattr(doctor, "OnnxEngine", on_cpu)
    versions = {"rtx-retrieval": "0.1.0", "onnxruntime-gpu": "1.31.0"}
    installed(monkeypatch, versions)
    assert "onnx, cuda bundles, on GPUs 1.31.0 yes" in lines_of()
    assert opened == ["cuda:0"]
    nodes = [node.op_type for node in onnx.load_from_string(doctor._PRODUCTS).graph.node]
    assert nodes == ["MatMul", "Add", "Cast", "MatMul", "Cast"]
    assert "cuda:0 fp32 fp32 yes" in lines_of(toy_bundle)
    assert run("--device", "cuda").exit_code == 0
    assert run(toy_bundle, "--device", "cuda:0").exit_code == 0
    result = run("--device", "cuda:1")
    assert result.exit_code == EngineError.exit_code
    assert "error: cuda:1: there is no such GPU; 1 found" in result.stderr
    installed(monkeypatch, {**versions, "onnxruntime": "1.31.0"})
    both = (
        "onnxruntime and onnxruntime-gpu are both installed and exclude each other: "
        "pip uninstall onnxruntime onnxruntime-gpu; pip install 'rtx-retrieval[gpu]'"
    )
    assert f"onnx, cuda bundles, on GPUs 1.31.0 {both}" in lines_of()


def test_engines_of_a_bundle(monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:
    bundle = Bundle.open(toy_bundle)
    entry = EngineEntry(
        target="tensorrt-rtx",
        version="1.7.1",
        graph="onnx/model.onnx",
        sources={},
        capabilities=(80, 89),
        profiles=({"batch": (1, 2, 4)},),
        layers={},
    )
    bundle.manifest = dataclasses.replace(bundle.manifest)
    object.__setattr__(bundle.manifest, "engines", {"e": entry})

    def problem() -> Any:
        return examine(bundle)["bundle"]["engines"]["e"]["problem"]

    assert problem() == "there is no GPU"
    with_driver(monkeypatch, T4)
    installed(monkeypatch, {"rtx-retrieval": "0.1.0"})
    assert "runs with that alone; it is not installed here" in problem()
    installed(monkeypatch, {"rtx-retrieval": "0.1.0", "tensorrt-rtx-cu13-bindings": "1.8.0"})
    assert problem() == "it was built with tensorrt-rtx 1.7.1, and runs with that alone; here is 1.8.0"
    installed(monkeypatch, {"rtx-retrieval": "0.1.0", "tensorrt-rtx-cu13-bindings": "1.7.1"})
    assert problem() == "it was built for sm_80, sm_89; here is sm_75"
    with_driver(monkeypatch, T4, L4)
    assert problem() is None
    devices = examine(bundle)["bundle"]["devices"]
    assert devices["tensorrt:0"]["problem"] == (
        "missing: pip install 'cuda-bindings>=12.9.1,<14'; it was built for sm_80, sm_89; here is sm_75"
    )
    versions = {"tensorrt-rtx-cu13-bindings": "1.7.1", "cuda-bindings": "13.0.0"}
    installed(monkeypatch, {"rtx-retrieval": "0.1.0", **versions})
    (told,) = {examine(bundle)["bundle"]["devices"]["tensorrt:1"]["problem"]}
    assert told == "tensorrt-rtx is built with CUDA 13, and the driver is for CUDA 12.8: a newer driver is needed"
    with_driver(monkeypatch, T4, L4, version=13000)
    assert examine(bundle)["bundle"]["devices"]["tensorrt:1"] == {
        "variant": "fp32",
        "precision": "fp32",
        "problem": None,
    }
    monkeypatch.setattr(Bundle, "open", lambda _: bundle)
    assert run(toy_bundle, "--device", "tensorrt:1").exit_code == 0
    for number, message in enumerate(["it was built for sm_80, sm_89; here is sm_75", "there is no such GPU; 2 found"]):
        result = run(toy_bundle, "--device", f"tensorrt:{2 * number}")
        assert result.exit_code == EngineError.exit_code
        assert f"error: tensorrt:{2 * number}: {message}" in result.stderr


def test_engines_that_are_not_there(monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:
    with_driver(monkeypatch, L4)
    result = run("--device", "tensorrt")
    assert result.exit_code == UsageError.exit_code
    assert "--device tensorrt: an engine belongs to a bundle; expected one" in result.stderr
    result = run(toy_bundle, "--device", "tensorrt")
    assert "error: tensorrt: the bundle has no engines; `rtx build --target` builds them" in result.stderr
