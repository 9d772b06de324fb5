from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rtx.runtime import cli
from rtx.runtime.cli import main, open_model
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import RtxError, UsageError
from rtx.runtime.reranker import Reranker

# Makes packages as absent as if they were not installed.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Blocker())
from rtx.runtime.cli import main, open_model
"""


def run_without_torch(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A command that imports or raises what it is told to, in a module of its own."""
    (tmp_path / "toy_command.py").write_text(
        "import importlib\n"
        "import click\n"
        "from rtx.runtime import errors\n"
        "@click.command()\n"
        "@click.option('--import', 'module')\n"
        "@click.option('--raise', 'error')\n"
        "def toy(module, error):\n"
        "    if module:\n"
        "        importlib.import_module(module)\n"
        "    raise getattr(errors, error)('the reason')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli._COMMANDS, "toy", cli._Command("toy_command:toy", "A toy."))
    return "toy"


def test_help_lists_every_command_and_imports_none():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, entry in cli._COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert entry.help in " ".join(result.stdout.split())


def test_every_command_can_be_loaded():
    for name in cli._COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, f"{name}: {result.output}"
        assert f"Usage: main {name}" in result.stdout


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "rtx, version 0.1.0\n")


def test_an_unknown_command_names_the_nearest():
    result = CliRunner().invoke(main, ["verfy", "x"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: command 'verfy' does not exist (did you mean 'verify'? known: bench, build, compose, data, doctor, "
        "embed, eval, export, finetune, info, mine, rerank, verify)\n"
    )


def test_a_missing_extra_says_what_installs_it():
    done = run_without_torch("main()", "export", "checkpoint", "-o", "out.rtx")
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr == (
        "error: rtx export needs the package 'torch', which is not installed. "
        "Install it with: pip install 'rtx-retrieval[export]'\n"
    )


@pytest.mark.parametrize("extra", ["train", ""])
def test_a_package_that_is_missed_later_is_named_as_well(monkeypatch: pytest.MonkeyPatch, command: str, extra: str):
    monkeypatch.setitem(cli._COMMANDS, command, cli._COMMANDS[command]._replace(extra=extra))
    result = CliRunner().invoke(main, [command, "--import", "no_such_package.part"])
    if extra:
        assert (result.exit_code, result.stderr) == (
            8,
            "error: rtx toy needs the package 'no_such_package', which is not installed. "
            "Install it with: pip install 'rtx-retrieval[train]'\n",
        )
    else:
        assert isinstance(result.exception, ModuleNotFoundError)


def test_a_module_of_ours_that_is_missing_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli._COMMANDS, "toy", cli._Command("rtx.runtime.nowhere:toy", "A toy.", "train"))
    result = CliRunner().invoke(main, ["toy"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_ctrl_c_in_any_command_has_the_exit_code_of_a_shell(monkeypatch):
    from rtx.runtime.bundle import Bundle

    def interrupted(*_: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "open", interrupted)
    result = CliRunner().invoke(main, ["verify", "x.rtx"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "name", ["RtxError", "UsageError", "GateError", "DataError", "BundleError", "EngineError", "TrainingError"]
)
def test_an_error_is_one_line_and_an_exit_code(command: str, name: str):
    from rtx.runtime import errors

    result = CliRunner().invoke(main, [command, "--raise", name])
    error: type[RtxError] = getattr(errors, name)
    assert (result.exit_code, result.stderr, result.stdout) == (error.exit_code, "error: the reason\n", "")


def test_a_bug_is_not_hidden(command: str):
    result = CliRunner().invoke(main, [command, "--raise", "NoSuchError"])
    assert isinstance(result.exception, AttributeError)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["doctor", "--json"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]):
    """As in `rtx info | head -0`: no complaint, neither from rtx nor from Python when it ends."""
    read, write = os.pipe()
    os.close(read)
    code = "from rtx.runtime.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_open_model_takes_bundles(toy_bundle: Path, toy_reranker_bundle: Path):
    with open_model(toy_bundle, variant="int8", threads=1) as model:
        assert isinstance(model, Embedder)
        assert model.engine.name == "toy.rtx:int8"
    with open_model(str(toy_reranker_bundle), threads=1) as model:
        assert isinstance(model, Reranker)


def test_what_is_no_bundle_has_no_variants(tmp_path: Path):
    for path in (tmp_path, tmp_path / "misspelt.rtx"):
        with pytest.raises(UsageError) as caught:
            open_model(path, variant="int8")
        assert str(caught.value) == f"{path}: has no manifest.json; variants ('int8') exist in bundles only"


def test_a_checkpoint_needs_the_trainer(tmp_path: Path):
    done = run_without_torch("open_model(sys.argv[1])", str(tmp_path))
    assert done.stderr.splitlines()[-1] == (
        f"rtx.runtime.errors.MissingExtraError: opening the checkpoint {tmp_path} needs the package 'torch', "
        "which is not installed. Install it with: pip install 'rtx-retrieval[train]'"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line():
    code = "from rtx.runtime.cli import main; main()"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code, "doctor"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b"error: standard output or a file: cannot be read or written: No space left on device\n"
    assert done.returncode == 5


def test_warnings_of_pillow_are_not_shown_to_who_runs_a_command():
    warn = "warnings.warn_explicit('Corrupt EXIF data', UserWarning, 'TiffImagePlugin.py', 1, module='PIL.Tiff')"
    code = f"import warnings; from rtx.runtime.cli import main; main.callback(); {warn}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
