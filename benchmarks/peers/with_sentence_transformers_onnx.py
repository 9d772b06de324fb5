"""sentence-transformers on ONNX Runtime, by its own exports: `onnx-o3`, and `onnx-int8` for what the CPU has."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.sentence_transformers_models import open_model, running
from benchmarks.peers.worker import Order, Run, Source, attempt, has_vnni, serve

FILES = {"onnx-o3": "model_O3.onnx", "onnx-int8": "model_int8.onnx"}


def load(source: Source, form: str, threads: int) -> Run:
    import onnxruntime

    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = threads
    model = open_model(
        source.artifact,
        source.task,
        backend="onnx",
        provider="CPUExecutionProvider",
        session_options=session,
        file_name=FILES[form],
        subfolder="onnx",
        export=False,
    )
    return running(model, source.task)


def prepare(source: Source, order: Order) -> Mapping[str, str]:
    """The checkpoint with graphs in the folder `onnx`: as exported, for FastEmbed too, and what is made of that."""
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model, export_optimized_onnx_model

    model = open_model(source.checkpoint, source.task, backend="onnx", provider="CPUExecutionProvider", export=True)
    target = str(source.artifact)
    model.save_pretrained(target)
    failed: dict[str, str] = {}
    if "onnx-o3" in order.forms:
        with attempt("onnx-o3", failed):
            export_optimized_onnx_model(model, "O3", target)
    if "onnx-int8" in order.forms:
        with attempt("onnx-int8", failed):
            configuration = "avx512_vnni" if has_vnni() else "avx2"
            export_dynamic_quantized_onnx_model(model, configuration, target, file_suffix="int8")
    return failed


if __name__ == "__main__":
    packages = ("sentence-transformers", "transformers", "optimum-onnx", "onnxruntime", "torch")
    serve(load=load, prepare=prepare, packages=packages)
