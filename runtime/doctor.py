"""What this machine has, what is missing, and which variant of a bundle would run where.

Nothing is taken for granted that can be tried: ONNX Runtime's CUDA provider runs a graph on each GPU.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import numpy as np

from rtx.kernels.library import best_isa
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.backends.tensorrt import INSTALL, installed_tensorrt, mismatch, tensorrt_package
from rtx.runtime.bundle import Bundle
from rtx.runtime.engine import TENSORRT
from rtx.runtime.errors import EngineError, MissingExtraError, UsageError, install_command
from rtx.runtime.gpu import Gpu, Gpus, find_gpus
from rtx.runtime.machine import describe_machine, installed_version
from rtx.runtime.manifest import EngineEntry, Target

_DISTRIBUTION = "rtx-retrieval"
# name[extras] ... ; extra == "name"
_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w,\s-]+)\])?[^;]*;.*\bextra\s*==\s*["']([\w-]+)["']""")

# A graph in ONNX whose products a GPU does with its libraries, in both precisions: a wheel without machine code for the
# GPU would copy, but not multiply. y = float32(float16(x @ W + b) @ W) of x [n, 2], W [[1, 2], [3, 4]] and b [10, 20].
_PRODUCTS = (
    b'\x08\x08\x12\x03rtx:\xdc\x01\n\x11\n\x01x\n\x01w\x12\x01p"\x06MatMul\n\x0e\n\x01p\n\x01b\x12\x01s"\x03Add\n'
    b'\x17\n\x01s\x12\x01c"\x04Cast*\t\n\x02to\x18\n\xa0\x01\x02\n\x11\n\x01c\n\x01v\x12\x01q"\x06MatMul\n\x17\n'
    b'\x01q\x12\x01y"\x04Cast*\t\n\x02to\x18\x01\xa0\x01\x02\x12\x01g*\x1b\x08\x02\x08\x02\x10\x01B\x01wJ\x10\x00'
    b"\x00\x80?\x00\x00\x00@\x00\x00@@\x00\x00\x80@*\x11\x08\x02\x10\x01B\x01bJ\x08\x00\x00 A\x00\x00\xa0A*\x13\x08"
    b"\x02\x08\x02\x10\nB\x01vJ\x08\x00<\x00@\x00B\x00DZ\x14\n\x01x\x12\x0f\n\r\x08\x01\x12\t\n\x03\x12\x01n\n\x02"
    b"\x08\x02b\x14\n\x01y\x12\x0f\n\r\x08\x01\x12\t\n\x03\x12\x01n\n\x02\x08\x02B\x04\n\x00\x10\r"
)
_X, _Y = np.array([[1.0, -2.0]], dtype=np.float32), np.array([[47.0, 66.0]], dtype=np.float32)
# What TensorRT-RTX's packages are called by the CUDA that they were built with.
_CUDA_OF = re.compile(r"-cu(\d+)\b")


def examine(bundle: Bundle | None = None) -> dict[str, Any]:
    """The machine, its GPUs, engines and extras, and where a bundle would run; for JSON.

    Each engine has `problem`, why it cannot be used, and None if it can.
    """
    try:
        gpus, problem = find_gpus(), None
    except EngineError as broken:
        gpus, problem = None, str(broken)
    devices = () if gpus is None else gpus.devices
    if gpus is not None and not devices:
        problem = "the NVIDIA driver finds no GPU"
    cuda = {gpu.index: _why_not_cuda(gpu) for gpu in devices}
    found = {
        "kind": "machine",
        "rtx": installed_version(_DISTRIBUTION),
        "machine": dataclasses.asdict(describe_machine()),
        "operators": best_isa(),
        "gpu": {
            "cuda": None if gpus is None else gpus.cuda,
            "devices": [dataclasses.asdict(gpu) for gpu in devices],
            "problem": problem,
        },
        "engines": _engines(cuda, problem),
        "extras": describe_extras(),
        "bundle": None,
    }
    if bundle is not None:
        found["bundle"] = _where_it_runs(bundle, gpus, cuda)
    return found


def describe_extras() -> dict[str, dict[str, Any]]:
    """The extras of rtx with the versions of their packages, and the command that brings what is missing."""
    extras: dict[str, dict[str, Any]] = {}
    for extra, (packages, includes) in optional_packages(metadata.requires(_DISTRIBUTION) or []).items():
        versions = {package: installed_version(package) for package in packages}
        extras[extra] = {"packages": versions, "includes": includes}

    def complete(extra: str) -> bool:
        entry = extras[extra]
        return None not in entry["packages"].values() and all(map(complete, entry["includes"]))

    for extra, entry in extras.items():
        entry["install"] = None if complete(extra) else install_command(extra)
    return extras


def optional_packages(requirements: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """The packages of each extra of rtx, and the other extras that it includes.

    Args:
        requirements: as `importlib.metadata.requires` gives them.
    """
    extras: dict[str, tuple[list[str], list[str]]] = {}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            package, included, extra = match.groups()
            packages, includes = extras.setdefault(extra, ([], []))
            if package == _DISTRIBUTION:
                includes += [name.strip() for name in included.split(",")]
            else:
                packages.append(package)
    return extras


def _engines(cuda: dict[int, str | None], no_gpu: str | None) -> dict[str, dict[str, Any]]:
    cpu, gpu = installed_version("onnxruntime"), installed_version("onnxruntime-gpu")
    torch = installed_version("torch")
    # They own the same files: to remove one leaves the other broken.
    clean = f"pip uninstall onnxruntime onnxruntime-gpu; {install_command('gpu')}"
    both = f"onnxruntime and onnxruntime-gpu are both installed and exclude each other: {clean}"
    broken = "; ".join(f"cuda:{index}: {why}" for index, why in cuda.items() if why)
    missing = f"missing: {'pip uninstall onnxruntime; ' if cpu else ''}{install_command('gpu')}"
    on_cuda = missing if gpu is None else (both if cpu else no_gpu or broken or None)
    found: dict[str, dict[str, Any]] = {
        "onnx": {
            "runs": "bundles, on the CPU",
            "version": cpu or gpu,
            "problem": None if cpu or gpu else f"missing: {install_command('cpu')}",
        },
        "onnx, cuda": {"runs": "bundles, on GPUs", "version": gpu, "problem": on_cuda},
        "torch": {
            "runs": "checkpoints",
            "version": torch,
            "problem": None if torch else f"missing: {install_command('train')}",
        },
    }
    for target, command in INSTALL.items():
        version = installed_tensorrt(target)
        # Without a GPU, TensorRT-RTX builds all the same.
        alone = f"builds engines, and runs none: {no_gpu}" if target == "tensorrt-rtx" else no_gpu
        problem = (alone if no_gpu else None) if version else f"missing: {command}"
        found[target] = {"runs": "engines, on GPUs", "version": version, "problem": problem}
    return found


def _why_not_cuda(gpu: Gpu) -> str | None:
    """Why ONNX Runtime does not run a graph on a GPU; None if it does."""
    try:
        engine = OnnxEngine(_PRODUCTS, output="y", name="a graph", device=f"cuda:{gpu.index}", threads=1)
        try:
            same = np.array_equal(engine.run({"x": _X}), _Y)
        finally:
            engine.close()
    except (MissingExtraError, EngineError) as broken:
        return str(broken)
    return None if same else "it runs a graph and gives wrong numbers"


def _where_it_runs(bundle: Bundle, gpus: Gpus | None, cuda: dict[int, str | None]) -> dict[str, Any]:
    problems = {"cpu": None, **{f"cuda:{index}": why for index, why in cuda.items()}}
    devices = {device: _variant(bundle, device, problem) for device, problem in problems.items()}
    if bundle.manifest.engines and gpus is not None:
        devices |= {f"{TENSORRT}:{gpu.index}": _on_tensorrt(bundle, gpu, gpus.cuda) for gpu in gpus.devices}
    return {
        "path": str(bundle.path),
        "devices": devices,
        "engines": {
            file: {"problem": _why_not_engine(engine, gpus)} for file, engine in bundle.manifest.engines.items()
        },
    }


def _on_tensorrt(bundle: Bundle, gpu: Gpu, cuda: str) -> dict[str, Any]:
    """As `_variant`, for the bundle's engines on a GPU, by a driver for some CUDA; whether they run is not tried."""
    found = _variant(bundle, f"{TENSORRT}:{gpu.index}", None)
    if found["variant"] is None:
        return found
    problems = [] if installed_version("cuda-bindings") else ["missing: pip install 'cuda-bindings>=12.9.1,<14'"]
    for graph in bundle.manifest.variants[found["variant"]].graphs:
        engines = bundle.engines_of(graph).values()
        why = [
            mismatch(engine, installed_tensorrt(engine.target), {gpu.capability}) or _too_old(engine.target, cuda)
            for engine in engines
        ]
        problems += [] if None in why else [reason for reason in why if reason]
    return {**found, "problem": "; ".join(dict.fromkeys(problems)) or None}


def _too_old(target: Target, cuda: str) -> str | None:
    """Why the driver, which is for a version of CUDA, is not new enough for TensorRT's package; None if it is."""
    built = _CUDA_OF.search(tensorrt_package(target) or "")
    if built is None or int(built[1]) <= int(cuda.split(".")[0]):
        return None
    return f"{target} is built with CUDA {built[1]}, and the driver is for CUDA {cuda}: a newer driver is needed"


def _variant(bundle: Bundle, device: str, problem: str | None) -> dict[str, Any]:
    """What is opened on a device where no variant is named, and why it cannot be; `problem` is the device's own."""
    try:
        name, variant = bundle.variant(device=device)
    except UsageError as none:
        return {"variant": None, "precision": None, "problem": str(none)}
    return {"variant": name, "precision": variant.precision, "problem": problem}


def _why_not_engine(engine: EngineEntry, gpus: Gpus | None) -> str | None:
    """Why no GPU of this machine takes an engine; None if one does."""
    if gpus is None or not gpus.devices:
        return "there is no GPU"
    return mismatch(engine, installed_tensorrt(engine.target), {gpu.capability for gpu in gpus.devices})
