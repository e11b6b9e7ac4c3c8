"""The solvers that a recipe can name, and how samples are made with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process, Spacing
from msdiff_dist.diffusion.solvers.dpm_solver import dpm_solver_singlestep
from msdiff_dist.diffusion.solvers.heun import heun, heun_steps
from msdiff_dist.diffusion.solvers.schedulers import ddim, ddpm, dpmpp_2m
from msdiff_dist.diffusion.solvers.solver import Denoise, Solver
from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table


def _variance_preserving(process: Process) -> bool:
    return process.variance_preserving


SOLVERS: Table[Solver] = Table(
    "solver",
    {
        "ddim": Solver(run=ddim, fits=_variance_preserving, options=("eta",), clips=True),
        "dpmpp_2m": Solver(run=dpmpp_2m, fits=_variance_preserving),
        "ddpm": Solver(run=ddpm, fits=_variance_preserving, clips=True),
        "dpm_3s": Solver(
            run=dpm_solver_singlestep,
            fits=lambda process: process.variance_preserving and not process.discrete,
            spacings=("log_snr",),
            least_steps=3,
        ),
        "heun": Solver(run=heun, fits=lambda process: process.unit == "sigma", options=("churn",), steps_of=heun_steps),
    },
)


@dataclass(frozen=True, kw_only=True)
class ChurnConfig:
    """Heun's stochastic noise (2206.00364, Algorithm 2): S_churn, S_noise, and the sigmas between which it acts."""

    amount: float = 0.0
    """S_churn: how much noise is added, over all steps."""
    noise: float = 1.0
    """S_noise: factor on the standard deviation of the added noise."""
    sigma_min: float = 0.0
    """S_tmin: smallest sigma at which noise is added."""
    sigma_max: float = math.inf
    """S_tmax: largest sigma at which noise is added."""

    def __post_init__(self) -> None:
        if not self.amount >= 0:
            raise ConfigError("amount", self.amount, "must not be negative", "Use 0 for deterministic sampling.")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are made."""

    name: Annotated[str, SOLVERS] | None = None
    """Solver; null is the process's own."""
    steps: int = 50
    """Network evaluations; for `heun` its steps N, which take 2 N - 1 evaluations."""
    eta: float = 0.0
    """Noise of ddim's steps: 0 is deterministic, 1 as noisy as ddpm."""
    spacing: Spacing | None = None
    """Where the times lie, one of the process's spacings; null is its default."""
    end: float | None = None
    """Last time of a vp process (default t_min) or an edm process (default sigma_min)."""
    clip: bool = False
    """Keep estimates of x_0 inside [-1, 1]; for pixels, not for latents. ddim keeps the noise estimate of the estimate
    before clipping. Early in training `ddim` with eta 1 and clip gives the cleanest images."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance: output = unconditional + scale x (conditional - unconditional)."""
    churn: ChurnConfig = field(default_factory=ChurnConfig)
    """heun's noise."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "sampling needs at least one step", "Use 50.")
        if not 0 <= self.eta <= 1:
            raise ConfigError("eta", self.eta, "must lie in [0, 1]", "Use 0 for deterministic sampling.")
        if self.name is None:
            return
        solver = SOLVERS.choose("name", self.name)
        if self.eta and "eta" not in solver.options:
            raise ConfigError("eta", self.eta, f"{self.name} has no eta", "Leave it out, or use the ddim sampler.")
        if self.churn.amount and "churn" not in solver.options:
            raise ConfigError("churn.amount", self.churn.amount, f"{self.name} has no churn", "Leave it out.")
        if self.steps < solver.least_steps:
            problem = f"{self.name} needs at least {solver.least_steps} evaluations"
            raise ConfigError("steps", self.steps, problem, f"Use at least {solver.least_steps}.")

    def for_process(self, process: Process) -> SamplerConfig:
        """This configuration with its sampler named.

        Raises:
            ConfigError: the sampler, spacing, end or number of steps does not fit the process.
        """
        name = self.name or process.sampler
        solver = SOLVERS[name]
        if not solver.fits(process):
            fitting = [known for known, other in SOLVERS.items() if other.fits(process)]
            problem = f"does not sample a process in {process.unit}"
            raise ConfigError("name", name, problem, f"Choose from: {', '.join(fitting)}.")
        named = replace(self, name=name)
        if solver.spacings is not None and named.spacing not in (*solver.spacings, None):
            problem = f"{name} takes its steps in {' or '.join(solver.spacings)} alone"
            raise ConfigError("spacing", named.spacing, problem, "Leave it out.")
        process.sampling_times(named.steps, named.spacing, named.end)
        return named


def solve(
    denoise: Denoise, process: Process, config: SamplerConfig, x_T: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """Carry x_T [n, ...], noise of standard deviation `process.prior_std`, to a sample.

    Args:
        generators: one for each of the n samples, the source of the noise of stochastic steps.

    Raises:
        ConfigError: the sampler, spacing, end or number of steps does not fit the process.
    """
    config = config.for_process(process)
    solver = SOLVERS[config.name or process.sampler]
    if config.clip and not solver.clips:

        def clipped(x: Tensor, t: float) -> Tensor:
            return denoise(x, t).clamp(-1, 1)

        return solver.run(clipped, process, config, x_T, generators)
    return solver.run(denoise, process, config, x_T, generators)
