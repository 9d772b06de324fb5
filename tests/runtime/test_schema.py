from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from rtx.runtime.errors import BundleError, UsageError
from rtx.runtime.schema import parse


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size: expected at least 0, got {self.size}")


@dataclass(frozen=True)
class Whole:
    title: str
    rate: float
    flag: bool
    mode: Literal["fast", "small"]
    part: Part
    limit: int | None = None
    parts: tuple[Part, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)


VALID = {"title": "t", "rate": 2, "flag": True, "mode": "fast", "part": {"name": "p"}}


def problems(data: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse(Whole, data, source="test.toml")
    source, _, rest = str(caught.value).partition(": ")
    assert source == "test.toml"
    return rest.split("; ")


def test_values_are_built_and_defaults_filled():
    data = VALID | {"parts": [{"name": "a", "size": 3}, {"name": "b"}], "sizes": {"x": 1}, "limit": 5}
    whole = parse(Whole, data, source="test.toml")
    assert whole == Whole("t", 2.0, True, "fast", Part("p"), 5, (Part("a", 3), Part("b")), {"x": 1})
    assert type(whole.rate) is float
    assert parse(Whole, VALID | {"limit": None}, source="test.toml").limit is None


def test_every_offender_is_listed_at_once():
    data = {
        "titel": "t",
        "rate": "high",
        "flag": 1,
        "mode": "slow",
        "part": {"name": 3, "sise": 1},
        "limit": True,
        "parts": [{"name": "a"}, {}],
        "sizes": {"x": 1.5},
    }
    assert problems(data) == [
        "unknown key 'titel' (did you mean 'title'? known: flag, limit, mode, part, parts, rate, sizes, title)",
        "missing key 'title'",
        "rate: expected float, got str 'high'",
        "flag: expected bool, got int 1",
        "mode: expected one of 'fast', 'small', got 'slow'",
        "unknown key 'part.sise' (did you mean 'size'? known: name, size)",
        "part.name: expected str, got int 3",
        "limit: expected int, got bool True",
        "missing key 'parts[1].name'",
        "sizes.x: expected int, got float 1.5",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("title", None, "title: expected str, got NoneType None"),
        ("rate", True, "rate: expected float, got bool True"),
        ("parts", {"name": "a"}, "parts: expected a list, got dict {'name': 'a'}"),
        ("parts", "ab", "parts: expected a list, got str 'ab'"),
        ("sizes", [1], "sizes: expected a table of keys, got list [1]"),
        ("part", "p", "part: expected a table of keys, got str 'p'"),
        ("part", {"name": "p", "size": -1}, "part.size: expected at least 0, got -1"),
        ("parts", [{"name": "p", "size": -1}], "parts[0].size: expected at least 0, got -1"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_place(key: str, value: object, message: str):
    assert problems(VALID | {key: value}) == [message]


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_something_else_than_a_table_is_refused(data: object):
    assert problems(data) == [f"the top level: expected a table of keys, got {type(data).__name__} {data!r}"]


def test_a_long_value_is_cut_in_the_message():
    assert len(problems(VALID | {"rate": "x" * 1000})[0]) < 120


def test_the_error_class_is_the_callers():
    with pytest.raises(BundleError, match=r"^manifest\.json: missing key 'title'$"):
        parse(
            Whole,
            {key: value for key, value in VALID.items() if key != "title"},
            source="manifest.json",
            error=BundleError,
        )
