from __future__ import annotations

import inspect
import pickle
import re

import pytest

import rtx.runtime
from rtx.runtime import errors
from rtx.runtime.errors import InvalidItemsError, ItemError, MissingExtraError, RtxError, nearest

LINE = re.compile(r"^    (?P<tree>[│├└─ ]*)(?P<name>\w+Error) +exit +(?P<exit>\d+) +HTTP (?P<http>\d+)")


def drawn() -> dict[str, tuple[str, int, int]]:
    """The tree of the docstring: by class its parent, its exit code and its HTTP status."""
    tree: dict[str, tuple[str, int, int]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := LINE.match(line):
            depth = len(match["tree"]) // 4
            path[depth:] = [match["name"]]
            parent = path[depth - 1] if depth else "Exception"
            tree[match["name"]] = (parent, int(match["exit"]), int(match["http"]))
    return tree


def defined() -> dict[str, type[RtxError]]:
    classes = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in classes if issubclass(cls, RtxError)}


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    actual = {name: (cls.__bases__[0].__name__, cls.exit_code, cls.http_status) for name, cls in defined().items()}
    assert "RtxError" in actual
    assert drawn() == actual


def test_exit_codes_tell_the_branches_apart():
    branches = [cls for cls in defined().values() if cls.__bases__[0] is RtxError]
    codes = [RtxError.exit_code, *(cls.exit_code for cls in branches)]
    assert sorted(codes) == list(range(1, len(codes) + 1))


def test_every_class_is_public():
    assert {*defined(), "ItemError"} <= set(rtx.runtime.__all__)


def test_invalid_items_lists_all_up_to_ten():
    few = InvalidItemsError([ItemError(2, "is empty"), ItemError(5, "is a number")], total=7)
    assert str(few) == "2 of 7 items cannot be used:\n  item 2: is empty\n  item 5: is a number"
    many = InvalidItemsError([ItemError(index, "bad") for index in range(12)], total=20)
    assert str(many).splitlines()[0] == "12 of 20 items cannot be used:"
    assert str(many).splitlines()[-2:] == ["  item 9: bad", "  … and 2 more"]
    assert [item.index for item in many.items] == list(range(12))


def test_a_missing_extra_says_what_installs_it():
    error = MissingExtraError("onnxruntime", "cpu", "running an ONNX graph")
    assert str(error) == (
        "running an ONNX graph needs the package 'onnxruntime', which is not installed. "
        "Install it with: pip install 'rtx-retrieval[cpu]'"
    )


@pytest.mark.parametrize(
    "error",
    [
        *(
            cls("a message")
            for name, cls in defined().items()
            if name not in ("InvalidItemsError", "MissingExtraError")
        ),
        InvalidItemsError([ItemError(1, "bad")], total=3),
        MissingExtraError("torch", "train", "training"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: RtxError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_nearest_names_the_right_spelling():
    assert nearest("epoch", ["batch_size", "epochs"]) == "did you mean 'epochs'? known: batch_size, epochs"
    assert nearest("zzz", {"b", "a"}) == "known: a, b"
    assert nearest("x", []) == "known: (none)"
