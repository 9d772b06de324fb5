from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtx.runtime.errors import BundleError
from rtx.runtime.manifest import FORMAT_VERSION, FileEntry, Manifest


@pytest.fixture(scope="module")
def content(toy_bundle: Path) -> bytes:
    return (toy_bundle / "manifest.json").read_bytes()


def signed(data: dict[str, Any]) -> bytes:
    """The content of a manifest that was written with this data, right or wrong, by rtx itself."""
    body = {key: value for key, value in data.items() if key != "sha256"}

    def dump(tree: object) -> bytes:
        return (json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    return dump({**body, "sha256": hashlib.sha256(dump(body)).hexdigest()})


def test_round_trip_is_exact(content: bytes):
    manifest = Manifest.from_bytes(content)
    assert manifest.to_bytes() == content
    assert manifest.default_variant == "fp32"
    assert manifest.variants["int8"].tolerance.max_abs == 0.05
    assert manifest.contract.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert json.loads(content)["format_version"] == FORMAT_VERSION == 1


def test_texts_beyond_ascii_survive(content: bytes):
    manifest = Manifest.from_bytes(content)
    contract = dataclasses.replace(manifest.contract, prompts={"query": "Größe 東京\n\0\x7f\U0001f600: "})
    changed = dataclasses.replace(manifest, contract=contract)
    assert Manifest.from_bytes(changed.to_bytes()) == changed


def test_a_flipped_bit_at_any_position_is_found(content: bytes):
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        with pytest.raises(BundleError, match=r"^manifest\.json: "):
            Manifest.from_bytes(bytes(damaged))


@given(st.data())
def test_a_byte_changed_lost_or_added_is_found(content: bytes, data: st.DataObject):
    position = data.draw(st.integers(0, len(content) - 1))
    replacement = data.draw(st.binary(max_size=2).filter(lambda new: new != content[position : position + 1]))
    damaged = content[:position] + replacement + content[position + 1 :]
    with pytest.raises(BundleError, match=r"^manifest\.json: "):
        Manifest.from_bytes(damaged)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace("  ", " "),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n",
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace('"bytes":', '"bytes": 1, "bytes":', 1),
        lambda text: "\ufeff" + text,
    ],
    ids=["indent", "line ends", "trailing line", "one line", "doubled key", "byte order mark"],
)
def test_another_form_of_the_same_data_is_not_what_was_written(content: bytes, rewrite: Any):
    with pytest.raises(BundleError, match=r"^manifest\.json: "):
        Manifest.from_bytes(rewrite(content.decode()).encode())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b'["\xff"]', "UnicodeDecodeError"),
        (b"[]", "TypeError"),
        (b"7", "AttributeError"),
        (b"{}", "KeyError: 'sha256'"),
        (b'{"sha256": ""}', "KeyError: 'format_version'"),
        (b'{"sha256": "", "format_version": 1, "x": "\\ud800"}', "UnicodeEncodeError"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_something_else_is_no_manifest(content: bytes, reason: str):
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(content)
    assert str(caught.value).startswith(f"manifest.json: is no manifest of rtx ({reason}")


def test_another_format_version_says_what_to_do(content: bytes):
    data = json.loads(content) | {"format_version": 2, "a_key_of_the_future": True}
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(signed(data))
    assert str(caught.value) == (
        "manifest.json: has format version 2; this rtx reads version 1. "
        "Export the checkpoint again, or install the rtx that wrote it"
    )


def test_a_foreign_manifest_lists_all_that_is_wrong_with_it(content: bytes):
    data = json.loads(content)
    data["variants"]["int8"]["precision"] = "int2"
    del data["provenance"]["source"]
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(signed(data))
    assert str(caught.value) == (
        "manifest.json: variants.int8.precision: expected one of 'fp32', 'fp16', 'bf16', 'int8', 'int4', got 'int2'; "
        "missing key 'provenance.source'"
    )


def test_the_default_variant_must_be_there(content: bytes):
    data = json.loads(content) | {"default_variant": "fp16"}
    with pytest.raises(BundleError, match=r"^manifest\.json: default_variant: 'fp16' is not one of fp32, int8$"):
        Manifest.from_bytes(signed(data))


def test_every_file_must_be_listed(content: bytes):
    data = json.loads(content)
    data["variants"]["int8"]["external"] = ["onnx/weights.bin"]
    del data["files"]["tokenizer.json"], data["files"]["onnx/model.onnx"]
    with pytest.raises(BundleError) as caught:
        Manifest.from_bytes(signed(data))
    assert str(caught.value) == "manifest.json: files: onnx/model.onnx, onnx/weights.bin, tokenizer.json missing"


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/model.onnx", "onnx/../../x", "..\\x", "."])
def test_files_outside_of_the_bundle_are_refused(content: bytes, file: str):
    manifest = Manifest.from_bytes(content)
    files = {**manifest.files, file: FileEntry(sha256="0" * 64, bytes=1)}
    with pytest.raises(ValueError, match="expected plain paths inside the bundle"):
        dataclasses.replace(manifest, files=files)
