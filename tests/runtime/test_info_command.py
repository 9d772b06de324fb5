from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.contract import Contract


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines as on a terminal that is wide enough for all of them."""
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["info", *map(str, arguments)])


def lines_of(*arguments: object) -> list[str]:
    """The lines that the command prints, with single spaces."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_a_bundle_shows_contract_variants_rejected_and_provenance(toy_bundle: Path):
    lines = lines_of(toy_bundle)
    manifest = Bundle.open(toy_bundle).manifest
    size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    assert lines[0] == f"toy: a bundle of format version 1, {size:.1f} MB"
    assert {
        "variant precision size least cosine largest difference NDCG@10",
        "fp32 (default) fp32 0.0 MB 1.000000 9.0e-08",
        "int8 int8 0.0 MB 0.999968 3.2e-03 -0.0012",
        "fp16 NDCG@10 fell by 0.0100, more than 0.0050",
        "task embed",
        "inputs input_ids, attention_mask, token_type_ids",
        "pad_token_id 0",
        "pooling mean",
        "normalize yes",
        "prompts document: 'code: ', query: 'find code: '",
        "default_prompt none",
        "source toy",
        "command rtx export toy -o toy.rtx",
        "versions rtx 0.1.0",
    } <= set(lines)
    assert not any(line.startswith("activation") for line in lines)


def test_a_reranker_shows_what_a_reranker_has(toy_reranker_bundle: Path):
    lines = lines_of(toy_reranker_bundle)
    assert {"task rerank", "activation identity", "prompts none", "max_tokens 64"} <= set(lines)
    assert "variant precision size least agreement largest difference NDCG@10" in lines
    assert not any(line.startswith(("pooling", "dimension", "normalize", "similarity")) for line in lines)


def test_a_bundle_as_json(toy_bundle: Path):
    result = run(toy_bundle, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    manifest = Bundle.open(toy_bundle).manifest
    assert (found["kind"], found["name"], found["default_variant"]) == ("bundle", "toy", "fp32")
    assert Contract.from_dict(found["contract"]) == manifest.contract
    assert found["variants"]["int8"] == {
        "file": "onnx/model_int8.onnx",
        "precision": "int8",
        "image_file": None,
        "image_precision": None,
        "tolerance": {"min_cosine": 0.99, "max_abs": 0.05},
        "external": [],
        "operators": False,
        "kept": [],
        "kept_precision": "fp32",
        "bytes": manifest.files["onnx/model_int8.onnx"].bytes,
        "parity": {"mean_cosine": 0.99998, "min_cosine": 0.999968, "max_abs": 0.0032, "worst": 3},
        "ranking": {"k": 10, "difference": -0.0012, "interval": [-0.003, 0.0006], "confidence": 0.95},
    }
    assert found["rejected"] == manifest.rejected
    assert found["provenance"] == dataclasses.asdict(manifest.provenance)


def test_a_bundle_without_a_report_says_nothing_about_parity(toy_bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(toy_bundle, tmp_path / "copy.rtx"))
    manifest = Bundle.open(copy).manifest
    files = {file: entry for file, entry in manifest.files.items() if file != "report.json"}
    (copy / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files, rejected={}).to_bytes())
    lines = lines_of(copy)
    assert "int8 int8 0.0 MB" in lines
    assert "Did not pass the gate" not in lines


def test_markup_in_a_prompt_is_text(toy_bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(toy_bundle, tmp_path / "copy.rtx"))
    manifest = Bundle.open(copy).manifest
    contract = dataclasses.replace(manifest.contract, prompts={"query": "[bold]x[/bold][/red]"})
    (copy / "manifest.json").write_bytes(dataclasses.replace(manifest, contract=contract).to_bytes())
    assert "prompts query: '[bold]x[/bold][/red]'" in lines_of(copy)


@pytest.mark.parametrize("damage", ["report", "absent"])
def test_a_bundle_that_cannot_be_read_exits_with_5(toy_bundle: Path, tmp_path: Path, damage: str):
    copy = tmp_path / "copy.rtx"
    message = f"error: {copy}: does not exist; expected a bundle folder\n"
    if damage == "report":
        shutil.copytree(toy_bundle, copy)
        (copy / "report.json").write_bytes(b"{}")
        message = f"error: {copy}: report.json was changed after it was written (its hash does not fit)\n"
    result = run(copy)
    assert (result.exit_code, result.stdout, result.stderr) == (5, "", message)


# -- a checkpoint --------------------------------------------------------------------------------------------------


def test_a_checkpoint_shows_its_contract(tiny_checkpoint: Callable[..., Path]):
    folder = tiny_checkpoint("bert")
    result = run(folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    contract = Contract.from_dict(found.pop("contract"))
    assert found == {"kind": "checkpoint", "path": str(folder)}
    assert (contract.task, contract.dimension, contract.pooling) == ("embed", 32, ("mean",))
    lines = lines_of(folder)
    assert lines[0] == f"{folder}: a checkpoint"
    assert {"task embed", "dimension 32", "pooling mean"} <= set(lines)


def test_a_checkpoint_shows_the_chat_template_around_a_pair(tiny_checkpoint: Callable[..., Path]):
    lines = lines_of(tiny_checkpoint("qwen3-chat", "rerank"))
    shown = " ".join(lines[next(index for index, line in enumerate(lines) if line.startswith("rendered")) :])
    assert shown.startswith("rendered '<|im_start|>system\\nIs it")
    assert "\\n<Q>: $A\\n<D>: $B<|im_end|>" in shown
    assert not any(line.startswith(("rendered", "strip_sides")) for line in lines_of(tiny_checkpoint("bert", "rerank")))


def test_a_folder_of_something_else_exits_with_5(tmp_path: Path):
    result = run(tmp_path)
    assert result.exit_code == 5
    assert result.stderr.startswith(f"error: {tmp_path / 'config.json'}: missing; expected a Sentence Transformers ")


def test_without_a_path_it_says_what_is_missing():
    result = run()
    assert result.exit_code == 2
    assert "BUNDLE|CHECKPOINT" in result.stderr
