"""sentence-transformers on OpenVINO: `openvino`, and `openvino-int8` by its own static quantisation.

Where the CPU has AMX, OpenVINO computes an fp32 model in bfloat16 of its own accord; it is left to that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.sentence_transformers_models import open_model, running
from benchmarks.peers.worker import Order, Run, Source, attempt, serve

FILES = {"openvino": "openvino_model.xml", "openvino-int8": "openvino_model_qint8_quantized.xml"}


def load(source: Source, form: str, threads: int) -> Run:
    model = open_model(
        source.artifact,
        source.task,
        backend="openvino",
        file_name=FILES[form],
        subfolder="openvino",
        export=False,
        ov_config={"INFERENCE_NUM_THREADS": threads},
    )
    return running(model, source.task)


def prepare(source: Source, order: Order) -> Mapping[str, str]:
    from optimum.intel import OVQuantizationConfig  # type: ignore[import-not-found]
    from sentence_transformers.backend import export_static_quantized_openvino_model

    model = open_model(source.checkpoint, source.task, backend="openvino", export=True)
    model.save_pretrained(str(source.artifact))
    failed: dict[str, str] = {}
    with attempt("openvino-int8", failed):
        texts = json.loads(order.calibration.read_text(encoding="utf-8"))
        folder = source.artifact / "calibration"
        folder.mkdir()
        rows = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "train.jsonl").write_text("".join(rows), encoding="utf-8")
        export_static_quantized_openvino_model(
            model,
            OVQuantizationConfig(num_samples=len(texts)),
            str(source.artifact),
            dataset_name=str(folder),
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
        )
    return failed


if __name__ == "__main__":
    packages = ("sentence-transformers", "transformers", "optimum-intel", "openvino", "nncf")
    serve(load=load, prepare=prepare, packages=packages)
