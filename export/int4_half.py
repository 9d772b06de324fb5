"""int4-half variant: linear layers with weights in 4 bits and everything else in half precision, for TensorRT.

    x [* factor] ─────────────────────────────────────────────────────────┐
    W int4 [in, out] -> DequantizeLinear(scale [in / block, out]) ┴> MatMul in half precision

TensorRT reads weights in 4 bits with a scale for each block of inputs, and no zero point. What is multiplied is the
rounded weight. Embeddings stay in half precision. Opset 21.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from rtx.export.calibration import activations
from rtx.export.edit import Editor, drop_dead
from rtx.export.fp16 import to_fp16
from rtx.export.graph import module_of
from rtx.export.int4_blocks import BLOCKS, Factors, block_of, quantize_blocks
from rtx.export.int8 import check_gemm, content_of, refuse_left_out, replace_product
from rtx.runtime.errors import ExportError

_NAME, _OPSET = "int4-half", 21


def quantize_int4_half(model: ir.Model, factors: Factors = MappingProxyType({})) -> list[str]:
    """Quantise a plain graph in place, and bring the rest to half precision.

    Args:
        model: what `rtx.export.graphs.export_graphs` made.
        factors: of what its layers read, as `rtx.export.calibration.calibrate` gives them; without, weights are
            rounded as they are.

    Returns:
        Names of the modules whose weights are now int4, as `RetrievalModel.named_modules` calls them.

    Raises:
        ExportError: a weight holds NaN or infinity, has a width that no block divides, or is used in a way that is not
            known here.
    """
    editor = Editor(model.graph, "int4_half")
    model.graph.opset_imports[""] = _OPSET
    weights: dict[tuple[ir.Value, bool, str], _Weight] = {}
    done: dict[str, None] = {}
    for x, layers in activations(model.graph).items():
        found = factors.get(str(x.name))
        values, moments = (None, None) if found is None else (found.values, found.moments)
        # Read now: what made it may have been replaced since.
        read = layers[0][0].inputs[0]
        assert read is not None
        if values is not None:
            factor = editor.constant(f"{x.name}_factor", values)
            read = editor.insert(layers[0][0], "Mul", read, factor, shape=read.shape)
        for node, weight in layers:
            check_gemm(_NAME, node)
            transposed = bool(node.attributes.get_int("transB", False))
            # Layers that read different activations have a weight of their own, if it is rounded by what they read.
            key = weight, transposed, "" if values is None and moments is None else str(x.name)
            if key not in weights:
                content = content_of(_NAME, node, weight)
                content = np.ascontiguousarray(content.T) if transposed else content
                block = block_of(len(content))
                if block is None:
                    reason = f"reads {len(content)} numbers; expected a multiple of {BLOCKS[-1]}"
                    raise ExportError(f"{_NAME}: {module_of(node)}: {reason}")
                rounded = quantize_blocks(
                    content if values is None else content / values[:, np.newaxis], block, moments
                )
                name = f"{weight.name}{'_transposed' * transposed}{'_for_' * bool(key[2])}{key[2]}"
                weights[key] = _Weight(
                    editor.constant(f"{name}_int4", rounded.values.astype(ir.DataType.INT4.numpy())),
                    editor.constant(f"{name}_scale", rounded.scale),
                    block,
                )
            held = weights[key]
            attributes = {"axis": 0, "block_size": held.block}
            real = editor.insert(
                node, "DequantizeLinear", held.values, held.scale, attributes=attributes, shape=held.values.shape
            )
            replace_product(editor, node, read, real)
            done[module_of(node)] = None
    drop_dead(editor.graph)
    refuse_left_out(model.graph, _NAME)
    to_fp16(model)
    return list(done)


class _Weight(NamedTuple):
    """A weight [in, out] int4, what a step of each block is worth, and inputs of a block."""

    values: ir.Value
    scale: ir.Value
    block: int
