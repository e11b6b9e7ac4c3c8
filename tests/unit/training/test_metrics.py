from __future__ import annotations

from typing import Any

import pytest

from msdiff_dist.data.corruption import Corruption
from msdiff_dist.training.metrics import LOSS_WINDOW, LossAverage, Meter, StepOutcome


def test_loss_average_is_a_mean_then_exponential() -> None:
    average = LossAverage()
    for step in range(1, LOSS_WINDOW + 1):
        average.update(step, float(step))
    assert average.value == pytest.approx((LOSS_WINDOW + 1) / 2)
    before = average.value
    average.update(LOSS_WINDOW + 1, before + LOSS_WINDOW)
    assert average.value == pytest.approx(before + 1)


def outcome(**changes: Any) -> StepOutcome:
    known: dict[str, Any] = {
        "loss": 0.5, "loss_per_stage": [0.25, 0.75], "grad_norm": 2.0, "stop_requested": False, "busy_W": [1.0, 3.0],
        "corruption": [], "seconds": {"data": 0.1},
    }  # fmt: skip
    return StepOutcome(**known | changes)


def test_a_meter_keeps_what_adds_up() -> None:
    meter, bad = Meter(batch_size=8, step_petaflops=0.5), Corruption("a.tar", "1", "is torn")
    first = meter.measure(3, outcome(corruption=[bad]), lr=0.1, elapsed=2.0)
    assert (first.images_seen, first.images_per_second, first.petaflops) == (24, 4.0, 1.5)
    assert (first.balance, first.damaged, first.seconds) == (2 / 3, 1, {"data": 0.1, "checkpoint": 0.0})
    meter.saving = 7.0
    second = meter.measure(4, outcome(corruption=[bad]), lr=0.1, elapsed=2.0)
    assert (second.damaged, second.seconds["checkpoint"]) == (2, 7.0)
    assert meter.measure(5, outcome(), lr=0.1, elapsed=2.0).seconds["checkpoint"] == 0.0


def test_numbers_have_names_of_their_own() -> None:
    scalars = Meter(batch_size=8, step_petaflops=0.5).measure(1, outcome(), lr=0.1, elapsed=2.0).scalars()
    assert {"loss": 0.5, "loss_per_stage/1": 0.75, "seconds/data": 0.1, "lr": 0.1}.items() <= scalars.items()
