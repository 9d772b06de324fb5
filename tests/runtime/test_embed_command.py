from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from rtx.runtime.cli import main
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder

TEXTS = ["how do i reset the device?", "", "sort the list", "x" * 300_000, "nul \0 and \U0001f600", "open the valve"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def embed(toy_bundle: Path) -> Callable[..., Result]:
    """Runs `rtx embed` on the toy bundle."""
    return lambda *arguments, stdin=None: invoke(toy_bundle, *arguments, stdin=stdin)


def invoke(bundle: Path, *arguments: str, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, ["embed", str(bundle), *arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def expected(bundle: Path, texts: Sequence[str] = TEXTS, **options: Any) -> NDArray[Any]:
    with Embedder.open(bundle, threads=1) as model:
        return model.embed(texts, **options)


def write_jsonl(path: str, rows: Sequence[object]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(output: str) -> list[str | int]:
    return [json.loads(line)["id"] for line in Path(f"{output}.ids.jsonl").read_text().splitlines()]


def errors(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(f"{output}.errors.jsonl").read_text().splitlines()]


def test_npy_holds_what_the_embedder_gives(embed: Callable[..., Result], toy_bundle: Path) -> None:
    source = write_jsonl("in.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)])
    result = embed(source, "-o", "out.npy", "--threads", "1")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "out.npy: 6 vectors of 32 float32; ids in out.npy.ids.jsonl\n"
    np.testing.assert_array_equal(np.load("out.npy"), expected(toy_bundle))
    assert ids("out.npy") == [f"d{i}" for i in range(6)]
    assert sorted(file.name for file in Path().iterdir()) == ["in.jsonl", "out.npy", "out.npy.ids.jsonl"]


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_every_option_reaches_the_embedder(embed: Callable[..., Result], toy_bundle: Path, precision: str) -> None:
    pq.write_table(pa.table({"body": TEXTS, "key": list(range(100, 106))}), "in.parquet")
    columns = ["--text-column", "body", "--id-column", "key"]
    options = ["--prompt", "query", "--dimensions", "12", "--precision", precision, "--variant", "int8", "--normalize"]
    result = embed("in.parquet", "-o", "out.parquet", *columns, *options, "--threads", "1", "--max-batch-tokens", "64")
    assert result.exit_code == 0, result.stderr
    table = pq.read_table("out.parquet")
    with Embedder.open(toy_bundle, variant="int8", threads=1) as model:
        vectors = model.embed(TEXTS, prompt="query", dimensions=12, precision=precision, normalize=True)  # type: ignore[arg-type]
    if precision == "binary":
        written = np.stack([np.frombuffer(code, np.uint8) for code in table["embedding"].to_pylist()])
    else:
        written = np.array(table["embedding"].to_pylist(), dtype=vectors.dtype)
    np.testing.assert_allclose(written, vectors, rtol=0, atol=1e-6)
    assert written.shape == (6, 2 if precision == "binary" else 12)
    assert table["id"].to_pylist() == [str(i) for i in range(100, 106)]
    metadata = json.loads(table.schema.metadata[b"rtx"])
    assert metadata["precision"] == precision
    assert (metadata["bundle"], metadata["variant"], metadata["dimensions"]) == ("toy", "int8", 12)


@pytest.mark.parametrize("file_format", ["jsonl", "txt", "csv"])
def test_standard_input(embed: Callable[..., Result], toy_bundle: Path, file_format: str) -> None:
    content = {"jsonl": b'{"text": "sort"}\n{"text": "open"}\n', "txt": b"sort\nopen\n", "csv": b"text\nsort\nopen\n"}
    result = embed("-", "-o", "out.npy", "--format", file_format, stdin=content[file_format])
    assert result.exit_code == 0, result.stderr
    np.testing.assert_allclose(np.load("out.npy"), expected(toy_bundle, ["sort", "open"]), rtol=0, atol=1e-6)
    assert ids("out.npy") == ([2, 3] if file_format == "csv" else [1, 2])


def test_bad_records_are_listed_and_the_others_embedded(embed: Callable[..., Result], toy_bundle: Path) -> None:
    Path("in.jsonl").write_text(
        '{"text": "sort"}\n{"text": 5, "id": "five"}\n{"text": "\\ud800"}\n{oops\n{"txt": "x"}\n[]\n{"text": "open"}\n'
    )
    result = embed("in.jsonl", "-o", "out.npy", "--precision", "int8")
    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        "out.npy: 2 vectors of 32 int8; ids in out.npy.ids.jsonl",
        "5 records have no vector; all are listed in out.npy.errors.jsonl:",
        "  in.jsonl:2: expected a text (str), got int",
        "  in.jsonl:3: holds an unpaired surrogate at character 0; expected valid Unicode",
        "  in.jsonl:4: is no valid JSON: Expecting property name enclosed in double quotes at character 2",
        "  in.jsonl:5: has no column 'text' (its columns: txt)",
        "  in.jsonl:6: expected a JSON object, got list",
    ]
    np.testing.assert_array_equal(np.load("out.npy"), expected(toy_bundle, ["sort", "open"], precision="int8"))
    assert ids("out.npy") == [1, 7]
    assert errors("out.npy")[0] == {"where": "in.jsonl:2", "id": "five", "error": "expected a text (str), got int"}
    assert [error["where"] for error in errors("out.npy")] == [f"in.jsonl:{i}" for i in (2, 3, 4, 5, 6)]

    Path("in.jsonl").write_text('{"text": "sort"}\n')
    assert embed("in.jsonl", "-o", "out.npy", "--overwrite").exit_code == 0
    assert not Path("out.npy.errors.jsonl").exists()


def test_fail_stops_at_the_first_bad_record(embed: Callable[..., Result]) -> None:
    write_jsonl("in.jsonl", [{"text": "sort"}, {"text": "open"}, {"text": None}, {"text": 5}])
    result = embed("in.jsonl", "-o", "out.npy", "--on-invalid", "fail", "--rows-per-part", "2")
    assert result.exit_code == 4
    assert result.stderr == "error: in.jsonl:3: expected a text (str), got NoneType\n"
    assert not Path("out.npy").exists()
    assert Path("out.npy.partial/000000.json").exists()
    write_jsonl("in.jsonl", [{"text": "sort"}, {"text": "open"}, {"text": "mended"}])
    result = embed("in.jsonl", "-o", "out.npy", "--on-invalid", "fail", "--rows-per-part", "2")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "going on with out.npy.partial; finished parts: 1",
        "out.npy: 3 vectors of 32 float32, 2 of the records by an earlier run; ids in out.npy.ids.jsonl",
    ]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_vector_that_is_not_finite_fails_alone(
    embed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    original = Embedder.embed

    def overflow(self: Embedder, items: Sequence[str], **options: Any) -> NDArray[Any]:
        vectors = original(self, items, **options)
        if items:
            vectors[[text == "open" for text in items]] = np.inf
        return vectors

    monkeypatch.setattr(Embedder, "embed", overflow)
    write_jsonl("in.jsonl", [{"text": "sort"}, {"text": "open"}, {"text": "close"}])
    assert embed("in.jsonl", "-o", "out.npy", "--precision", precision).exit_code == 4
    assert ids("out.npy") == [1, 3]
    message = "the model gives it a vector that is not finite"
    assert errors("out.npy") == [{"where": "in.jsonl:2", "id": 2, "error": message}]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["in.txt", "-o", "out.csv"], 2, "out.csv: expected a name that ends in .npy or .parquet"),
        (["in.txt", "-o", "nix/out.npy"], 2, "nix/out.npy: the folder nix does not exist"),
        (["in.txt", "-o", "folder.npy", "--overwrite"], 2, "folder.npy: is a folder; expected a file to write"),
        (["own.npy.ids.jsonl", "-o", "own.npy"], 2, "own.npy.ids.jsonl: is read as the input and would be lost"),
        (["in.parquet", "-o", "in.parquet", "--overwrite"], 2, "in.parquet: is read as the input and would be lost"),
        (["in.txt", "-o", "out.npy", "--threads", str(2**40)], 2, "threads: expected at most 1024, got"),
        (["in.txt", "-o", f"{'x' * 300}.npy"], 5, "x.npy: cannot be read or written: File name too long"),
        (["in.txt", "-o", "there.npy"], 2, "there.npy: exists; pass --overwrite to replace it"),
        (["in.txt", "-o", "out.npy", "--prompt", "qeury"], 2, "prompt 'qeury' does not exist (did you mean 'query'?"),
        (["in.txt", "-o", "out.npy", "--dimensions", "33"], 2, "dimensions: expected 1 to 32, got 33"),
        (["in.txt", "-o", "out.npy", "--variant", "fp61"], 2, "has no variant 'fp61' (known: fp32, int8)"),
        (["nix.jsonl", "-o", "out.npy"], 4, "nix.jsonl: cannot be read: No such file or directory"),
        (["in.csv", "-o", "out.npy"], 4, "in.csv: has no column 'text' (did you mean 'txt'? known: txt)"),
        (["-", "-o", "out.npy"], 2, "standard input has no name to tell its format by"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(
    embed: Callable[..., Result], arguments: list[str], code: int, message: str
) -> None:
    Path("in.txt").write_text("a\n")
    Path("in.csv").write_text("txt\na\n")
    Path("there.npy").touch()
    Path("folder.npy").mkdir()
    for source in ("own.npy.ids.jsonl", "in.parquet"):
        Path(source).write_text('{"text": "a"}\n')
    before = sorted(file.name for file in Path().iterdir())
    result = embed(*arguments)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert sorted(file.name for file in Path().iterdir()) == before
    assert Path("in.parquet").read_text() == Path("own.npy.ids.jsonl").read_text() == '{"text": "a"}\n'


def test_a_reranker_or_a_missing_bundle(toy_reranker_bundle: Path) -> None:
    Path("in.txt").write_text("a\n")
    result = invoke(toy_reranker_bundle, "in.txt", "-o", "out.npy")
    assert (result.exit_code, "use `rtx rerank`" in result.stderr) == (2, True)
    result = invoke(Path("nix.rtx"), "in.txt", "-o", "out.npy")
    assert (result.exit_code, "nix.rtx: does not exist" in result.stderr) == (5, True)


def test_parquet_without_pyarrow(embed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = embed("in.txt", "-o", "out.parquet")
    assert result.exit_code == 8
    assert "Install it with: pip install 'rtx-retrieval[parquet]'" in result.stderr


class Interrupted:
    """Makes the command end, as by Ctrl-C, in its n-th call of the embedder, and counts the texts of all calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.calls_left = -1
        original = Embedder.embed

        def counted(model: Embedder, items: Sequence[str], **options: Any) -> NDArray[Any]:
            if items:
                if self.calls_left == 0:
                    raise KeyboardInterrupt
                self.calls_left -= 1
                self.texts += items
            return original(model, items, **options)

        monkeypatch.setattr(Embedder, "embed", counted)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interrupted]:
    return Interrupted(monkeypatch)  # type: ignore[return-value]


@pytest.mark.parametrize("source", ["in.txt", "-"])
def test_ctrl_c_says_how_to_go_on(embed: Callable[..., Result], interrupted: Interrupted, source: str) -> None:
    content = "".join(f"text {i}\n" for i in range(10)).encode()
    Path("in.txt").write_bytes(content)
    arguments = [source, "-o", "out.npy", "--rows-per-part", "3", "--format", "txt", "--threads", "1"]
    interrupted.calls_left = 2
    result = embed(*arguments, stdin=content)
    assert result.exit_code == 130
    same = "the same command, fed the same input," if source == "-" else "the same command"
    assert result.stderr == f"interrupted; {same} goes on; finished parts, kept in out.npy.partial: 2\n"

    interrupted.calls_left = -1
    interrupted.texts.clear()
    assert embed(*arguments, stdin=content).exit_code == 0
    assert interrupted.texts == [f"text {i}" for i in range(6, 10)]
    resumed = np.load("out.npy")
    assert embed(*arguments, "--overwrite", stdin=content).exit_code == 0
    np.testing.assert_array_equal(resumed, np.load("out.npy"))
    assert ids("out.npy") == list(range(1, 11))


def test_interrupted_before_anything_was_kept(embed: Callable[..., Result], interrupted: Interrupted) -> None:
    Path("in.txt").write_text("a\n")
    interrupted.calls_left = 0
    result = embed("in.txt", "-o", "out.npy")
    assert (result.exit_code, result.stderr) == (
        130,
        "interrupted before the first part was finished; nothing is kept\n",
    )
    assert not Path("out.npy.partial").exists()


def test_another_input_bundle_or_argument_does_not_go_on_with_the_parts(
    embed: Callable[..., Result],
    interrupted: Interrupted,
    tmp_path: Path,
    write_bundle: Callable[[Path, Contract], Path],
    embed_contract: Contract,
) -> None:
    Path("in.txt").write_text("".join(f"text {i}\n" for i in range(10)))
    arguments = ["in.txt", "-o", "out.npy", "--rows-per-part", "3"]
    interrupted.calls_left = 2
    embed(*arguments)
    interrupted.calls_left = -1

    result = embed(*arguments, "--prompt", "query")
    assert result.exit_code == 2
    assert "holds an unfinished run with other arguments (prompt None there, 'query' here)" in result.stderr
    result = invoke(write_bundle(tmp_path / "other.rtx", embed_contract), *arguments)
    assert result.exit_code == 2
    assert re.search(r"with other arguments \(bundle 'toy' there, 'other' here; bundle_sha256 ", result.stderr)
    lines = Path("in.txt").read_text()
    Path("in.txt").write_text(lines.replace("text 4", "new"))
    result = embed(*arguments)
    assert result.exit_code == 4
    assert "in out.npy.partial has read: it differs from in.txt:4 on" in result.stderr

    interrupted.texts.clear()
    assert embed(*arguments, "--overwrite", "--variant", "fp32", "--max-batch-tokens", "32").exit_code == 0
    assert interrupted.texts == ["text 3", "new", *(f"text {i}" for i in range(5, 10))]


def _start(bundle: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from rtx.runtime.cli import main; main()", "embed", str(bundle), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_it_goes_on_without_losing_or_doubling_a_row(toy_bundle: Path) -> None:
    """The real command and SIGKILL; test_bulk.py kills it before every single step."""
    moments = random.Random(7)
    texts = [f"reset the device {moments.random()}" for _ in range(3000)]
    write_jsonl("in.jsonl", [{"id": f"d{i}", "text": text if i % 7 else None} for i, text in enumerate(texts)])
    arguments = ["--rows-per-part", "60", "--threads", "1"]
    partial = Path("out.npy.partial")
    finished: dict[str, int] = {}
    for _ in range(2):
        process = _start(toy_bundle, "in.jsonl", "-o", "out.npy", *arguments)
        while len(list(partial.glob("0*.json"))) < len(finished) // 2 + 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        now = {
            file.name: file.stat().st_mtime_ns
            for done in partial.glob("0*.json")
            for file in (done, done.with_suffix(".npy"))
        }
        assert finished.items() <= now.items()  # nothing that was finished was written again
        finished = now
    assert not Path("out.npy").exists()

    process = _start(toy_bundle, "in.jsonl", "-o", "out.npy", *arguments)
    _, said = process.communicate()
    assert process.returncode == 4
    assert f"going on with {partial}; finished parts: {len(finished) // 2}\n" in said
    assert f"{len(finished) // 2 * 60:,} of the records by an earlier run" in said
    whole = Path("whole")
    whole.mkdir()
    assert invoke(toy_bundle, "in.jsonl", "-o", "whole/out.npy", *arguments).exit_code == 4
    for file in whole.iterdir():
        assert file.read_bytes() == Path(file.name).read_bytes()
    assert sorted(file.name for file in Path().iterdir()) == sorted(
        ["in.jsonl", "whole", *(f.name for f in whole.iterdir())]
    )


def test_a_changed_bundle_file_is_found_before_anything_is_embedded(toy_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy_bundle, tmp_path / "copy.rtx")
    graph = copy / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\1")
    Path("in.txt").write_text("a\n")
    result = invoke(copy, "in.txt", "-o", "out.npy")
    assert result.exit_code == 5
    assert "onnx/model.onnx" in result.stderr
    assert not Path("out.npy.partial").exists()
