from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rtx.runtime.batching import next_batch, plan_batches

LENGTHS = st.lists(st.integers(1, 600), max_size=80)
TOKENS = st.integers(1, 2000)
ITEMS = st.integers(1, 40)


def test_a_plan_by_hand():
    # Longest first: 9 and 8 fill 18 with padding. 3, 3 and 2 would leave room for the 1, but are three items already.
    plan = plan_batches([3, 9, 1, 8, 3, 2], max_batch_tokens=18, max_batch_items=3)
    assert plan == [[1, 3], [0, 4, 5], [2]]


def test_an_empty_plan():
    assert plan_batches([], max_batch_tokens=10, max_batch_items=10) == []


@given(LENGTHS, TOKENS, ITEMS)
def test_a_plan_holds_each_item_once_within_the_budget_longest_first(lengths: list[int], tokens: int, items: int):
    plan = plan_batches(lengths, max_batch_tokens=tokens, max_batch_items=items)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert 1 <= len(batch) <= items
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens
    order = [lengths[index] for batch in plan for index in batch]
    assert order == sorted(lengths, reverse=True)


@given(LENGTHS, TOKENS, ITEMS)
def test_a_plan_wastes_no_batch(lengths: list[int], tokens: int, items: int):
    """No batch could have taken the first item of the next one."""
    plan = plan_batches(lengths, max_batch_tokens=tokens, max_batch_items=items)
    for batch in plan[:-1]:
        assert len(batch) == items or (len(batch) + 1) * lengths[batch[0]] > tokens


@given(LENGTHS, TOKENS, ITEMS)
def test_equal_lengths_keep_their_order(lengths: list[int], tokens: int, items: int):
    plan = plan_batches(lengths, max_batch_tokens=tokens, max_batch_items=items)
    order = [(-lengths[index], index) for batch in plan for index in batch]
    assert order == sorted(order)


def test_a_packed_plan_by_hand():
    # In order: 3 + 9 + 1 fill 13 to the token; 20 is longer than the budget and alone; the last three are few enough.
    plan = plan_batches([3, 9, 1, 20, 2, 4, 5, 1], max_batch_tokens=13, max_batch_items=3, packed=True)
    assert plan == [[0, 1, 2], [3], [4, 5, 6], [7]]
    assert plan_batches([], max_batch_tokens=13, max_batch_items=3, packed=True) == []


@given(LENGTHS, TOKENS, ITEMS)
def test_a_packed_plan_goes_through_the_items_in_order_within_the_budget(lengths: list[int], tokens: int, items: int):
    plan = plan_batches(lengths, max_batch_tokens=tokens, max_batch_items=items, packed=True)
    assert [index for batch in plan for index in batch] == list(range(len(lengths)))
    for batch in plan:
        cut = [lengths[index] for index in batch]
        assert 1 <= len(batch) <= items
        assert len(batch) == 1 or sum(cut) <= tokens
        # What bounds the token ids, which are padded all the same.
        assert len(batch) * max(cut) <= max(items * tokens, *cut)
    for batch, following in pairwise(plan):  # none could have taken the first item of the next one
        assert len(batch) == items or sum(lengths[index] for index in batch) + lengths[following[0]] > tokens


@given(LENGTHS.filter(bool), TOKENS, ITEMS)
def test_the_next_packed_batch_is_the_first_of_a_plan(lengths: list[int], tokens: int, items: int):
    """So what has waited longest runs first, and nothing overtakes."""
    plan = plan_batches(lengths, max_batch_tokens=tokens, max_batch_items=items, packed=True)
    assert next_batch(lengths, max_batch_tokens=tokens, max_batch_items=items, packed=True) == plan[0]


def test_the_next_batch_by_hand():
    # The oldest has 10 tokens. Nearest to it are 10, 11, 9; with 11 a row, four rows would need 44.
    assert next_batch([10, 50, 11, 3, 10, 9], max_batch_tokens=40, max_batch_items=9) == [0, 4, 2]
    assert next_batch([10, 50, 11, 3, 10, 9], max_batch_tokens=44, max_batch_items=9) == [0, 4, 2, 5]
    assert next_batch([10, 50, 11, 3, 10, 9], max_batch_tokens=999, max_batch_items=2) == [0, 4]
    assert next_batch([10, 1], max_batch_tokens=5, max_batch_items=9) == [0]
    # 14 is nearest and does not fit; 3 would, but is further away than what is left out.
    assert next_batch([10, 14, 3], max_batch_tokens=20, max_batch_items=9) == [0]


@given(LENGTHS.filter(bool), TOKENS, ITEMS)
def test_the_next_batch_holds_the_oldest_and_stays_within_the_budget(lengths: list[int], tokens: int, items: int):
    batch = next_batch(lengths, max_batch_tokens=tokens, max_batch_items=items)
    assert batch[0] == 0
    assert len(set(batch)) == len(batch) <= items
    assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


@given(LENGTHS.filter(bool), TOKENS, ITEMS)
def test_nothing_starves(lengths: list[int], tokens: int, items: int):
    """However many younger items arrive, the n-th item runs in the n-th batch at the latest."""
    waiting = list(enumerate(lengths))
    for step in range(len(lengths)):
        chosen = set(next_batch([n for _, n in waiting], max_batch_tokens=tokens, max_batch_items=items))
        waiting = [entry for index, entry in enumerate(waiting) if index not in chosen]
        assert all(age > step for age, _ in waiting)
        waiting.append((len(lengths) + step, lengths[-1]))
