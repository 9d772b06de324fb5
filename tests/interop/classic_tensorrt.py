"""Classic TensorRT has what rtx calls: the names, in the Python bindings of several versions.

The bindings come from the package index; the libraries behind them, some GB for GPUs, are empty ones that are compiled
here, so that the module can be imported. Nothing is built or run.

    python tests/interop/classic_tensorrt.py
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / ".venvs" / "tensorrt"
VERSIONS = ("10.13.3.9", "10.16.1.11", "11.4.0.106")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# Of TensorRT-RTX alone, and asked for where there are capabilities to build for, or where it is there.
OF_RTX = {"num_compute_capabilities", "set_compute_capability", "ComputeCapability", "REQUIRE_USER_ALLOCATION"}


def main() -> int:
    """Exit code 1 if something is missing."""
    failed = 0
    for version in VERSIONS:
        folder = FOLDER / version
        if not (folder / "tensorrt_bindings").is_dir():
            prepare(folder, version)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=False)
        failed += done.returncode != 0
    return min(failed, 1)


def prepare(folder: Path, version: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    package = f"tensorrt-cu13-bindings=={version}"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package], check=True)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.partition('.')[0]}"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)


def check(folder: str) -> int:
    """In a process that finds the empty libraries."""
    sys.path[:0] = [folder, str(HERE.parent / "runtime")]
    from called import called

    from rtx.export import tensorrt as building
    from rtx.runtime.backends import tensorrt as running

    trt: Any = importlib.import_module("tensorrt_bindings")
    engine, context = trt.ICudaEngine, trt.IExecutionContext
    owners: dict[Any, dict[str, Any]] = {
        running: {"engine": engine, "_engine": engine, "context": context, "_runtime": trt.Runtime, "_trt": trt},
        building: {
            "builder": trt.Builder,
            "config": trt.IBuilderConfig,
            "parser": trt.OnnxParser,
            "profile": trt.IOptimizationProfile,
            "network": trt.INetworkDefinition,
            "layer": trt.ILayer,
            "tensor": trt.ITensor,
            "timings": trt.ITimingCache,
            "BuilderFlag": trt.BuilderFlag,
            "NetworkDefinitionCreationFlag": trt.NetworkDefinitionCreationFlag,
            "trt": trt,
        },
    }
    asked = {
        (name, kind)
        for module, kinds in owners.items()
        for owner, kind in kinds.items()
        for name in called(module, owner)
    }
    asked.add(("USER_MANAGED", trt.ExecutionContextAllocationStrategy))
    # What a name was given to that is called otherwise by now would not be looked at.
    empty = [owner for module, kinds in owners.items() for owner in kinds if not called(module, owner)]
    if empty:
        print(f"FAIL nothing is asked of {', '.join(empty)} any more")
        return 1
    missing = sorted(name for name, kind in asked if name not in OF_RTX and not hasattr(kind, name))
    found = f"has no {', '.join(missing)}" if missing else f"has the {len(asked)} names that rtx asks for"
    print(f"{'FAIL' if missing else 'ok  '} TensorRT {trt.__version__} {found}", flush=True)
    return min(len(missing), 1)


if __name__ == "__main__":
    sys.exit(check(sys.argv[1]) if len(sys.argv) > 1 else main())
