"""Starts of a process of its own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rtx.runtime.coldstart import measure
from rtx.runtime.contract import Contract
from rtx.runtime.errors import EngineError
from rtx.runtime.first_result import peak_rss_bytes


def test_a_start_gives_its_time_and_its_own_peak_of_memory(toy_bundle: Path) -> None:
    # A process inherits the peak of the one that starts it in ru_maxrss: that would count this array.
    ballast = np.ones(64_000_000)
    start = measure(str(toy_bundle), variant="int8", threads=1, first=["reset"], further=["sort the list"] * 4)
    assert start.first_result_s > 0
    if sys.platform == "linux":
        assert start.peak_rss_bytes is not None
        assert 20e6 < start.peak_rss_bytes < ballast.nbytes


def test_pairs_are_run_by_a_reranker(toy_reranker_bundle: Path) -> None:
    assert (
        measure(str(toy_reranker_bundle), variant="fp32", threads=1, first=[("sort", "sort the list")]).first_result_s
        > 0
    )


def test_a_reranker_on_top_of_a_first_stage_starts_as_any_other(
    tmp_path: Path, write_bundle: Callable[[Path, Contract], Path], rerank_contract: Contract
) -> None:
    contract = dataclasses.replace(rerank_contract, activation="identity", first_stage_weight=60.0)
    bundle = write_bundle(tmp_path / "top.rtx", contract)
    assert measure(str(bundle), variant="fp32", threads=1, first=[("sort", "sort the list")]).first_result_s > 0


def test_without_a_variant_it_is_what_opens(toy_bundle: Path) -> None:
    assert measure(str(toy_bundle), threads=1, first=["sort"]).first_result_s > 0


def test_a_process_that_fails_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as raised:
        measure(str(tmp_path / "none.rtx"), first=["x"])
    assert "none.rtx: a process that opens it failed:" in str(raised.value)
    assert "Error" in str(raised.value).splitlines()[-1]


def test_the_peak_of_this_process_is_no_less_than_what_it_holds() -> None:
    ballast = np.ones(8_000_000)
    assert (peak_rss_bytes() or 0) >= ballast.nbytes
