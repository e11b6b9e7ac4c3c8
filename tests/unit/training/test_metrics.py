from __future__ import annotations

from typing import Any

import pytest

from msdiff_dist.data.corruption import Corruption
from msdiff_dist.training.metrics import LOSS_WINDOW, Compute, LossAverage, Meter, StepOutcome
from msdiff_dist.training.time_left import TimeLeft

COMPUTE = Compute(step=0.5, total=1.5)


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
        "loss": 0.5, "loss_per_stage": [0.25, 0.75], "samples_per_stage": [2, 6], "grad_norm": 2.0,
        "stop_requested": False, "busy_W": [1.0, 3.00004], "memory_W": [7, 5],
        "corruption": [], "seconds": {"data": 0.1},
    }  # fmt: skip
    return StepOutcome(**known | changes)


def meter_of_a_run(peak_petaflops: float | None = None) -> Meter:
    return Meter(8, peak_petaflops, TimeLeft(10, {}))


def test_a_meter_keeps_what_adds_up() -> None:
    meter, bad = meter_of_a_run(), Corruption("a.tar", "1", "is torn")
    first = meter.measure(3, outcome(corruption=[bad]), lr=0.1, elapsed=2.0, compute=COMPUTE)
    assert (first.images_seen, first.images_per_second, first.petaflops) == (24, 4.0, 1.5)
    assert first.balance == pytest.approx(2 / 3, rel=1e-4)
    assert (first.damaged, first.seconds) == (1, {"data": 0.1, "checkpoint": 0.0})
    meter.saving = 7.0
    second = meter.measure(4, outcome(corruption=[bad]), lr=0.1, elapsed=2.0, compute=COMPUTE)
    assert (second.damaged, second.seconds["checkpoint"]) == (2, 7.0)
    assert meter.measure(5, outcome(), lr=0.1, elapsed=2.0, compute=COMPUTE).seconds["checkpoint"] == 0.0


def test_numbers_have_names_of_their_own() -> None:
    scalars = meter_of_a_run().measure(1, outcome(), lr=0.1, elapsed=2.0, compute=COMPUTE).scalars()
    assert {"loss": 0.5, "loss_per_stage/1": 0.75, "seconds/data": 0.1, "lr": 0.1}.items() <= scalars.items()
    assert not any(name.startswith("busy_seconds") for name in scalars), "as many as ranks"
    assert scalars["slowest_rank"] == 1
    assert "mfu" not in scalars, "not known"


def test_what_the_ranks_say_of_themselves() -> None:
    found = meter_of_a_run().measure(1, outcome(), lr=0.1, elapsed=2.0, compute=COMPUTE)
    assert (found.busy_seconds, found.slowest_rank, found.memory_bytes) == ([1.0, 3.0], 1, 7)
    assert (found.mfu, found.eta_seconds) == (None, None)


def test_utilisation_is_a_share_of_all_devices_peak() -> None:
    meter = meter_of_a_run(peak_petaflops=2.0)
    assert meter.measure(1, outcome(), lr=0.1, elapsed=0.5, compute=COMPUTE).mfu == 0.5 / 0.5 / 2.0
    assert meter.measure(2, outcome(), lr=0.1, elapsed=0.5, compute=COMPUTE).eta_seconds is not None
    assert meter.measure(10, outcome(), lr=0.1, elapsed=0.5, compute=COMPUTE).eta_seconds is None
