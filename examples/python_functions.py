"""Functions and what their docstrings say, from the Python sources of installed distributions.

Nothing is imported or run: the sources are parsed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "_test", "_tests", "testing", "_testing"}
    | {"vendor", "_vendor", "vendored", "_vendored", "extern", "externals", "third_party"}
)
_TEST_FILE = re.compile(r"test_.*\.py|.*_tests?\.py|conftest\.py")
_GENERATED = re.compile(
    r"auto(matically)?[- ]?generated|generated (by|from|automatically)|@generated|do not (edit|modify)", re.IGNORECASE
)
_GENERATED_NOTE_CHARS = 2000
_MAX_SOURCE_BYTES = 1_000_000

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Distribution:
    """An installed distribution: `files` are its Python sources, relative to `site`, sorted."""

    name: str
    version: str
    site: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A function or method: `identifier` is file:line:qualified name, `code` its source without the docstring."""

    distribution: str
    identifier: str
    docstring: str | None
    code: str


def installed(sites: Sequence[Path] | None = None) -> list[Distribution]:
    """The distributions with Python sources under `sites` (default: site-packages of the running environment)."""
    if sites is None:
        sites = [Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")]
    found: dict[str, Distribution] = {}
    for site in dict.fromkeys(sites):
        for entry in importlib.metadata.distributions(path=[str(site)]):
            name = entry.metadata["Name"]
            files = sorted(file.as_posix() for file in entry.files or () if _is_source(file))
            if files:
                found.setdefault(normalised_name(name), Distribution(name, entry.version, site, tuple(files)))
    return [found[key] for key in sorted(found)]


def normalised_name(name: str) -> str:
    """The form in which two spellings of a distribution's name are equal (PEP 503): "Jinja2" -> "jinja2"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_source(path: PurePosixPath) -> bool:
    return path.suffix == ".py" and ".." not in path.parts and not path.is_absolute()


def stable_hash(text: str) -> str:
    """An order that looks random and is the same on every machine and in every run."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_functions(
    distribution: Distribution, dropped: Counter[str], *, min_lines: int, max_lines: int
) -> Iterator[Function]:
    """Functions and methods whose code has `min_lines` to `max_lines` lines without the docstring.

    The files come in the order of their hash, so that the first functions are a sample of the whole distribution. Left
    out are tests, vendored copies, generated files, functions inside functions and such without a body. `dropped`
    counts what was left out, by reason.
    """
    for path in sorted(distribution.files, key=stable_hash):
        parts = PurePosixPath(path).parts
        if not _SKIPPED_FOLDERS.isdisjoint(parts[:-1]) or _TEST_FILE.fullmatch(parts[-1]):
            dropped["files: tests or vendored copies"] += 1
            continue
        try:
            source = (distribution.site / path).read_bytes().decode("utf-8")
            if len(source) > _MAX_SOURCE_BYTES or _GENERATED.search(source, 0, _GENERATED_NOTE_CHARS):
                dropped["files: generated, or over 1 MB"] += 1
                continue
            source = source.replace("\r\n", "\n").replace("\r", "\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the compiler thinks of other people's escapes
                tree = ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            dropped["files: unreadable, or not this version's Python"] += 1
            continue
        lines = source.split("\n")
        for qualified_name, node in _definitions(tree.body, ""):
            if _is_stub(node):
                dropped["functions: no body"] += 1
                continue
            code = code_without_docstring(lines, node)
            if min_lines <= code.count("\n") + 1 <= max_lines:
                identifier = f"{path}:{node.lineno}:{qualified_name}"
                yield Function(distribution.name, identifier, ast.get_docstring(node), code)
            else:
                dropped[f"functions: not {min_lines} to {max_lines} lines"] += 1


def _definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, Definition):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix)


def _is_stub(node: Definition) -> bool:
    """Whether there is nothing but docstring, `...`, `pass` and `raise NotImplementedError`."""
    for statement in node.body:
        if isinstance(statement, ast.Raise):
            error = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
            if not (isinstance(error, ast.Name) and error.id == "NotImplementedError"):
                return False
        elif isinstance(statement, ast.Expr):
            if not isinstance(statement.value, ast.Constant):
                return False
        elif not isinstance(statement, ast.Pass):
            return False
    return True


def code_without_docstring(lines: Sequence[str], node: Definition) -> str:
    """The source of a function with its decorators and comments, docstring cut out, moved to the left margin.

    Args:
        lines: of the whole file, without line ends.
        node: what `ast.parse` made of the function there.
    """
    start = min(part.lineno for part in (node, *node.decorator_list)) - 1
    stop = node.end_lineno or node.lineno
    kept = list(lines[start:stop])
    if ast.get_docstring(node, clean=False) is not None:
        docstring = node.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
        # The columns of syntax trees count UTF-8 bytes.
        before = lines[first].encode()[: docstring.col_offset].decode()
        after = lines[last].encode()[docstring.end_col_offset :].decode().lstrip().removeprefix(";").lstrip()
        rest = kept[last + 1 - start :]
        while rest and not rest[0].strip():
            del rest[0]
        kept = kept[: first - start] + ([before + after] if (before + after).strip() else []) + rest
    # Not textwrap.dedent, which a string that runs to the left margin would keep from moving anything.
    definition = lines[node.lineno - 1]
    indent = definition[: len(definition) - len(definition.lstrip())]
    return "\n".join(line.removeprefix(indent) for line in kept)


_MIN_WORDS, _MAX_WORDS = 4, 50
_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`([^`]*)`")
_NAME_IN_MARKS = re.compile(r"\[?`([^`]*?)(?:\s*<[^`>]*>)?`\]?(?:__?\b)?")
_UNDERLINE = re.compile(r"^\s*[-=~^]{3,}\s*$", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z0-9\"'(*\[])")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|al|resp|approx|incl|Fig|Eq|Ref|Dr|No)\.$")
# A docstring that starts with a directive, a doctest, a field, a section, the signature or a parameter.
_NO_SUMMARY = re.compile(
    r"\.\. |>>>|[:@](param|type|return|rtype|raise)"
    r"|(args|arguments|params?|parameters|returns?|raises|yields?|attributes|inputs?|outputs?)\s*(:|$)"
    r"|(examples?|usage|notes?|see also)\s*(:|$)"
    r"|[\w.]+\(.*\)\s*(->.*)?$"
    r"|\*{0,2}\w+ : ",
    re.IGNORECASE,
)
# What any number of functions could say of themselves.
_TRIVIAL = re.compile(
    r"(returns?|gets?|sets?) (self|the (name|value|type))\b.{0,12}$"
    r"|tests? (that|if|whether|for|the)\b"
    r"|(see|same as|like|alias (for|of|to))\b"
    r"|(deprecated|todo|fixme|internal|private|overrid\w*|inherit\w*|undocumented|stub|dummy|placeholder|no-?op)\b"
    r"|(initiali[sz]es?|init|constructors?|constructs?)\b.{0,24}$"
    r"|(implements? __\w+__|magic method)"
    r"|helper (function|method|for)\b.{0,24}$"
    r"|(wrapper|shortcut|convenience \w+) (for|to|around|of)\b.{0,30}$"
    r"|this (method|function|class) (is|should|must) (deprecated|be overridden|overrid\w+)",
    re.IGNORECASE,
)


def summary(docstring: str) -> str:
    """The first sentence of a docstring as plain text, without the marks of reStructuredText and Markdown around names.

    Raises:
        ValueError: it would not make a query; the message is the reason.
    """
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    if _NO_SUMMARY.match(paragraph.split("\n", 1)[0].strip()) or _UNDERLINE.search(paragraph):
        raise ValueError("docstrings: no summary")
    text = _ROLE.sub(lambda role: _shown_name(role[1]), " ".join(paragraph.split()))
    text = _NAME_IN_MARKS.sub(lambda name: _shown_name(name[1]), text.replace("``", "`"))
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[: match.end()]):
            text = text[: match.end()]
            break
    text = text.rstrip(" :")
    if sum(not character.isascii() for character in text) > len(text) // 20:
        raise ValueError("docstrings: not English")
    words = len(text.split())
    if words < _MIN_WORDS:
        raise ValueError(f"docstrings: under {_MIN_WORDS} words")
    if words > _MAX_WORDS:
        raise ValueError(f"docstrings: first sentence over {_MAX_WORDS} words")
    if _TRIVIAL.match(text):
        raise ValueError("docstrings: would fit any function")
    return text


def _shown_name(target: str) -> str:
    """Sphinx shows "~package.module.name" as "name"."""
    return target.rsplit(".", 1)[-1] if target.startswith("~") else target
