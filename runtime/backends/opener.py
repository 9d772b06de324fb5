"""What opens one graph of a model: ONNX Runtime a graph, TensorRT the engine that was built of it."""

from __future__ import annotations

from collections.abc import Callable

from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.backends.tensorrt import TensorRtEngine

Graph = OnnxEngine | TensorRtEngine
OpenGraph = Callable[..., Graph]
"""Called as `OnnxEngine` is."""
