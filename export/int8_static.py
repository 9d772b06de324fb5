"""int8-static variant: linear layers with one activation scale that is fixed at export, for TensorRT.

    x [* migrated] -> QuantizeLinear -> DequantizeLinear ┐
                        W int8 -> DequantizeLinear [out] ┴> MatMul

TensorRT reads the pairs as an int8 product; ONNX Runtime gives the same numbers, so that they are held against PyTorch
here. Zero points are 0. What lies around the layers is in half precision, as in the fp16 variant, embeddings too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from rtx.export.calibration import activations, weight_of
from rtx.export.edit import Editor, drop_dead
from rtx.export.fp16 import to_fp16
from rtx.export.graph import module_of
from rtx.export.int8 import refuse_left_out, replace_product
from rtx.export.scales import Scale, Scales, quantize_columns
from rtx.runtime.errors import ExportError


def quantize_int8_static(model: ir.Model, scales: Scales, keep: Collection[str] = ()) -> list[str]:
    """Quantise a plain graph in place, and bring the rest to half precision.

    Args:
        model: what `rtx.export.graphs.export_graphs` made.
        scales: of what its layers read, as `rtx.export.calibration.calibrate` gives them.
        keep: modules that stay in half precision, named as what is returned.

    Returns:
        Names of the modules whose weights are now int8, as `RetrievalModel.named_modules` calls them.

    Raises:
        ExportError: there is no scale for a layer, a weight holds NaN or infinity, or is used in a way that is not
            known here.
    """
    done = insert_pairs(model, scales, keep)
    refuse_left_out(model.graph, "int8-static", keep)
    to_fp16(model)
    return done


def insert_pairs(model: ir.Model, scales: Scales, keep: Collection[str] = ()) -> list[str]:
    """The quantisation alone: what is around it stays float32. Arguments as of `quantize_int8_static`."""
    editor = Editor(model.graph, "int8_static")
    done: dict[str, None] = {}
    weights: dict[tuple[ir.Value, bool, str], _Weight] = {}
    for x, layers in activations(model.graph).items():
        layers = [(node, weight) for node, weight in layers if module_of(node) not in keep]
        if not layers:
            continue
        if (scale := scales.get(str(x.name))) is None:
            module = module_of(layers[0][0])
            raise ExportError(
                f"int8-static: no calibration item goes through {module}; expected items of each kind that is served, "
                "texts and images"
            )
        # Read now: what made it may have been replaced since.
        read = layers[0][0].inputs[0]
        assert read is not None
        rounded = _round(editor, layers[0][0], read, str(x.name), scale)
        for node, weight in layers:
            replace_product(editor, node, rounded, _weight(editor, node, weight, scale, str(x.name), weights))
            done[module_of(node)] = None
    drop_dead(editor.graph)
    return list(done)


def _round(editor: Editor, before: ir.Node, x: ir.Value, name: str, scale: Scale) -> ir.Value:
    """An activation after its way through 8 bits; `name` is its own in the plain graph."""
    insert, constant = editor.insert, editor.constant
    if scale.migrated is not None:
        x = insert(before, "Mul", x, constant(f"{name}_migrated", scale.migrated), shape=x.shape)
    step = constant(f"{name}_step", np.array(scale.step, dtype=np.float32))
    zero = constant(f"{name}_zero", np.array(0, dtype=np.int8))
    values = insert(before, "QuantizeLinear", x, step, zero, dtype=ir.DataType.INT8, shape=x.shape)
    return insert(before, "DequantizeLinear", values, step, zero, shape=x.shape)


class _Weight(NamedTuple):
    """A weight [in, out] int8, and what a step of each column is worth."""

    values: ir.Value
    steps: ir.Value
    zeros: ir.Value


def _weight(
    editor: Editor,
    node: ir.Node,
    weight: ir.Value,
    scale: Scale,
    x: str,
    known: dict[tuple[ir.Value, bool, str], _Weight],
) -> ir.Value:
    """What a layer multiplies by, [in, out]. Layers that read different activations have their own, if one migrates."""
    transposed = bool(node.attributes.get_int("transB", False))
    of = "" if scale.migrated is None else x
    if (weight, transposed, of) not in known:
        content = weight_of(node, weight, "int8-static")
        values, steps = quantize_columns(content if scale.migrated is None else content / scale.migrated[:, np.newaxis])
        name = f"{weight.name}{'_transposed' * transposed}{'_for_' * bool(of)}{of}"
        known[weight, transposed, of] = _Weight(
            editor.constant(f"{name}_int8", values),
            editor.constant(f"{name}_steps", steps),
            editor.constant(f"{name}_zeros", np.zeros(len(steps), dtype=np.int8)),
        )
    held = known[weight, transposed, of]
    return editor.insert(node, "DequantizeLinear", *held, attributes={"axis": 1}, shape=held.values.shape)
