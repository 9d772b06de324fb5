from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rtx.runtime.errors import MissingExtraError, UsageError
from rtx.runtime.vectors import Rows, check_vector_file, ids_file, write_npy, write_parquet

DTYPES = [np.float32, np.int8, np.uint8]


def _parts(dtype: Any) -> list[Rows]:
    values = np.arange(20, dtype=dtype).reshape(5, 4)
    return [Rows(["a", 2], values[:2]), Rows([], values[:0]), Rows(["ü", "d", "e"], values[2:])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "out.npy"
    write_npy(path, _parts(dtype), shape=(5, 4), dtype=np.dtype(dtype))
    vectors = np.load(path)
    assert vectors.dtype == dtype
    np.testing.assert_array_equal(vectors, np.arange(20, dtype=dtype).reshape(5, 4))
    lines = ids_file(path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": "a"}, {"id": 2}, {"id": "ü"}, {"id": "d"}, {"id": "e"}]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parquet(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "out.parquet"
    write_parquet(path, _parts(dtype), width=4, dtype=np.dtype(dtype), metadata={"precision": "x"})
    table = pq.read_table(path)
    kind = table.schema.field("embedding").type
    expected = np.arange(20, dtype=dtype).reshape(5, 4)
    if dtype == np.uint8:
        assert kind == pa.binary(4)
        vectors = np.stack([np.frombuffer(code, np.uint8) for code in table["embedding"].to_pylist()])
    else:
        assert pa.types.is_fixed_size_list(kind)
        assert kind.list_size == 4
        assert kind.value_type == pa.from_numpy_dtype(dtype)
        vectors = np.array(table["embedding"].to_pylist(), dtype=dtype)
    np.testing.assert_array_equal(vectors, expected)
    assert table["id"].to_pylist() == ["a", "2", "ü", "d", "e"]
    assert json.loads(table.schema.metadata[b"rtx"]) == {"precision": "x"}


def test_names_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"out\.csv: expected a name that ends in \.npy or \.parquet$"):
        check_vector_file(tmp_path / "out.csv")
    with pytest.raises(UsageError, match=r"out\.npy: the folder .*/nix does not exist$"):
        check_vector_file(tmp_path / "nix" / "out.npy")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"writing out\.parquet needs .*rtx-retrieval\[parquet\]"):
        check_vector_file(tmp_path / "out.parquet")
