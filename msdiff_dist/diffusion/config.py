"""Recipe sections `diffusion` and `stages`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from msdiff_dist.diffusion.noise_schedule import ScheduleName
from msdiff_dist.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
SamplerName = Literal["ddim", "dpmpp_2m", "ddpm", "dpm_3s", "heun"]
Spacing = Literal["leading", "trailing", "uniform", "log_snr", "rho"]
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


@dataclass(frozen=True)
class VPConfig:
    """Continuous variance-preserving SDE (2011.13456): beta(t) linear from beta_min to beta_max over t in [0, 1].

    `t_min` is the smallest time that is trained, and where samplers stop unless told otherwise.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    prediction_type: PredictionType = "epsilon"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            problem = f"must be positive and at most beta_max = {self.beta_max}"
            raise ConfigError("beta_min", self.beta_min, problem, "The paper uses 0.1 and 20.")
        if not 0 < self.t_min < 1:
            raise ConfigError("t_min", self.t_min, "must lie between 0 and 1", "Use 1e-3.")
        check_min_snr_gamma(self.min_snr_gamma)


@dataclass(frozen=True)
class EDMConfig:
    """EDM (2206.00364): noise level sigma with ln(sigma) ~ N(p_mean, p_std^2), and its preconditioning.

    Args:
        sigma_data: standard deviation of the data.
        sigma_min, sigma_max, rho: the sampler's noise levels, even in sigma^(1/rho) (Eq. 5).
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        for name in ("p_std", "sigma_data", "sigma_min", "rho"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be positive", "Correct it.")
        if not self.sigma_max > self.sigma_min:
            problem = f"must be above sigma_min = {self.sigma_min}"
            raise ConfigError("sigma_max", self.sigma_max, problem, "EDM uses 0.002 and 80.")


def check_min_snr_gamma(gamma: float | None) -> None:
    """Refuse a min-SNR gamma that is not positive."""
    if gamma is not None and not gamma > 0:
        raise ConfigError("min_snr_gamma", gamma, "must be positive", "Use 5, or null for no weighting.")


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process. The section named like `process` configures it, and only that one may be given."""

    process: Literal["discrete", "vp", "edm"] = "discrete"
    discrete: DiscreteConfig | None = None
    vp: VPConfig | None = None
    edm: EDMConfig | None = None

    def __post_init__(self) -> None:
        for name in ("discrete", "vp", "edm"):
            if name != self.process and getattr(self, name) is not None:
                remedy = f"Remove it (or set it to null), or use process: {name}."
                raise ConfigError(name, "{...}", f"configures a process that is not in use ({self.process})", remedy)


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
