"""Kernels of Triton compiled ahead of time, on a machine without a GPU: what each takes of a GPU of every kind.

BUILDS    of each file of `rtx.kernels.gpu`: its kernels, with the types and constants that they are compiled for
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""A100; A10, RTX 30; L4, L40S, RTX 40; H100, H200; B200; RTX 50, RTX PRO."""

SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"): a kernel that needs more is compiled and never starts."""

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
# Pointers are those of tensors, which begin at multiples of 16 bytes and more.
_ALIGNED = [["tt.divisibility", 16]]
_WARP = 32


@dataclass(frozen=True, kw_only=True)
class Build:
    """A kernel and what it is compiled for.

    Attributes:
        kernel: decorated by `triton.jit`.
        types: of its arguments that are known only when it runs: "*fp16" (a pointer), "i32", "fp32".
        constants: of the others.
        warps: of 32 threads, in a block.
        stages: of loads that run ahead of what they are needed for.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability.

    Attributes:
        capability: as 89.
        registers: of a thread.
        shared_bytes: of a block.
        stack_bytes: of a thread: what does not fit into its registers (spills) lies there, in the GPU's memory.
        cubin: the machine code.
    """

    capability: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    cubin: bytes


def compile_kernel(build: Build, capability: int) -> Compiled:
    """
    Raises:
        ValueError: `build` does not name every argument of its kernel, or others.
        triton.CompilationError: the kernel is wrong.
    """
    names = list(build.kernel.arg_names)
    if sorted([*build.types, *build.constants]) != sorted(names):
        raise ValueError(f"{build.kernel.__name__}: expected {names}, got {[*build.types, *build.constants]}")
    pointers = [name for name, kind in build.types.items() if kind.startswith("*")]
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): _ALIGNED for name in pointers},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the next version's defaults
        found = triton.compile(
            source,
            target=GPUTarget("cuda", capability, _WARP),
            options={"num_warps": build.warps, "num_stages": build.stages},
        )
    cubin: bytes = found.asm["cubin"]
    registers, stack = _usage(cubin)
    # What is asked for when the kernel starts is not in the machine code.
    return Compiled(capability, registers, int(found.metadata.shared), stack, cubin)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a thread, as NVIDIA's `cuobjdump`, which is in Triton's package, reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run([os.fspath(tool), "-res-usage", file], capture_output=True, text=True, check=True).stdout
    match = _USAGE.search(told)
    assert match is not None, told
    return int(match[1]), int(match[2])
