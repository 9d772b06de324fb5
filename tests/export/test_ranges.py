"""How large numbers get: where PyTorch has them, and what is said of those that half precision does not hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rtx.export.fp16 import LARGEST
from rtx.export.graphs import Graphs
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.export.ranges import Range, measure_ranges, overflowing
from rtx.runtime.errors import ExportError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

TEXTS = ["how to reset the pump", "a", "what the code of the query is for"]
FEED_FORWARD = "backbone.encoder.layer.1.intermediate.dense"


def test_they_are_those_of_pytorch(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    items = [row for row in model.preprocessor.encode(TEXTS) if isinstance(row, Encoded)]
    found = measure_ranges(Graphs(graph), [tmp_path / "model.onnx"], model.preprocessor, items, threads=1)
    ranges = {one.module: one.largest for one in found}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected: dict[str, float] = {}

    def look(name: str) -> Callable[..., None]:
        def note(_: Any, __: Any, output: torch.Tensor) -> None:
            expected[name] = max(expected.get(name, 0.0), float(output.detach().abs().max()))

        return note

    handles = [module.register_forward_hook(look(name)) for name, module in linear.items()]
    for item in items:
        model.engine().run(model.preprocessor.collate([item]))
    for handle in handles:
        handle.remove()
    assert len(expected) == 13  # the pooler too, which nobody reads
    for name, largest in expected.items():
        if name.endswith("pooler.dense"):
            continue
        # The product before the bias is among what a layer computes.
        assert ranges[name] >= largest * (1 - 1e-5)
        assert ranges[name] < 2 * largest
    assert [one.largest for one in found] == sorted(ranges.values(), reverse=True)
    # Masks are no larger than half precision holds, and norms and pooling are not in it.
    assert found[0].largest < 1e3
    assert not [name for name in ranges if "LayerNorm" in name]
    assert not [*tmp_path.iterdir()]


def test_what_overflows_is_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    dense = model.get_submodule(FEED_FORWARD)
    with torch.no_grad():
        dense.weight.mul_(1e5)
        model.get_submodule("backbone.encoder.layer.1.output.dense").weight.mul_(1e-5)
    model.save(tmp_path / "large")
    outcome = export_bundle(
        str(tmp_path / "large"), tmp_path / "x.rtx", ExportOptions(variants=("fp32", "fp16"), threads=1)
    )
    verdict = outcome.verdicts["fp16"]
    assert not verdict.passed
    assert verdict.failures[-1].startswith("half precision ends at 65,504: backbone.encoder.layer.1.intermediate")
    assert {one.module for one in outcome.ranges if not one.fits} >= {FEED_FORWARD}
    report = json.loads((tmp_path / "x.rtx" / "report.json").read_text())
    assert report["ranges"][0]["largest"] == outcome.ranges[0].largest > LARGEST
    page = (tmp_path / "x.rtx" / "report.html").read_text()
    assert "Half precision" in page
    assert FEED_FORWARD in page


def test_a_mask_is_not_what_is_large(exported: Callable[..., Any], tmp_path: Path) -> None:
    """A causal mask is there for every text, and as large as half precision allows."""
    model, graph = exported("qwen3")
    items = [row for row in model.preprocessor.encode(TEXTS) if isinstance(row, Encoded)]
    found = measure_ranges(Graphs(graph), [tmp_path / "model.onnx"], model.preprocessor, items, threads=1)
    assert 1 < found[0].largest < 1000
    assert [one for one in found if one.module.endswith("self_attn")]


def test_a_model_that_gives_nan_is_blamed_itself(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    with torch.no_grad():
        model.get_submodule(FEED_FORWARD).weight[0, 0] = math.nan
    model.save(tmp_path / "nan")
    with pytest.raises(ExportError, match=r"PyTorch itself gives numbers that are not finite for (\d+) of \1 golden"):
        export_bundle(str(tmp_path / "nan"), tmp_path / "x.rtx", ExportOptions(threads=1))
    assert not (tmp_path / "x.rtx").exists()


def test_what_is_no_number_does_not_fit(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    weight = next(v for n, v in graph.graph.initializers.items() if n.endswith("layer.1.intermediate.dense.bias"))
    content = weight.const_value.numpy().copy()
    content[3] = np.nan  # one number of many
    weight.const_value = ir.tensor(content, name=weight.name)
    items = [row for row in model.preprocessor.encode(TEXTS) if isinstance(row, Encoded)]
    found = measure_ranges(Graphs(graph), [tmp_path / "model.onnx"], model.preprocessor, items, threads=1)
    assert found[0].largest == math.inf
    assert not found[0].fits


@pytest.mark.usefixtures("shared_graph")
def test_layers_that_are_kept_do_not_mend_it(
    tiny_checkpoint: Callable[..., Path], evalset: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtx.export.ranges.LARGEST", 5.0)
    options = ExportOptions(variants=("fp32", "int8-static"), evalset=evalset, max_ndcg_drop=1.0, mixed=True, threads=1)
    outcome = export_bundle(str(tiny_checkpoint("bert")), tmp_path / "x.rtx", options)
    assert [*outcome.manifest.variants] == ["fp32"]
    assert not outcome.mixed
    assert outcome.verdicts["int8-static"].failures[-1].startswith("half precision ends at 5: ")


def test_in_words() -> None:
    assert overflowing([Range("a", LARGEST), Range("b", 1.0)]) == ""
    assert overflowing([Range("a", 1e36)]) == "half precision ends at 65,504: a reaches 1e+36"
    several = [Range("n", math.inf), *(Range(f"m{place}", 7e4 - place) for place in range(6)), Range("s", 1.0)]
    assert overflowing(several) == (
        "half precision ends at 65,504: n reaches inf, m0 reaches 70,000, m1 reaches 69,999, m2 reaches 69,998, "
        "m3 reaches 69,997, and 2 more"
    )
    assert Range("n", math.inf).to_dict() == {"module": "n", "largest": None}
    with pytest.raises(AttributeError):
        Range("n", 1.0).largest = 2.0  # type: ignore[misc]
