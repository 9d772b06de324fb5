"""Every kernel compiles for every GPU, and asks for no more than one has: in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtx.kernels.gpu import OPS, ahead
from rtx.kernels.gpu.ahead import CAPABILITIES, SHARED_LIMIT_BYTES

# Bytes that some builds leave on the stack of a thread, as much as four registers hold.
MOST_STACK_BYTES = 16
CODE = """
import importlib, json, sys
from rtx.kernels.gpu.ahead import CAPABILITIES, compile_kernel
seen, rows = set(), []
# Every kernel for every capability, and its other builds for one each: benchmarks/bench_gpu_kernels.py has them all.
for at, (name, build) in enumerate(importlib.import_module("rtx.kernels.gpu." + sys.argv[1]).BUILDS.items()):
    one = CAPABILITIES[at % len(CAPABILITIES)]
    for capability in (one,) if build.kernel in seen else CAPABILITIES:
        found = compile_kernel(build, capability)
        rows.append([name, capability, found.registers, found.shared_bytes, found.stack_bytes, len(found.cubin)])
    seen.add(build.kernel)
print(json.dumps(rows))
"""


def test_every_op_is_one_of_them() -> None:
    files = sorted(file.stem for file in Path(ahead.__file__).parent.glob("*.py") if "BUILDS: dict" in file.read_text())
    assert files == sorted(OPS)


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile(op: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run([sys.executable, "-c", CODE, op], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(told.stdout)
    assert {capability for _, capability, *_ in found} == {*CAPABILITIES}
    for name, capability, registers, shared, stack, size in found:
        assert 16 <= registers <= 255, name
        assert shared <= SHARED_LIMIT_BYTES[capability], name
        assert stack <= MOST_STACK_BYTES, name
        assert size > 1000, name
