"""The wheel, in an environment that has the base install and the extra `cpu` alone: a bundle opens and embeds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rtx.kernels.library import library_file

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "runtime", "trainer", "export")
TEXTS = ["how to reset the pump", "a", "Größe 東京", "for file in code: text " * 30]

pytestmark = pytest.mark.slow


def run(*command, cwd, expected=0, **variables):
    # Nothing of the checkout or of the environment that runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == expected, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def wheel(once):
    """Built once for all workers, as compiling takes its time."""
    (built,) = (once("wheel", build) / "dist").glob("*.whl")
    return built


def build(source):
    """From a copy: setuptools leaves its work beside the sources, and takes up what an earlier build left."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "_cpu.*"))
    # Here the operators need not be fast, and the compiler takes its time to make them so: its last -O counts.
    compiler = source / "compiler"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist"]
    run(*command, cwd=source, CC=str(compiler), CXX=str(compiler))


@pytest.fixture(scope="session")
def installed(once, wheel):
    """Folder of the environment's programs."""

    def install(folder):
        venv.create(folder, with_pip=False)
        # Most of the packages' modules are never imported, so that compiling all of them takes longer than all tests.
        pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q", "--no-compile"]
        run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=folder)

    return once("installed", install) / "bin"


@pytest.fixture(scope="session")
def bundle(once, tiny_checkpoint):
    def export(folder):
        from rtx.export.pipeline import ExportOptions, export_bundle

        checkpoint = tiny_checkpoint("distilbert", prompts={"query": "find: "})
        export_bundle(str(checkpoint), folder / "tiny.rtx", ExportOptions(variants=("fp32", "int8"), threads=1))

    return once("wheel-bundle", export) / "tiny.rtx"


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {name for name in names if name.startswith("rtx/")}
    sources = {
        f"rtx/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.parent.name != "cpu"
    }
    operators = {name for name in held if name.startswith("rtx/kernels/_cpu.")}
    assert held - operators == {name for name in sources if not name.startswith("rtx/kernels/_cpu.")}
    # Where the checkout has them, there is a compiler here.
    assert len(operators) == (library_file() is not None)
    assert {f"rtx/{room}/py.typed" for room in ROOMS} <= held
    # Whole folders of the repository: rtx/trainer/examples.py is a module of the package.
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/")) or "conftest" in name for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_python_embeds_without_torch(installed, bundle, tmp_path):
    from rtx.runtime import Embedder

    code = (
        "import importlib.util, json, sys; import numpy as np; import rtx.runtime; from rtx.runtime import Embedder\n"
        "bundle, texts = sys.argv[1], json.loads(sys.argv[2])\n"
        "with Embedder.open(bundle, variant='fp32', threads=1) as model:\n"
        "    np.save('vectors.npy', model.embed(texts, prompt='query'))\n"
        "names = ('torch', 'transformers', 'onnx', 'pytest')\n"
        "print(json.dumps([rtx.runtime.__file__, [name for name in names if importlib.util.find_spec(name)]]))\n"
    )
    done = run(installed / "python", "-c", code, bundle, json.dumps(TEXTS), cwd=tmp_path)
    where, found = json.loads(done.stdout)
    assert Path(where).is_relative_to(installed.parent)
    assert found == []
    with Embedder.open(bundle, variant="fp32", threads=1) as model:
        expected = model.embed(TEXTS, prompt="query")
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-6)


def test_the_commands_of_the_runtime_work(installed, bundle, tmp_path):
    rtx = installed / "rtx"
    assert "embed" in run(rtx, "--help", cwd=tmp_path).stdout
    assert "all checks hold" in run(rtx, "verify", bundle, cwd=tmp_path).stdout
    (tmp_path / "texts.txt").write_text("one text\nand another\n", encoding="utf-8")
    run(rtx, "embed", bundle, "texts.txt", "-o", "vectors.npy", cwd=tmp_path)
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("finetune", "--task", "embed", "--model", "model", "--train", "pairs.jsonl", "-o", "tuned"), "train"),
        (("export", "model", "-o", "model.rtx"), "export"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_of_another_extra_says_what_installs_it(installed, tmp_path, command, extra):
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    (tmp_path / "model").mkdir()
    done = run(installed / "rtx", *command, cwd=tmp_path, expected=8)
    assert re.fullmatch(
        r"error: .*needs the package '(torch|accelerate|onnx_ir)', which is not installed\. "
        rf"Install it with: pip install 'rtx-retrieval\[{extra}\]'\n",
        done.stderr,
    ), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pairs.jsonl"]
