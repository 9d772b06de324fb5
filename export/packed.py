"""The packed graph: the same inputs and outputs as the plain one, and between them no padding.

    input_ids, attention_mask [batch, tokens]
        -> the tokens that the mask keeps, one row behind the other: [1, kept]
        -> the transformer, whose linear layers see [kept, hidden] and whose attention is `rtx::PackedAttention`
        -> back to [batch, tokens, hidden]: pooling, head and score as ever

transformers asks for attention by name: one that is registered here serves every architecture that asks. The places of
the kept tokens are an input while the graph is exported, since torch.export cannot follow how many a mask keeps;
afterwards they are computed from the mask.
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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rtx.export.edit import Editor
from rtx.export.graph import Exported, example_inputs, exporting, is_scoring, output_names, to_graph, with_contract
from rtx.kernels.library import DOMAIN
from rtx.runtime.errors import ExportError
from rtx.trainer.model import RetrievalModel

PACKED_ATTENTION = "PackedAttention"
_NAME = "rtx_packed"
_KEPT = "kept"


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
    types: Tensor | None

    @classmethod
    def of(cls, kept: Tensor, first: int, ids: Tensor, mask: Tensor, types: Tensor | None) -> _Packed:
        """Pack rows with padding.

        Args:
            kept: [kept] int64, the places in the flattened rows that the mask keeps.
            first: position of a row's first token.
            ids, mask, types: [batch, tokens] int64 each.
        """

        def packed(rows: Tensor) -> Tensor:
            return rows.flatten().index_select(0, kept).unsqueeze(0)

        ends = mask.sum(dim=1).cumsum(0)
        return cls(
            ids=packed(ids),
            positions=packed(mask.cumsum(1) + (first - 1)),
            offsets=torch.cat([torch.zeros_like(ends[:1]), ends]),
            places=(mask.flatten().cumsum(0) - 1).clamp(min=0),
            types=None if types is None else packed(types),
        )


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

    def __init__(self, model: RetrievalModel, first: int) -> None:
        super().__init__(model)
        self._first = first

    def forward(  # type: ignore[override]
        self,
        kept: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        _packed.append(_Packed.of(kept, self._first, input_ids, attention_mask, token_type_ids))
        try:
            return super().forward(input_ids, attention_mask, token_type_ids, pooling_mask)
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
    transformer, first = _transformer(model, kind)
    inputs = example_inputs(model)
    rows, columns = torch.export.Dim("batch", min=1, max=1 << 20), torch.export.Dim("tokens", min=2, max=1 << 20)
    shapes: dict[str, Any] = {name: {0: rows, 1: columns} for name in inputs}
    inputs = {_KEPT: inputs["attention_mask"].flatten().nonzero().flatten(), **inputs}
    shapes = {_KEPT: {0: torch.export.Dim("kept", min=2, max=1 << 30)}, **shapes}
    with exporting(model, model.backbone, attention=_NAME), _packing(transformer):
        graph = to_graph(_ExportedPacked(model, first), inputs, output_names(model), shapes, name=kind)
    _refuse_other_attention(graph, kind)
    _compute_kept(graph)
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
        found = original(input_ids=packed.ids, position_ids=packed.positions, **types)
        hidden = found.last_hidden_state[0].index_select(0, packed.places).reshape(*mask.shape, -1)
        found.last_hidden_state = hidden
        if (pooler := getattr(transformer, "pooler", None)) is not None:
            found.pooler_output = pooler(hidden)
        return found

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


def _compute_kept(graph: ir.Model) -> None:
    """Let the places that the mask keeps be computed from it."""
    main = graph.graph
    kept, mask = (next(value for value in main.inputs if value.name == name) for name in (_KEPT, "attention_mask"))
    editor, first, int64 = Editor(main, "pack"), main[0], ir.DataType.INT64
    flat = editor.constant("pack_flat", np.array([-1], dtype=np.int64))
    found = editor.insert(first, "NonZero", editor.insert(first, "Reshape", mask, flat, dtype=int64), dtype=int64)
    ir.convenience.replace_all_uses_with(kept, editor.insert(first, "Reshape", found, flat, dtype=int64))
    main.inputs.remove(kept)
