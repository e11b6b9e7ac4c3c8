"""What diffusers' scheduler_config.json says about training: the noise schedule, and what the network predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.diffusion.noise_schedule import ScheduleName
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError, ConfigError

SCHEDULES: dict[ScheduleName, str] = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
"""Our names of noise schedules and diffusers'."""
WITH_BETAS = (
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Samplers of networks that were trained with betas. All keep the schedule in the same fields, with these defaults."""
_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon",
}  # fmt: skip
# Classes with other defaults.
_OWN_DEFAULTS = {
    name: {"beta_start": 0.00085, "beta_end": 0.012}
    for name in (
        "DPMSolverSDEScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    )
}  # fmt: skip
# Why a class of another family cannot be converted, by what its name contains.
_OTHERS = {
    "FlowMatch": "of flow matching, a process that this package does not have",
    "EDM": "of EDM, whose U-Nets of diffusers this package does not have",
    "CMStochastic": "of consistency models, which are trained on sigmas and not on betas",
    "LCM": "of latent consistency models, which are distilled to few steps",
    "TCD": "of trajectory consistency models, which are distilled to few steps",
    "Sde": "of score-based models in continuous time",
    "Karras": "of score-based models in continuous time",
    "VQDiffusion": "of discrete tokens",
    "UnCLIP": "of unCLIP, whose network also predicts variances",
    "Cosine": "with sigmas instead of betas",
    "Amused": "of masked tokens",
}
# Fields that, unless they have this value, make another schedule or another prediction.
_PLAIN: dict[str, Any] = {
    "rescale_betas_zero_snr": False, "trained_betas": None, "use_flow_sigmas": False, "flow_shift": 1.0,
    "timestep_type": "discrete", "variance_type": None,
}  # fmt: skip
_PLAIN_CHOICES = {"variance_type": ("learned", "learned_range")}  # the other values change the sampler alone


def read_scheduler(config: Mapping[str, Any], options: ConvertOptions) -> DiscreteConfig:
    """The process of a network that this scheduler samples from.

    Raises:
        CheckpointError: the scheduler is of another family of models, or its schedule is none of ours.
    """
    name = config.get("_class_name")
    if name not in WITH_BETAS:
        why = next((why for part, why in _OTHERS.items() if part in str(name)), "that this package does not know")
        raise CheckpointError(
            "scheduler._class_name", name, f"is a scheduler {why}",
            "Convert a model trained with betas; if this one is, convert its U-Net's folder alone.",
        )  # fmt: skip
    full = {**_DEFAULTS, **_OWN_DEFAULTS.get(name, {}), **config}
    for field, plain in _PLAIN.items():
        value = full.get(field, plain)
        if value != plain and (field not in _PLAIN_CHOICES or value in _PLAIN_CHOICES[field]):
            raise CheckpointError(
                f"scheduler.{field}", "..." if field == "trained_betas" else value,
                "makes a noise schedule or a prediction that this package does not have", "Convert a model without it.",
            )  # fmt: skip
    names = {theirs: ours for ours, theirs in SCHEDULES.items()}
    if full["beta_schedule"] not in names:
        raise CheckpointError(
            "scheduler.beta_schedule", full["beta_schedule"], "is a noise schedule that this package lacks",
            f"Convert a model with one of {', '.join(names)}.",
        )  # fmt: skip
    prediction = options.prediction_type or full["prediction_type"]
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise CheckpointError(
            "scheduler.prediction_type", prediction, "is not what a network of this package predicts",
            "Convert a model of epsilon, v_prediction or sample.",
        )  # fmt: skip
    try:
        return DiscreteConfig(
            timesteps=full["num_train_timesteps"],
            schedule=names[full["beta_schedule"]],
            beta_start=full["beta_start"],
            beta_end=full["beta_end"],
            prediction_type=prediction,
        )
    except (ConfigError, TypeError) as e:
        raise CheckpointError(
            "scheduler_config.json",
            {name: full[name] for name in _DEFAULTS},
            f"describes no noise schedule ({e})",
            "Fetch the folder again.",
        ) from None
