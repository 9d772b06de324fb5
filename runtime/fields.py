"""The fields of a training row: texts, lists, and all spellings of negatives.

What is wrong is added to a list of problems, so that one look at a row names all of it.
"""

from __future__ import annotations

import json
import numbers
import re
from collections.abc import Iterable, Mapping

from rtx.runtime.errors import ItemError
from rtx.runtime.text import check_text

Row = Mapping[str, object]

LARGEST_FLOAT32 = 3.4028234663852886e38
NUMBERED_NEGATIVE = re.compile(r"negative_\d+")


def is_blank(value: object) -> bool:
    """Whether a field has nothing: null, or an empty cell."""
    return value is None or (isinstance(value, str) and not value)


def finite_float32(value: object) -> float | None:
    """A number that is finite in float32, also as text (a cell of a csv file); None for anything else, booleans too."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_FLOAT32 else None


def missing(row: Row, name: str) -> str:
    """The problem that a row lacks a field."""
    return f"has no {name}; it has {', '.join(sorted(row)) or 'no field at all'}"


def read_text(row: Row, name: str, problems: list[str]) -> str:
    """A text that is not empty; what comes with a problem is not to be used."""
    if name not in row:
        problems.append(missing(row, name))
        return ""
    value = check_text(0, row[name])
    if isinstance(value, ItemError):
        problems.append(f"{name}: {value.message}")
        return ""
    if not value.strip():
        problems.append(f"{name}: is empty")
    return value


def single_negatives(names: Iterable[str]) -> tuple[str, ...]:
    """Of a row's columns, those that may have one negative each, in order."""
    numbered = sorted((name for name in names if NUMBERED_NEGATIVE.fullmatch(name)), key=lambda name: int(name[9:]))
    return ("negative", *numbered)


def read_negatives(row: Row, single: tuple[str, ...], problems: list[str]) -> tuple[str, ...]:
    """All negatives of a row, from `negative`, `negative_1` … (`single`) and then `negatives`, a list.

    A field that is blank has none. In the list nothing may be blank, since `scores` may go with it place by place.
    """
    found = [(name, row[name]) for name in single if not is_blank(row.get(name))]
    if not is_blank(row.get("negatives")):
        found += read_items(row, "negatives", "texts", problems)
    return tuple(read_text({name: value}, name, problems) for name, value in found)


def read_items(row: Row, name: str, kind: str, problems: list[str]) -> list[tuple[str, object]]:
    """The items of a list with their places, as "negatives[0]"."""
    if name not in row:
        problems.append(missing(row, name))
        return []
    several = row[name]
    if isinstance(several, str):
        # A cell of a csv file.
        try:
            several = json.loads(several)
        except (ValueError, RecursionError):
            several = None
        if not isinstance(several, list):
            problems.append(f"{name}: expected a list of {kind} (in csv: a JSON list)")
            return []
    if isinstance(several, Mapping) or not isinstance(several, Iterable):
        problems.append(f"{name}: expected a list of {kind}, got {type(several).__name__}")
        return []
    return [(f"{name}[{place}]", value) for place, value in enumerate(several)]
