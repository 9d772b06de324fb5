"""Vectors to files: npy with the ids beside it, or parquet. Written part by part, in the memory of one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.atomic import atomic_file, check_target
from rtx.runtime.errors import MissingExtraError, UsageError
from rtx.runtime.failures import failures_file


class Rows(NamedTuple):
    """Some rows of an output: ids, and vectors [len(ids), width] in the same order."""

    ids: Sequence[str | int]
    vectors: NDArray[Any]


def check_vector_file(path: Path, *, source: str | None = None) -> None:
    """Find out before any work is done whether vectors can be written there.

    Args:
        path: of the vectors.
        source: as in `check_target`.

    Raises:
        UsageError: the name ends neither in .npy nor in .parquet, or no file may be written there or beside it.
        MissingExtraError: parquet is asked for and pyarrow is not installed.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise UsageError(f"{path}: expected a name that ends in .npy or .parquet")
    for file in (path, ids_file(path), failures_file(path)):
        check_target(file, source=source)
    if path.suffix == ".parquet":
        _pyarrow(path)


def ids_file(path: Path) -> Path:
    """Where the ids of an npy file are: a line `{"id": ...}` for each of its rows."""
    return path.with_name(path.name + ".ids.jsonl")


def write_npy(
    path: Path, rows: Iterable[Rows], *, shape: tuple[int, int], dtype: np.dtype[Any], workspace: Path | None = None
) -> None:
    """Write `path`, and before it `ids_file(path)`.

    Args:
        path: the file.
        rows: the content in order.
        shape, dtype: of all vectors together.
        workspace: as in `atomic_file`.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with atomic_file(path, workspace=workspace) as stream, atomic_file(ids_file(path), workspace=workspace) as ids:
        np.lib.format.write_array_header_1_0(stream, header)
        for part in rows:
            stream.write(np.ascontiguousarray(part.vectors, dtype=dtype).data)
            ids.writelines(json.dumps({"id": identifier}).encode() + b"\n" for identifier in part.ids)


def write_parquet(
    path: Path,
    rows: Iterable[Rows],
    *,
    width: int,
    dtype: np.dtype[Any],
    metadata: Mapping[str, Any],
    workspace: Path | None = None,
) -> None:
    """Write columns `id` (string) and `embedding`: lists of fixed size; of uint8 codes binary of fixed size.

    Args:
        path: the file.
        rows: the content in order, a row group each.
        width: of all vectors.
        dtype: of all vectors: float32, int8 or uint8.
        metadata: goes into the file's own under "rtx", as JSON.
        workspace: as in `atomic_file`.
    """
    pa = _pyarrow(path)
    if dtype == np.uint8:
        kind = pa.binary(width)
    else:
        kind = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False), width)
    schema = pa.schema(
        [pa.field("id", pa.string(), nullable=False), pa.field("embedding", kind, nullable=False)],
        metadata={"rtx": json.dumps(metadata)},
    )
    with (
        atomic_file(path, workspace=workspace) as stream,
        pa.parquet.ParquetWriter(stream, schema, use_dictionary=False) as writer,
    ):
        for part in rows:
            flat = np.ascontiguousarray(part.vectors, dtype=dtype).reshape(-1)
            if dtype == np.uint8:
                embedding = pa.FixedSizeBinaryArray.from_buffers(kind, len(part.ids), [None, pa.py_buffer(flat)])
            else:
                embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
            ids = pa.array([str(identifier) for identifier in part.ids], pa.string())
            writer.write_table(pa.Table.from_arrays([ids, embedding], schema=schema))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise MissingExtraError("pyarrow", "parquet", f"writing {path.name}") from missing
    return pyarrow
