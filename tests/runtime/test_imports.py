from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rtx.runtime

PACKAGE = Path(rtx.runtime.__file__).parent
# What is heavy, or comes with an extra only.
HEAVY = {"torch", "transformers", "tensorrt", "onnxruntime", "onnx", "pyarrow", "rich", "datasets", "pandas", "scipy"}
# Commands are loaded one at a time, and print with rich.
MODULES = sorted(
    ".".join(("rtx.runtime", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.parent.name != "commands"
)

PUBLIC = [
    "ArtifactError",
    "Budget",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Contract",
    "DataError",
    "Embedder",
    "Engine",
    "EngineError",
    "ExportError",
    "GateError",
    "ImageLimits",
    "InvalidItemsError",
    "ItemError",
    "MissingExtraError",
    "PdfPages",
    "Ranked",
    "Reranker",
    "RtxError",
    "TrainingError",
    "UsageError",
]


def imported_by(code: str) -> set[str]:
    """Names of all modules that a new Python has imported after running `code`."""
    code += "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(json.loads(done.stdout))


def test_the_runtime_itself_imports_nothing():
    modules = imported_by("import rtx.runtime")
    assert not modules & {*HEAVY, "numpy", "tokenizers", "click"}
    assert {name for name in modules if name.startswith("rtx.")} == {
        "rtx.runtime",
        "rtx.runtime.errors",
        "rtx.runtime.lazy",
    }


def test_all_modules_together_import_nothing_heavy():
    modules = imported_by("import importlib; [importlib.import_module(name) for name in %r]" % MODULES)  # noqa: UP031
    assert set(MODULES) <= modules
    assert not modules & HEAVY
    assert not {name for name in modules if name.startswith(("rtx.trainer", "rtx.export"))}


def test_the_public_names_import_no_engine():
    modules = imported_by("from rtx.runtime import *; Embedder, Reranker, Bundle")
    assert "tokenizers" in modules
    assert not modules & HEAVY


def test_the_command_line_imports_no_command():
    modules = imported_by("import rtx.runtime.cli")
    assert not modules & {*HEAVY, "numpy", "tokenizers"}


def test_no_module_names_torch_or_transformers():
    """Not even inside a function: the command line alone knows the other rooms."""
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "cli.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                outside = ("torch", "transformers", "rtx.trainer", "rtx.export")
                assert not name.startswith(outside), f"{path}: imports {name}"


def test_the_public_names_are_these():
    assert rtx.runtime.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(rtx.runtime))
    for name in PUBLIC:
        value = getattr(rtx.runtime, name)
        assert value.__name__ == name
        assert value.__module__.startswith("rtx.runtime.")


def test_type_checkers_see_the_public_names():
    """The imports under TYPE_CHECKING are the names of `__all__`, each from the module that defines it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    static = {alias.name: node.module for node in imports for alias in node.names if alias.name[0].isupper()}
    static.pop("TYPE_CHECKING")
    assert static == {name: getattr(rtx.runtime, name).__module__ for name in PUBLIC}


def test_another_name_does_not_exist():
    with pytest.raises(AttributeError, match=r"^module 'rtx\.runtime' has no attribute 'Embeder'$"):
        rtx.runtime.Embeder  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Embeder'"):
        from rtx.runtime import Embeder  # noqa: F401


def test_modules_of_the_package_are_still_found():
    from rtx.runtime import errors

    assert errors.RtxError is rtx.runtime.RtxError


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("trainer", "RetrievalModel", "train"), ("export", "export_bundle", "export")],
)
def test_rooms_without_their_packages_name_the_extra(package: str, name: str, extra: str) -> None:
    # None in sys.modules is how Python marks a module that is not to be found.
    code = f"import sys; sys.modules['torch'] = None; import rtx.{package}; rtx.{package}.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith(
        f"MissingExtraError: rtx.{package}.{name} needs the package 'torch', which is not installed. "
        f"Install it with: pip install 'rtx-retrieval[{extra}]'\n"
    )
