"""The gate, on constructed arrays: what fails is said with its worst item, and NaN never passes."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from rtx.export.gate import Gate, Verdict, judge, limits, surroundings
from rtx.runtime.errors import EngineError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Comparison, QueryChange
from rtx.runtime.golden import Golden
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

ITEMS = ("the first", "the second", "the third")


def golden(outputs):
    tokens = tuple(Encoded([1, 2, 3], [0, 0, 0]) for _ in ITEMS)
    return Golden(ITEMS, (None,) * len(ITEMS), tokens, np.asarray(outputs, dtype=np.float32))


VECTORS = np.eye(3, 8, dtype=np.float32)


def verdict(alone=VECTORS, elsewhere=None, precision="fp32", ranking=None, expected=VECTORS, **options) -> Verdict:
    task = "embed" if expected.ndim == 2 else "rerank"
    held_to = limits(precision, task, float(np.abs(expected).max()))
    stacked = np.stack([alone] * 3) if elsewhere is None else elsewhere
    return judge("candidate", held_to, alone, stacked, golden(expected), ranking, **options)


def comparison(difference, interval=(-0.01, 0.01)):
    worst = (QueryChange("q7", "reset?", 1.0, 0.5),)
    return Comparison(
        "faq", "0" * 64, 100, 10, 0.8, 0.8 + difference, difference, interval, 0.95, 0.99, 0.0, 0.0, 1, 2, worst
    )


def moved(angle, row=1):
    """Vectors of which one is turned by an angle."""
    vectors = VECTORS.copy()
    vectors[row] = np.cos(angle) * VECTORS[row] + np.sin(angle) * np.eye(1, 8, 7, dtype=np.float32)[0]
    return vectors


def test_equal_outputs_pass():
    found = verdict()
    assert found.passed
    assert found.parity.min_cosine == found.invariance.min_cosine == 1.0
    assert found.parity.max_abs == found.invariance.max_abs == 0.0


@pytest.mark.parametrize(
    ("precision", "allowed", "too_far"), [("fp32", 9e-6, 2e-5), ("fp16", 0.015, 0.03), ("int8", 0.09, 0.3)]
)
def test_parity_is_held_to_the_precision(precision, allowed, too_far):
    assert verdict(moved(allowed), precision=precision).passed
    found = verdict(moved(too_far), precision=precision)
    (failure,) = found.failures
    assert failure.startswith("differs from PyTorch: least cosine ")
    assert failure.endswith("worst item: 'the second'")
    assert f"(at most {found.limits.parity.max_abs:.2e})" in failure
    assert found.parity.worst == 1


@pytest.mark.parametrize("surrounding", [0, 1, 2])
def test_every_surrounding_counts(surrounding):
    elsewhere = np.stack([VECTORS] * 3)
    elsewhere[surrounding] = moved(1e-3, row=2)
    (failure,) = verdict(elsewhere=elsewhere).failures
    assert failure.startswith("depends on the batch: ")
    assert failure.endswith("worst item: 'the third'")


def test_a_large_difference_in_one_surrounding_does_not_hide_a_bad_cosine_in_another():
    expected = np.stack([1000 * VECTORS[0], 0.1 * VECTORS[1], VECTORS[2]])
    elsewhere = np.stack([expected] * 3)
    elsewhere[0, 0] *= 1.0015  # off by 1.5 at a cosine of 1: within 2e-2 of the magnitude
    elsewhere[1, 1] = 0.1 * moved(0.3)[1]  # off by 0.03 at a cosine of 0.955
    (failure,) = verdict(expected, elsewhere, "int8", expected=expected).failures
    assert failure.startswith("depends on the batch: least cosine 0.955")
    assert failure.endswith("worst item: 'the second'")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_what_is_not_finite_never_passes(bad, task):
    expected = VECTORS if task == "embed" else np.array([0.1, 0.5, 0.9], dtype=np.float32)
    broken = expected.copy()
    broken[1] = bad
    with np.errstate(invalid="ignore"):
        found = verdict(broken, expected=expected)
        in_batch = verdict(expected, np.stack([expected, broken, expected]), expected=expected)
        reference = verdict(expected, expected=broken)
    assert found.failures[0].startswith("differs from PyTorch")
    assert found.failures[0].endswith("worst item: 'the second'")
    assert in_batch.failures[0].startswith("depends on the batch")
    assert not reference.passed
    # JSON has no NaN.
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["parity"]["max_abs"] is None


def test_scores_are_held_relative_to_the_largest():
    expected = np.array([-200.0, 3.0, 50.0], dtype=np.float32)
    assert verdict(expected + np.float32(1e-3), expected=expected).passed
    (failure,) = verdict(expected + np.array([0, 0.1, 0], np.float32), expected=expected).failures
    assert failure.endswith("worst item: 'the second'")
    assert verdict(expected * np.float32(1.01), expected=expected, precision="int8").passed


@pytest.mark.parametrize(("difference", "passes"), [(-0.0049, True), (0.01, True), (-0.0051, False), (np.nan, False)])
def test_ranking_may_lose_as_much_as_is_allowed(difference, passes):
    found = verdict(ranking=comparison(difference, (-0.02, 0.003)))
    assert found.passed == passes
    assert verdict(ranking=comparison(difference), max_ndcg_drop=0.1).passed == (not np.isnan(difference))
    if not passes:
        (failure,) = found.failures
        assert failure == (
            f"loses ranking quality: NDCG@10 {difference:+.4f} against PyTorch (95 % interval -0.0200 to +0.0030), "
            "allowed is -0.005"
        )
    assert found.to_dict()["ranking"]["worst"] == [{"query": "q7", "text": "reset?", "reference": 1.0, "other": 0.5}]


def test_limits_grow_with_the_error_that_a_precision_makes():
    for task in ("embed", "rerank"):
        held = [limits(precision, task, 0.3) for precision in ("fp32", "fp16", "int8")]
        for tighter, looser in itertools.pairwise(held):
            for check in ("parity", "invariance"):
                assert getattr(tighter, check).max_abs < getattr(looser, check).max_abs
                assert getattr(tighter, check).min_cosine > getattr(looser, check).min_cosine
    assert limits("fp32", "embed", 30.0).parity.max_abs == pytest.approx(3e-4)


@pytest.fixture(scope="module")
def gated(tiny_checkpoint):
    """A model with its gate; a tiny checkpoint of the architecture that loads fastest."""
    model = RetrievalModel.load(tiny_checkpoint("distilbert", prompts={"query": "find: "}))
    return model, Gate(model)


class Wrong:
    """PyTorch with one thing wrong."""

    name = "wrong"
    packed = False
    max_rows = staticmethod(lambda _: None)

    def __init__(self, model, break_batch=None, break_output=None):
        self.engine = model.engine()
        self.break_batch = break_batch or (lambda batch: batch)
        self.break_output = break_output or (lambda output: output)

    def run(self, batch):
        return self.break_output(self.engine.run(self.break_batch(batch)))

    def close(self):
        pass


def failures(gated, **wrong):
    model, gate = gated
    return gate.judge("candidate", "fp32", Wrong(model, **wrong)).failures


def test_pytorch_passes_its_own_gate(gated):
    assert failures(gated) == ()


def test_a_lost_mask_is_found_where_there_is_padding(gated):
    def without_mask(batch):
        return batch | {"attention_mask": np.ones_like(batch["attention_mask"])}

    (failure,) = failures(gated, break_batch=without_mask)
    assert failure.startswith("depends on the batch: ")


def test_positions_that_count_padding_are_found(gated):
    def turned(batch):
        return {name: np.ascontiguousarray(array[:, ::-1]).copy() for name, array in batch.items()}

    assert [failure.partition(":")[0] for failure in failures(gated, break_batch=turned)] == [
        "differs from PyTorch",
        "depends on the batch",
    ]


def test_a_row_that_depends_on_its_neighbours_is_found(gated):
    def per_tensor(output):
        step = np.abs(output).max() / 127
        return (np.rint(output / step) * step).astype(np.float32) if len(output) > 1 else output

    (failure,) = failures(gated, break_output=per_tensor)
    assert failure.startswith("depends on the batch: ")


def test_rows_out_of_order_are_found(gated):
    (failure,) = failures(gated, break_output=lambda output: output[::-1].copy())
    assert failure.startswith("depends on the batch: ")


def test_swapped_dimensions_are_found(gated):
    assert failures(gated, break_output=lambda output: output[:, ::-1].copy())[0].startswith("differs")


def test_an_engine_that_fails_is_refused_with_its_reason(gated):
    def fail(_):
        raise EngineError("wrong: out of memory")

    assert failures(gated, break_output=fail) == ("cannot be run: wrong: out of memory",)
    (failure,) = failures(gated, break_output=lambda output: output.astype(np.float64))
    assert failure.startswith("cannot be run: wrong: expected [1, 32] float32 from the engine")


def test_ranking_is_measured_against_pytorch(gated):
    model, _ = gated
    documents = {f"d{i}": text for i, text in enumerate(["reset the pump", "a red cat", "sort the list", "close it"])}
    evalset = EvalSet("small", {"q": "how to reset", "r": "sorting"}, documents, {"q": {"d0": 1}, "r": {"d2": 1}})
    gate = Gate(model, evalset=evalset)
    right = gate.judge("candidate", "fp32", Wrong(model))
    assert right.passed
    assert right.ranking.difference == 0.0
    # The golden set takes from the evaluation set too.
    assert "how to reset" in gate.golden.items
    assert "a red cat" in gate.golden.items

    def opposite(output):
        return output if len(output) == 1 else -output

    assert not gate.judge("candidate", "fp32", Wrong(model, break_output=opposite)).passed


def test_min_cosine_takes_the_place_of_the_precisions_own_but_for_fp32(gated):
    model, _ = gated
    gate = Gate(model, min_cosine=0.5)
    assert gate.limits("int8").parity.min_cosine == 0.5
    assert gate.limits("fp32").parity.min_cosine == 1 - 1e-5


def test_surroundings_are_a_mixed_batch_a_sorted_one_and_padding(gated):
    model, gate = gated
    seen = []

    def record(batch):
        seen.append(batch["attention_mask"].copy())
        return batch

    items = gate.golden.tokens[:6]
    found = surroundings(Wrong(model, break_batch=record), model.preprocessor, items)
    assert found.shape == (3, 6, 32)
    assert [len(mask) for mask in seen[:2]] == [4, 2]
    longest = model.contract.max_tokens
    for mask, item in zip(seen[-6:], items, strict=True):
        assert mask.shape == (1, min(len(item.ids) + 7, longest))
        assert mask.sum() == len(item.ids)


def test_golden_items_cover_every_kind_of_prompt_and_the_limit(gated):
    model, gate = gated
    assert set(gate.golden.prompts) == {None, "query", "document"}
    lengths = [len(item.ids) for item in gate.golden.tokens]
    assert min(lengths) == 2  # the empty text
    assert max(lengths) == model.contract.max_tokens
    np.testing.assert_array_equal(
        gate.golden.outputs[4], model.engine().run(model.preprocessor.collate([gate.golden.tokens[4]]))[0]
    )
