"""The linear layers of the packed graph in 8 bits, each one `rtx::Int8Linear` with what stands around it.

    input     LayerNorm or RMSNorm -> several MatMul       one product with several outputs: query, key and value
                                   -> MatMul -> Split      likewise
              either, activation of the first, Mul         a gated layer
    output    MatMul -> bias -> activation -> residual -> LayerNorm or RMSNorm

and the word embeddings, with what is added to them and their norm, one `rtx::Int8Embedding`. The arithmetic is that of
`rtx.export.int8`, which writes it in standard operators; `rtx.kernels.int8_linear` has the contract and the reference.
Attention may round its weights and values to bfloat16 where a layer in 8 bits is behind it, which rounds more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.edit import Editor, drop_dead
from rtx.export.graph import is_scoring, module_of
from rtx.export.int8 import check_gemm, content_of, quantizable, refuse_left_out
from rtx.export.packed import PACK_ROWS, PACKED_ATTENTION, RMS_NORM
from rtx.kernels.int8_linear import Int8Weight, pack_weight, quantize_rows, quantize_weight
from rtx.kernels.library import DOMAIN

INT8_LINEAR, INT8_EMBEDDING = "Int8Linear", "Int8Embedding"
_MOST_OUTPUTS = 3
_NORMS = {"LayerNormalization": "layer", RMS_NORM: "rms"}


def quantize_int8_fused(model: ir.Model, keep: Collection[str] = ()) -> list[str]:
    """Quantise a packed graph in place; what is given, returned and raised is as for `quantize_int8`.

    A layer that is kept stays as it is, with its bias, activation, residual and norm: those that read the same as it
    form a group without it.
    """
    graph = model.graph
    fuser = _Fuser(Editor(graph, "int8"))
    done: dict[str, None] = {}
    layers: list[_Layer] = []
    for node, weight in list(quantizable(graph, _holds)):
        if module_of(node) in keep:
            continue
        if node.op_type == "Gather":
            fuser.replace_embedding(node, weight)
        else:
            layers.append(fuser.layer(node, weight))
        done[module_of(node)] = None
    for group in _groups(layers):
        fuser.replace(group)
    drop_dead(graph)
    for node in graph:
        if node.op_type == PACKED_ATTENTION:
            rounds = {reader.op_type for reader in node.outputs[0].consumers()} == {INT8_LINEAR}
            node.attributes["bfloat16"] = ir.AttrInt64("bfloat16", int(rounds))
    graph.opset_imports[DOMAIN] = 1
    refuse_left_out(graph, "int8-packed", keep)
    return list(done)


@dataclass
class _Norm:
    """A norm that is taken into another operator."""

    node: ir.Node

    @property
    def attributes(self) -> dict[str, int | float | str]:
        return {
            "norm": _NORMS[self.node.op_type],
            "epsilon": self.node.attributes.get_float("epsilon", 1e-5),
        }

    @property
    def inputs(self) -> tuple[ir.Value | None, ...]:
        """Weight, and bias if there is one."""
        return tuple(self.node.inputs[1:3])


@dataclass
class _Layer:
    """A linear layer, and the nodes behind it that become one with it: the last one's output is what it gives."""

    nodes: list[ir.Node]
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None
    activation: str = ""
    split: ir.Node | None = None
    gate: ir.Node | None = None  # the Mul of two halves of what is split
    added: ir.Node | None = None  # the Add of a residual
    norm: _Norm | None = None

    @property
    def x(self) -> ir.Value:
        value = self.nodes[0].inputs[0]
        assert value is not None
        return value

    @property
    def residual(self) -> ir.Value | None:
        """What is added now: it may have been replaced since the layer was found."""
        if self.added is None:
            return None
        before = self.nodes[self.nodes.index(self.added) - 1]
        return _other(self.added, before.outputs[0])

    @property
    def plain(self) -> bool:
        """Whether nothing comes behind product and bias."""
        return not self.activation and self.added is None and self.split is None


@dataclass
class _Group:
    """Layers that become one product: they read the same."""

    layers: list[_Layer]
    gate: ir.Node | None = None  # the Mul of two halves
    last: ir.Node = field(init=False)

    def __post_init__(self) -> None:
        if self.gate is None:
            self.gate = self.layers[0].gate
        self.last = self.layers[0].nodes[-1] if self.gate is None else self.gate

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """What it gives."""
        if self.gate is not None:
            return self.gate.outputs
        split = self.layers[0].split
        return [layer.nodes[-1].outputs[0] for layer in self.layers] if split is None else split.outputs

    @property
    def sizes(self) -> list[int]:
        """Columns of each part."""
        split = self.layers[0].split
        return (
            [_columns(layer) for layer in self.layers] if split is None else [_width(value) for value in split.outputs]
        )


def _groups(layers: Sequence[_Layer]) -> list[_Group]:
    """Which layers become one product."""
    found: list[_Group] = []
    by_input: dict[ir.Value, list[_Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.x, []).append(layer)
    for readers in by_input.values():
        readers, gated = _gated(readers)
        found += gated
        plain = [layer for layer in readers if layer.plain]
        found += [_Group(plain[at : at + _MOST_OUTPUTS]) for at in range(0, len(plain), _MOST_OUTPUTS)]
        found += [_Group([layer]) for layer in readers if not layer.plain]
    return found


def _gated(layers: list[_Layer]) -> tuple[list[_Layer], list[_Group]]:
    """Layers that are not, and pairs that are multiplied with each other."""
    found: list[_Group] = []
    left = list(layers)
    for first in layers:
        alone = first.activation and first.added is None and first.split is None
        product = _only_reader(first.nodes[-1], "Mul") if alone else None
        for second in left:
            pair = product is not None and second is not first and second.plain
            if pair and _only_reader(second.nodes[-1], "Mul") is product and _columns(first) == _columns(second):
                found.append(_Group([first, second], product))
                left = [layer for layer in left if layer is not first and layer is not second]
                break
    return left, found


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]


def _columns(layer: _Layer) -> int:
    shape = layer.weight.shape
    assert shape is not None
    return int(shape[0] if layer.transposed else shape[1])  # type: ignore[arg-type]


def _rows(layer: _Layer) -> int:
    shape = layer.weight.shape
    assert shape is not None
    return int(shape[1] if layer.transposed else shape[0])  # type: ignore[arg-type]


class _Fuser:
    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._added: set[ir.Node] = set()  # by layers: two may end in the same Add

    def layer(self, node: ir.Node, weight: ir.Value) -> _Layer:
        """MatMul or Gemm, with a bias, an activation, a residual and a norm where there are some."""
        check_gemm("int8-packed", node)
        transposed = bool(node.attributes.get_int("transB", False))
        layer = _Layer([node], weight, transposed, node.inputs[2] if len(node.inputs) > 2 else None)
        columns = _columns(layer)
        if layer.bias is None and (added := _only_reader(node, "Add")) is not None:
            other = _other(added, node.outputs[0])
            if _is_bias(other, columns):
                layer.bias = other
                layer.nodes.append(added)
        if self._take_split(layer):
            return layer
        self._take_activation(layer)
        added = _only_reader(layer.nodes[-1], "Add")
        fits = added is not None and _same_shape(_other(added, layer.nodes[-1].outputs[0]), added.outputs[0])
        if added is not None and fits and added not in self._added:
            self._added.add(added)
            layer.added = added
            layer.nodes.append(added)
            if (norm := _only_reader(added, *_NORMS)) is not None and _is_norm(norm):
                layer.norm = _Norm(norm)
                layer.nodes.append(norm)
        return layer

    @staticmethod
    def _take_split(layer: _Layer) -> bool:
        split = _only_reader(layer.nodes[-1], "Split")
        if split is None or len(split.outputs) > _MOST_OUTPUTS or split.attributes.get_int("axis", 0) not in (-1, 2):
            return False
        layer.split = split
        layer.nodes.append(split)
        if len(split.outputs) == 2 and _width(split.outputs[0]) == _width(split.outputs[1]):
            name, last = _activation(split.outputs[0])
            product = None if last is None else _only_reader(last, "Mul")
            uses = split.outputs[1].uses()
            if product is not None and [use.node for use in uses] == [product]:
                layer.activation, layer.gate = name, product
        return True

    @staticmethod
    def _take_activation(layer: _Layer) -> None:
        layer.activation, last = _activation(layer.nodes[-1].outputs[0])
        if last is not None:
            layer.nodes.append(last)

    def replace(self, group: _Group) -> None:
        """Let one operator take the place of a group."""
        layers, first = group.layers, group.layers[0]
        # What several read comes first; a residual may be made only shortly before it is added.
        several = len(layers) > 1 and group.gate is None
        before = min((layer.nodes[0] for layer in layers), key=self._place) if several else group.last
        norm, x = first.norm, first.x
        attributes: dict[str, int | float | str] = {
            "in_features": _rows(first),
            "activation": first.activation,
            "gated": int(group.gate is not None),
        }
        attributes |= {"norm": "", "norm_at": "output", "epsilon": 0.0}
        if norm is not None:
            attributes |= norm.attributes
        elif (norm := _norm_before(x, layers)) is not None:
            attributes |= {**norm.attributes, "norm_at": "input"}
            given = norm.node.inputs[0]
            assert given is not None
            x = given
        inputs = [*self._weights(group), first.residual, *(() if norm is None else norm.inputs)]
        while inputs[-1] is None:
            inputs.pop()
        outputs = group.outputs
        results = self.editor.insert_many(
            before, INT8_LINEAR, x, *inputs, outputs=len(outputs), attributes=attributes, domain=DOMAIN
        )
        for output, result in zip(outputs, results, strict=True):
            self.editor.replace_value(output, result)

    def _place(self, node: ir.Node) -> int:
        return next(place for place, other in enumerate(self.editor.graph) if other is node)

    def _weights(self, group: _Group) -> list[ir.Value | None]:
        """values, scale, column_sum, bias and split of layers beside each other."""
        layers, sizes = group.layers, group.sizes
        contents = []
        for layer in layers:
            content = content_of("int8-packed", layer.nodes[0], layer.weight)
            contents.append(quantize_weight(content.T if layer.transposed else content))
        whole = Int8Weight(
            np.concatenate([one.values for one in contents], axis=1),
            np.concatenate([one.scale for one in contents]),
            np.concatenate([one.column_sum for one in contents]),
        )
        name = "_".join(f"{layer.weight.name}{'_transposed' * layer.transposed}" for layer in layers)
        biases = [None if layer.bias is None else _content(layer.bias) for layer in layers]
        bias = None
        if any(one is not None for one in biases):
            columns = [len(one.scale) for one in contents]
            zeros = (np.zeros(count, dtype=np.float32) for count in columns)
            bias = np.concatenate([zero if one is None else one for one, zero in zip(biases, zeros, strict=True)])
        return [
            self._constant(f"{name}_int8", pack_weight(whole, sizes)),
            self._constant(f"{name}_scale", whole.scale),
            self._constant(f"{name}_column_sum", whole.column_sum),
            None if bias is None else self._constant(f"{name}_bias", bias),
            None if len(sizes) < 2 else self._constant(f"{name}_split", np.array(sizes)),
        ]

    def replace_embedding(self, node: ir.Node, table: ir.Value) -> None:
        """Gather(table, ids), with what is added to it and a norm behind that, where there are some."""
        rows = quantize_rows(content_of("int8-packed", node, table))
        nodes, norm, added = [node], None, []
        while (sum_ := _only_reader(nodes[-1], "Add")) is not None:
            other = _other(sum_, nodes[-1].outputs[0])
            if other is None or not _same_shape(other, sum_.outputs[0]):
                break
            added.append(other)
            nodes.append(sum_)
        if (reader := _only_reader(nodes[-1], *_NORMS)) is not None and _is_norm(reader):
            norm = _Norm(reader)
            nodes.append(reader)
        insert, last = self.editor.insert, nodes[-1]
        total = added[0] if added else None
        for one in added[1:]:
            total = insert(last, "Add", total, one, shape=one.shape)
        attributes: dict[str, int | float | str] = {"norm": "", "epsilon": 0.0} if norm is None else norm.attributes
        constants = (
            self._constant(f"{table.name}_int8", rows.values),
            self._constant(f"{table.name}_scale", rows.scale),
        )
        inputs = [*constants, node.inputs[1], total, *(() if norm is None else norm.inputs)]
        while inputs[-1] is None:
            inputs.pop()
        self.editor.replace(last, insert(last, INT8_EMBEDDING, *inputs, attributes=attributes, domain=DOMAIN))

    def _constant(self, name: str, values: NDArray[np.generic]) -> ir.Value:
        """A constant, which layers that share a weight share too, where theirs is the same."""
        known = self.editor.graph.initializers.get(name)
        if known is None:
            return self.editor.constant(name, values)
        return known if np.array_equal(_content(known), values) else self._constant(f"{name}_", values)


def _norm_before(x: ir.Value, layers: Sequence[_Layer]) -> _Norm | None:
    """The norm that gives x, if nothing else reads that."""
    node = x.producer()
    if node is None or node.op_type not in _NORMS or not _is_norm(node):
        return None
    readers = {use.node for use in x.uses()}
    return _Norm(node) if readers == {layer.nodes[0] for layer in layers} and not x.is_graph_output() else None


def _is_norm(node: ir.Node) -> bool:
    """Whether it is one of rows by a weight that is constant."""
    last = node.op_type == RMS_NORM or node.attributes.get_int("axis", -1) == -1
    constants = [value for value in node.inputs[1:] if value is not None]
    return last and not is_scoring(node) and all(value.is_initializer() for value in constants)


def _activation(value: ir.Value) -> tuple[str, ir.Node | None]:
    """What alone reads a value, if it is an activation: its name, and the node that gives its result."""
    readers = {use.node for use in value.uses()}
    names = {node.op_type for node in readers}
    if value.is_graph_output() or any(is_scoring(node) for node in readers):
        return "", None
    if names == {"Gelu"} and len(readers) == 1:
        gelu = next(iter(readers))
        return "gelu_tanh" if gelu.attributes.get_string("approximate", "none") == "tanh" else "gelu", gelu
    # x * sigmoid(x)
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = None if sigmoid is None else _only_reader(sigmoid, "Mul")
    return ("silu", product) if product is not None and readers == {sigmoid, product} else ("", None)


def _only_reader(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The node that alone reads what a node gives, if it is of one of these types."""
    value = node.outputs[0]
    readers = {use.node for use in value.uses()}
    if len(readers) != 1 or value.is_graph_output():
        return None
    reader: ir.Node = next(iter(readers))
    return reader if reader.op_type in op_types and not is_scoring(reader) else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand."""
    others: Iterable[ir.Value | None] = (given for given in node.inputs if given is not value)
    return next(iter(others), None)


def _same_shape(value: ir.Value | None, other: ir.Value) -> bool:
    known = value is not None and not value.is_initializer() and value.shape is not None and other.shape is not None
    return known and value is not None and value.shape == other.shape


def _is_bias(value: ir.Value | None, columns: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return value.const_value.dtype == ir.DataType.FLOAT and list(value.const_value.shape) == [columns]


def _content(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _holds(value: ir.Value | None, ids: ir.Value) -> bool:
    """Whether a value is the ids, or those of them that were packed."""
    while value is not None and value is not ids:
        producer = value.producer()
        if producer is None or producer.op_type not in ("Reshape", "Unsqueeze", PACK_ROWS):
            return False
        # Of what is packed, the ids come first.
        packs = producer.op_type == PACK_ROWS
        if packs and value is not producer.outputs[2]:
            return False
        value = producer.inputs[1 if packs else 0]
    return value is ids
