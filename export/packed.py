"""The packed graph: the same inputs and outputs as the plain one, and between them no padding.

    input_ids, attention_mask [batch, tokens]
        -> the tokens that the mask keeps, one row behind the other: [1, kept]
        -> the transformer, whose linear layers see [kept, hidden] and whose attention is `rtx::PackedAttention`
        -> back to [batch, tokens, hidden]: pooling, head and score as ever

transformers asks for attention by name: one that is registered here serves every architecture that asks. The graph is
exported with packed tokens as inputs, since torch.export cannot follow how many a mask keeps; the nodes that pack them
are put in front afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rtx.export.edit import Editor
from rtx.export.graph import Exported, example_inputs, exporting, is_scoring, output_names, to_graph, with_contract
from rtx.kernels.library import DOMAIN
from rtx.runtime.errors import ExportError
from rtx.trainer.model import RetrievalModel

PACKED_ATTENTION = "PackedAttention"
_NAME = "rtx_packed"


@dataclass
class _Packed:
    """What is packed while a graph is exported.

    Attributes:
        ids: [1, kept] int64.
        positions: [1, kept] int64, within each row.
        offsets: [batch + 1] int64, where each row begins among the kept.
        places: [batch * tokens] int64, of each place the kept token that stands there; anything where none does.
        types: [1, kept] int64, or None.
    """

    ids: Tensor
    positions: Tensor
    offsets: Tensor
    places: Tensor
    types: Tensor | None = None


_packed: list[_Packed] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, heads, kept, width] each to [1, kept, heads, width]."""
    if unknown := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    # Turned back at once: behind each other, both turns vanish from the graph.
    sides = [side.transpose(1, 2).flatten(0, 1) for side in (query, key, value)]
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    # transformers counts a token itself among those that a window shows on one side.
    window = -1 if sliding_window is None else sliding_window - 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{PACKED_ATTENTION}",
        (*sides, _packed[-1].offsets),
        {"scale": float(scale), "causal": int(causal), "window": window},
        dtype=query.dtype,
        shape=sides[0].shape,
        version=1,
    )
    return found.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)


class _ExportedPacked(Exported):
    """The model as its packed graph."""

    def forward(  # type: ignore[override]
        self,
        packed_ids: Tensor,
        packed_positions: Tensor,
        offsets: Tensor,
        places: Tensor,
        attention_mask: Tensor,
        packed_types: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        _packed.append(_Packed(packed_ids, packed_positions, offsets, places, packed_types))
        try:
            # In place of the padded tokens stands something of their shape: nothing reads them.
            types = None if packed_types is None else attention_mask
            return super().forward(attention_mask, attention_mask, types, pooling_mask)
        finally:
            _packed.pop()


def export_packed(model: RetrievalModel) -> ir.Model:
    """Export the packed graph of what has tokens, in float32; inputs and outputs as of `export_graph`.

    Args:
        model: on the CPU, in float32.

    Raises:
        ExportError: the architecture has attention of its own, or pads to one length.
    """
    contract = model.contract
    kind = type(model.backbone).__name__
    if contract.visual is not None or contract.fixed_tokens or "attention_mask" not in contract.inputs:
        raise ExportError(f"packed: {kind} cannot be packed: its rows have one length, or images among their tokens")
    transformer, shift = _transformer(model, kind)
    padded = example_inputs(model)
    batch, tokens = padded["input_ids"].shape
    kept = batch * tokens
    inputs = {
        "packed_ids": padded["input_ids"].reshape(1, -1),
        "packed_positions": torch.arange(tokens).repeat(1, batch) + shift,
        "offsets": torch.arange(0, kept + 1, tokens),
        "places": torch.arange(kept),
        "attention_mask": torch.ones_like(padded["input_ids"]),
    }
    if "token_type_ids" in contract.inputs:
        inputs["packed_types"] = torch.zeros((1, kept), dtype=torch.int64)
    if "pooling_mask" in contract.inputs:
        inputs["pooling_mask"] = torch.ones_like(padded["input_ids"])
    rows, columns = torch.export.Dim("batch", min=2, max=1 << 20), torch.export.Dim("tokens", min=2, max=1 << 20)
    some = torch.export.Dim("kept", min=2, max=1 << 30)
    shapes: dict[str, Any] = {name: {0: rows, 1: columns} for name in inputs if name.endswith("_mask")}
    shapes |= {name: {1: some} for name in inputs if name.startswith("packed_")}
    shapes |= {"offsets": {0: torch.export.Dim.AUTO}, "places": {0: torch.export.Dim.AUTO}}
    with exporting(model, model.backbone, attention=_NAME), _packing(transformer):
        graph = to_graph(
            _ExportedPacked(model),
            inputs,
            output_names(model),
            {name: shapes[name] for name in inputs},
            name=kind,
        )
    _refuse_other_attention(graph, kind)
    _put_packing_in_front(graph, contract.inputs, shift)
    return with_contract(graph, contract)


def _transformer(model: RetrievalModel, kind: str) -> tuple[Any, int]:
    """The module that has the layers, and the position of a row's first token.

    Raises:
        ExportError: it is not told positions.
    """
    backbone: Any = model.backbone
    transformer = getattr(backbone, "base_model", backbone)
    if "position_ids" not in inspect.signature(transformer.forward).parameters:
        raise ExportError(f"packed: {kind} takes no position_ids")
    # Where positions count from behind that of padding, as RoBERTa's do.
    learned = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    padding = getattr(learned, "padding_idx", None)
    return transformer, 0 if padding is None else padding + 1


@contextlib.contextmanager
def _packing(transformer: Any) -> Iterator[None]:
    """The transformer runs on what is packed, whatever it is called with, and gives back rows with padding."""
    original = transformer.forward
    takes_types = "token_type_ids" in inspect.signature(original).parameters

    def forward(*_: Any, **given: Any) -> Any:
        packed, mask = _packed[-1], given["attention_mask"]
        types = {"token_type_ids": packed.types} if takes_types and packed.types is not None else {}
        found = original(input_ids=packed.ids, position_ids=packed.positions, **types).last_hidden_state
        hidden = found[0].index_select(0, packed.places).reshape(*mask.shape, -1)
        pooler = getattr(transformer, "pooler", None)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden)
        )

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward


def _refuse_other_attention(graph: ir.Model, kind: str) -> None:
    attentions = sum(node.op_type == PACKED_ATTENTION for node in graph.graph)
    others = sum(node.op_type == "Softmax" and not is_scoring(node) for node in graph.graph)
    if not attentions or others:
        raise ExportError(f"packed: {kind} does not ask transformers for its attention, but has one of its own")


def _put_packing_in_front(graph: ir.Model, names: tuple[str, ...], shift: int) -> None:
    """Let the packed inputs be computed from those of the plain graph."""
    main = graph.graph
    inputs = {value.name: value for value in main.inputs}
    editor = Editor(main, "pack")
    first = main[0]
    mask = inputs["attention_mask"]
    int64 = ir.DataType.INT64

    def insert(op_type: str, *given: ir.Value | None, **attributes: int) -> ir.Value:
        return editor.insert(first, op_type, *given, attributes=attributes, dtype=int64)

    def constant(name: str, *numbers: int) -> ir.Value:
        return editor.constant(f"pack_{name}", np.array(numbers, dtype=np.int64))

    flat, row_axis, front = constant("flat", -1), constant("row_axis", 1), constant("front", 0)
    # A scalar where the operators want one.
    axis_0, axis_1 = (editor.constant(f"pack_axis_{at}", np.array(at, dtype=np.int64)) for at in (0, 1))
    one, zero = constant("one", 1), constant("zero", 0)
    flat_mask = insert("Reshape", mask, flat)
    kept = insert("Reshape", insert("NonZero", flat_mask), flat)

    def packed(value: ir.Value) -> ir.Value:
        return insert("Unsqueeze", insert("Gather", insert("Reshape", value, flat), kept, axis=0), front)

    made: dict[str, ir.Value] = {}
    plain: dict[str, ir.Value] = {"attention_mask": mask}
    for name in names:
        if name in inputs:
            plain[name] = inputs[name]
            continue
        plain[name] = ir.Input(name, shape=mask.shape, type=ir.TensorType(int64))
        made["packed_ids" if name == "input_ids" else "packed_types"] = packed(plain[name])
    within = insert("CumSum", mask, axis_1)
    if shift != 1:
        within = insert("Add", within, constant("shift", shift - 1))
    made["packed_positions"] = packed(within)
    lengths = insert("ReduceSum", mask, row_axis, keepdims=0)
    made["offsets"] = insert("Concat", zero, insert("CumSum", lengths, axis_0), axis=0)
    made["places"] = insert("Max", insert("Sub", insert("CumSum", flat_mask, axis_0), one), zero)
    for name, value in made.items():
        ir.convenience.replace_all_uses_with(inputs[name], value)
    main.inputs[:] = [plain[name] for name in names]
    editor.drop_unused()
