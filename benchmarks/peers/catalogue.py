"""Which peers there are, which environment and script each runs in, and which models each is run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.peers.checkpoints import CheckpointName
from benchmarks.peers.environments import OWN

ModelName = Literal["minilm", "base", "qwen3"]

_SMALL: tuple[CheckpointName, ...] = ("minilm", "pairs")
_ENCODERS: tuple[CheckpointName, ...] = (*_SMALL, "base")
_ALL: tuple[CheckpointName, ...] = (*_ENCODERS, "qwen3")


@dataclass(frozen=True)
class Peer:
    """A way of running a model.

    Attributes:
        name: as tables show it.
        environment: requirements/ENVIRONMENT.txt, or "rtx" for the one that the driver runs in.
        form: what its script's `load` is told, and the `prepare` of its artifact.
        checkpoints: that it is run with.
        artifact: environment whose `prepare` makes the files that it opens; None where it opens the checkpoint.
    """

    name: str
    environment: str
    form: str
    checkpoints: tuple[CheckpointName, ...]
    artifact: str | None = None

    @property
    def script(self) -> str:
        return script_of(self.environment)


def script_of(environment: str) -> str:
    return f"with_{environment}.py"


BASELINE = "sentence-transformers, torch"
"""What ratios are to, and vectors are held against."""
OURS = "rtx, int8-packed"
"""What is set beside every peer."""

_ONNX, _OPENVINO = "sentence_transformers_onnx", "sentence_transformers_openvino"
# Not all at every size: FastEmbed and Infinity run ONNX Runtime and PyTorch, which stand for them with larger models;
# fp32 through ONNX Runtime is there as plain ONNX Runtime. Of Qwen3, CTranslate2 converts only the language model; the
# export for plain ONNX Runtime fails in PyTorch 2.13 ("unordered_map::at"); and the graph that sentence-transformers
# 5.7 exports asks for position_ids, which it then does not give.
PEERS = (
    Peer(BASELINE, "sentence_transformers", "torch", _ALL),
    Peer("sentence-transformers, torch int8", "sentence_transformers", "torch-int8", _ALL),
    Peer("sentence-transformers, ONNX O3", _ONNX, "onnx-o3", _SMALL, _ONNX),
    Peer("sentence-transformers, ONNX int8", _ONNX, "onnx-int8", _ENCODERS, _ONNX),
    Peer("sentence-transformers, OpenVINO", _OPENVINO, "openvino", _SMALL, _OPENVINO),
    Peer("sentence-transformers, OpenVINO int8", _OPENVINO, "openvino-int8", _ALL, _OPENVINO),
    Peer("FastEmbed", "fastembed", "onnx", _SMALL, _ONNX),
    Peer("FastEmbed, int8", "fastembed", "onnx-int8", _SMALL, _ONNX),
    Peer("Infinity, torch", "infinity", "torch", _SMALL),
    Peer("CTranslate2, int8", "ctranslate2", "int8", _ENCODERS, "ctranslate2"),
    Peer("plain ONNX Runtime, fused", "onnxruntime", "fp32", _ENCODERS, "onnxruntime"),
    Peer("plain ONNX Runtime, fused int8", "onnxruntime", "int8", _ENCODERS, "onnxruntime"),
    Peer("rtx, fp32", OWN, "fp32", _ALL, OWN),
    Peer("rtx, fp32-packed", OWN, "fp32-packed", _ENCODERS, OWN),
    Peer(OURS, OWN, "int8-packed", _ALL, OWN),
)
OURS_ON_GPU = "rtx, fp16 engines"
GPU_PEERS = (
    # Its attention is PyTorch's, which on a GPU is flash attention in half precision.
    Peer(BASELINE, "sentence_transformers", "torch-fp16-cuda", _ALL),
    Peer("vLLM", "vllm", "fp16", _ALL),
    Peer("Text Embeddings Inference", "text_embeddings_inference", "fp16", _ALL),
    Peer("rtx, fp16", OWN, "fp16@cuda", _ALL, OWN),
    Peer(OURS_ON_GPU, OWN, "fp16@tensorrt", _ALL, OWN),
)
CHECKPOINTS: dict[ModelName, tuple[CheckpointName, ...]] = {
    "minilm": ("minilm", "pairs"),
    "base": ("base",),
    "qwen3": ("qwen3",),
}


def chosen(words: tuple[str, ...], *, gpu: bool = False) -> list[Peer]:
    """The baseline, and the peers whose names have one of the words in them; all where there are no words."""
    return [
        peer
        for peer in (GPU_PEERS if gpu else PEERS)
        if peer.name == BASELINE or not words or any(word.lower() in peer.name.lower() for word in words)
    ]
