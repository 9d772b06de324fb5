from __future__ import annotations

import argparse
import ast
import inspect
import json.decoder
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from python_functions import (
    Distribution,
    Function,
    code_without_docstring,
    installed,
    normalised_name,
    read_functions,
    summary,
)


def first_function(source: str) -> str:
    node = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return code_without_docstring(source.split("\n"), node)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(
            'def f(a):\n    """One.\n\n    Two.\n    """\n\n    # why\n    return a  # how\n\n\nx = 1\n',
            "def f(a):\n    # why\n    return a  # how",
            id="lines and the blank one after them go, comments stay",
        ),
        pytest.param(
            'class C:\n    @property\n    async def f(self):\n        r"""One."""\n        return 1\n',
            "@property\nasync def f(self):\n    return 1",
            id="a decorated method moves to the margin",
        ),
        pytest.param('def f(): "One."; return 1\n', "def f(): return 1", id="on the line of the definition"),
        pytest.param(
            'def f(é="ü"): "Größe."; return é\n', 'def f(é="ü"): return é', id="columns are bytes, not characters"
        ),
        pytest.param(
            'def f():\n    """One."""  # noqa: D401\n    return 1\n',
            "def f():\n    # noqa: D401\n    return 1",
            id="a comment behind it stays",
        ),
        pytest.param(
            'def f():\n    ("One."\n     " Two.")\n    return 1\n',
            "def f():\n    return 1",
            id="in parentheses",
        ),
        pytest.param(
            'def f():\n    # before\n    """One."""\n    return 1\n',
            "def f():\n    # before\n    return 1",
            id="a comment before it stays",
        ),
        pytest.param(
            'class C:\n    def f(self):\n        """One."""\n        return """\nleft\n    right"""\n',
            'def f(self):\n    return """\nleft\nright"""',
            id="a string at the margin does not keep the function indented",
        ),
        pytest.param(
            'def f():\n    x = 1\n    """Not a docstring."""\n    return x\n',
            'def f():\n    x = 1\n    """Not a docstring."""\n    return x',
            id="a later string stays",
        ),
    ],
)
def test_docstring_removal(source: str, expected: str) -> None:
    assert first_function(source) == expected


@pytest.mark.parametrize("module", [argparse, inspect, json.decoder, textwrap])
def test_only_the_docstring_is_gone_from_real_code(module: ModuleType) -> None:
    source = inspect.getsource(module)
    lines = source.split("\n")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert len(nodes) >= 4
    for node in nodes:
        code = code_without_docstring(lines, node)
        if ast.get_docstring(node) is not None:
            del node.body[0]
        if node.body:
            # Line by line: moving a function to the margin moves the lines inside its strings too.
            got, expected = (ast.unparse(tree).split("\n") for tree in (ast.parse(code), node))
            assert [line.strip() for line in got] == [line.strip() for line in expected]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of the edges. Slow for large graphs.", "Return the sum of the edges."),
        (
            "Wrap text to a width,\n    e.g. 72. Then join it.\n\n    Args:\n        text: it.",
            "Wrap text to a width, e.g. 72.",
        ),
        ("Split by separators, e.g. Commas and so on", "Split by separators, e.g. Commas and so on"),
        ("Build a :class:`~nx.Graph` from ``edges`` of `G`_.", "Build a Graph from edges of G."),
        ("Load a [`PreTrainedModel`] by :func:`load_model`.", "Load a PreTrainedModel by load_model."),
        ("Read version 1.5 of the file.", "Read version 1.5 of the file."),
        ("Create one of the following kinds:\n\n* a\n* b", "Create one of the following kinds"),
    ],
)
def test_summary(docstring: str, expected: str) -> None:
    assert summary(docstring) == expected


@pytest.mark.parametrize(
    ("docstring", "reason"),
    [
        ("", "docstrings: under 4 words"),
        ("Close the file.", "docstrings: under 4 words"),
        (" ".join(["word"] * 51), "docstrings: first sentence over 50 words"),
        (":param x: the value of x to be used", "docstrings: no summary"),
        ("Args:\n    x: the value that is used", "docstrings: no summary"),
        ("Parameters\n----------\nx : int, a value to be used", "docstrings: no summary"),
        ("Notes on the shape of it\n~~~~~~~~~~~~\nThey are long.", "docstrings: no summary"),
        ("stack(arrays, axis=0, out=None) -> array\n\nJoin arrays.", "docstrings: no summary"),
        ("stream : file-like object that is read", "docstrings: no summary"),
        (">>> add(1, 2) + add(3, 4)\n10", "docstrings: no summary"),
        ("Berechnet die Länge für größere Wörter über Äste", "docstrings: not English"),
        ("Test that the sum of edges is right.", "docstrings: would fit any function"),
        ("Initialize self with arguments.", "docstrings: would fit any function"),
        ("See the documentation of the base class.", "docstrings: would fit any function"),
        ("Deprecated since 1.2, use the other one.", "docstrings: would fit any function"),
    ],
)
def test_docstrings_that_make_no_query(docstring: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        summary(docstring)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Function], Counter[str]]]:
    """`read({path: source})` gives the functions of 3 to 5 lines, by identifier, and what was dropped."""

    def read(files: dict[str, str]) -> tuple[list[Function], Counter[str]]:
        for path, source in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source, encoding="utf-8")
        dropped: Counter[str] = Counter()
        distribution = Distribution("fake", "1.0", tmp_path, tuple(sorted(files)))
        functions = list(read_functions(distribution, dropped, min_lines=3, max_lines=5))
        return sorted(functions, key=lambda function: function.identifier), dropped

    return read


Read = Callable[[dict[str, str]], tuple[list[Function], Counter[str]]]

NESTED = """\
import os

def outer():
    \"\"\"Doc.\"\"\"
    def inner():
        return 1
    return inner

class A:
    class B:
        def method(self):
            x = 1
            return x

if os.name:
    async def guarded():
        # why
        return 2
"""
OUTER = """\
def outer():
    def inner():
        return 1
    return inner"""


def test_functions_and_methods_are_read_and_inner_functions_stay_inside(read: Read) -> None:
    functions, dropped = read({"pkg/module.py": NESTED})
    assert functions == [
        Function("fake", "pkg/module.py:11:A.B.method", None, "def method(self):\n    x = 1\n    return x"),
        Function("fake", "pkg/module.py:16:guarded", None, "async def guarded():\n    # why\n    return 2"),
        Function(
            "fake",
            "pkg/module.py:3:outer",
            "Doc.",
            "def outer():\n    def inner():\n        return 1\n    return inner",
        ),
    ]
    assert dropped == {}


def function(name: str, *body: str) -> str:
    return "\n".join([f"def {name}():", *(f"    {line}" for line in body)]) + "\n"


USEFUL = function("useful", "x = 1", "return x")


def test_what_is_no_document_is_counted(read: Read) -> None:
    source = (
        USEFUL
        + function("stub", '"""Doc."""', "...")
        + function("abstract", '"""Doc."""', "raise NotImplementedError('later')")
        + function("short", '"""Doc."""', "return 1")
        + function("just_fits", '"""Doc."""', *["x = 1"] * 4)
        + function("too_long", '"""Doc."""', *["x = 1"] * 5)
        + function("raises", "x = 1", "raise ValueError(x)")
    )
    functions, dropped = read({"pkg/module.py": source})
    assert {f.identifier.split(":")[-1] for f in functions} == {"useful", "just_fits", "raises"}
    assert dropped == {"functions: no body": 2, "functions: not 3 to 5 lines": 2}


def test_files_that_are_not_someones_code_are_counted(read: Read) -> None:
    functions, dropped = read(
        {
            "pkg/kept.py": USEFUL,
            "pkg/testing_tools.py": USEFUL,
            "pkg/tests/cases.py": USEFUL,
            "pkg/test_kept.py": USEFUL,
            "pkg/_vendor/other.py": USEFUL,
            "pkg/generated.py": "# This file was automatically generated from grammar.txt\n" + USEFUL,
            "pkg/python2.py": "print 'no'\n" + USEFUL,
        }
    )
    assert [f.identifier for f in functions] == ["pkg/kept.py:1:useful", "pkg/testing_tools.py:1:useful"]
    assert dropped == {
        "files: tests or vendored copies": 3,
        "files: generated, or over 1 MB": 1,
        "files: unreadable, or not this version's Python": 1,
    }


def test_installed_reads_the_records_of_distributions(tmp_path: Path) -> None:
    info = tmp_path / "Some_Tool-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Some.Tool\nVersion: 2.1\n")
    (info / "RECORD").write_text("tool/b.py,,\ntool/a.py,,\ntool/data.txt,,\n../../bin/tool.py,,\n")
    assert installed([tmp_path]) == [Distribution("Some.Tool", "2.1", tmp_path, ("tool/a.py", "tool/b.py"))]
    assert normalised_name("Some.Tool") == normalised_name("some_tool") == "some-tool"
