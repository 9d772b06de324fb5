"""int4-half variant: linear layers with weights in 4 bits and everything else in half precision, for TensorRT.

    W int4 [in, out] -> DequantizeLinear(scale [in / block, out]) -> MatMul in half precision

TensorRT reads weights in 4 bits with a scale for each block of inputs, and no zero point. What is multiplied is the
rounded weight. Embeddings stay in half precision. Opset 21.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.edit import Editor, drop_dead
from rtx.export.fp16 import to_fp16
from rtx.export.graph import module_of
from rtx.export.int8 import check_gemm, content_of, quantizable, refuse_left_out, replace_product
from rtx.export.scales import half_up
from rtx.runtime.errors import ExportError

_NAME, _OPSET = "int4-half", 21
# 4 bits and 16 / 64 more a weight. Smaller where a layer's inputs are no multiple of it.
_BLOCKS = (64, 32, 16)
_LOWEST, _HIGHEST = -8, 7
# A block's largest magnitude is clipped where that makes its other steps so much finer that the error is less.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Int4Blocks(NamedTuple):
    """A weight in 4 bits.

    Attributes:
        values: [in, out] int8, -8 to 7.
        scale: [in / block, out] float32, in half precision to the last bit.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """[in, out] float32: the weight that the integers stand for."""
        return self.values.astype(np.float32) * self.scale.repeat(len(self.values) // len(self.scale), axis=0)


def quantize_blocks(weight: NDArray[np.float32], block: int) -> Int4Blocks:
    """Round a weight [in, out] to 4 bits, each output channel in blocks of inputs.

    Args:
        weight: finite; `in` is a multiple of `block`.
        block: inputs that share a scale.
    """
    blocks = weight.reshape(-1, block, weight.shape[1])
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    values = np.empty(blocks.shape, dtype=np.int8)
    scale = np.empty(largest.shape, dtype=np.float32)
    least = np.full(largest.shape, np.inf, dtype=np.float32)
    for clip in _CLIPS:
        step = half_up(largest * np.float32(clip / _HIGHEST))
        rounded = np.clip(np.rint(blocks / step), _LOWEST, _HIGHEST)
        error = np.square(rounded * step - blocks).sum(axis=1, keepdims=True)
        better = error < least
        np.copyto(values, rounded, where=better, casting="unsafe")
        np.copyto(scale, step, where=better)
        np.copyto(least, error, where=better)
    return Int4Blocks(values.reshape(weight.shape), scale[:, 0])


def quantize_int4_half(model: ir.Model) -> list[str]:
    """Quantise a plain graph in place, and bring the rest to half precision.

    Args:
        model: what `rtx.export.graphs.export_graphs` made.

    Returns:
        Names of the modules whose weights are now int4, as `RetrievalModel.named_modules` calls them.

    Raises:
        ExportError: a weight holds NaN or infinity, has a width that no block divides, or is used in a way that is not
            known here.
    """
    editor = Editor(model.graph, "int4_half")
    model.graph.opset_imports[""] = _OPSET
    weights: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value, int]] = {}
    done: dict[str, None] = {}
    for node, weight in list(quantizable(model.graph)):
        if node.op_type == "Gather":
            continue
        check_gemm(_NAME, node)
        transposed = bool(node.attributes.get_int("transB", False))
        if (weight, transposed) not in weights:
            content = content_of(_NAME, node, weight)
            content = np.ascontiguousarray(content.T) if transposed else content
            block = next((size for size in _BLOCKS if len(content) % size == 0), 0)
            if not block:
                reason = f"reads {len(content)} numbers; expected a multiple of {_BLOCKS[-1]}"
                raise ExportError(f"{_NAME}: {module_of(node)}: {reason}")
            name = f"{weight.name}_transposed" if transposed else weight.name
            rounded = quantize_blocks(content, block)
            weights[weight, transposed] = (
                editor.constant(f"{name}_int4", rounded.values.astype(ir.DataType.INT4.numpy())),
                editor.constant(f"{name}_scale", rounded.scale),
                block,
            )
        values, scale, block = weights[weight, transposed]
        attributes = {"axis": 0, "block_size": block}
        real = editor.insert(node, "DequantizeLinear", values, scale, attributes=attributes, shape=values.shape)
        x = node.inputs[0]
        assert x is not None
        replace_product(editor, node, x, real)
        done[module_of(node)] = None
    drop_dead(editor.graph)
    refuse_left_out(model.graph, _NAME)
    to_fp16(model)
    return list(done)
