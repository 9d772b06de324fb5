"""The variants of a bundle: their names and files, and how each is derived from the plain graph."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from rtx.export.fp16 import to_fp16
from rtx.export.fused import fuse
from rtx.export.graph import strip_notes
from rtx.export.int8 import quantize_int8

VariantName = Literal["fp32", "fused", "fp16", "int8"]
Precision = Literal["fp32", "fp16", "int8"]

VARIANTS: tuple[VariantName, ...] = get_args(VariantName)
"""In the order of closeness to PyTorch."""

FILES: dict[VariantName, str] = {
    "fp32": "onnx/model.onnx",
    "fused": "onnx/model_fused.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_int8.onnx",
}
# Protobuf messages end at 2 GiB; from here on weights lie in a file of their own.
_EXTERNAL_FROM_BYTES = 1_900_000_000


def precision_of(name: VariantName) -> Precision:
    """Precision of a variant's linear layers."""
    return "fp32" if name == "fused" else name


def derive(name: VariantName, plain: ir.Model) -> ir.Model:
    """A variant of the plain graph, which stays as it is.

    Raises:
        ExportError: the graph does not lend itself to it.
    """
    variant = plain.clone()
    if name == "fp16":
        to_fp16(variant)
    elif name == "int8":
        quantize_int8(variant)
    elif name == "fused":
        fuse(variant)
    return variant


def save(graph: ir.Model, path: Path) -> None:
    """Write a graph without the exporter's notes; weights of 2 GiB and more go to a file beside it."""
    strip_notes(graph)
    constants = (value.const_value for value in graph.graph.initializers.values())
    weights = sum(constant.nbytes for constant in constants if constant is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if weights > _EXTERNAL_FROM_BYTES else None)


def external_files(path: Path) -> list[Path]:
    """The files beside a graph that hold its weights."""
    beside = path.with_name(f"{path.name}.data")
    return [beside] if beside.exists() else []


def remove(path: Path) -> None:
    """Remove a graph with its weights, as far as they are there."""
    for file in (path, *external_files(path)):
        file.unlink(missing_ok=True)
