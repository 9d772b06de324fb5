"""What each Triton kernel takes of each kind of GPU, compiled without one: registers, shared memory, stack, blocks.

No time is measured, and none is claimed: there is no GPU here. "warps" is how many of a multiprocessor's warps can be
there at once as far as registers and shared memory allow, computed from NVIDIA's tables, not observed.

    python benchmarks/bench_gpu_kernels.py
    python benchmarks/bench_gpu_kernels.py --only pool --sm 89
"""

from __future__ import annotations

import importlib
import json

import click

from rtx.kernels.gpu.ahead import CAPABILITIES, OPS, SHARED_LIMIT_BYTES, Build, Compiled, compile_kernel

# Of a multiprocessor, by capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS = 64 << 10
MOST_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SHARED_BYTES = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
# Registers are given to a warp in steps of 256; the driver keeps 1 KiB of shared memory a block.
REGISTER_STEP, RESERVED_BYTES, WARP = 256, 1024, 32


def resident_warps(build: Build, found: Compiled) -> int:
    """Warps of a multiprocessor at once, as registers and shared memory allow."""
    a_warp = -(-found.registers * WARP // REGISTER_STEP) * REGISTER_STEP
    by_registers = REGISTERS // a_warp // build.warps
    by_shared = SHARED_BYTES[found.capability] // (found.shared_bytes + RESERVED_BYTES)
    return min(MOST_WARPS[found.capability] // build.warps, by_registers, by_shared) * build.warps


@click.command()
@click.option("--only", type=click.Choice(OPS), help="One op.")
@click.option("--sm", type=int, multiple=True, help="Compute capabilities; all that are known by default.")
def main(only: str | None, sm: tuple[int, ...]) -> None:
    """Compile every kernel and print what it takes."""
    rows = []
    print(f"{'op':<18} {'build':<48} {'sm':>4} {'registers':>9} {'shared':>7} {'stack':>5} {'warps':>8} {'cubin':>7}")
    for op in [only] if only else OPS:
        builds: dict[str, Build] = importlib.import_module(f"rtx.kernels.gpu.{op}").BUILDS
        for name, build in builds.items():
            for capability in sm or CAPABILITIES:
                found = compile_kernel(build, capability)
                assert found.shared_bytes <= SHARED_LIMIT_BYTES[capability], (
                    f"{op} {name} does not start on {capability}"
                )
                warps = resident_warps(build, found)
                rows.append(
                    {
                        "op": op,
                        "build": name,
                        "sm": capability,
                        "registers": found.registers,
                        "shared_bytes": found.shared_bytes,
                        "stack_bytes": found.stack_bytes,
                        "resident_warps": warps,
                        "cubin_bytes": len(found.cubin),
                    }
                )
                print(
                    f"{op:<18} {name:<48} {capability:>4} {found.registers:>9} {found.shared_bytes:>7} "
                    f"{found.stack_bytes:>5} {warps:>3} / {MOST_WARPS[capability]} {len(found.cubin):>7}"
                )
    print(json.dumps({"kind": "gpu kernels, compiled and not run", "rows": rows}))


if __name__ == "__main__":
    main()
