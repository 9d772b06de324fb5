"""sentence-transformers on PyTorch: as it is (`torch`), in fp16 on a GPU (`torch-fp16-cuda`),
and with linear layers quantised when loaded (`torch-int8`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.sentence_transformers_models import open_model, running
from benchmarks.peers.worker import Run, Source, serve


def load(source: Source, form: str, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    if form == "torch-fp16-cuda":
        model = open_model(source.checkpoint, source.task, backend="torch", device="cuda", dtype=torch.float16)
        return running(model, source.task)
    model = open_model(source.checkpoint, source.task, backend="torch")
    if form == "torch-int8":
        # Deprecated, and what every guide to int8 with PyTorch on a CPU still shows.
        quantize: Any = torch.ao.quantization.quantize_dynamic
        quantize(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return running(model, source.task)


if __name__ == "__main__":
    serve(load=load, packages=("sentence-transformers", "transformers", "torch"))
