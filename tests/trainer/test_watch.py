from __future__ import annotations

from rtx.trainer.watch import LossWatch


def watched(*losses: float) -> str | None:
    watch = LossWatch()
    return [watch.add(loss) for loss in losses][-1]


def test_ten_batches_far_above_the_worst_of_the_first_are_too_many():
    first = [0.5] * 19 + [1.0]
    assert watched(*first, *[4.1] * 9) is None
    assert watched(*first, *[4.0] * 10) is None
    assert watched(*first, *[4.1] * 5, 4.0, *[4.1] * 9) is None
    assert watched(*first, *[4.1] * 9, 4.2) == (
        "the loss diverges: at least 4.1 in each of the last 10 batches, at most 1 in the first 20"
    )


def test_a_loss_that_begins_at_zero_may_rise():
    assert watched(*[0.0] * 20, *[0.1] * 20) is None


def test_a_loss_that_never_leaves_zero_is_told_apart():
    def always_zero(*losses: float) -> bool:
        watch = LossWatch()
        for loss in losses:
            watch.add(loss)
        return watch.always_zero

    assert always_zero(*[0.0] * 40)
    assert not always_zero()
    assert not always_zero(0.5, 0.0)
    assert not always_zero(*[0.0] * 30, 0.5, *[0.0] * 30)
