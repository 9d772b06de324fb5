"""The table, which knows nothing of torch, says of each loss what its function says."""

from __future__ import annotations

import inspect

import pytest

from rtx.trainer import losses
from rtx.trainer.loss_table import LOSSES, spec_of


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, table in LOSSES.items() for name in table])
def test_the_table_has_the_options_of_each_function(task, name):
    loss = getattr(getattr(losses, task), name)
    parameters = inspect.signature(loss).parameters.values()
    options = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    assert sorted(LOSSES[task][name].options) == sorted(options)
    assert spec_of(loss, task) is LOSSES[task][name]


def test_the_table_lists_every_loss():
    public = {loss for name, loss in vars(losses).items() if name in losses.__all__ and inspect.isfunction(loss)}
    listed = {getattr(getattr(losses, task), name) for task, table in LOSSES.items() for name in table}
    assert public - listed == {losses.matryoshka}
    assert listed - public == {losses.rerank.margin_mse}
