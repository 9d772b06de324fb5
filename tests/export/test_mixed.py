"""Mixed precision: what is kept in float32, and that it is what costs most and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from rtx.export import pipeline
from rtx.export.derive import derive
from rtx.export.gate import Verdict, judge, limits
from rtx.export.graph import constant_matrix, module_of
from rtx.export.graphs import Graphs
from rtx.export.int8 import quantizable
from rtx.export.mixed import fails_on_quality, in_words, least_kept, rank, units_of
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.export.variants import VariantName
from rtx.kernels import library
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.errors import GateError
from rtx.runtime.evalset import EvalSet, write_evalset
from rtx.runtime.golden import Golden
from rtx.runtime.text import Encoded
from rtx.runtime.verification import verify_bundle

Exported = Callable[..., Any]
BUILT = library.library_file() is not None
LAYER = "backbone.encoder.layer"
SELF = "attention.self"
LINEAR = (
    *(f"{SELF}.{side}" for side in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
BAD, FACTOR = tuple(f"{LAYER}.{depth}.attention.output.dense" for depth in (0, 1)), 1024.0
needs_operators = pytest.mark.skipif(not BUILT, reason=f"packed: {library.NOT_BUILT}")
WORDS = ("backbone.embeddings.word_embeddings",)
EVERY = (*WORDS, *(f"{LAYER}.{depth}.{name}" for depth in (0, 1) for name in LINEAR))


@pytest.mark.parametrize("most", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("first", [1, 4])
def test_as_few_as_pass_are_kept(most: int, first: int) -> None:
    for enough in range(1, most + 2):
        asked: list[int] = []

        def passes(count: int, enough: int = enough, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= enough

        assert least_kept(most, passes, first) == (enough if enough <= most else None)
        assert len(asked) == len({*asked}) <= 7
        if first == enough <= most:
            assert asked == [first, first - 1][:first]


def test_units_come_by_what_they_cost() -> None:
    cost = {("a.0.q", "a.0.k"): 0.1, ("a.0.f",): 0.5, ("a.1.q", "a.1.k"): float("inf"), ("a.1.f",): 0.0}
    assert rank(list(cost), cost.__getitem__) == [("a.1.q", "a.1.k"), ("a.0.f",), ("a.0.q", "a.0.k"), ("a.1.f",)]


def test_of_many_units_the_dearest_are_found_with_few_measurements() -> None:
    units = [(f"layer.{depth}.{kind}",) for depth in range(28) for kind in ("qkv", "out", "up", "down")]
    dear = {("layer.21.down",): 5.0, ("layer.3.up",): 3.0, ("layer.4.up",): 2.0}
    measured: list[tuple[str, ...]] = []

    def error(modules: tuple[str, ...]) -> float:
        measured.append(modules)
        return sum(dear.get((module,), 0.01) for module in modules)

    ranked = rank(units, error)
    assert len(measured) <= 40
    assert ranked[:3] == list(dear)
    assert sorted(ranked) == sorted(units)
    assert {module.rpartition(".")[2] for module in measured[0]} == {"qkv"}


def test_what_reads_the_same_is_one_unit(exported: Exported) -> None:
    expected: list[tuple[str, ...]] = [WORDS]
    for layer in (f"{LAYER}.0", f"{LAYER}.1"):
        expected += [tuple(f"{layer}.{SELF}.{side}" for side in ("query", "key", "value"))]
        expected += [(f"{layer}.attention.output.dense",), (f"{layer}.intermediate.dense",), (f"{layer}.output.dense",)]
    assert units_of(exported("bert").graph.graph) == expected


def test_layers_that_share_a_table_of_positions_are_units_of_their_own(exported: Exported) -> None:
    units = units_of(exported("deberta-v2").graph.graph)
    assert [len(unit) for unit in units] == [1, 3, 1, 1, 1, 3, 1, 1, 1]


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_operators)])
def test_kept_layers_are_those_of_fp32_and_the_others_int8(exported: Exported, packed: bool) -> None:
    """One of a group, one that has a norm behind it, and the table."""
    keep = (f"{LAYER}.0.{SELF}.key", f"{LAYER}.1.output.dense", *WORDS)
    model, plain = exported("bert", packed=packed)
    # So few tokens that no number lies at the edge of a step, where it may fall on either side.
    batch = exported("bert").batch(2, 20)

    def outputs(form: Any, keep: Sequence[str], graph: ir.Model = plain) -> np.ndarray[Any, Any]:
        graph = derive(form, graph, keep)
        products = (node for node in graph.graph if node.op_type in ("MatMul", "Gemm", "Gather"))
        # The scales of rows are one column.
        in_float32 = {
            module_of(node)
            for node in products
            for value in map(constant_matrix, node.inputs)
            if value is not None and value.shape is not None and value.shape[1] != 1
        }
        assert in_float32 & {*EVERY} == ({*keep} if "int8" in form else {*EVERY})
        # Attention may round where 8 bits come behind it.
        dense = [f"{LAYER}.{depth}.attention.output.dense" for depth in range(2)]
        attentions = [node for node in graph.graph if node.op_type == "PackedAttention"]
        rounds = [node.attributes.get_int("bfloat16") for node in attentions]
        assert rounds == [int("int8" in form and name not in keep) for name in dense[: len(attentions)]]
        engine = OnnxEngine(ir.to_proto(graph).SerializeToString(), output=model.contract.output, threads=1)
        return engine.run(batch)

    form = "int8-packed" if packed else "int8"
    fp32, int8, mixed = outputs("fp32", EVERY), outputs(form, ()), outputs(form, keep)
    np.testing.assert_allclose(outputs(form, EVERY), fp32, atol=2e-6)
    # The same as where the others' weights and inputs alone are rounded, in standard operators.
    rounded = outputs("int8", keep, exported("bert").graph)
    assert np.abs(mixed - rounded).max() < 0.1 * np.abs(mixed - int8).max()
    assert 1e-3 < np.linalg.norm(mixed - fp32) < np.linalg.norm(int8 - fp32)


def spoil(graph: ir.Model) -> ir.Model:
    """Nothing changes in exact numbers: what a row of a layer is multiplied by, the layer before is divided by."""
    weights = {module_of(node): weight for node, weight in quantizable(graph.graph)}
    for depth, bad in enumerate(BAD):
        before = f"encoder.layer.{depth}.{SELF}.value"
        bias = next(value for name, value in graph.graph.initializers.items() if name.endswith(f"{before}.bias"))
        changes = (
            (weights[f"backbone.{before}"], (..., 3), 1 / FACTOR),
            (bias, 3, 1 / FACTOR),
            (weights[bad], 3, FACTOR),
        )
        for value, place, factor in changes:
            assert value.const_value is not None
            content = value.const_value.numpy().copy()
            content[place] *= factor
            value.const_value = ir.tensor(content, name=value.name)
    return graph


@pytest.fixture
def spoilt(exported: Exported, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint whose graphs have two layers that are bad for int8."""
    plain, packed = (spoil(exported("bert", packed=packed).graph) for packed in (False, True))
    monkeypatch.setattr(pipeline, "export_graphs", lambda _: Graphs(plain))
    monkeypatch.setattr(pipeline, "export_packed", lambda _: packed)
    return str(tiny_checkpoint("bert"))


def test_auto_keeps_the_layers_that_are_bad_for_int8(spoilt: str, evalset: EvalSet, tmp_path: Path) -> None:
    write_evalset(evalset, tmp_path / "eval")
    target = tmp_path / "x.rtx"
    command = ["export", spoilt, "-o", str(target), "--precision", "auto", "--threads", "1"]
    result = CliRunner().invoke(main, [*command, "--eval", str(tmp_path / "eval"), "--max-ndcg-drop", "1"])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(target)
    names = {"int8", "int8-packed"} if BUILT else {"int8"}
    kept = {name: variant.kept for name, variant in bundle.manifest.variants.items() if variant.kept}
    assert {name: sorted(modules) for name, modules in kept.items()} == {name: [*BAD] for name in names}
    report = json.loads((target / "report.json").read_text())
    for name, verdict in report["verdicts"].items():
        if name not in names:
            assert verdict["mixed"] is None
            continue
        mixed = verdict["mixed"]
        assert (mixed["kept"], mixed["layers"]) == ([*kept[name]], len(EVERY))
        assert mixed["without"]["parity"]["min_cosine"] < 0.98 < 0.99 < verdict["parity"]["min_cosine"]
        assert mixed["without"]["failures"][0].startswith("differs from PyTorch")
        least = f"{mixed['without']['parity']['min_cosine']:.5f}"
        change = f"{mixed['without']['ranking']['difference']:+.4f}"
        said = f"{name}: 2 of {len(EVERY)} layers in fp32 (without: least cosine {least}, NDCG@10 {change}): "
        assert said + ", ".join(kept[name]) in result.stdout.splitlines()
    page = (target / "report.html").read_text()
    assert "Layers that are kept" in page
    assert f">{', '.join(kept['int8'])}<" in page
    # What lies there is what was judged, and not what was tried last.
    assert all(finding.ok for finding in verify_bundle(target))
    assert not list(target.glob("onnx/trial*"))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["info", str(target)])
    assert "int8, 2 layers fp32" in shown.stdout


def test_without_auto_a_variant_that_fails_is_left_out(spoilt: str, tmp_path: Path) -> None:
    outcome = export_bundle(spoilt, tmp_path / "x.rtx", ExportOptions(variants=("fp32", "int8"), threads=1))
    assert list(outcome.manifest.variants) == ["fp32"]
    assert outcome.mixed == {}


@pytest.mark.parametrize("external", [False, True])
def test_half_of_the_layers_are_the_most(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    """Also where weights lie beside their graphs."""
    if external:
        monkeypatch.setattr("rtx.export.derive._EXTERNAL_FROM_BYTES", 10_000)
    names: tuple[VariantName, ...] = ("int8", "int8-packed") if BUILT else ("int8",)
    options = ExportOptions(variants=names, mixed=True, min_cosine=0.999999, threads=1)
    said: list[str] = []
    with pytest.raises(GateError) as caught:
        export_bundle(spoilt, tmp_path / "x.rtx", options, notify=said.append)
    reason = "half of the layers in fp32, where int8 gains nothing any more, do not mend that"
    found = re.findall(rf"(\S+): {reason}: least cosine 0\.9\d+, largest difference", str(caught.value))
    assert found == [*names]
    counts = [match.groups() for text in said if (match := re.match(r"(\S+): judging with (\d+) of 9 groups", text))]
    # What came of the first is the guess for the second.
    assert counts == [("int8", "1"), ("int8", "2"), ("int8", "4"), ("int8-packed", "4")][: 2 + len(names)]
    assert sum("measuring" in text for text in said) == 1


@pytest.mark.parametrize(
    ("parity", "invariance", "expected"), [(0.9, 1.0, True), (1.0, 1.0, False), (0.9, 0.9, False), (1.0, 0.9, False)]
)
def test_only_what_fails_on_quality_is_mixed(parity: float, invariance: float, expected: bool) -> None:
    golden = np.array([[1.0, 0.0]], dtype=np.float32)

    def turned(cosine: float) -> np.ndarray[Any, Any]:
        return np.array([[cosine, np.sqrt(1 - cosine**2)]], dtype=np.float32)

    known = Golden(("a",), (None,), (Encoded([1], [0], 0),), golden)
    alone = turned(parity)
    elsewhere = np.stack([alone if invariance == 1.0 else -alone])
    assert fails_on_quality(judge("int8", limits("int8", "embed", 1.0), alone, elsewhere, known)) is expected


def test_what_cannot_be_run_is_not_mixed() -> None:
    verdict = Verdict("int8", limits("int8", "embed", 1.0), None, None, None, ("cannot be run",))
    assert not fails_on_quality(verdict)


def test_names_are_said_once() -> None:
    assert in_words(["a.0.query", "a.0.key", "a.1.dense", "b"]) == "a.0.{query, key}, a.1.dense, b"
