from __future__ import annotations

import pytest

from msdiff_dist.training.metrics import LOSS_WINDOW, LossAverage


def test_loss_average_is_a_mean_then_exponential() -> None:
    average = LossAverage()
    for step in range(1, LOSS_WINDOW + 1):
        average.update(step, float(step))
    assert average.value == pytest.approx((LOSS_WINDOW + 1) / 2)
    before = average.value
    average.update(LOSS_WINDOW + 1, before + LOSS_WINDOW)
    assert average.value == pytest.approx(before + 1)
