"""What is put in order in a packed graph once torch has exported it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rtx.export.edit import Editor, drop_dead

_VIEWS = ("Reshape", "Unsqueeze", "Squeeze")


def drop_first_input(graph: ir.Graph, name: str) -> None:
    """Remove an input of the graph, and with it the first input of the nodes that read it."""
    value = next(one for one in graph.inputs if one.name == name)
    for node in [use.node for use in value.uses()]:
        assert node.inputs[0] is value
        shorter = ir.node(
            node.op_type, node.inputs[1:], node.attributes, domain=node.domain, num_outputs=len(node.outputs)
        )
        shorter.metadata_props.update(node.metadata_props)
        graph.insert_before(node, shorter)
        for old, new in zip(node.outputs, shorter.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
    graph.inputs.remove(value)


def drop_reshapes(graph: ir.Graph) -> None:
    """Remove what brings a value into another shape and back, as models do around their attention."""
    for node in list(graph):
        root = node
        while root.op_type in _VIEWS and root.inputs[0] is not None:
            value = root.inputs[0]
            if (before := value.producer()) is None or before.op_type not in _VIEWS:
                break
            root = before
        if root.op_type not in _VIEWS:
            continue
        start, end = root.inputs[0], node.outputs[0]
        if start is None or start.shape is None or start.shape != end.shape or end.is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(end, start)
    drop_dead(graph)


def split_rows(graph: ir.Graph) -> None:
    """Where a row is brought into parts, and each part is taken out by itself: let it be split."""
    editor = Editor(graph, "split")
    for node in list(graph):
        value, row = node.outputs[0], node.inputs[0] if node.op_type == "Reshape" else None
        if row is None or row.shape is None or value.shape is None or len(value.shape) != len(row.shape) + 2:
            continue
        axis = len(row.shape) - 1
        count, width = value.shape[axis], row.shape[-1]
        parts = {_part(use.node, axis): use.node for use in value.uses()}
        if not isinstance(count, int) or not isinstance(width, int) or {*parts} != {*range(count)}:
            continue
        sizes = editor.constant(f"split_{node.name}", np.full(count, width // count))
        results = editor.insert_many(node, "Split", row, sizes, outputs=count, attributes={"axis": axis})
        shape = editor.constant(f"heads_{node.name}", np.array([*[0] * axis, *_sizes(value.shape[axis + 1 :])]))
        for place, result in enumerate(results):
            result.shape = ir.Shape([*row.shape[:-1], width // count])
            squeeze = next(iter(parts[place].outputs[0].uses())).node
            editor.replace_value(squeeze.outputs[0], editor.insert(node, "Reshape", result, shape))
    drop_dead(graph)


def _sizes(dimensions: Any) -> list[int]:
    return [int(size) for size in dimensions]


def _part(node: ir.Node, axis: int) -> int | None:
    """Which element along an axis a Slice takes out, if a Squeeze of that axis alone reads it."""
    uses = node.outputs[0].uses()
    if node.op_type != "Slice" or len(uses) != 1 or next(iter(uses)).node.op_type != "Squeeze":
        return None
    squeeze = next(iter(uses)).node
    given = [_number(value) for value in (*node.inputs[1:4], squeeze.inputs[1])]
    start, stop, along, squeezed = given
    if start is None or stop != start + 1 or along not in (axis, -3) or squeezed not in (axis, -3):
        return None
    return start


def _number(value: ir.Value | None) -> int | None:
    content = None if value is None or value.const_value is None else value.const_value.numpy()
    return None if content is None or content.size != 1 else int(content.item())


def select_first(graph: ir.Graph) -> None:
    """Where of rows with padding only one column is read, unpack that one."""
    editor = Editor(graph, "column")
    for node in list(graph):
        rows = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
        if rows is None or rows.op_type != "Reshape" or node.attributes.get_int("axis", 0) != 1:
            continue
        unpack = rows.inputs[0].producer() if rows.inputs[0] is not None else None
        if unpack is None or unpack.op_type != "Gather" or unpack.attributes.get_int("axis", 0) != 0:
            continue
        # places [batch * tokens] -> [batch, tokens] -> those of the column -> their rows
        hidden, places = unpack.inputs
        ends = (editor.constant(f"{name}_{node.name}", np.array([at])) for name, at in (("start", 0), ("stop", 2)))
        shape = editor.insert(node, "Slice", rows.inputs[1], *ends, dtype=ir.DataType.INT64)
        table = editor.insert(node, "Reshape", places, shape, dtype=ir.DataType.INT64)
        chosen = editor.insert(node, "Gather", table, node.inputs[1], attributes={"axis": 1}, dtype=ir.DataType.INT64)
        editor.replace(node, editor.insert(node, "Gather", hidden, chosen, attributes={"axis": 0}))
    drop_dead(graph)
