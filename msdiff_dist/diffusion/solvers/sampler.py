"""The table of solvers that a recipe can name, the sampler's configuration, and `solve`, which runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from msdiff_dist.bounds import check_between
from msdiff_dist.config import INFINITE
from msdiff_dist.diffusion.process import Last, Process, Spacing
from msdiff_dist.diffusion.solvers.dpm_solver import dpm_solver_singlestep
from msdiff_dist.diffusion.solvers.heun import heun, heun_steps
from msdiff_dist.diffusion.solvers.schedulers import ddim, ddpm, dpmpp_2m, dpmpp_2m_restarts
from msdiff_dist.diffusion.solvers.solver import Denoise, Solver, StageOf
from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table


def _variance_preserving(process: Process) -> bool:
    return process.variance_preserving


SOLVERS: Table[Solver] = Table(
    "solver",
    {
        "ddim": Solver(run=ddim, fits=_variance_preserving, options=("eta", "last"), clips=True),
        "dpmpp_2m": Solver(
            run=dpmpp_2m,
            fits=_variance_preserving,
            options=("last",),
            staged=dpmpp_2m,
            restarts=dpmpp_2m_restarts,
        ),
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

_MOST_GUIDANCE = 1e6


@dataclass(frozen=True, kw_only=True)
class ChurnConfig:
    """Stochastic noise of the `heun` solver (2206.00364, Algorithm 2)."""

    amount: float = 0.0
    """S_churn: amount of noise that all steps together add."""
    noise: float = 1.0
    """S_noise: factor on the standard deviation of the added noise."""
    sigma_min: float = 0.0
    """S_tmin: smallest sigma at which noise is added."""
    sigma_max: Annotated[float, INFINITE] = math.inf
    """S_tmax: largest sigma at which noise is added."""

    def __post_init__(self) -> None:
        if not self.amount >= 0:
            raise ConfigError("amount", self.amount, "must not be negative", "Use 0 for deterministic sampling.")
        check_between("amount", self.amount, 0, 1e6)
        check_between("noise", self.noise, 0, 1e6)
        check_between("sigma_min", self.sigma_min, 0, math.inf)
        if self.sigma_max < self.sigma_min:
            problem = f"is below sigma_min = {self.sigma_min}, so no step would add noise"
            raise ConfigError("sigma_max", self.sigma_max, problem, "Raise it, or set amount to 0.")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn: solver, steps, guidance."""

    name: Annotated[str, SOLVERS] | None = None
    """Solver; null takes the process's default."""
    steps: int = 50
    """Number of network evaluations; for `heun` the number N of steps, which take 2 N - 1 evaluations."""
    eta: float = 0.0
    """Noise of the steps of `ddim`: 0 is deterministic, 1 as noisy as `ddpm`."""
    spacing: Spacing | None = None
    """How the sampling times are spaced; null takes the process's default."""
    end: float | None = None
    """Last time that is sampled, of a `vp` process (default t_end) or an `edm` process (default sigma_min)."""
    last: Last = "first_time"
    """Where the last step of `ddim` and `dpmpp_2m` ends. `first_time`: at the noise level of the first timestep, as in
    LDM's and DPM-Solver's code, or at `end`; autoencoders decode latents with so little noise. `clean`: at clean data,
    for pixels, where that noise shows (with LDM's betas 5 of 255 levels). `ddpm` and `heun` end at clean data, `dpm_3s`
    at `end`."""
    clip: bool = False
    """Clip estimates of x_0 to [-1, 1]: for pixels, not for latents. `ddim` still takes its estimate of the noise from
    the estimate before clipping. Early in training `ddim` with eta 1 and clip gives the cleanest images."""
    restart: bool = True
    """Whether `dpmpp_2m` uses no estimate of the stage before where its steps, in log-SNR, grow longer by a quarter and
    more, as near the data: they would multiply the difference between two decoders. false: as with one network."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance: output = unconditional + scale x (conditional - unconditional)."""
    churn: ChurnConfig = field(default_factory=ChurnConfig)
    """Stochastic noise of `heun`."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "sampling needs at least one step", "Use 50.")
        check_between("steps", self.steps, 1, 10**5)
        check_between("guidance_scale", self.guidance_scale, -_MOST_GUIDANCE, _MOST_GUIDANCE)
        if not 0 <= self.eta <= 1:
            raise ConfigError("eta", self.eta, "must lie in [0, 1]", "Use 0 for deterministic sampling.")
        if self.name is None:
            return
        solver = SOLVERS.choose("name", self.name)
        if self.eta and "eta" not in solver.options:
            raise ConfigError("eta", self.eta, f"{self.name} has no eta", "Omit it, or use the ddim sampler.")
        if self.churn.amount and "churn" not in solver.options:
            raise ConfigError(
                "churn.amount", self.churn.amount, f"{self.name} has no churn", "Omit it, or use the heun sampler."
            )
        if self.last != "first_time" and "last" not in solver.options:
            raise ConfigError(
                "last", self.last, f"{self.name} has no choice of it", "Omit it, or use the ddim sampler."
            )
        if not self.restart and solver.restarts is None:
            problem = f"{self.name} never begins anew"
            raise ConfigError("restart", self.restart, problem, "Omit it, or use the dpmpp_2m sampler.")
        if self.steps < solver.least_steps:
            problem = f"{self.name} needs at least {solver.least_steps} evaluations"
            raise ConfigError("steps", self.steps, problem, f"Use at least {solver.least_steps}.")

    def for_process(self, process: Process) -> SamplerConfig:
        """This configuration, with the process's default solver in place of null.

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
            problem = f"{name} supports only {' or '.join(solver.spacings)}"
            raise ConfigError("spacing", named.spacing, problem, "Omit it.")
        # Called only for its checks: it refuses spacings, ends and numbers of steps that the process does not offer.
        process.sampling_times(named.steps, named.spacing, named.end, named.last)
        return named


def solve(
    denoise: Denoise,
    process: Process,
    config: SamplerConfig,
    x_T: Tensor,
    generators: list[torch.Generator],
    stage_of: StageOf | None = None,
) -> Tensor:
    """Samples [n, ...] from x_T [n, ...], noise of standard deviation `process.prior_std`.

    Args:
        denoise: estimate of x_0 from x_t and t.
        generators: one per sample, from which stochastic steps draw their noise.
        stage_of: of a model of several stages; None: one network answers at all times.

    Raises:
        ConfigError: the sampler, spacing, end or number of steps does not fit the process.
    """
    config = config.for_process(process)
    solver = SOLVERS[config.name or process.sampler]

    def clipped(x: Tensor, t: float) -> Tensor:
        return denoise(x, t).clamp(-1, 1)

    answer = clipped if config.clip and not solver.clips else denoise
    if solver.staged is not None and stage_of is not None and config.restart:
        return solver.staged(answer, process, config, x_T, generators, stage_of)
    return solver.run(answer, process, config, x_T, generators)
