"""Graph and PyTorch agree for every architecture, in every precision, at every shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rtx.export.fp16 import to_fp16
from rtx.export.graph import CONTRACT_KEY, export_graph, strip_notes
from rtx.export.int8 import quantize_int8
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.contract import Contract
from rtx.runtime.golden import deviation
from rtx.runtime.text import Batch
from rtx.trainer.model import RetrievalModel

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")


def make_batch(contract: Contract, rows: int, tokens: int, vocabulary: int) -> Batch:
    """Random tokens; every second row is half padding."""
    random = np.random.default_rng(rows * 1000 + tokens)
    mask = np.ones((rows, tokens), dtype=np.int64)
    mask[1::2, tokens // 2 + 1 :] = 0
    if contract.padding_side == "left":
        mask = np.ascontiguousarray(mask[:, ::-1])
    ids = np.where(mask == 1, random.integers(5, vocabulary, mask.shape), contract.pad_token_id)
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids), "pooling_mask": mask}
    return {name: arrays[name] for name in contract.inputs}


def make_engine(graph: ir.Model, contract: Contract) -> OnnxEngine:
    return OnnxEngine(ir.to_proto(graph).SerializeToString(), output=contract.output, threads=1)


def batches_of(model: RetrievalModel) -> list[Batch]:
    contract, vocabulary = model.contract, int(model.backbone.config.vocab_size)
    shapes = [(1, 1), (1, 2), (3, 7), (2, 33), (2, contract.max_tokens)]
    return [make_batch(contract, rows, tokens, vocabulary) for rows, tokens in shapes]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_agrees_with_pytorch(architecture: str, tiny_checkpoint: Callable[..., Path]) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, normalize=True))
    graph = export_graph(model)
    reference = [model.engine().run(batch) for batch in batches_of(model)]
    plain = make_engine(graph, model.contract)
    half = make_engine(to_fp16(graph), model.contract)
    converted = quantize_int8(graph)
    small = make_engine(graph, model.contract)
    for batch, expected in zip(batches_of(model), reference, strict=True):
        assert deviation(plain.run(batch), expected).max_abs < 1e-5
        assert deviation(half.run(batch), expected).min_cosine > 0.9999
        assert deviation(small.run(batch), expected).min_cosine > 0.99
    # Two layers with at least four linear layers each, and the word embeddings.
    assert len(converted) >= 9
    assert sum("embed" in name for name in converted) == 1
