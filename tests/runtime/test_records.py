from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rtx.runtime import records
from rtx.runtime.errors import DataError, MissingExtraError, UsageError
from rtx.runtime.records import BadRecord, Input, Record


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: str, *required: str, optional: tuple[str, ...] = (), **options: Any) -> list[Record | BadRecord]:
    with Input(path, **options) as source:
        return list(source.records(required or ("text",), optional))


def write(path: str, content: bytes) -> str:
    Path(path).write_bytes(content)
    return path


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_jsonl_keeps_the_columns_asked_for_and_ids() -> None:
    path = write(
        "a.jsonl",
        b'\xef\xbb\xbf{"id": "x", "text": "one", "n": 1}\r\n\n{"text": "two", "extra": 3, "id": 7}\n{"text": 5}',
    )
    assert read(path, optional=("n",)) == [
        Record("x", "a.jsonl:1", {"text": "one", "n": 1}),
        Record(7, "a.jsonl:3", {"text": "two"}),
        Record(4, "a.jsonl:4", {"text": 5}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops}", "is no valid JSON: Expecting property name enclosed in double quotes at character 2"),
        (b"[1]", "expected a JSON object, got list"),
        (b"\xff{}", "is not valid UTF-8 at byte 0"),
        (b'{"title": 1, "id": 2}', "has no column 'text' (its columns: title, id)"),
        (b"[" * 100_000, "is JSON nested too deeply"),
        (b'{"text": "", "id": 1.5}', "column 'id': expected a text or a whole number as id, got float"),
        (b'{"text": "", "id": true}', "column 'id': expected a text or a whole number as id, got bool"),
        (b'{"text": "", "id": "\\udc00"}', "column 'id': holds an unpaired surrogate; expected valid Unicode"),
    ],
)
def test_a_bad_line_spoils_only_itself(line: bytes, message: str) -> None:
    path = write("a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, bad, last = read(path)
    assert bad == BadRecord(2, "a.jsonl:2", message)
    assert str(bad) == f"a.jsonl:2: {message}"
    assert [first, last] == [Record(1, "a.jsonl:1", {"text": "a"}), Record(3, "a.jsonl:3", {"text": "b"})]


def test_a_named_id_column_has_to_be_in_every_record() -> None:
    path = write("a.jsonl", b'{"text": "a", "key": "k"}\n{"text": "b"}\n{"text": "c", "key": null}\n')
    assert read(path, id_column="key") == [
        Record("k", "a.jsonl:1", {"text": "a"}),
        BadRecord(2, "a.jsonl:2", "has no column 'key' (its columns: text)"),
        BadRecord(3, "a.jsonl:3", "column 'key': expected a text or a whole number as id, got NoneType"),
    ]


def test_ids_are_found_by_the_names_that_corpora_have() -> None:
    path = write("a.jsonl", b'{"text": "a", "_id": "beir"}\n{"text": "b", "id": "own", "_id": "x"}\n{"text": "c"}\n')
    assert [record.id for record in read(path)] == ["beir", "own", 3]


def test_txt_has_an_item_a_line_blank_ones_too() -> None:
    path = write("a.txt", b"one\n\n\xff\nthree \r\nlast")
    assert read(path, "anything") == [
        Record(1, "a.txt:1", {"anything": "one"}),
        Record(2, "a.txt:2", {"anything": ""}),
        BadRecord(3, "a.txt:3", "is not valid UTF-8 at byte 0"),
        Record(4, "a.txt:4", {"anything": "three "}),
        Record(5, "a.txt:5", {"anything": "last"}),
    ]


def test_csv_names_the_line_where_a_row_starts() -> None:
    content = b'id,text\n1,"a\r\nb, ""c"""\n2\n\n3,\xff\n4,"x"y\n5,last\n'
    assert read(write("a.csv", content)) == [
        Record("1", "a.csv:2", {"text": 'a\r\nb, "c"'}),
        BadRecord(4, "a.csv:4", "has 1 fields; expected 2 (id, text)"),
        BadRecord(6, "a.csv:6", "is no valid row: holds bytes that are not UTF-8"),
        BadRecord(7, "a.csv:7", "is no valid row: ',' expected after '\"'"),
        Record("5", "a.csv:8", {"text": "last"}),
    ]


def test_a_quote_that_is_never_closed_does_not_become_a_text() -> None:
    assert read(write("a.csv", b'text\nfine\n"open\nlost\n')) == [
        Record(2, "a.csv:2", {"text": "fine"}),
        BadRecord(3, "a.csv:3", "is no valid row: unexpected end of data"),
    ]


def test_a_csv_field_may_be_longer_than_the_csv_modules_default() -> None:
    text = "word " * 100_000
    assert read(write("a.csv", f"text\n{text}\n".encode())) == [Record(2, "a.csv:2", {"text": text})]


def test_tsv() -> None:
    path = write("a.tsv", b'id\ttext\nx\ta, b\ny\t"tab\there"\n')
    assert read(path) == [Record("x", "a.tsv:2", {"text": "a, b"}), Record("y", "a.tsv:3", {"text": "tab\there"})]


def test_parquet_rows_count_from_one() -> None:
    table = pa.table({"text": ["a", None, "c"], "n": [5, 6, 7], "id": ["x", None, "z"], "list": [["p"], [], None]})
    pq.write_table(table, "a.parquet", row_group_size=2)
    assert read("a.parquet", optional=("list",)) == [
        Record("x", "a.parquet:1", {"text": "a", "list": ["p"]}),
        Record(2, "a.parquet:2", {"text": None, "list": []}),
        Record("z", "a.parquet:3", {"text": "c", "list": None}),
    ]
    assert [record.id for record in read("a.parquet", id_column="n")] == [5, 6, 7]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"text": "a"}\n'), ("a.csv", b"text\na\n"), ("a.txt", b"a\n")]
)
def test_gzipped_input_reads_as_the_plain_one(name: str, content: bytes) -> None:
    plain = read(write(name, content))
    zipped = read(write(f"{name}.gz", gzip.compress(content)))
    assert [record.fields for record in zipped if isinstance(record, Record)] == [{"text": "a"}]
    assert [record.id for record in zipped] == [record.id for record in plain]


def test_stdin_is_read_in_the_format_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"one\ntwo\n")
    assert read("-", file_format="txt") == [
        Record(1, "stdin:1", {"text": "one"}),
        Record(2, "stdin:2", {"text": "two"}),
    ]
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 5000)[:-20], "a.jsonl.gz: cannot be read beyond line "),
        ("a.txt.gz", b"plain", "a.txt.gz: cannot be read beyond line 0: Not a gzipped file"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as parquet: "),
        ("a.csv", b"id,txet\n", "a.csv: has no column 'text' (did you mean 'txet'? known: id, txet)"),
        ("a.csv", b"text,a,text\n", "a.csv:1: names columns more than once: text"),
        ("a.csv", b"", "a.csv:1: expected a first line that names the columns, found none"),
        ("a.csv", b"te\xffxt\n", "a.csv:1: is no valid row: holds bytes that are not UTF-8"),
    ],
)
def test_an_input_that_cannot_be_used_at_all(path: str, content: bytes, message: str) -> None:
    write(path, content)
    with pytest.raises(DataError) as raised:
        read(path)
    assert str(raised.value).startswith(message)


def test_missing_inputs_and_columns() -> None:
    with pytest.raises(DataError, match=r"^nix\.jsonl: cannot be read: No such file or directory$"):
        read("nix.jsonl")
    with pytest.raises(DataError, match=r"^nix: cannot be read: No such file or directory$"):
        read("nix")
    pq.write_table(pa.table({"text": ["a"]}), "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet: has no column 'key' \(known: text\)$"):
        read("a.parquet", id_column="key")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("a.dat", {}, "a.dat: the ending tells no format that can be read"),
        ("-", {}, "standard input has no name to tell its format by; pass --format"),
        ("-", {"file_format": "parquet"}, "standard input cannot be parquet"),
        ("a.txt", {"id_column": "key"}, "id column 'key': a txt input has no columns"),
    ],
)
def test_arguments_that_do_not_fit(path: str, options: dict[str, Any], message: str) -> None:
    write("a.txt", b"a\n")
    write("a.dat", b"a\n")
    with pytest.raises(UsageError) as raised:
        read(path, **options)
    assert str(raised.value).startswith(message)


def test_txt_cannot_hold_two_columns() -> None:
    with pytest.raises(UsageError, match=r"a\.txt: a txt input has one text a line, not the columns query, document"):
        read(write("a.txt", b"a\n"), "query", "document")


def test_parquet_without_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"reading a\.parquet needs .*rtx-retrieval\[parquet\]"):
        read("a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_endless_line_is_one_bad_record_read_in_bounded_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_LINE_BYTES", 2**20)
    asked: list[int] = []

    class Probe(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            asked.append(-1 if size is None else size)
            return super().readline(size)

    probe = Probe(b"x" * (5 * 2**20) + b'\n{"text": "a"}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(probe))
    bad, good = read("-", file_format="jsonl" if name == "a.jsonl" else "txt")
    assert bad == BadRecord(1, "stdin:1", "is longer than 1 MiB")
    assert isinstance(good, Record)
    assert good.id == 2
    assert 0 < min(asked) <= max(asked) <= 2**20 + 1


def test_an_endless_csv_line_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_LINE_BYTES", 2**20)
    path = write("a.csv", b"text\nfine\n" + b"x" * 2**21 + b"\nb\n")
    with Input(path) as source:
        rows = source.records(["text"])
        assert next(rows) == Record(2, "a.csv:2", {"text": "fine"})
        with pytest.raises(DataError, match=r"^a\.csv:3: is no valid row: is longer than 1 MiB$"):
            next(rows)


def test_records_come_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record is there before the second line was looked at."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(_OneLineThenFail()))
    with Input("-", file_format="txt") as source:
        rows = source.records(["text"])
        assert next(rows) == Record(1, "stdin:1", {"text": "one"})
        with pytest.raises(DataError, match="stdin: cannot be read beyond line 1: unplugged"):
            next(rows)


class _OneLineThenFail(io.BytesIO):
    def __init__(self) -> None:
        super().__init__(b"one\n")

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line:
            raise OSError("unplugged")
        return line


def test_fraction_goes_from_zero_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c", "d"]}), "a.parquet")
    write("a.txt", b"a\nb\nc\nd\n")
    for path in ("a.parquet", "a.txt"):
        with Input(path) as source:
            seen = [source.fraction(), *(source.fraction() for _ in source.records(["text"]))]
        assert seen == [0, 0.25, 0.5, 0.75, 1]
    stdin(monkeypatch, b"a\n")
    with Input("-", file_format="txt") as source:
        assert source.fraction() is None
