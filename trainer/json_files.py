"""JSON files of a checkpoint: read and written, and single values checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtx.runtime.errors import CheckpointError


def one_of(source: Path, data: Mapping[str, Any], key: str, known: Sequence[str]) -> str | None:
    value = data.get(key)
    if value is not None and value not in known:
        raise CheckpointError(f"{source}: {key}: expected one of {', '.join(known)}, got {value!r}")
    return value


def typed(source: Path, data: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = data.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if value is not None and type(value) is not kind:
        raise CheckpointError(f"{source}: {key}: expected {kind.__name__}, got {value!r}")
    return value


def read_json(path: Path) -> Any:
    """The decoded file; None if there is none.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as broken:
        raise CheckpointError(f"{path}: not readable as JSON: {broken}") from broken


def read_object(path: Path) -> dict[str, Any] | None:
    data = read_json(path)
    if data is not None and not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: object, *, indent: int, sort_keys: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(data, indent=indent, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")
