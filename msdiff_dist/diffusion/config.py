"""Recipe sections `diffusion` and `stages`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from msdiff_dist.diffusion.noise_schedule import ScheduleName
from msdiff_dist.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Unit = Literal["timestep", "t", "sigma"]
StageSampling = Literal["uniform", "equal"] | tuple[float, ...]


@dataclass(frozen=True)
class DiscreteConfig:
    """LDM's discrete process: integer timesteps 0 .. timesteps - 1.

    `min_snr_gamma` weighs the loss by min(SNR, gamma) (2303.09556), expressed for the prediction type in use.
    """

    timesteps: int = 1000
    schedule: ScheduleName = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    prediction_type: PredictionType = "epsilon"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ConfigError("timesteps", self.timesteps, "a process needs at least two timesteps", "Use 1000.")
        if not 0 < self.beta_start < 1:
            raise ConfigError("beta_start", self.beta_start, "must lie between 0 and 1", "LDM uses 0.0015.")
        if not self.beta_start <= self.beta_end < 1:
            problem = f"must lie between beta_start = {self.beta_start} and 1"
            raise ConfigError("beta_end", self.beta_end, problem, "LDM uses 0.0195.")
        check_min_snr_gamma(self.min_snr_gamma)


def check_min_snr_gamma(gamma: float | None) -> None:
    """Refuse a min-SNR gamma that is not positive."""
    if gamma is not None and not gamma > 0:
        raise ConfigError("min_snr_gamma", gamma, "must be positive", "Use 5, or null for no weighting.")


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process. The section named like `process` configures it."""

    process: Literal["discrete"] = "discrete"
    discrete: DiscreteConfig = field(default_factory=DiscreteConfig)


@dataclass(frozen=True)
class StagesConfig:
    """How time is divided into stages and how often each is trained.

    Args:
        boundaries: the K - 1 inner boundaries in the process's own unit, ascending; none for a unified model.
        sampling: the chosen objective's probability of each stage. `uniform` leaves the process's own training
            distribution as it is, `equal` gives every stage 1/K, a list gives K relative weights.
    """

    boundaries: tuple[float, ...] = ()
    sampling: StageSampling = "uniform"

    def __post_init__(self) -> None:
        if any(not math.isfinite(b) for b in self.boundaries):
            raise ConfigError("boundaries", list(self.boundaries), "must be finite numbers", "Correct them.")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            remedy = f"Write {sorted(set(self.boundaries))}."
            raise ConfigError("boundaries", list(self.boundaries), "must ascend without repeats", remedy)
        if isinstance(self.sampling, tuple):
            if len(self.sampling) != self.num_stages:
                problem = f"has {len(self.sampling)} weights for {self.num_stages} stages"
                raise ConfigError("sampling", list(self.sampling), problem, f"Give {self.num_stages} weights.")
            if any(not (w > 0 and math.isfinite(w)) for w in self.sampling):
                raise ConfigError("sampling", list(self.sampling), "weights must be positive", "Correct them.")

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1
