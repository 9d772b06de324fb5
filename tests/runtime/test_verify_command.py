from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.contract import Contract
from rtx.runtime.errors import UsageError
from rtx.runtime.golden import Golden
from rtx.runtime.manifest import FileEntry
from rtx.runtime.verification import Finding, verify_bundle

FILES = ["golden.npz", "onnx/model.onnx", "onnx/model_int8.onnx", "report.json", "tokenizer.json"]
CHECKS = ["manifest", "files", "other files", "golden set", "tokenizer"]
CHECKS += ["fp32 graph", "fp32 outputs", "int8 graph", "int8 outputs"]


@pytest.fixture
def copy(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "copy.rtx"))


def rewrite(folder: Path, file: str, content: bytes, **changes: Any) -> None:
    """Give a bundle another file, or its manifest other values, as if it had been written so."""
    (folder / file).write_bytes(content)
    manifest = Bundle.open(folder).manifest
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    changed = dataclasses.replace(manifest, files={**manifest.files, file: entry}, **changes)
    (folder / "manifest.json").write_bytes(changed.to_bytes())


def rewrite_golden(folder: Path, change: Callable[[Golden], Golden]) -> None:
    rewrite(folder, "golden.npz", change(Bundle.open(folder).golden()).to_bytes())


def failures(path: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {found.check: found.problems for found in verify_bundle(path, threads=1, **options) if not found.ok}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_a_whole_bundle_passes_every_check(toy_bundle: Path, toy_reranker_bundle: Path):
    for path in (toy_bundle, toy_reranker_bundle):
        findings = verify_bundle(path, threads=1)
        assert [found.check for found in findings] == CHECKS
        assert failures(path) == {}


def test_one_variant_can_be_asked_for(toy_bundle: Path):
    findings = verify_bundle(toy_bundle, variant="int8", threads=1)
    assert [found.check for found in findings] == [*CHECKS[:5], "int8 graph", "int8 outputs"]
    with pytest.raises(UsageError, match="has no variant 'int4'"):
        verify_bundle(toy_bundle, variant="int4")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_one_flipped_bit_in_any_file_is_named_and_the_file_not_used(copy: Path, file: str, where: float):
    content = bytearray((copy / file).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (copy / file).write_bytes(content)
    expected = {"files": (f"{file} was changed after it was written (its hash does not fit)",)}
    blocked = {
        "golden.npz": ("golden set", ["tokenizer", "fp32 outputs", "int8 outputs"], "golden set"),
        "tokenizer.json": ("tokenizer", ["fp32 outputs", "int8 outputs"], "tokenizer"),
        "onnx/model.onnx": ("fp32 graph", ["fp32 outputs"], "graph"),
        "onnx/model_int8.onnx": ("int8 graph", ["int8 outputs"], "graph"),
    }
    if file in blocked:
        check, dependent, what = blocked[file]
        expected[check] = (f"not checked: {file} is damaged",)
        expected |= dict.fromkeys(dependent, (f"not checked: there is no {what}",))
    assert failures(copy) == expected


def test_a_damaged_manifest_is_the_only_finding(copy: Path):
    content = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(content.replace(b'"name": "toy"', b'"name": "boy"'))
    problem = f"{copy / 'manifest.json'}: was changed after it was written (its own hash does not fit)"
    assert verify_bundle(copy) == [Finding("manifest", problems=(problem,))]


def test_missing_and_foreign_files_are_named(copy: Path):
    (copy / "report.json").unlink()
    (copy / "onnx" / "notes.txt").write_text("mine")
    assert failures(copy) == {
        "files": ("report.json cannot be read: No such file or directory",),
        "other files": ("onnx/notes.txt is not listed in manifest.json",),
    }


@pytest.mark.parametrize(
    ("find", "replace", "problem"),
    [
        (
            '"lowercase":true',
            '"lowercase":false',
            "1 of 7 items have other tokens; first item 3 'Sort THE list': token 1 is {unknown}, expected {sort}",
        ),
        (
            '"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"[CLS]","type_id":0}},',
            '"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"[CLS]","type_id":1}},',
            "7 of 7 items have other tokens; first item 0 'how do i reset the device?' with prompt 'query': "
            "segment 0 is 1, expected 0",
        ),
        (
            ',{"SpecialToken":{"id":"[SEP]","type_id":0}}],"pair"',
            '],"pair"',
            "7 of 7 items have other tokens; first item 0 'how do i reset the device?' with prompt 'query': "
            "token 12 is none, expected 3",
        ),
    ],
)
def test_a_tokenizer_that_gives_other_tokens_is_named_with_the_first_item(
    copy: Path, find: str, replace: str, problem: str
):
    text = (copy / "tokenizer.json").read_text()
    assert find in text
    rewrite(copy, "tokenizer.json", text.replace(find, replace).encode())
    vocabulary = json.loads(text)["model"]["vocab"]
    assert failures(copy) == {
        "tokenizer": (problem.format(unknown=vocabulary["[UNK]"], sort=vocabulary["sort"]),),
    }


def test_a_tokenizer_that_cannot_be_read_is_a_finding(copy: Path):
    rewrite(copy, "tokenizer.json", b"{}")
    found = failures(copy)
    assert list(found) == ["tokenizer", "fp32 outputs", "int8 outputs"]
    assert found["tokenizer"][0].startswith("tokenizer.json: cannot be read by tokenizers: ")


def test_outputs_beyond_the_tolerance_name_the_worst_item(copy: Path):
    def shift(golden: Golden) -> Golden:
        outputs = golden.outputs.copy()
        outputs[2] = outputs[2, ::-1]
        return dataclasses.replace(golden, outputs=outputs)

    rewrite_golden(copy, shift)
    found = failures(copy)
    assert list(found) == ["fp32 outputs", "int8 outputs"]
    for problems in found.values():
        (problem,) = problems
        assert problem.startswith("least cosine ")
        assert problem.endswith("; worst is item 2 'parse a file' with prompt 'document'")
    assert "(at least 0.999999), largest difference" in found["fp32 outputs"][0]
    assert "(at most 1.00e-05)" in found["fp32 outputs"][0]


def test_a_reranker_names_its_worst_pair(toy_reranker_bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(toy_reranker_bundle, tmp_path / "copy.rtx"))
    add = np.array([0, 1, 0, 0], dtype=np.float32)
    rewrite_golden(copy, lambda golden: dataclasses.replace(golden, outputs=golden.outputs + add))
    problem = failures(copy)["fp32 outputs"][0]
    assert problem.startswith("least agreement ")
    assert problem.endswith("largest difference 1.00e+00 (at most 1.00e-05); worst is item 1 ('sort', 'sort the list')")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda golden: dataclasses.replace(golden, outputs=golden.outputs[:, :8]),
            "expected outputs [7, 32], got [7, 8] for 7 items, 7 prompts, 7 rows of tokens",
        ),
        (
            lambda golden: dataclasses.replace(golden, prompts=("title", *golden.prompts[1:])),
            "prompt 'title' does not exist (known: document, query)",
        ),
        (
            lambda golden: dataclasses.replace(golden, outputs=golden.outputs * np.float32("nan")),
            "holds outputs that are not finite",
        ),
        (
            lambda golden: dataclasses.replace(golden, items=(), prompts=(), tokens=(), outputs=golden.outputs[:0]),
            "is empty",
        ),
    ],
)
def test_a_golden_set_of_another_contract_is_a_finding(copy: Path, change: Callable[[Golden], Golden], problem: str):
    rewrite_golden(copy, change)
    found = failures(copy)
    assert found["golden set"] == (problem,)
    assert found["tokenizer"] == ("not checked: there is no golden set",)
    assert found["int8 outputs"] == ("not checked: there is no golden set",)


def test_a_golden_row_beyond_the_limit_is_a_finding(copy: Path):
    contract = dataclasses.replace(Bundle.open(copy).manifest.contract, max_tokens=32)
    rewrite(copy, "report.json", b"{}", contract=contract)
    found = failures(copy)
    assert found["golden set"] == ("holds a row of 64 tokens; the contract's limit is 32",)
    assert found["fp32 graph"] == ("the graph was written for another contract: max_tokens differ",)


def test_a_graph_with_other_inputs_does_not_fit(
    tmp_path: Path, write_bundle: Callable[[Path, Contract], Path], embed_contract: Contract
):
    path = write_bundle(tmp_path / "toy.rtx", embed_contract)
    inputs = ("input_ids", "attention_mask", "pooling_mask")
    contract = dataclasses.replace(embed_contract, inputs=inputs, include_prompt=False)
    rewrite(path, "report.json", b"{}", contract=contract)
    assert failures(path, variant="fp32")["fp32 graph"] == (
        "the graph has no input pooling_mask; the contract names it",
        "the graph has the input token_type_ids; the contract does not name it",
        "the graph was written for another contract: include_prompt, inputs differ",
    )


def test_a_graph_without_the_output_is_a_finding(copy: Path):
    model = onnx.load(copy / "onnx" / "model.onnx")
    model.graph.node[-1].output[0] = model.graph.output[0].name = "last_hidden_state"
    rewrite(copy, "onnx/model.onnx", model.SerializeToString())
    assert failures(copy) == {
        "fp32 graph": ("copy.rtx:fp32: the graph has no output 'sentence_embedding' (it has last_hidden_state)",),
        "fp32 outputs": ("not checked: there is no graph",),
    }


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_check(toy_bundle: Path):
    result = run(toy_bundle, "--threads", 1)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line[:6] for line in lines[:-1]] == ["ok    "] * len(CHECKS)
    assert [line[8:20].rstrip() for line in lines[:-1]] == CHECKS
    assert lines[4] == "ok      tokenizer     gives the golden tokens"
    assert lines[-1] == f"{toy_bundle}: all checks hold"


def test_the_command_prints_every_failure_and_exits_with_5(copy: Path):
    (copy / "report.json").write_bytes(b"{}")
    (copy / "stranger").write_bytes(b"")
    result = run(copy)
    assert result.exit_code == 5
    files = Bundle.open(copy).manifest.files
    size = sum(entry.bytes for entry in files.values())
    assert result.stdout.splitlines()[1:5] == [
        f"FAILED  files         5 files, {size:,} bytes",
        f"        - report.json has 2 bytes instead of {files['report.json'].bytes}",
        "FAILED  other files",
        "        - stranger is not listed in manifest.json",
    ]
    assert result.stdout.splitlines()[-1] == f"{copy}: 2 of 9 checks failed"


def test_the_command_speaks_json(copy: Path):
    (copy / "stranger").write_bytes(b"")
    result = run(copy, "--json", "--variant", "fp32")
    assert result.exit_code == 5
    found = json.loads(result.stdout)
    assert (found["bundle"], found["ok"]) == (str(copy), False)
    assert [check["check"] for check in found["checks"]] == CHECKS[:7]
    assert found["checks"][2] == {
        "check": "other files",
        "ok": False,
        "skipped": False,
        "measured": "",
        "problems": ["stranger is not listed in manifest.json"],
    }
    assert all(check["ok"] for index, check in enumerate(found["checks"]) if index != 2)


def test_what_is_no_bundle_exits_with_5(tmp_path: Path):
    result = run(tmp_path / "nothing")
    assert result.exit_code == 5
    assert result.stdout.splitlines() == [
        "FAILED  manifest",
        f"        - {tmp_path / 'nothing'}: does not exist; expected a bundle folder",
        f"{tmp_path / 'nothing'}: 1 of 1 checks failed",
    ]


def test_an_unknown_variant_exits_with_2(toy_bundle: Path):
    result = run(toy_bundle, "--variant", "int4")
    assert result.exit_code == 2
    expected = f"error: {toy_bundle}: has no variant 'int4' (did you mean 'int8'? known: fp32, int8)\n"
    assert (result.stderr, result.stdout) == (expected, "")
