"""fp16 and bf16 variants: linear layers, attention products and embeddings in half precision, for GPUs.

Half precision begins where the backbone looks up embeddings or multiplies by a weight, and goes on through everything
that is computed from there. These stay float32:

    norms, and sums and powers elsewhere     squares overflow the largest fp16, 65504
    softmax                                  its sums lose the small terms
    positions, angles, masks until used      fp16 holds whole numbers up to 2048 only
    pooling, head, classifier, activation    scores that tie in half precision reorder rankings

bf16 has the range of float32 and 8 bits where fp16 has 11: for models whose numbers fp16 does not hold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.edit import Editor, drop_dead
from rtx.export.graph import constant_matrix, is_norm, is_scoring

# A mask is the most negative float32, or -inf: in fp16 it would be -inf, and a row that is masked all over NaN.
# exp(-30000) is 0 all the same.
_MASK = -3e4
LARGEST = float(np.finfo(np.float16).max)
"""What half precision ends at: 65504."""
_FP32_OPERATORS = ("Softmax", "ReduceSum", "ReduceMean", "ReduceL2", "CumSum", "Pow", "Sqrt", "Exp", "Cast")
_SHORT = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_READS_WEIGHT = ("Gather", "MatMul", "Gemm")


def to_fp16(model: ir.Model) -> None:
    """Bring a plain graph to half precision in place; inputs and outputs stay as they are.

    Args:
        model: what `rtx.export.graph.export_graph` made.
    """
    _convert(model, ir.DataType.FLOAT16)


def to_bf16(model: ir.Model) -> None:
    """As `to_fp16`, in bfloat16."""
    _convert(model, ir.DataType.BFLOAT16)


def _convert(model: ir.Model, half: ir.DataType) -> None:
    converter = _Converter(Editor(model.graph, _SHORT[half]), half)
    for node in list(model.graph):
        converter.convert(node)
    drop_dead(converter.editor.graph)


def half_values(model: ir.Model) -> set[str]:
    """Names of what the fp16 graph of a plain one computes in half precision.

    Scores are not among them once a mask is added: they are as large as the mask, and go into a softmax in float32.
    """
    graph = model.clone()
    converter = _Converter(Editor(graph.graph, "half"), ir.DataType.FLOAT16, weights=False)
    for node in list(graph.graph):
        converter.convert(node)
    return {
        str(value.name)
        for node in graph.graph
        if node.op_type != "Cast" and node not in converter.masking
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT16
    }


def bound_masks(model: ir.Model) -> None:
    """Let the masks of a plain graph be those of its fp16 graph, in place: no larger than half precision holds."""
    converter = _Converter(Editor(model.graph, "bounded"), ir.DataType.FLOAT16)
    for node in list(model.graph):
        converter.bound_masks(node)
    drop_dead(converter.editor.graph)


class _Converter:
    """Brings nodes to their precision, one after the other.

    Args:
        editor: of the graph.
        half: the type of half precision.
        weights: whether weights are converted; without, types alone are right.
    """

    def __init__(self, editor: Editor, half: ir.DataType, *, weights: bool = True) -> None:
        self.editor, self._half, self._weights = editor, half, weights
        # Nodes that put a mask on scores.
        self.masking: set[ir.Node] = set()
        # What is computed from weights, as against positions and masks.
        self._hidden: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def convert(self, node: ir.Node) -> None:
        """Bring a node whose predecessors are done to its precision."""
        self.bound_masks(node)
        reads_weight = node.op_type == "DequantizeLinear" or (
            node.op_type in _READS_WEIGHT and any(constant_matrix(value) for value in node.inputs)
        )
        is_hidden = reads_weight or any(value in self._hidden for value in node.inputs)
        half = is_hidden and not (is_scoring(node) or is_norm(node) or node.op_type in _FP32_OPERATORS)
        if half and self._adds_mask(node):
            self.masking.add(node)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, self._half):
                continue
            wanted = self._half if half else ir.DataType.FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._cast(node, value, wanted))
        if is_hidden:
            # Not the shapes of what is computed: positions are counted by them.
            outputs = [output for output in node.outputs if output.dtype == ir.DataType.FLOAT]
            self._hidden.update(outputs)
            for output in outputs if half else ():
                output.type = ir.TensorType(self._half)

    def _adds_mask(self, node: ir.Node) -> bool:
        """Whether a node of what is computed from weights takes something that is not, and is no weight."""
        if node.op_type not in ("Add", "Where"):
            return False
        others = [value for value in node.inputs if value is not None and value not in self._hidden]
        return any(
            value.const_value is None or (value.const_value.size == 1 and value.const_value.numpy().item() <= _MASK)
            for value in others
            if value.dtype == ir.DataType.FLOAT
        )

    def bound_masks(self, node: ir.Node) -> None:
        """What a node of the backbone reads of the kind of a mask."""
        if is_scoring(node):
            return
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
                continue
            if value.const_value.size == 1 and value.const_value.numpy().item() < _MASK:
                content = np.full(tuple(value.const_value.shape.numpy()), _MASK, dtype=np.float32)
                node.replace_input_with(index, self._constant(value, "bounded", content))

    def _cast(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.const_value is not None and not self._weights:
            return value
        if value.const_value is not None:
            content = value.const_value.numpy()
            if dtype == ir.DataType.FLOAT16:
                content = np.clip(content, -LARGEST, LARGEST)
            return self._constant(value, _SHORT[dtype], content.astype(dtype.numpy()))
        if (value, dtype) not in self._casts:
            self._casts[value, dtype] = self.editor.insert(
                node, "Cast", value, attributes={"to": dtype}, dtype=dtype, shape=value.shape
            )
        return self._casts[value, dtype]

    def _constant(self, value: ir.Value, kind: str, content: NDArray[np.generic]) -> ir.Value:
        name = f"{value.name}_{kind}"
        if name not in self.editor.graph.initializers:
            self.editor.constant(name, content)
        return self.editor.graph.initializers[name]
