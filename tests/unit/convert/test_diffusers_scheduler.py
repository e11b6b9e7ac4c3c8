"""Every scheduler class of diffusers is read as what it is, or refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import schedulers

from msdiff_dist.convert.formats.diffusers_scheduler import WITH_BETAS, read_scheduler
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.diffusion.noise_schedule import betas
from msdiff_dist.errors import CheckpointError

NAMES = sorted(
    name for name in dir(schedulers) if name.endswith("Scheduler") and name[:4] != "Flax" and hasattr(diffusers, name)
)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*WITH_BETAS}))
def test_a_class_of_another_family_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"scheduler\._class_name = '{name}'"):
        read_scheduler({"_class_name": name}, ConvertOptions())


@pytest.mark.parametrize("name", sorted({*NAMES} & {*WITH_BETAS} - {"DPMSolverSDEScheduler"}))  # needs torchsde
def test_a_class_gives_its_own_betas(name: str) -> None:
    ours, theirs = read_scheduler({"_class_name": name}, ConvertOptions()), getattr(diffusers, name)()
    expected = np.asarray(theirs.betas, np.float64)
    assert betas(ours.schedule, ours.timesteps, ours.beta_start, ours.beta_end) == pytest.approx(expected, rel=1e-4)
    assert ours.prediction_type == theirs.config.get("prediction_type", "epsilon")


def test_the_usual_ones_are_not_refused() -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"):
        found = read_scheduler({"_class_name": name, **config}, ConvertOptions())
        assert (found.schedule, found.beta_start, found.beta_end) == ("scaled_linear", 0.00085, 0.012)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2]},
        {"use_flow_sigmas": True},
        {"timestep_type": "continuous"},
        {"variance_type": "learned_range"},
        {"prediction_type": "flow_prediction"},
        {"beta_schedule": "sigmoid"},
        {"num_train_timesteps": "many"},
        {"beta_start": -1},
    ],
)
def test_other_schedules_and_predictions_are_refused_by_field(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_scheduler({"_class_name": "DDPMScheduler", **changes}, ConvertOptions())
    assert next(iter(changes)) in str(caught.value)


def test_a_sampler_only_setting_is_no_reason_to_refuse() -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "thresholding": True}
    assert read_scheduler(config, ConvertOptions()).schedule == "linear"
