"""The packed graph: the same inputs and the same result as the plain one, and between them no padding.

    input_ids, attention_mask [batch, tokens]
        -> `rtx::PackRows`: the tokens that the mask keeps, one row behind the other: [1, kept]
        -> the transformer, whose linear layers see [kept, hidden] and whose attention is `rtx::PackedAttention`
        -> `rtx::PackedPool`: [batch, hidden]; head and score as ever

transformers asks for attention by name: one that is registered here serves every architecture that asks. How many
tokens the mask keeps is told by an input while the graph is exported, since torch.export cannot follow that; afterwards
the input is removed.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rtx.export.graph import Exported, example_inputs, exporting, is_scoring, to_graph, with_contract
from rtx.export.packed_edits import drop_first_input, drop_reshapes, select_first, split_rows
from rtx.kernels.library import DOMAIN
from rtx.kernels.norm import rms_norm
from rtx.kernels.rotary_embedding import rotary_embedding
from rtx.runtime.errors import ExportError
from rtx.trainer import logit_score
from rtx.trainer.model import RetrievalModel

PACK_ROWS, PACKED_ATTENTION, PACKED_POOL = "PackRows", "PackedAttention", "PackedPool"
RMS_NORM, ROTARY_EMBEDDING = "RMSNorm", "RotaryEmbedding"
_ROTATION = "apply_rotary_pos_emb"
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
        pooled: [1, kept] int64, 0 for a token that pooling leaves out; or None.
    """

    ids: Tensor
    positions: Tensor
    offsets: Tensor
    places: Tensor
    types: Tensor | None
    pooled: Tensor | None

    @classmethod
    def of(cls, kept: Tensor, first: int, mask: Tensor, ids: Tensor, *others: Tensor | None) -> _Packed:
        """Pack rows with padding.

        Args:
            kept: [kept], anything: how many the mask keeps.
            first: position of a row's first token.
            mask, ids: [batch, tokens] int64 each.
            others: types and what is pooled, as `mask`, or None.
        """
        given = [rows for rows in (ids, *others) if rows is not None]
        flat = (1, kept.shape[0])
        offsets, positions, *packed = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{PACK_ROWS}",
            (kept, mask, *given),
            {"first": first},
            dtypes=[torch.int64] * (2 + len(given)),
            shapes=[(mask.shape[0] + 1,), *[flat] * (1 + len(given))],
            version=1,
        )
        kept_ids, *left = packed
        types, pooled = (None if rows is None else left.pop(0) for rows in others)
        places = (mask.flatten().cumsum(0) - 1).clamp(min=0)
        return cls(kept_ids, positions, offsets, places, types, pooled)


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
    sides = [side.transpose(1, 2).flatten(2) for side in (query, key, value)]
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    # transformers counts a token itself among those that a window shows on one side.
    window = -1 if sliding_window is None else sliding_window - 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = {"heads": query.shape[1], "key_heads": key.shape[1]}
    seen = {"scale": float(scale), "causal": int(causal), "window": window}
    found = _operator(PACKED_ATTENTION, (*sides, _packed[-1].offsets), sides[0].shape, **heads, **seen, bfloat16=0)
    return found.view(1, -1, query.shape[1], query.shape[3]), None


def _operator(name: str, inputs: Sequence[Tensor], shape: Sequence[Any], **attributes: Any) -> Tensor:
    """A node of the library's, with one output of float32."""
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", tuple(inputs), attributes, dtype=torch.float32, shape=shape, version=1
    )
    return found


def _pool(hidden: Tensor, modes: Sequence[str]) -> Tensor:
    """Token vectors [1, kept, dim] to [batch, dim * len(modes)], as `rtx.trainer.pooling.pool` of rows with padding."""
    packed = _packed[-1]
    inputs = [hidden, packed.offsets, *([] if packed.pooled is None else [packed.pooled])]
    shape = (packed.offsets.shape[0] - 1, hidden.shape[2])
    return torch.cat([_operator(PACKED_POOL, inputs, shape, mode=mode) for mode in modes], dim=-1)


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
        _packed.append(_Packed.of(kept, self._first, attention_mask, input_ids, token_type_ids, pooling_mask))
        model = self.model
        try:
            if not _pools(model):
                return super().forward(input_ids, attention_mask, token_type_ids, pooling_mask)
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            hidden = model.encode_tokens({name: rows for name, rows in given.items() if rows is not None})
            if model.layout.logit_score is None:
                return (model.finish(model.apply_head(_pool(hidden, model.layout.pooling))),)
            logits = logit_score.score(_pool(hidden, ("lasttoken",)), self.direction, self.bias)
            return (model.activate(logits),)
        finally:
            _packed.pop()


def _pools(model: RetrievalModel) -> bool:
    """Whether token vectors go straight to pooling: not where a model of transformers has a head of its own."""
    return model.layout.logit_score is not None or (model.task == "embed" and not model.layout.features)


def export_packed(model: RetrievalModel) -> ir.Model:
    """Export the packed graph of what has tokens, in float32.

    Inputs, and vectors or scores, are those of `export_graph`; token vectors are none of its outputs, as they would
    bring the padding back.

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
    inputs = {_KEPT: torch.zeros(int(inputs["attention_mask"].sum()), dtype=torch.int64), **inputs}
    shapes = {_KEPT: {0: torch.export.Dim("kept", min=2, max=1 << 30)}, **shapes}
    packing = _packing(transformer, unpacks=not _pools(model))
    operators = contextlib.ExitStack()
    operators.enter_context(_norms(transformer))
    operators.enter_context(_rotations(transformer))
    with exporting(model, model.backbone, attention=_NAME), packing, operators:
        graph = to_graph(_ExportedPacked(model, first), inputs, [contract.output], shapes, name=kind)
    _refuse_other_attention(graph, kind)
    drop_first_input(graph.graph, _KEPT)
    split_rows(graph.graph)
    drop_reshapes(graph.graph)
    select_first(graph.graph)
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
def _packing(transformer: Any, *, unpacks: bool) -> Iterator[None]:
    """The transformer runs on what is packed, whatever it is called with; it gives back that, or rows with padding."""
    original = transformer.forward
    takes_types = "token_type_ids" in inspect.signature(original).parameters

    def forward(*_: Any, **given: Any) -> Any:
        packed = _packed[-1]
        types = {"token_type_ids": packed.types} if takes_types and packed.types is not None else {}
        found = original(input_ids=packed.ids, position_ids=packed.positions, **types)
        if unpacks:
            shape = given["attention_mask"].shape
            hidden = found.last_hidden_state[0].index_select(0, packed.places).reshape(*shape, -1)
            found.last_hidden_state = hidden
            if (pooler := getattr(transformer, "pooler", None)) is not None:
                found.pooler_output = pooler(hidden)
        return found

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward


@contextlib.contextmanager
def _norms(transformer: nn.Module) -> Iterator[None]:
    """Every RMSNorm is one node. (LayerNorm is one in ONNX.)"""
    found = [module for module in transformer.modules() if _is_rms_norm(module)]

    def forward_of(module: Any) -> Any:
        epsilon = float(_epsilon(module))
        return lambda x: _operator(RMS_NORM, (x, module.weight), x.shape, epsilon=epsilon)

    for module in found:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is one, by its name and by what it does: there are some with other formulas."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and isinstance(_epsilon(module), float)
    if not named or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    x = torch.linspace(-1.0, 2.0, 3 * len(weight)).reshape(3, -1)
    with torch.no_grad():
        expected = rms_norm(x.numpy(), weight.float().numpy(), epsilon=float(_epsilon(module)))
        return bool(np.allclose(module(x).numpy(), expected, rtol=1e-4, atol=1e-6))


@contextlib.contextmanager
def _rotations(transformer: nn.Module) -> Iterator[None]:
    """What turns queries and keys by their position is two nodes, where it is what most models of transformers do."""
    homes = {id(home): home for module in transformer.modules() if (home := sys.modules[type(module).__module__])}
    found = [(home, vars(home)[_ROTATION]) for home in homes.values() if _ROTATION in vars(home)]
    found = [(home, original) for home, original in found if _rotates_halves(original)]

    def rotation_of(original: Any) -> Any:
        def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
            if args or options.get("unsqueeze_dim", 1) != 1 or cos.shape[-1] != query.shape[-1]:
                return original(query, key, cos, sin, *args, **options)
            return _rotated(query, cos, sin), _rotated(key, cos, sin)

        return rotate

    for home, original in found:
        setattr(home, _ROTATION, rotation_of(original))
    try:
        yield
    finally:
        for home, original in found:
            setattr(home, _ROTATION, original)


def _rotated(side: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[1, heads, kept, width]; cos, sin [1, kept, width]."""
    rows = side.transpose(1, 2).flatten(2)
    found = _operator(ROTARY_EMBEDDING, (rows, cos, sin), rows.shape, heads=side.shape[1])
    return found.view(1, -1, side.shape[1], side.shape[3]).transpose(1, 2)


def _rotates_halves(function: Any) -> bool:
    """Whether a function of transformers' models is `rtx.kernels.rotary_embedding`: there are some that are not."""
    query, key = torch.linspace(-1.0, 2.0, 96).reshape(2, 1, 2, 3, 8).unbind(0)
    cos, sin = torch.linspace(-1.0, 0.5, 48).reshape(2, 1, 3, 8).unbind(0)
    try:
        found = function(query, key, cos, sin)
    except (TypeError, RuntimeError):
        return False
    for side, turned in zip((query, key), found, strict=True):
        expected = rotary_embedding(side[0].transpose(0, 1).numpy(), cos[0].numpy(), sin[0].numpy())
        if not np.allclose(turned[0].transpose(0, 1).numpy(), expected, atol=1e-6):
            return False
    return True


def _refuse_other_attention(graph: ir.Model, kind: str) -> None:
    attentions = sum(node.op_type == PACKED_ATTENTION for node in graph.graph)
    others = sum(node.op_type == "Softmax" and not is_scoring(node) for node in graph.graph)
    if not attentions or others:
        raise ExportError(f"packed: {kind} does not ask transformers for its attention, but has one of its own")
