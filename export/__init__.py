"""From a checkpoint to a bundle: one plain ONNX graph, its variants, and the gate that each has to pass."""

from __future__ import annotations

from rtx.export.pipeline import ExportOptions, Outcome, export_bundle

__all__ = ["ExportOptions", "Outcome", "export_bundle"]
