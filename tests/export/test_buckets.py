"""Buckets of lengths: pure functions, against trying all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtx.export.buckets import check_lengths, fit_lengths, length_ranges, row_range, spread_lengths
from rtx.runtime.errors import UsageError


def test_nothing_known() -> None:
    assert spread_lengths(512) == (32, 128, 512)
    assert spread_lengths(8192) == (32, 128, 512, 2048, 8192)
    assert spread_lengths(32_768) == (32, 128, 512, 2048, 32_768)
    assert spread_lengths(20) == (20,)
    assert fit_lengths([], 512) == (32, 128, 512)


@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=12),
    most=st.sampled_from([64, 100, 128]),
    count=st.integers(1, 4),
)
def test_no_other_buckets_have_less_padding(lengths: list[int], most: int, count: int) -> None:
    def padded(ends: tuple[int, ...]) -> int:
        return sum(min(end for end in ends if end >= min(length, most)) for length in lengths)

    found = fit_lengths(lengths, most, count)
    assert found[-1] == most
    assert list(found) == sorted(set(found))
    assert len(found) <= count
    others = sorted({-(-length // 16) * 16 for length in lengths if -(-length // 16) * 16 < most})
    all_ends = itertools.chain.from_iterable(itertools.combinations(others, size) for size in range(count))
    assert padded(found) == min(padded((*ends, most)) for ends in all_ends)


def test_two_kinds_of_texts() -> None:
    assert fit_lengths([9, 12, 14] * 50 + [180, 190, 201] * 20, 512) == (16, 192, 208, 512)
    assert fit_lengths([9, 12, 14] * 50 + [180, 190, 201] * 20, 512, count=3) == (16, 208, 512)


def test_given_ends() -> None:
    assert check_lengths((32, 128), 512) == (32, 128, 512)
    assert check_lengths((32, 512), 512) == (32, 512)
    for wrong in ((128, 32), (32, 32), (1,), (600,)):
        with pytest.raises(UsageError, match="lengths: expected rising numbers from 2 to the model's limit of 512"):
            check_lengths(wrong, 512)


def test_every_length_is_in_one_range() -> None:
    ranges = length_ranges((32, 128, 512))
    assert ranges == [(1, 32, 32), (33, 128, 128), (129, 512, 512)]
    assert [length for least, _, most in ranges for length in range(least, most + 1)] == list(range(1, 513))
    assert length_ranges((1,)) == [(1, 1, 1)]


def test_rows_stay_within_the_tokens_of_a_batch() -> None:
    assert row_range(16) == (1, 64, 256)
    assert row_range(512) == (1, 8, 32)
    assert row_range(100_000) == (1, 1, 1)
