"""Frozen dataclasses from plain data, strictly: every offender is listed, with what was expected.

One mechanism reads manifests, contracts and training configurations. It knows str, int, float, bool, Literal, X | None,
tuple[X, ...], dict[str, X] and nested dataclasses, which is all that those need.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from rtx.runtime.errors import RtxError, UsageError, nearest

T = TypeVar("T")


def parse(cls: type[T], data: object, *, source: str, error: type[RtxError] = UsageError) -> T:
    """Build the dataclass `cls` from decoded JSON or TOML.

    Args:
        cls: a dataclass; a field without default is required.
        data: a mapping from field names to values.
        source: what the data is, for the message ("manifest.json", "train.toml").
        error: the class to raise.

    Raises:
        error: lists every unknown key, missing key and value of the wrong type at once. A ValueError that the dataclass
            raises in `__post_init__` is passed on the same way.
    """
    problems: list[str] = []
    value = _build(cls, data, "", problems)
    if problems:
        raise error(f"{source}: " + "; ".join(problems))
    return typing.cast(T, value)


def _build(cls: type[Any], data: object, where: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{where or 'the top level'}: expected a table of keys, got {_name(data)}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    prefix = f"{where}." if where else ""
    problems += [f"unknown key '{prefix}{key}' ({nearest(str(key), fields)})" for key in data if key not in fields]
    values: dict[str, Any] = {}
    before = len(problems)
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], prefix + name, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing key '{prefix}{name}'")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as broken:
        problems.append(f"{prefix}{broken}" if prefix else str(broken))
        return None


def _convert(hint: Any, value: object, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, problems)
    if origin is typing.Literal:
        if value not in arguments:
            expected = ", ".join(map(repr, arguments))
            problems.append(f"{where}: expected one of {expected}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where}: expected a list, got {_name(value)}")
            return ()
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{where}: expected a table of keys, got {_name(value)}")
            return {}
        return {str(key): _convert(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, problems)
    if hint is Any or hint is object:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int to Python, and 1 is no answer to a yes-or-no question.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{where}: expected {hint.__name__}, got {_name(value)}")
    return value


def _name(value: object) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
