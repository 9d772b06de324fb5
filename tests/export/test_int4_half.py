"""Weights in 4 bits beside half precision: the blocks, the graph, and what widths do not divide."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtx.export import int4_half
from rtx.export.calibration import activations, weight_of
from rtx.export.emulation import emulate
from rtx.export.graph import module_of
from rtx.export.int4_half import quantize_blocks, quantize_int4_half
from rtx.runtime.errors import ExportError
from rtx.runtime.golden import deviation


@given(st.sampled_from([(16, 16, 1), (64, 32, 5), (192, 64, 7)]), st.floats(1e-3, 1e3), st.integers(0, 3))
def test_blocks(sizes: tuple[int, int, int], size: float, seed: int) -> None:
    inputs, block, out = sizes
    weight = (np.random.default_rng(seed).standard_t(3, size=(inputs, out)) * size).astype(np.float32)
    found = quantize_blocks(weight, block)
    assert found.values.shape == weight.shape
    assert found.scale.shape == (inputs // block, out)
    assert -8 <= found.values.min() <= found.values.max() <= 7
    assert (found.scale.astype(np.float16).astype(np.float32) == found.scale).all()
    # Each block by itself is no worse than with the whole of its range.
    blocks = weight.reshape(-1, block, out)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 7 * (1 + 2**-9)
    whole = np.square(np.rint(blocks / step) * step - blocks).sum(axis=1)
    error = np.square(found.dequantize() - weight).reshape(blocks.shape).sum(axis=1)
    assert (error <= whole * 1.05 + 1e-12).all()


def test_an_outlier_widens_its_own_block_only() -> None:
    weight = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
    weight[5, 1] = 50.0
    scale = quantize_blocks(weight, 64).scale
    assert scale[0, 1] > 4
    assert np.delete(scale.ravel(), 1).max() < 0.7


def test_the_graph_is_that_of_rounded_weights(some: Any) -> None:
    """Against the plain graph with the weights that the integers stand for: half precision alone differs."""
    expected = some.graph.clone()
    for layers in activations(expected.graph).values():
        for node, weight in layers:
            content = np.ascontiguousarray(weight_of(node, weight))
            block = next(size for size in (64, 32, 16) if len(content) % size == 0)
            rounded = quantize_blocks(content, block).dequantize()
            transposed = node.attributes.get_int("transB", False)
            rounded = np.ascontiguousarray(rounded.T if transposed else rounded)
            weight.const_value = ir.tensor(rounded, name=weight.name)
    modules = [module_of(node) for layers in activations(some.graph.graph).values() for node, _ in layers]
    assert {*quantize_int4_half(some.graph)} == {*modules}
    assert [value for value in some.graph.graph.initializers.values() if value.dtype == ir.DataType.INT4]
    engine = some._replace(graph=emulate(some.graph)).engine()
    reference = some._replace(graph=expected).engine()
    for batch in some.batches():
        assert deviation(engine.run(batch), reference.run(batch)).max_abs < 2e-2


def test_a_width_that_no_block_divides(some: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_half, "_BLOCKS", (48,))
    with pytest.raises(ExportError, match=r"int4-half: \S+: reads \d+ numbers; expected a multiple of 48"):
        quantize_int4_half(some.graph)
