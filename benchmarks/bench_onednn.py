"""int8_linear beside oneDNN's int8 product with the same bias and activation, on one thread, in interleaved rounds.

oneDNN is what PyTorch brings: `torch.ops.onednn.qlinear_pointwise`, on a weight that it has packed, with float32 out.
It is given rows that are quantised already, by one scale for all of them: it has no scale for each, and no residual or
norm behind the product. rtx quantises its rows, each by its own, within the time. What PyTorch adds to a call is in
oneDNN's time.

    python benchmarks/bench_onednn.py
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch

from rtx.kernels.int8_linear import pack_weight
from rtx.kernels.library import Isa, load_library
from rtx.runtime.machine import describe_machine
from rtx.runtime.rounds import fitting_count, run_rounds, summarize

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.bench_kernels import (
    ACTIVATIONS,
    Case,
    Layer,
    aligned,
    longs,
    normal,
    pointers,
    random_weight,
    run,
)
from benchmarks.isa import isa_option

ROUNDS, SECONDS = 9, 0.004
TOKENS = (10, 82, 1000)
LAYERS = (
    Layer("MiniLM", 384, (3 * 384,)),
    Layer("MiniLM", 384, (1536,), "gelu"),
    Layer("MiniLM", 1536, (384,)),
    Layer("bge-base", 768, (3072,), "gelu"),
    Layer("bge-base", 3072, (768,)),
)
OURS, ONEDNN = "rtx", "oneDNN"
# Of two results, of the norm of one: rows by one scale, and rows by their own.
TOLERANCE = 0.02


@click.command()
@isa_option
def main(isa: Isa) -> None:
    """Print how many times as long oneDNN takes."""
    torch.set_num_threads(1)
    operators = load_library()
    operators.rtx_weight.restype = ctypes.c_void_p
    print(f"operators: {isa}; torch {torch.__version__}; one thread\n")
    print("| layer | tokens | rtx, µs | oneDNN, µs | oneDNN / rtx (quartiles) |\n|---|---|---|---|---|")
    found = {}
    for layer, tokens in itertools.product(LAYERS, TOKENS):
        cases = pair(operators, layer, tokens)
        count = fitting_count([*cases.values()], run, SECONDS, least=1, most=10_000)

        def timed(case: Case, count: int = count) -> Mapping[str, float]:
            run(case, 1)
            begun = perf_counter()
            run(case, count)
            return {"seconds": (perf_counter() - begun) / count}

        rounds = run_rounds(cases, {"all": timed}, ROUNDS)
        stats = summarize(rounds, baseline=OURS)
        ours, other = stats[OURS]["seconds"], stats[ONEDNN]["seconds"]
        name = f"{layer.model} {layer.inputs} → {layer.outputs[0]} {layer.around}".strip()
        print(
            f"| {name} | {tokens:,} | {ours.median * 1e6:,.1f} | {other.median * 1e6:,.1f} "
            f"| {other.ratio:.2f} ({other.ratio_low:.2f}–{other.ratio_high:.2f}) |"
        )
        found[f"{name}, {tokens} tokens"] = rounds
    print("\n" + json.dumps({"isa": isa, "rounds": found, "machine": dataclasses.asdict(describe_machine())}))


def pair(operators: ctypes.CDLL, layer: Layer, tokens: int) -> dict[str, Case]:
    """The same layer on the same rows by either, and a look at whether they agree."""
    random = np.random.default_rng(0)
    weight = random_weight(random, layer)
    packed = aligned((pack_weight(weight, layer.outputs).size,), np.int8)
    packed[:] = pack_weight(weight, layer.outputs).reshape(-1)
    x, bias = normal(random, tokens, layer.inputs), normal(random, 1, layer.outputs[0])[0]
    y = aligned((tokens, layer.outputs[0]), np.float32)
    parts = np.array(layer.outputs, dtype=np.int64)
    ours = ctypes.c_void_p(
        operators.rtx_weight(
            *pointers(packed, weight.scale, weight.column_sum, bias), *longs(layer.inputs), *pointers(parts), *longs(1)
        )
    )
    arguments = (
        *pointers(x),
        ours,
        ACTIVATIONS.index(layer.activation),
        *(0, 0, 0),
        ctypes.c_float(1e-5),
        *pointers(None, None, None),
        *longs(tokens),
        (ctypes.c_void_p * 1)(y.ctypes.data),
    )
    scale = float(np.abs(x).max()) / 127
    rows = torch.from_numpy((np.rint(x / scale) + 128).astype(np.uint8))
    values = torch.from_numpy((weight.values.astype(np.int16) - 128).astype(np.int8).T.copy())
    theirs = torch.ops.onednn.qlinear_prepack(values, list(rows.shape))
    scales, zeros = torch.from_numpy(weight.scale.copy()), torch.zeros(layer.outputs[0], dtype=torch.int64)
    biases, activation = torch.from_numpy(bias), layer.activation or "none"

    def product() -> torch.Tensor:
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rows,
            scale,
            128,
            theirs,
            scales,
            zeros,
            biases,
            1.0,
            0,
            torch.float32,
            activation,
            [],
            "none",
        )
        return found

    case = Case(OURS, "", tokens, operators.rtx_int8_linear, itertools.repeat(arguments), kept=(packed, x, y, bias))
    run(case, 1)
    distance = float(np.linalg.norm(product().numpy() - y) / np.linalg.norm(y))
    assert distance <= TOLERANCE, f"{layer}: {distance} from each other"
    return {OURS: case, ONEDNN: Case(ONEDNN, "", tokens, product, itertools.repeat(()))}


if __name__ == "__main__":
    main()
