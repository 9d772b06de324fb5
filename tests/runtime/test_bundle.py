from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from rtx.runtime.bundle import Bundle
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import BundleError, EngineError, UsageError
from rtx.runtime.manifest import FileEntry

FILES = ["golden.npz", "manifest.json", "onnx/model.onnx", "onnx/model_int8.onnx", "report.json", "tokenizer.json"]


@pytest.fixture
def copy(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "copy.rtx"))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def replace_file(folder: Path, file: str, content: bytes) -> None:
    """Put another content into a bundle, with a manifest that knows it."""
    (folder / file).write_bytes(content)
    manifest = Bundle.open(folder).manifest
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    changed = dataclasses.replace(manifest, files={**manifest.files, file: entry})
    (folder / "manifest.json").write_bytes(changed.to_bytes())


def test_an_engine_knows_from_the_manifest_that_it_packs(copy: Path):
    manifest = Bundle.open(copy).manifest
    int8 = dataclasses.replace(manifest.variants["int8"], operators=True)
    changed = dataclasses.replace(manifest, variants={**manifest.variants, "int8": int8})
    (copy / "manifest.json").write_bytes(changed.to_bytes())
    for name in ("fp32", "int8"):
        with Embedder.open(copy, variant=name, threads=1) as model:
            assert model.engine.packed == (name == "int8")


def test_a_whole_bundle_has_no_damage(toy_bundle: Path, toy_reranker_bundle: Path):
    for path in (toy_bundle, toy_reranker_bundle):
        assert sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()) == FILES
        for opened in (Bundle.open(path), Bundle.open(str(path))):
            assert (opened.damaged(), opened.unlisted()) == ({}, [])


@pytest.mark.parametrize("file", [file for file in FILES if file != "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_bit_in_any_file_is_named(copy: Path, file: str, where: float):
    flip(copy / file, int(where * ((copy / file).stat().st_size - 1)))
    problem = f"{file} was changed after it was written (its hash does not fit)"
    assert Bundle.open(copy).damaged() == {file: problem}
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy).read(file)
    assert str(caught.value) == f"{copy}: {problem}"


def test_every_kind_of_damage_is_listed(copy: Path):
    (copy / "golden.npz").unlink()
    (copy / "report.json").write_bytes(b"{}")
    (copy / "onnx" / "model_fp16.onnx").write_bytes(b"")
    (copy / ".DS_Store").write_bytes(b"")
    (copy / "link").symlink_to("nowhere")
    size = Bundle.open(copy).manifest.files["report.json"].bytes
    assert Bundle.open(copy).damaged() == {
        "golden.npz": "golden.npz cannot be read: No such file or directory",
        "report.json": f"report.json has 2 bytes instead of {size}",
    }
    assert Bundle.open(copy).unlisted() == [".DS_Store", "link", "onnx/model_fp16.onnx"]


@pytest.mark.parametrize(
    ("file", "use"),
    [
        ("tokenizer.json", lambda bundle: bundle.preprocessor()),
        ("golden.npz", lambda bundle: bundle.golden()),
        ("onnx/model.onnx", lambda bundle: bundle.engine()),
        ("onnx/model_int8.onnx", lambda bundle: bundle.engine("int8")),
    ],
)
def test_a_damaged_file_is_named_when_it_is_used(copy: Path, file: str, use: object):
    flip(copy / file, 20)
    with pytest.raises(BundleError, match=re.escape(f"{copy}: {file} was changed after it was written")):
        use(Bundle.open(copy))  # type: ignore[operator]
    (copy / file).unlink()
    with pytest.raises(BundleError, match=re.escape(f"{copy}: {file} cannot be read: No such file or directory")):
        use(Bundle.open(copy))  # type: ignore[operator]


def test_without_verification_a_damaged_file_is_still_no_other_error(copy: Path):
    (copy / "tokenizer.json").write_bytes(b"\xff\xfe")
    (copy / "golden.npz").write_bytes(b"\xff\xfe")
    (copy / "onnx" / "model.onnx").write_bytes(b"\xff\xfe")
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"tokenizer\.json is no UTF-8"):
        bundle.preprocessor(verify=False)
    with pytest.raises(BundleError, match=r"^golden\.npz: cannot be read"):
        bundle.golden(verify=False)
    with pytest.raises(EngineError, match=r"^copy\.rtx:fp32: ONNX Runtime [\d.]+ cannot load the graph: "):
        bundle.engine(verify=False)


def test_what_is_no_bundle_says_why(tmp_path: Path, toy_bundle: Path):
    cases = {
        tmp_path / "nothing": "does not exist; expected a bundle folder",
        toy_bundle / "manifest.json": "is a file; expected a bundle folder",
        tmp_path: "has no manifest.json; expected a folder that `rtx export` wrote",
    }
    for path, message in cases.items():
        with pytest.raises(BundleError) as caught:
            Bundle.open(path)
        assert str(caught.value) == f"{path}: {message}"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="it looks like a checkpoint; `rtx export` makes a bundle of it"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read: Is a directory"):
        Bundle.open(tmp_path)


def test_variants_by_name(toy_bundle: Path):
    bundle = Bundle.open(toy_bundle)
    assert bundle.variant()[0] == "fp32"
    assert bundle.variant("int8") == ("int8", bundle.manifest.variants["int8"])
    with pytest.raises(UsageError) as caught:
        bundle.variant("int4")
    assert str(caught.value) == f"{toy_bundle}: has no variant 'int4' (did you mean 'int8'? known: fp32, int8)"
    with pytest.raises(UsageError) as rejected:
        bundle.variant("fp16")
    expected = f"{toy_bundle}: variant 'fp16' did not pass the gate: NDCG@10 fell by 0.0100, more than 0.0050"
    assert str(rejected.value) == expected


def test_weights_beside_the_graph_are_read_and_checked(toy_bundle: Path, copy: Path):
    """A graph over 2 GiB keeps its weights in further files."""
    model = onnx.load(copy / "onnx" / "model.onnx")
    onnx.save_model(
        model, copy / "onnx" / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1000
    )
    replace_file(copy, "onnx/weights.bin", (copy / "onnx" / "weights.bin").read_bytes())
    replace_file(copy, "onnx/model.onnx", (copy / "onnx" / "model.onnx").read_bytes())
    manifest = Bundle.open(copy).manifest
    variant = dataclasses.replace(manifest.variants["fp32"], external=("onnx/weights.bin",))
    manifest = dataclasses.replace(manifest, variants={**manifest.variants, "fp32": variant})
    (copy / "manifest.json").write_bytes(manifest.to_bytes())

    with Embedder.open(copy) as external, Embedder.open(toy_bundle) as inside:
        np.testing.assert_array_equal(external.embed(["sort the list"]), inside.embed(["sort the list"]))
    flip(copy / "onnx" / "weights.bin", 100)
    with pytest.raises(BundleError, match=re.escape(f"{copy}: onnx/weights.bin was changed after it was written")):
        Embedder.open(copy)
