from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest

from rtx.runtime.errors import DataError, UsageError
from rtx.trainer.data import TrainingData
from rtx.trainer.sampler import BatchSampler


def data_of(rows):
    return TrainingData.from_rows(rows, needs="positives")


def row_of(query, positive, *negatives):
    return {"query": query, "positive": positive, "negatives": list(negatives)}


def unlike(count):
    return [row_of(f"q{i}", f"d{i}", "same") for i in range(count)]


def clash(one, two):
    """Whether one row's texts would be false negatives of the other's, told by their text."""
    first, second = (
        ({row.query, row.documents[0]}, set(row.documents[1:])) for row in (one, two)
    )  # query and positive, negatives
    return bool(first[0] & second[0] or first[0] & second[1] or first[1] & second[0])


def random_rows(count, texts, seed):
    generator = np.random.default_rng(seed)
    return [
        row_of(f"q{q}", f"d{p}", *(f"d{n}" for n in negatives if n != p))
        for q, p, *negatives in generator.integers(texts, size=(count, 5)).tolist()
    ]


@pytest.fixture
def small_windows(monkeypatch):
    """Four batches a window."""
    monkeypatch.setattr("rtx.trainer.sampler._WINDOW_BATCHES", 4)
    monkeypatch.setattr("rtx.trainer.sampler._WINDOW_ROWS", 1)


@pytest.mark.parametrize(("count", "texts", "batch_size"), [(100, 60, 8), (257, 1000, 32), (40, 5, 4), (7, 100, 64)])
def test_no_batch_holds_a_false_negative(count, texts, batch_size):
    data = data_of(random_rows(count, texts, seed=count))
    sampler = BatchSampler(data, batch_size=batch_size, seed=1, no_duplicates=True)
    for epoch in range(3):
        plan = list(sampler.plan(epoch))
        assert len(plan) == len(sampler) == -(-count // batch_size)
        assert all(1 <= len(batch) <= batch_size for batch in plan)
        rows = list(chain.from_iterable(plan))
        assert len(rows) == len(set(rows))
        for batch in plan:
            for one, two in combinations(batch, 2):
                assert not clash(data[one], data[two])
        # A row is left out only where it fits nowhere.
        for row in set(range(count)) - set(rows):
            for batch in plan:
                full = len(batch) >= count // len(plan)
                assert full or any(clash(data[row], data[other]) for other in batch)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    ("count", "texts", "batch_size"), [(400, 300, 8), (1000, 2000, 16), (300, 60, 4), (999, 150, 7)]
)
def test_windows_keep_what_a_whole_plan_keeps(count, texts, batch_size):
    data = data_of(random_rows(count, texts, seed=count))
    sampler = BatchSampler(data, batch_size=batch_size, seed=1, no_duplicates=True)
    plan = list(sampler.plan(0))
    assert len(plan) == len(sampler) == -(-count // batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in plan)
    rows = list(chain.from_iterable(plan))
    assert len(rows) == len(set(rows))
    assert not any(clash(data[one], data[two]) for batch in plan for one, two in combinations(batch, 2))
    # What was left out fits into no batch of the last window.
    for row in set(range(count)) - set(rows):
        for batch in plan[(len(plan) - 1) // 4 * 4 :]:
            assert len(batch) >= count // len(plan) or any(clash(data[row], data[other]) for other in batch)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("seed", range(5))
def test_a_row_that_does_not_fit_its_window_comes_with_a_later_one(seed):
    # 12 windows of 4 batches, and 24 rows with one query.
    data = data_of([row_of("same", f"d{i}") for i in range(24)] + [row_of(f"q{i}", f"e{i}") for i in range(456)])
    plan = list(BatchSampler(data, batch_size=10, seed=seed, no_duplicates=True).plan(0))
    # Its place is taken by another one.
    assert [len(batch) for batch in plan] == [10] * 48
    assert sorted(chain.from_iterable(plan)) == list(range(480))
    assert max(sum(row < 24 for row in batch) for batch in plan) == 1
    # The same permutation has more than four of them in the rows of some window.
    windows = BatchSampler(data, batch_size=40, seed=seed, no_duplicates=False).plan(0)
    assert max(sum(row < 24 for row in window) for window in windows) > 4


def test_rows_that_share_nothing_are_all_there_in_even_batches():
    sampler = BatchSampler(data_of(unlike(65)), batch_size=64, seed=0, no_duplicates=True)
    plan = list(sampler.plan(0))
    assert sorted(chain.from_iterable(plan)) == list(range(65))
    # Not 64 and a lone one without any negative.
    assert sorted(map(len, plan)) == [32, 33]


def test_more_copies_than_batches_are_left_out_and_the_batches_stay_even():
    data = data_of([row_of("same", f"d{i}") for i in range(10)] + [row_of(f"q{i}", f"e{i}") for i in range(10)])
    plan = list(BatchSampler(data, batch_size=5, seed=0, no_duplicates=True).plan(0))
    assert [sum(row < 10 for row in batch) for batch in plan] == [1, 1, 1, 1]
    assert sorted(row for batch in plan for row in batch if row >= 10) == list(range(10, 20))
    assert sorted(map(len, plan)) == [3, 3, 4, 4]


def test_the_plan_depends_on_seed_and_epoch_alone():
    data = data_of(random_rows(60, 40, seed=3))
    for no_duplicates in (True, False):
        options = {"batch_size": 8, "no_duplicates": no_duplicates}
        plans = {(s, e): list(BatchSampler(data, seed=s, **options).plan(e)) for s in (0, 1) for e in (0, 1)}
        assert len({str(plan) for plan in plans.values()}) == 4
        np.random.seed(99)
        again = BatchSampler(pickle.loads(pickle.dumps(data)), seed=1, **options)
        again.set_epoch(1)
        assert list(again) == list(again) == plans[1, 1]


def test_without_in_batch_negatives_rows_are_only_shuffled():
    data = data_of([row_of("q", "d")] * 10)
    plan = list(BatchSampler(data, batch_size=4, seed=0, no_duplicates=False).plan(0))
    assert sorted(chain.from_iterable(plan)) == list(range(10))
    assert list(chain.from_iterable(plan)) != list(range(10))
    assert list(map(len, plan)) == [4, 3, 3]


@pytest.fixture
def three_files(tmp_path):
    """Sources of 40, 10 and 25 rows."""
    paths = []
    for name, count in (("a", 40), ("b", 10), ("c", 25)):
        paths.append(tmp_path / f"{name}.csv")
        paths[-1].write_text("query,positive\n" + "".join(f"{name}{i},{name.upper()}{i}\n" for i in range(count)))
    return TrainingData.read(paths, needs="positives")


def source_of(row):
    return "a" if row < 40 else "b" if row < 50 else "c"


@pytest.mark.parametrize("no_duplicates", [True, False])
def test_joined_batches_have_rows_of_all_files(three_files, no_duplicates):
    sampler = BatchSampler(three_files, batch_size=25, seed=0, no_duplicates=no_duplicates)
    plan = list(sampler.plan(0))
    assert len(sampler) == len(plan) == 3
    assert sorted(chain.from_iterable(plan)) == list(range(75))
    assert all({source_of(row) for row in batch} == {"a", "b", "c"} for batch in plan)


@pytest.mark.parametrize("no_duplicates", [True, False])
def test_proportional_batches_have_rows_of_one_file_and_take_all(three_files, no_duplicates):
    sampler = BatchSampler(three_files, batch_size=4, seed=0, no_duplicates=no_duplicates, mixing="proportional")
    orders = []
    for epoch in range(2):
        plan = list(sampler.plan(epoch))
        assert sorted(chain.from_iterable(plan)) == list(range(75))
        assert all(len({source_of(row) for row in batch}) == 1 for batch in plan)
        orders.append([source_of(batch[0]) for batch in plan])
        assert Counter(orders[-1]) == {"a": 10, "b": 3, "c": 7}
    assert len(sampler) == 20
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("no_duplicates", [True, False])
def test_in_turn_ends_with_the_smallest_file(three_files, no_duplicates):
    sampler = BatchSampler(three_files, batch_size=4, seed=0, no_duplicates=no_duplicates, mixing="in_turn")
    plan = list(sampler.plan(0))
    assert len(sampler) == len(plan) == 9
    assert [source_of(batch[0]) for batch in plan] == ["a", "b", "c"] * 3
    assert all(len({source_of(row) for row in batch}) == 1 for batch in plan)
    assert sorted(row for batch in plan for row in batch if source_of(row) == "b") == list(range(40, 50))
    rows = list(chain.from_iterable(plan))
    assert len(rows) == len(set(rows)) == 12 + 10 + 12
    # Another pass has other rows of the larger files.
    assert set(rows) != set(chain.from_iterable(sampler.plan(1)))


@pytest.mark.parametrize("mixing", ["joined", "proportional", "in_turn"])
@pytest.mark.parametrize(("processes", "batch_size"), [(2, 7), (3, 8), (4, 4)])
def test_processes_share_every_batch(three_files, mixing, processes, batch_size):
    options = {"batch_size": batch_size, "seed": 5, "no_duplicates": True, "mixing": mixing, "processes": processes}
    samplers = [BatchSampler(three_files, process=number, **options) for number in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    whole = list(samplers[0].plan(0))
    assert [len(found) for found in shares] == [len(whole)] * processes == [len(samplers[0])] * processes
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert list(chain.from_iterable(parts)) == batch
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert len(batch) <= batch_size


def test_no_batch_is_smaller_than_the_number_of_processes():
    # 9 rows in batches of at most 4 would be three of 3: four processes have two of 4, and a row is left out.
    data = data_of(unlike(9))
    sampler = BatchSampler(data, batch_size=4, seed=0, no_duplicates=True, processes=4)
    assert [len(batch) for batch in sampler.plan(0)] == [4, 4]
    left = [set(range(9)) - set(chain.from_iterable(sampler.plan(epoch))) for epoch in range(8)]
    assert all(len(rows) == 1 for rows in left)
    assert len(set(map(frozenset, left))) > 1


def test_a_batch_that_duplicates_keep_too_small_is_filled_up_for_all_processes():
    data = data_of([row_of("same", f"d{i}") for i in range(12)] + [row_of("q0", "e0"), row_of("q1", "e1")])
    samplers = [
        BatchSampler(data, batch_size=4, seed=0, no_duplicates=True, process=number, processes=2) for number in (0, 1)
    ]
    alone = list(BatchSampler(data, batch_size=4, seed=0, no_duplicates=True).plan(0))
    assert sorted(map(len, alone)) == [1, 1, 2, 2]
    # The loop counts on the number of batches: for the schedule, and to find the place where a run goes on.
    for sampler in samplers:
        assert [len(batch) for batch in sampler] == [1, 1, 1, 1] == [1] * len(sampler)
    for batch in samplers[0].plan(0):
        assert len(batch) == len({*batch}) == 2
    assert list(samplers[0].plan(3)) == list(samplers[1].plan(3))


def test_what_cannot_be_shared_is_refused(three_files):
    with pytest.raises(UsageError, match="batch_size: 3 rows for 4 processes; expected at least one for each"):
        BatchSampler(three_files, batch_size=3, seed=0, no_duplicates=True, processes=4)
    options = {"batch_size": 16, "seed": 0, "no_duplicates": True, "processes": 11}
    assert len(BatchSampler(three_files, **options)) == 5
    with pytest.raises(DataError, match=r"b\.csv: has 10 rows; expected at least 11, one a process"):
        BatchSampler(three_files, mixing="proportional", **options)


def test_a_text_that_most_rows_share_takes_no_time():
    # Each of these rows fits one batch of a window, and none of those that follow.
    count = 40_000
    data = data_of([row_of("same" if i % 4 else f"q{i}", f"d{i}") for i in range(count)])
    plan = list(BatchSampler(data, batch_size=4, seed=0, no_duplicates=True).plan(0))
    assert len(plan) == 10_000
    assert sum(row % 4 == 0 for batch in plan for row in batch) == 10_000
    assert all(sum(row % 4 > 0 for row in batch) <= 1 for batch in plan)
    assert min(map(len, plan)) >= 1


def test_planning_needs_no_torch():
    code = "import sys, rtx.trainer.sampler; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
