"""What each Triton kernel takes of each kind of GPU, compiled without one: registers, shared memory, stack, blocks.

No time is measured, and none is claimed: there is no GPU here. "warps" is how many of a multiprocessor's warps can be
there at once as far as registers, shared memory and blocks allow, computed from NVIDIA's tables, not observed.

The second table is computed, too: what a job of each op has to read and write once, what it has to calculate, and how
long a GPU would take that ran at its data sheet's figure for the slower of the two (Williams et al. 2009, "Roofline",
doi:10.1145/1498765.1498785), with nothing in its caches. How near the kernels come, nobody has measured.

    python benchmarks/bench_gpu_kernels.py
    python benchmarks/bench_gpu_kernels.py --only pool --sm 89
"""

from __future__ import annotations

import importlib
import json
from typing import Literal, NamedTuple

import click

from rtx.kernels.gpu import OPS
from rtx.kernels.gpu.ahead import CAPABILITIES, SHARED_LIMIT_BYTES, Build, Compiled, compile_kernel

# Of a multiprocessor, by capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS = 64 << 10
MOST_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
MOST_BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_BYTES = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
# Registers are given to a warp in steps of 256; the driver keeps 1 KiB of shared memory a block.
REGISTER_STEP, RESERVED_BYTES, WARP = 256, 1024, 32


Unit = Literal["fp32", "fp16", "int8"]


class Gpu(NamedTuple):
    """Figures of a data sheet, without sparsity.

    Attributes:
        bytes_per_s: to and from its memory.
        per_s: operations, two for a multiplication and an addition: in float32 without tensor cores, in float16 and
            int8 with them.
    """

    bytes_per_s: float
    per_s: dict[Unit, float]


# NVIDIA's data sheets: A100 80 GB SXM, L4, H100 SXM.
GPUS = {
    "A100": Gpu(2.039e12, {"fp32": 19.5e12, "fp16": 312e12, "int8": 624e12}),
    "L4": Gpu(0.3e12, {"fp32": 30.3e12, "fp16": 121e12, "int8": 242.5e12}),
    "H100": Gpu(3.35e12, {"fp32": 67e12, "fp16": 989e12, "int8": 1979e12}),
}


class Job(NamedTuple):
    """A typical use of an op.

    Attributes:
        op: its name.
        size: in words.
        bytes: that are read or written once at least.
        operations: that the kernel makes, as `Gpu.per_s` counts them.
        unit: what they are calculated in.
    """

    op: str
    size: str
    bytes: int
    operations: int
    unit: Unit

    def roofline_s(self, gpu: Gpu) -> float:
        return max(self.bytes / gpu.bytes_per_s, self.operations / gpu.per_s[self.unit])


def jobs() -> list[Job]:
    """One of each op, or two where there are two passes."""
    rows, tokens, width, inner = 64, 16_384, 1024, 4096
    sequences, length, heads, head = 32, 512, 16, 64
    query_tokens, documents, document_tokens, dim = 32, 1000, 180, 128
    queries, candidates = 8192, 65_536
    vectors = 4 * (queries + candidates) * width
    products = 2 * queries * candidates * width
    return [
        # Sum, mean square, largest magnitude, and what makes y and the codes of the sum: some ten for each number.
        Job(
            "add_norm_quantize",
            f"{tokens} x {width} fp16, with residual and sum",
            tokens * width * (2 + 2 + 2 + 1) + 4 * tokens,
            10 * tokens * width,
            "fp32",
        ),
        Job("info_nce", f"forward, {queries} x {candidates} x {width}", vectors + 4 * queries, products, "fp32"),
        # Of each side the products again, and the gradient.
        Job("info_nce", f"backward, {queries} x {candidates} x {width}", 2 * vectors, 4 * products, "fp32"),
        Job(
            "int8_linear",
            f"{tokens} x {width} to {inner}, fp16",
            tokens * width + width * inner + 2 * tokens * inner,
            2 * tokens * width * inner,
            "int8",
        ),
        Job(
            "maxsim",
            f"{query_tokens} x {dim} with {documents} of {document_tokens} tokens, fp16",
            2 * dim * documents * document_tokens,
            2 * query_tokens * dim * documents * document_tokens,
            "fp16",
        ),
        Job(
            "packed_attention",
            f"{sequences} of {length} tokens, {heads} heads of {head}, fp16",
            4 * 2 * sequences * length * heads * head,
            4 * sequences * length**2 * heads * head,
            "fp16",
        ),
        Job(
            "pool",
            f"mean of {rows} x {length} x {width} fp16 to float32",
            2 * rows * length * width + 8 * rows * length + 4 * rows * width,
            rows * length * width,
            "fp32",
        ),
    ]


def print_jobs(only: str | None) -> list[dict[str, object]]:
    """Print the second table, and return it."""
    rows: list[dict[str, object]] = []
    print("\ncomputed from data sheets, not measured: the least time a GPU could take")
    print(f"{'op':<18} {'job':<48} {'MB':>7} {'G ops':>8} {'in':>5} " + " ".join(f"{f'{name} ms':>8}" for name in GPUS))
    for job in jobs():
        if only in (None, job.op):
            times = {name: 1e3 * job.roofline_s(gpu) for name, gpu in GPUS.items()}
            rows.append({**job._asdict(), "computed_ms": times})
            print(
                f"{job.op:<18} {job.size:<48} {job.bytes / 1e6:>7.1f} {job.operations / 1e9:>8.1f} {job.unit:>5} "
                + " ".join(f"{time:>8.3f}" for time in times.values())
            )
    return rows


def resident_warps(build: Build, found: Compiled) -> int:
    """Warps of a multiprocessor at once, as registers and shared memory allow."""
    a_warp = -(-found.registers * WARP // REGISTER_STEP) * REGISTER_STEP
    by_registers = REGISTERS // a_warp // build.warps
    by_shared = SHARED_BYTES[found.capability] // (found.shared_bytes + RESERVED_BYTES)
    by_warps, by_blocks = MOST_WARPS[found.capability] // build.warps, MOST_BLOCKS[found.capability]
    return min(by_warps, by_blocks, by_registers, by_shared) * build.warps


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
    computed = print_jobs(only)
    print(json.dumps({"kind": "gpu kernels, compiled and not run", "rows": rows, "computed": computed}))


if __name__ == "__main__":
    main()
