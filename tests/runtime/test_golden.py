from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rtx.runtime.bundle import Bundle
from rtx.runtime.engine import Budget
from rtx.runtime.errors import BundleError, ItemError
from rtx.runtime.golden import Golden, deviation
from rtx.runtime.manifest import Tolerance
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

NAN = float("nan")


def array(values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


GOLDEN = Golden(
    items=("a text", "", "Größe 東京 \U0001f600 \0"),
    prompts=(None, "query", "document"),
    tokens=(Encoded([1, 5, 2], [0, 0, 0]), Encoded([1, 2], [0, 0], 1), Encoded([1, 7, 7, 2], [0, 0, 1, 1], 2)),
    outputs=array([[1, 0], [0.6, 0.8], [0, -1]]),
)


def assert_equal(a: Golden, b: Golden) -> None:
    assert (a.items, a.prompts, a.tokens) == (b.items, b.prompts, b.tokens)
    np.testing.assert_array_equal(a.outputs, b.outputs)
    assert a.outputs.dtype == b.outputs.dtype


def test_round_trip():
    assert_equal(Golden.from_bytes(GOLDEN.to_bytes()), GOLDEN)


def test_round_trip_of_pairs():
    items = (("q", "d"), ("", "東京"))
    tokens = (Encoded([1, 5, 2], [0, 0, 1]), Encoded([1, 2], [0, 1]))
    golden = Golden(items, (None, None), tokens, array([0.5, -3]))
    assert_equal(Golden.from_bytes(golden.to_bytes()), golden)


def test_the_same_golden_set_gives_the_same_bytes():
    """No time and no order of a run is in the file, so a bundle can be reproduced."""
    content = GOLDEN.to_bytes()
    assert content == Golden.from_bytes(content).to_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", GOLDEN.to_bytes()[:200], b"\x93NUMPY"])
def test_something_else_is_an_error(content: bytes):
    with pytest.raises(BundleError, match=r"^golden\.npz: cannot be read \("):
        Golden.from_bytes(content)


def test_code_in_the_file_is_not_run():
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.array([{"items": []}], dtype=object))
    with pytest.raises(BundleError, match=r"golden\.npz: cannot be read \(ValueError: Object arrays cannot be loaded"):
        Golden.from_bytes(buffer.getvalue())


def test_deviation_of_vectors_by_hand():
    golden = array([[1, 0], [0, 2], [3, 4]])
    outputs = array([[1, 0], [0, 4], [4, 3]])
    found = deviation(outputs, golden)
    # cosines 1, 1, 24/25; differences 0, 2, 1
    assert found.min_cosine == pytest.approx(0.96, abs=1e-12)
    assert found.mean_cosine == pytest.approx((1 + 1 + 0.96) / 3, abs=1e-12)
    assert (found.max_abs, found.worst) == (2.0, 2)


def test_deviation_of_scores_by_hand():
    found = deviation(array([1, -3.5, 0]), array([1, -4, 0.25]))
    # differences 0, 0.5, 0.25 relative to the largest score, 4
    assert (found.min_cosine, found.mean_cosine) == (0.875, pytest.approx((1 + 0.875 + 0.9375) / 3))
    assert (found.max_abs, found.worst) == (0.5, 1)


def test_equal_outputs_do_not_deviate():
    for golden in (array([[0.6, 0.8]]), array([0.1, 0.2]), array([0, 0])):
        found = deviation(golden, golden)
        assert found.min_cosine == pytest.approx(1, abs=1e-12)
        assert found.max_abs == 0


@pytest.mark.parametrize(
    ("outputs", "golden", "worst"),
    [
        ([[1, 0], [NAN, 1]], [[1, 0], [0, 1]], 1),
        ([[1, 0], [0, 1]], [[1, 0], [NAN, 1]], 1),
        ([[1, 0], [np.inf, 1]], [[1, 0], [0, 1]], 1),
        ([1, NAN], [1, 2], 1),
        ([1, np.inf], [1, 2], 1),
        ([1, 2], [1, NAN], 0),  # the scale of all differences is not known
    ],
)
def test_what_is_not_finite_is_never_within(outputs: object, golden: object, worst: int):
    with np.errstate(invalid="ignore"):
        found = deviation(array(outputs), array(golden))
    assert found.worst == worst
    assert not found.within(Tolerance(min_cosine=-10, max_abs=1e30))


def test_within_holds_both_limits():
    found = deviation(array([[1, 0.1]]), array([[1, 0]]))
    assert found.within(Tolerance(min_cosine=0.99, max_abs=0.11))
    assert not found.within(Tolerance(min_cosine=0.999, max_abs=0.11))
    assert not found.within(Tolerance(min_cosine=0.99, max_abs=0.09))
    assert not found.within(Tolerance(min_cosine=NAN, max_abs=1))


@pytest.mark.parametrize("fixture", ["toy_bundle", "toy_reranker_bundle"])
def test_a_bundles_golden_set_holds(fixture: str, request: pytest.FixtureRequest):
    bundle = Bundle.open(request.getfixturevalue(fixture))
    golden, preprocessor = bundle.golden(), bundle.preprocessor()
    assert tuple(golden.tokenize(preprocessor)) == golden.tokens
    for name, variant in bundle.manifest.variants.items():
        for budget in (Budget(), Budget(max_batch_items=1), Budget(max_batch_tokens=100)):
            engine = bundle.engine(name, threads=1)
            assert golden.run(engine, preprocessor, budget).within(variant.tolerance)


def test_another_tokenizer_gives_other_tokens(toy_bundle: Path):
    bundle = Bundle.open(toy_bundle)
    golden = bundle.golden()
    changed = bundle.read("tokenizer.json").decode().replace('"lowercase":true', '"lowercase":false')
    found = golden.tokenize(Preprocessor(bundle.manifest.contract, changed))
    different = [index for index, pair in enumerate(zip(found, golden.tokens, strict=True)) if pair[0] != pair[1]]
    assert [golden.items[index] for index in different] == ["Sort THE list"]
    assert not any(isinstance(item, ItemError) for item in found)
