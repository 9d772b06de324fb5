"""Weights in 4 bits beside half precision: the blocks, the graph, and what widths do not divide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtx.export import int4_blocks
from rtx.export.calibration import activations, calibrate, weight_of
from rtx.export.emulation import emulate
from rtx.export.graph import module_of
from rtx.export.graphs import Graphs
from rtx.export.int4_blocks import Factor, Factors, choose_factor, quantize_blocks
from rtx.export.int4_half import quantize_int4_half
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.export.scales import Seen, half_up
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


def with_rounded_weights(graph: ir.Model, factors: Factors) -> ir.Model:
    """The plain graph with the weights that the integers stand for."""
    clone = graph.clone()
    for x, layers in activations(clone.graph).items():
        for node, weight in layers:
            content = np.ascontiguousarray(weight_of(node, weight))
            block = next(size for size in (64, 32, 16) if len(content) % size == 0)
            found = factors.get(str(x.name))
            values, moments = (None, None) if found is None else (found.values, found.moments)
            factor = np.ones((len(content), 1), np.float32) if values is None else values[:, None]
            rounded = quantize_blocks(content / factor, block, moments).dequantize() * factor
            transposed = node.attributes.get_int("transB", False)
            weight.const_value = ir.tensor(np.ascontiguousarray(rounded.T if transposed else rounded), name=weight.name)
    return clone


def test_the_graph_is_that_of_rounded_weights(some: Any) -> None:
    """Half precision alone differs."""
    expected = with_rounded_weights(some.graph, {})
    modules = [module_of(node) for layers in activations(some.graph.graph).values() for node, _ in layers]
    assert {*quantize_int4_half(some.graph)} == {*modules}
    assert [value for value in some.graph.graph.initializers.values() if value.dtype == ir.DataType.INT4]
    engine = some._replace(graph=emulate(some.graph)).engine()
    reference = some._replace(graph=expected).engine()
    for batch in some.batches():
        assert deviation(engine.run(batch), reference.run(batch)).max_abs < 2e-2


def seen_of(rows: Any) -> Seen:
    return Seen(np.abs(rows).max(axis=0), rows)


def test_a_factor_spares_what_outliers_are_multiplied_by() -> None:
    random = np.random.default_rng(0)
    rows, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((300, 128), (128, 40)))
    rows[:, 7] *= 40
    found = choose_factor(seen_of(rows), weight, modules=("some.layer",))
    assert found is not None
    assert found.values is not None
    assert found.strength > 0
    assert found.values.argmin() == 7
    assert found.error < 0.6 * found.plain_error
    assert (found.values == found.values.astype(np.float16)).all()
    # What is told is what is lost.
    exact = rows @ weight
    assert found.moments is not None
    for factor, moments, told in (
        (found.values, found.moments, found.error),
        (np.ones(128, np.float32), None, found.plain_error),
    ):
        moved = (rows * factor) @ quantize_blocks(weight / factor[:, None], 64, moments).dequantize()
        assert np.square(moved - exact).sum() / np.square(exact).sum() == pytest.approx(told, rel=1e-3)
    assert found.to_dict() == {
        "modules": ["some.layer"],
        "strength": found.strength,
        "error": found.error,
        "plain_error": found.plain_error,
    }


def test_a_factor_leaves_room_in_half_precision() -> None:
    """A channel that is small but for a spike would have the largest factor."""
    random = np.random.default_rng(0)
    rows, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((300, 128), (128, 40)))
    rows[:, 7] *= 40
    rows[:, 9] *= 1e-3
    seen = seen_of(rows)
    without = choose_factor(seen, weight)
    assert without is not None
    assert without.values is not None
    seen.largest[9] = 20_000
    assert (seen.largest * without.values).max() > 65_504
    found = choose_factor(seen, weight)
    assert found is not None
    factor = np.float32(1) if found.values is None else found.values
    assert (seen.largest * factor).max() <= 65_504 / 2


def test_blocks_are_clipped_by_what_that_does_to_results() -> None:
    """Of each block and column the clip of least error is taken, where channels depend on each other."""
    random = np.random.default_rng(0)
    rows = (random.standard_normal((400, 16)) @ random.standard_normal((16, 64))).astype(np.float32)
    weight = random.standard_t(3, size=(64, 30)).astype(np.float32)
    moments = (rows.T @ rows)[np.newaxis] / len(rows)
    found = quantize_blocks(weight, 64, moments)
    every = [quantize_blocks(weight, 64, moments * size).dequantize() for size in (1e-6, 1.0, 1e6)]
    assert all((one == found.dequantize()).all() for one in every)  # to any scale

    def errors(rounded: Any) -> Any:
        return np.square(rows.astype(np.float64) @ (rounded - weight)).sum(axis=0)

    least = np.full(30, np.inf)
    for clip in int4_blocks._CLIPS:
        step = half_up(np.abs(weight).max(axis=0) * np.float32(clip / 7))
        least = np.minimum(least, errors(np.clip(np.rint(weight / step), -8, 7) * step))
    np.testing.assert_allclose(errors(found.dequantize()), least, rtol=1e-3)
    plain = errors(quantize_blocks(weight, 64).dequantize())
    assert errors(found.dequantize()).sum() < 0.9 * plain.sum()
    # Moments of 1 are the error of weights.
    same = quantize_blocks(weight, 64, np.eye(64, dtype=np.float32)[np.newaxis])
    assert (same.values == quantize_blocks(weight, 64).values).mean() > 0.99


def test_a_block_that_was_silent_is_rounded_like_others() -> None:
    random = np.random.default_rng(0)
    rows, weight = random.standard_normal((300, 128)).astype(np.float32), random.standard_normal((128, 40))
    rows[:, 64:] = 0
    found = choose_factor(seen_of(rows), weight.astype(np.float32))
    assert found is not None
    assert found.moments is not None
    rounded = quantize_blocks(weight.astype(np.float32), 64, found.moments).dequantize()
    assert np.square(rounded - weight)[64:].mean() < 1.05 * np.square(rounded - weight)[:64].mean()


def test_where_factors_are_of_no_use_there_are_none() -> None:
    random = np.random.default_rng(0)
    signs = np.sign(random.standard_normal((300, 64))).astype(np.float32)  # each channel as large as any other
    found = choose_factor(seen_of(signs), random.standard_normal((64, 8)).astype(np.float32))
    assert found is not None
    assert found == Factor((), 0.0, None, found.error, found.plain_error)
    assert found.error <= found.plain_error
    assert choose_factor(seen_of(signs[:, :10]), np.ones((10, 8), np.float32)) is None
    empty = choose_factor(seen_of(np.zeros((3, 64), np.float32)), np.ones((64, 8), np.float32))
    assert empty is not None
    assert empty.error == 0


TEXTS = ["how to reset the pump", "a red cat in the garden", "sort the list of numbers in place", "a"]


def test_the_graph_has_the_factors_that_were_found(some: Any, tmp_path: Path) -> None:
    model = some.model
    items: Any = [(text, TEXTS[0]) for text in TEXTS] if model.task == "rerank" else TEXTS
    prepare = model.preprocessor.encode_pairs if model.task == "rerank" else model.preprocessor.encode
    plain = Graphs(some.graph)
    found = calibrate(
        plain, [tmp_path / "model.onnx"], model.preprocessor, prepare(items), None, factors=True, threads=1
    )
    assert not found.scales
    assert {*found.factors} == {str(x.name) for x in activations(some.graph.graph)}
    used = [factor for factor in found.factors.values() if factor.values is not None]
    assert used
    assert sum(factor.error for factor in used) < sum(factor.plain_error for factor in used)
    graph = some.graph.clone()
    modules = quantize_int4_half(graph, found.factors)
    assert {*modules} == {module for factor in found.factors.values() for module in factor.modules}
    constants = [name for name in graph.graph.initializers if "_factor" in name]
    assert len(constants) == len(used)
    # What a factor takes from the activation, its weights give back: half precision alone differs.
    engine = some._replace(graph=emulate(graph)).engine()
    reference = some._replace(graph=with_rounded_weights(some.graph, found.factors)).engine()
    for batch in some.batches():
        assert deviation(engine.run(batch), reference.run(batch)).max_abs < 4e-2


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_bundle_with_and_without_items(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, calibrated: bool
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"query": "reset pump", "positive": TEXTS[0], "negative": TEXTS[1]}) + "\n")
    options = ExportOptions(
        variants=("int4-half",), min_cosine=0.1, threads=1, calibration=pairs if calibrated else None
    )
    outcome = export_bundle(str(tiny_checkpoint("bert")), tmp_path / "tiny.rtx", options)
    graph = ir.load(tmp_path / "tiny.rtx" / "onnx" / "model_int4_half.onnx")
    used = [factor for factor in outcome.factors if factor.values is not None]
    assert len([name for name in graph.graph.initializers if "_factor" in name]) == len(used)
    report = json.loads((tmp_path / "tiny.rtx" / "report.json").read_text())
    assert report["factors"] == [factor.to_dict() for factor in outcome.factors]
    assert bool(outcome.factors) == calibrated
    assert bool(used) == calibrated


def test_a_width_that_no_block_divides(some: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_blocks, "BLOCKS", (48,))
    monkeypatch.setattr("rtx.export.int4_half.BLOCKS", (48,))
    with pytest.raises(ExportError, match=r"int4-half: \S+: reads \d+ numbers; expected a multiple of 48"):
        quantize_int4_half(some.graph)
