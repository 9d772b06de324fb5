"""`rtx build`: engines for a bundle that is there, by TensorRT-RTX itself."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rtx.export import build, tensorrt
from rtx.export.build import build_for
from rtx.export.engines import EngineOptions
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.runtime import atomic
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.errors import BundleError, ExportError, RtxError, UsageError
from rtx.runtime.manifest import MANIFEST_FILE, FileEntry

builds = pytest.mark.usefixtures("tensorrt_rtx")

FP32, FP16 = "engines/model.tensorrt-rtx.engine", "engines/model_fp16.tensorrt-rtx.engine"


@pytest.fixture
def bundle(once: Callable[..., Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Without engines, and the test's own to change."""

    def export(folder: Path) -> None:
        options = ExportOptions(variants=("fp32", "fp16"), min_cosine=0.9, threads=1)
        export_bundle(str(tiny_checkpoint("bert")), folder / "tiny.rtx", options)

    shutil.copytree(once("bundle-to-build", export) / "tiny.rtx", tmp_path / "tiny.rtx")
    return tmp_path / "tiny.rtx"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["build", *map(str, arguments), "--target", "tensorrt-rtx"])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@builds
def test_engines_come_into_a_bundle_and_nothing_else_changes(bundle: Path) -> None:
    (bundle / "notes").mkdir()
    (bundle / "notes" / "mine.txt").write_text("what no manifest lists")
    (bundle / "current").symlink_to("notes/mine.txt")
    (bundle / "nowhere").symlink_to("notes/none.txt")
    outside = bundle.parent / "outside"
    outside.touch(mode=0o600)
    (bundle / "outside").symlink_to("../outside")
    (bundle / "tokenizer.json").chmod(0o440)
    before, was = content(bundle), Bundle.open(bundle).manifest
    result = run(bundle, "--sm", "89", "--lengths", "16")
    assert result.exit_code == 0, result.output
    assert f"{FP16}: tensorrt-rtx" in result.stdout
    assert "sm 89, up to 16 64 tokens" in result.stdout
    after, found = content(bundle), Bundle.open(bundle)
    assert {*after} - {*before} == {FP32, FP16}
    assert [file for file in before if before[file] != after[file]] == [MANIFEST_FILE]
    assert found.damaged() == {}
    assert (bundle / "current").is_symlink()
    assert (bundle / "nowhere").is_symlink()
    assert outside.stat().st_mode & 0o777 == 0o600
    assert (bundle / "tokenizer.json").stat().st_mode & 0o777 == 0o440
    assert {path.name for path in bundle.parent.iterdir()} == {"tiny.rtx", "outside"}
    assert {*found.manifest.engines} == {FP32, FP16}
    engine = found.manifest.engines[FP16]
    assert engine.sources == {"onnx/model_fp16.onnx": was.files["onnx/model_fp16.onnx"].sha256}
    assert engine.capabilities == (89,)
    files = {file: entry for file, entry in found.manifest.files.items() if file not in (FP32, FP16)}
    assert dataclasses.replace(found.manifest, engines={}, files=files) == was


@builds
def test_another_version_takes_the_place_of_one_and_keeps_its_buckets(bundle: Path) -> None:
    assert run(bundle, "--sm", "89", "--lengths", "16,32").exit_code == 0
    first = Bundle.open(bundle).manifest
    # As an earlier TensorRT would have left them, one of which is open in a service meanwhile.
    engines = {file: dataclasses.replace(entry, version="1.6.0") for file, entry in first.engines.items()}
    (bundle / MANIFEST_FILE).write_bytes(dataclasses.replace(first, engines=engines).to_bytes())
    other = (bundle / FP32).read_bytes()
    with (bundle / FP16).open("rb") as opened:
        again = run(bundle, "--sm", "80", "--variant", "fp16")
        assert f"{FP16} was also for sm 89, which --sm does not name" in again.stderr
        assert hashlib.sha256(opened.read()).hexdigest() == first.files[FP16].sha256
    found = Bundle.open(bundle)
    assert found.damaged() == {}
    assert (bundle / FP32).read_bytes() == other
    assert found.manifest.engines[FP32].version == "1.6.0"
    (file,) = {*found.manifest.engines} - {FP32}
    assert {path.name for path in (bundle / "engines").iterdir()} == {Path(FP32).name, Path(file).name}
    assert file in again.stdout
    new = found.manifest.engines[file]
    assert (new.version, new.capabilities) == (first.engines[FP16].version, (80,))
    assert [profile["tokens"][2] for profile in new.profiles] == [16, 32, 64]


@builds
def test_each_graph_keeps_its_own_buckets(bundle: Path) -> None:
    for variant, lengths in (("fp32", "16"), ("fp16", "32")):
        assert run(bundle, "--sm", "89", "--variant", variant, "--lengths", lengths).exit_code == 0
    assert run(bundle, "--sm", "89").exit_code == 0
    engines = Bundle.open(bundle).manifest.engines
    ends = {entry.graph: [profile["tokens"][2] for profile in entry.profiles] for entry in engines.values()}
    assert ends == {"onnx/model.onnx": [16, 64], "onnx/model_fp16.onnx": [32, 64]}


@builds
def test_a_link_to_a_bundle_stays_one(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "served.rtx").symlink_to("tiny.rtx")
    assert run(tmp_path / "served.rtx", "--sm", "89", "--variant", "fp32").exit_code == 0
    assert (tmp_path / "served.rtx").is_symlink()
    assert {*Bundle.open(bundle).manifest.engines} == {FP32}


def test_models_for_triton_of_a_bundle_that_is_there(bundle: Path, tmp_path: Path) -> None:
    command = ["build", str(bundle), "--triton-repo", str(tmp_path / "models")]
    before = content(bundle)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'models'}: the models tiny, tiny_graph" in result.stdout
    assert (tmp_path / "models" / "tiny_graph" / "1" / "model.onnx").read_bytes() == before["onnx/model_fp16.onnx"]
    again = CliRunner().invoke(main, [*command, "--target", "tensorrt-rtx", "--sm", "89"])
    assert "there is a model already; --overwrite replaces it" in again.output
    assert content(bundle) == before  # before anything was built
    assert CliRunner().invoke(main, [*command, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(main, [*command, "--overwrite", "--variant", "fp32"]).exit_code == 0
    assert (tmp_path / "models" / "tiny_graph" / "1" / "model.onnx").read_bytes() == before["onnx/model.onnx"]
    (tmp_path / "link").symlink_to("nowhere")
    for place, why in (
        (bundle, "is a bundle"),
        (bundle / "models", f"is in the bundle {bundle}"),
        (tmp_path / "link", "is a link to nothing"),
    ):
        into = CliRunner().invoke(main, ["build", str(bundle), "--triton-repo", str(place)])
        assert f"{place}: {why}; expected the folder of a model repository" in into.output
    assert content(bundle) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --target, --triton-repo, or both"),
        (("--triton-repo", "models", "--sm", "89"), "--sm and --lengths: are of engines, which --target asks for"),
        (("--target", "tensorrt-rtx", "--overwrite"), "--overwrite: is of models in --triton-repo"),
        (
            ("--triton-repo", "models", "--variant", "fp32", "--variant", "fp16"),
            "--variant: Triton serves one, got fp32, fp16",
        ),
    ],
)
def test_what_is_asked_for_makes_sense(bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["build", str(bundle), *arguments])
    assert result.exit_code == UsageError.exit_code
    assert message in result.output


@builds
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--sm", "89", "--variant", "fp8"), UsageError, "has no variant 'fp8'"),
        ((), UsageError, "--sm: expected some of 75, 80, 86, 89, 120, 121, got none"),
        (("--sm", "90"), UsageError, "--sm: expected some of 75, 80, 86, 89, 120, 121, got 90"),
        (
            ("--sm", "89", "--lengths", "999"),
            UsageError,
            "lengths: expected rising numbers from 2",
        ),
    ],
)
def test_what_cannot_be_built(bundle: Path, arguments: tuple[str, ...], error: type[RtxError], message: str) -> None:
    before = content(bundle)
    result = run(bundle, *arguments)
    assert result.exit_code == error.exit_code
    assert message in result.output
    assert content(bundle) == before


@builds
def test_a_bundle_without_anything_to_build_of(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    variants = {"int8": manifest.variants["fp32"]}
    (bundle / MANIFEST_FILE).write_bytes(
        dataclasses.replace(manifest, variants=variants, default_variant="int8").to_bytes()
    )
    result = run(bundle, "--sm", "89")
    assert "engines are built of fp32, fp16, bf16, int8-static, int4-half; this bundle has int8" in result.output
    assert result.exit_code == UsageError.exit_code


@builds
def test_a_damaged_bundle_gets_no_engine_but_for_a_damaged_one(bundle: Path) -> None:
    assert run(bundle, "--sm", "89", "--variant", "fp32").exit_code == 0
    (bundle / FP32).write_bytes(b"")
    assert run(bundle, "--sm", "89", "--variant", "fp32").exit_code == 0
    assert Bundle.open(bundle).damaged() == {}
    with (bundle / "onnx" / "model_fp16.onnx").open("ab") as graph:
        graph.write(b"x")
    (bundle / "tokenizer.json").unlink()
    told = r"model_fp16\.onnx has \d+ bytes instead of \d+; tokenizer\.json cannot be read"
    with pytest.raises(BundleError, match=told):
        build_for(bundle, EngineOptions(target="tensorrt-rtx", capabilities=(89,)), ["fp32"], notify=print)
    assert [one.graph for one in Bundle.open(bundle).manifest.engines.values()] == ["onnx/model.onnx"]


@builds
def test_what_tensorrt_cannot_read(bundle: Path) -> None:
    named = bundle.with_name(os.fsdecode(b"bad\xff.rtx"))
    shutil.copytree(bundle, named)
    options = EngineOptions(target="tensorrt-rtx", capabilities=(89,))
    with pytest.raises(ExportError, match=r"bad\\udcff\.rtx/onnx/model\.onnx': expected a path in UTF-8"):
        build_for(named, options, ["fp32"], notify=print)
    manifest = Bundle.open(bundle).manifest
    (bundle / "onnx" / "model.onnx").write_bytes(b"no graph")
    listed = FileEntry(sha256=hashlib.sha256(b"no graph").hexdigest(), bytes=8)
    changed = dataclasses.replace(manifest, files={**manifest.files, "onnx/model.onnx": listed})
    (bundle / MANIFEST_FILE).write_bytes(changed.to_bytes())
    with pytest.raises(ExportError, match=r"model\.onnx: is no graph in ONNX"):
        build_for(bundle, options, ["fp32"], notify=print)
    assert Bundle.open(bundle).unlisted() == []


@builds
def test_an_engine_that_cannot_be_built_leaves_the_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *_: Any, **__: Any) -> Any:
        (folder / "engines").mkdir()
        raise ExportError("tensorrt-rtx: could not build main_graph")

    before = content(bundle)
    monkeypatch.setattr(build, "build_engines", fail)
    with pytest.raises(ExportError):
        build_for(bundle, EngineOptions(target="tensorrt-rtx", capabilities=(89,)), notify=print)
    assert content(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny.rtx"]


@builds
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_a_build(
    bundle: Path, number: signal.Signals, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT would swallow what its callbacks raise."""
    real, steps = tensorrt._monitor, []

    def monitor(trt: Any, came: Any) -> Any:
        found = real(trt, came)

        class Sending(type(found)):  # type: ignore[misc]
            def step_complete(self, *arguments: Any) -> bool:
                if not steps:
                    signal.raise_signal(number)
                steps.append(arguments)
                goes_on: bool = found.step_complete(*arguments)
                return goes_on

        return Sending()

    before = content(bundle)
    monkeypatch.setattr(tensorrt, "_monitor", monitor)
    # Not as this process found it: what a script starts in the background ignores Ctrl-C.
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(number, handler)
    try:
        with pytest.raises(error):
            build_for(bundle, EngineOptions(target="tensorrt-rtx", capabilities=(89,)), notify=print)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, found)
    assert len(steps) <= 2  # it ends where it was
    assert content(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny.rtx"]


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As Ctrl-C is for what a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with tensorrt._signals_wait() as came:
            signal.raise_signal(signal.SIGINT)
        assert came == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@builds
def test_what_changed_meanwhile_is_not_lost(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.build_engines

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        other = dataclasses.replace(Bundle.open(bundle).manifest, name="another export")
        (bundle / MANIFEST_FILE).write_bytes(other.to_bytes())
        return real(*arguments, **options)

    monkeypatch.setattr(build, "build_engines", meanwhile)
    result = run(bundle, "--sm", "89", "--variant", "fp16")
    assert f"{bundle}: was changed while engines were built for it; they are not put into it" in result.output
    found = Bundle.open(bundle)
    assert (found.manifest.name, found.manifest.engines, found.unlisted()) == ("another export", {}, [])


@builds
def test_from_within_the_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle / "onnx")
    assert run("..", "--sm", "89", "--variant", "fp16").exit_code == 0
    assert Path("model_fp16.onnx").exists()
    assert Bundle.open(bundle).damaged() == {}


@builds
def test_two_builds_at_once(bundle: Path) -> None:
    with build._alone(bundle):
        result = run(bundle, "--sm", "89", "--variant", "fp32")
    assert f"{bundle}: another process is building engines for it; wait until it has ended" in result.output
    assert result.exit_code == UsageError.exit_code
    assert run(bundle, "--sm", "89", "--variant", "fp32").exit_code == 0


@builds
@pytest.mark.parametrize("file", [MANIFEST_FILE, FP32])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_ends_a_build_finds_the_old_bundle_or_the_new_one(
    bundle: Path, file: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before and right after each file takes its place."""
    assert run(bundle, "--sm", "80", "--variant", "fp32").exit_code == 0
    before, real = content(bundle), os.replace

    def ending(source: Any, target: Any) -> None:
        ends = Path(target).parent.name == Path(file).parent.name if file == FP32 else Path(target).name == file
        if ends and moment == "before":
            raise KeyboardInterrupt
        real(source, target)
        if ends:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", ending)
        with pytest.raises(KeyboardInterrupt):
            build_for(bundle, EngineOptions(target="tensorrt-rtx", capabilities=(89,)), ["fp32"], notify=print)
    found = Bundle.open(bundle)
    assert found.damaged() == {}
    assert found.unlisted() == []
    if (file, moment) == (MANIFEST_FILE, "after"):
        assert [one.capabilities for one in found.manifest.engines.values()] == [(89,)]
    else:
        assert content(bundle) == before


@builds
def test_what_is_in_the_way_of_an_engine_stays(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle / "engines").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / Path(FP32).name).write_text("the user's own")
    assert run(bundle, "--sm", "89", "--variant", "fp32").exit_code == 0
    (file,) = Bundle.open(bundle).manifest.engines
    assert re.fullmatch(r"engines/model\.tensorrt-rtx-[0-9a-f]{12}\.engine", file)
    assert (bundle / FP32).read_text() == "the user's own"
    assert Bundle.open(bundle).damaged() == {}
    (bundle / "engines").unlink()
    (bundle / "engines").touch()
    result = run(bundle, "--sm", "89", "--variant", "fp16")
    assert f"{bundle}: {file} cannot be read: Not a directory" in result.output


@builds
def test_without_torch(bundle: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, onnxruntime=None); "
        "from rtx.runtime.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "build", str(bundle), "--target", "tensorrt-rtx", "--sm", "89"]
    done = subprocess.run([*command, "--variant", "fp32"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {*Bundle.open(bundle).manifest.engines} == {FP32}
