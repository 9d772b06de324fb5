from __future__ import annotations

import math

import pytest
import torch

from rtx.trainer.losses import Targets

TARGETS = Targets.of([(1, 0, 0), (1,), (0.5, 2)])


def test_documents_stand_row_by_row():
    assert TARGETS.owner.tolist() == [0, 0, 0, 1, 2, 2]
    assert TARGETS.labels.tolist() == [1, 0, 0, 1, 0.5, 2]
    assert TARGETS.first.tolist() == [0, 3, 4]
    assert TARGETS.place.tolist() == [0, 1, 2, 0, 0, 1]


def test_lists_are_padded_to_the_longest():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert TARGETS.lists(values, -1.0).tolist() == [[1, 2, 3], [4, -1, -1], [5, 6, -1]]


def test_log_softmax_is_of_each_query():
    values = torch.tensor([math.log(2), 0.0, 0.0, 9.0, math.log(3), 0.0], dtype=torch.float64)
    assert TARGETS.log_softmax(values).exp().tolist() == pytest.approx([0.5, 0.25, 0.25, 1.0, 0.75, 0.25], abs=1e-12)


def test_margins_are_to_the_first_document():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert TARGETS.margins(values).tolist() == [-1, -3, -16]
