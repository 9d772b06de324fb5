from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import code_search
import pytest
from click.testing import CliRunner
from code_search import CodeSearch, Settings, build, main, prepare
from python_functions import Distribution, installed

from rtx.runtime.errors import DataError, UsageError

SETTINGS = Settings(
    eval_distributions=("Held.Out", "not-installed"),
    dev_distributions=("devel",),
    train_pairs=100,
    min_queries=2,
)


def function(name: str, docstring: str | None, *, body: str | None = None, lines: int = 4) -> str:
    """Source of a function whose code nothing else resembles, unless `body` names whose code it has."""
    words = iter(hashlib.sha256(f"{body or name} {i}".encode()).hexdigest()[:6] for i in range(5 * lines))
    code = [f"    v{next(words)} = f{next(words)}(a{next(words)}, b{next(words)}.c{next(words)})" for _ in range(lines)]
    return "\n".join([f"def {name}():", *([f'    """{docstring}"""'] if docstring else []), *code, "", ""])


def numbered(prefix: str, count: int) -> str:
    return "\n".join(function(f"{prefix}{i}", f"Compute the {prefix} number {i} of it.") for i in range(count))


Install = Callable[[dict[str, dict[str, str]]], list[Distribution]]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """`install({distribution: {file: source}})` writes site-packages and gives what is installed there."""

    def install(packages: dict[str, dict[str, str]]) -> list[Distribution]:
        site = tmp_path / "site-packages"
        for name, files in packages.items():
            info = site / f"{name}-1.0.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
            for file, source in files.items():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).write_text(source, encoding="utf-8")
        return installed([site])

    return install


def packages(**more: str) -> dict[str, dict[str, str]]:
    """Two held-out distributions with three functions each and a small one to train on; `more` adds to their code."""
    return {
        "held_out": {"held/code.py": numbered("held", 3) + more.get("held_out", "")},
        "devel": {"devel/code.py": numbered("devel", 3) + more.get("devel", "")},
        "common": {"common/code.py": numbered("common", 2) + more.get("common", "")},
    }


def queries(data: CodeSearch) -> dict[str, list[str]]:
    splits = {"train": data.train, "eval": data.eval.queries, "dev": data.dev.queries}
    return {split: sorted(pair.query for pair in pairs) for split, pairs in splits.items()}


def test_distributions_are_held_out_as_a_whole(install: Install) -> None:
    data = build(install(packages()), SETTINGS)
    assert queries(data) == {
        "train": ["Compute the common number 0 of it.", "Compute the common number 1 of it."],
        "eval": [f"Compute the held number {i} of it." for i in range(3)],
        "dev": [f"Compute the devel number {i} of it." for i in range(3)],
    }
    assert {f.identifier for f in data.eval.documents} == {f"held/code.py:{1 + 8 * i}:held{i}" for i in range(3)}
    assert {pair.function for pair in data.eval.queries} == set(data.eval.documents)
    for pair in data.eval.queries:
        assert pair.function.code == function(f"held{pair.query.split()[4]}", None).rstrip()
    assert data.dropped == {}


def test_this_project_and_copies_of_held_out_packages_are_not_trained_on(install: Install) -> None:
    sources = packages()
    sources["rtx_retrieval"] = {"rtx_own/code.py": numbered("own", 2)}
    sources["typer"] = {"typer/code.py": numbered("typer", 2)}
    assert {pair.function.distribution for pair in build(install(sources), SETTINGS).train} == {"common"}


def test_what_is_held_out_does_not_come_back_in_training(install: Install) -> None:
    common = (
        function("held1", "Compute it from a copy of the code.")
        + function("devel1", "Compute it from a copy of the other code.")
        + function("other", "compute  the held number 2 of it")
    )
    data = build(install(packages(common=common)), SETTINGS)
    assert queries(data)["train"] == ["Compute the common number 0 of it.", "Compute the common number 1 of it."]
    assert data.dropped == {"pairs: code seen before": 2, "pairs: docstring seen before": 1}


@pytest.mark.parametrize(("changed_lines", "is_copy"), [(1, True), (7, False)])
def test_an_edited_copy_of_held_out_code_is_dropped(install: Install, changed_lines: int, is_copy: bool) -> None:
    original = function("original", "Compute the longest of them all.", lines=8)
    edited = function("original", "Compute it in an edited way.", lines=8).split("\n")
    edited[2 : 2 + changed_lines] = function("changed", None, lines=changed_lines).split("\n")[1 : 1 + changed_lines]
    data = build(install(packages(held_out=original, common="\n".join(edited))), SETTINGS)
    assert ("Compute it in an edited way." in queries(data)["train"]) is not is_copy
    assert data.dropped == ({"pairs: edited copy of held-out code": 1} if is_copy else {})


def test_duplicates_of_one_package_are_trained_on_once(install: Install) -> None:
    data = build(
        install(
            packages(
                common=function("first", "Sort the rows by their keys.")
                + function("second", "Sort the rows by their keys")
                + function("first", "Order the rows by their keys.")
            )
        ),
        SETTINGS,
    )
    assert [query for query in queries(data)["train"] if "rows" in query] == ["Sort the rows by their keys."]
    assert data.dropped == {"pairs: code seen before": 1, "pairs: docstring seen before": 1}


def test_an_ambiguous_docstring_is_no_query_but_its_functions_are_documents(install: Install) -> None:
    held_out = (
        function("sync", "Send the request to it.")
        + function("parallel", "Send the request to it.")
        + function("silent", None)
        + function("sync", "Send a copy of the request.")
    )
    data = build(install(packages(held_out=held_out)), SETTINGS)
    assert queries(data)["eval"] == [f"Compute the held number {i} of it." for i in range(3)]
    names = Counter(document.identifier.split(":")[-1] for document in data.eval.documents)
    assert names == {"held0": 1, "held1": 1, "held2": 1, "sync": 1, "parallel": 1, "silent": 1}
    assert data.dropped == {
        "functions: no docstring": 1,
        "pairs: code seen before": 1,
        "pairs: docstring seen before": 2,
    }


def test_an_evaluation_set_keeps_its_answers_when_it_is_cut(install: Install) -> None:
    held_out = numbered("more", 10) + "".join(function(f"silent{i}", None) for i in range(10))
    settings = dataclasses.replace(SETTINGS, queries_per_distribution=4, documents_per_distribution=7)
    data = build(install(packages(held_out=held_out)), settings)
    assert (len(data.eval.queries), len(data.eval.documents)) == (4, 7)
    assert {pair.function for pair in data.eval.queries} < set(data.eval.documents)


def test_training_pairs_are_balanced_over_packages(install: Install) -> None:
    sources = packages()
    sources |= {name: {f"{name}/code.py": numbered(name, count)} for name, count in (("big", 40), ("middle", 9))}

    def taken(**changes: int) -> Counter[str]:
        data = build(install(sources), dataclasses.replace(SETTINGS, **changes))
        return Counter(pair.function.distribution for pair in data.train)

    assert taken() == {"big": 40, "middle": 9, "common": 2}
    assert taken(pairs_per_distribution=20) == {"big": 20, "middle": 9, "common": 2}
    assert taken(train_pairs=20) == {"big": 9, "middle": 9, "common": 2}
    assert taken(train_pairs=15) == {"big": 7, "middle": 6, "common": 2}


def test_too_few_queries_name_the_packages(install: Install) -> None:
    with pytest.raises(DataError) as caught:
        build(install(packages()), dataclasses.replace(SETTINGS, min_queries=4))
    assert str(caught.value) == (
        "eval: 3 queries, expected at least 4, from Held.Out, not-installed, of which are installed: held_out"
    )


def test_nothing_to_train_on_is_an_error(install: Install) -> None:
    sources = {name: files for name, files in packages().items() if name != "common"}
    with pytest.raises(DataError, match=r"^train: no pairs in 0 distributions, expected installed packages"):
        build(install(sources), SETTINGS)


def test_the_files_are_a_training_file_and_two_beir_sets(install: Install, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    manifest, reused = prepare(folder, SETTINGS, install(packages(held_out=function("silent", None))))
    assert not reused
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    expected = [(f"Compute the common number {i} of it.", function(f"common{i}", None).rstrip()) for i in range(2)]
    assert sorted((row.pop("query"), row.pop("positive")) for row in rows) == expected
    assert rows == [{}, {}]
    corpus = [json.loads(line) for line in (folder / "eval/corpus.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (folder / "eval/queries.jsonl").read_text().splitlines()]
    qrels = [line.split("\t") for line in (folder / "eval/qrels/test.tsv").read_text().splitlines()]
    names = {document["_id"]: document["_id"].split(":")[-1] for document in corpus}
    assert sorted(names.values()) == ["held0", "held1", "held2", "silent"]
    for document in corpus:
        assert document == {
            "_id": document["_id"],
            "title": "",
            "text": function(names[document["_id"]], None).rstrip(),
        }
    assert [query["_id"] for query in asked] == ["q0000", "q0001", "q0002"]
    assert qrels[0] == ["query-id", "corpus-id", "score"]
    # The number in the question is the one in the name of the function that answers it.
    assert [(row[0], f"Compute the held number {names[row[1]][-1]} of it.", row[2]) for row in qrels[1:]] == [
        (query["_id"], query["text"], "1") for query in asked
    ]
    assert len((folder / "dev/corpus.jsonl").read_text().splitlines()) == 3
    assert manifest == json.loads((folder / "data.json").read_text())
    assert manifest["queries"] == {"train": {"common": 2}, "eval": {"held_out": 3}, "dev": {"devel": 3}}
    assert manifest["documents"] == {"train": 2, "eval": 4, "dev": 3}
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {"data.json", *manifest["files"]}
    assert not [path for path in tmp_path.iterdir() if path.name not in ("data", "site-packages")]


def test_data_are_built_again_only_if_something_changed(install: Install, tmp_path: Path) -> None:
    folder, distributions = tmp_path / "data", install(packages())
    first, _ = prepare(folder, SETTINGS, distributions)
    stamp = (folder / "train.jsonl").stat().st_ino
    assert prepare(folder, SETTINGS, distributions) == (first, True)
    assert (folder / "train.jsonl").stat().st_ino == stamp

    (folder / "eval/corpus.jsonl").write_text("damaged")
    assert prepare(folder, SETTINGS, distributions) == (first, False)
    (folder / "dev/queries.jsonl").unlink()
    assert prepare(folder, SETTINGS, distributions) == (first, False)

    fewer = dataclasses.replace(SETTINGS, train_pairs=1)
    changed, reused = prepare(folder, fewer, distributions)
    assert (reused, changed["queries"]["train"]) == (False, {"common": 1})
    newer = [dataclasses.replace(d, version="2.0") if d.name == "common" else d for d in distributions]
    assert prepare(folder, fewer, newer)[1] is False
    assert prepare(folder, fewer, newer)[1] is True


def test_a_folder_with_something_else_is_left_alone(install: Install, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="is in the way"):
        prepare(tmp_path / "mine", SETTINGS, install(packages()))
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_data_do_not_depend_on_hash_seed_or_order(install: Install, tmp_path: Path) -> None:
    sources = packages(held_out=numbered("more", 30))
    # The order of files and distributions would show: a cap ends in the middle, and two have the same docstrings.
    parts = {f"part{i}.py": numbered(f"part{i}x", 3) for i in range(9)}
    sources["common"] |= {f"common/{name}": code for name, code in parts.items()}
    sources["other"] = {f"other/{name}": code.replace("(a", "(b") for name, code in parts.items()}
    site = install(sources)[0].site
    script = (
        "import pathlib, sys, code_search as c, python_functions as p\n"
        "settings = c.Settings(eval_distributions=('held-out',), dev_distributions=('devel',), min_queries=2,\n"
        "    pairs_per_distribution=9, queries_per_distribution=9, documents_per_distribution=15)\n"
        "distributions = p.installed([pathlib.Path(sys.argv[1])])\n"
        "c.prepare(pathlib.Path(sys.argv[2]), settings, distributions[::int(sys.argv[3])])\n"
    )
    digests = []
    for seed, step in (("1", "1"), ("2", "-1")):
        out = tmp_path / f"data{seed}"
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(code_search.__file__).parent)}
        command = [sys.executable, "-c", script, str(site), str(out), step]
        subprocess.run(command, env=environment, check=True, timeout=60)
        digests.append(json.loads((out / "data.json").read_text())["files"])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 7


def test_command_prints_what_there_is(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = packages()
    sources |= {name: {f"{name}/code.py": numbered(name, 60)} for name in ("click", "anyio")}
    distributions = install(sources)
    monkeypatch.setattr(code_search, "installed", lambda: distributions)
    out = tmp_path / "data"
    result = CliRunner().invoke(main, ["data", "--out", str(out), "--train-pairs", "6"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["split", "queries", "functions", "packages"]
    assert lines[1].split()[:4] == ["train", "6", "6", "3"]
    assert lines[2].split()[:6] == ["eval", "60", "60", "1", "click", "60,"]
    assert lines[3].split()[:4] == ["dev", "60", "60", "1"]
    assert lines[-1].startswith(f"{out}: written (")
    again = CliRunner().invoke(main, ["data", "--out", str(out), "--train-pairs", "6"])
    assert again.stdout.splitlines()[:-1] == lines[:-1]
    assert again.stdout.splitlines()[-1].startswith(f"{out}: unchanged (")


def test_command_reports_an_error(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributions = install(packages())
    monkeypatch.setattr(code_search, "installed", lambda: distributions)
    result = CliRunner().invoke(main, ["data", "--out", str(tmp_path / "data")])
    assert result.exit_code == DataError.exit_code == 4
    assert result.stderr.startswith("error: eval: 0 queries, expected at least 50, from click, fsspec, ")
    assert result.stderr.endswith("of which are installed: none\n")
    assert not (tmp_path / "data").exists()


def test_held_out_distributions_do_not_overlap() -> None:
    assert not set(code_search.EVAL_DISTRIBUTIONS) & set(code_search.DEV_DISTRIBUTIONS)
