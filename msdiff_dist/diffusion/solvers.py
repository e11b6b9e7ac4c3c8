"""Solvers from noise to data. A solver knows the network only as `denoise(x_t, t) -> estimate of x_0`.

diffusers' schedulers do ddim, ddpm and DPM-Solver++ multistep: each sees the process as a noise schedule with one entry
for each of the sampler's times, so any process and any spacing works, in float64 coefficients. Two solvers are written
here: EDM's Heun, because diffusers' has no stochastic churn, and DPM-Solver's singlestep order 3, because diffusers
deprecates its noise-predicting form and cannot place its inner times between the outer ones as the paper does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.config import SamplerName, Spacing
from msdiff_dist.diffusion.process import Process
from msdiff_dist.errors import ConfigError

Denoise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class ChurnConfig:
    """Heun's stochastic noise (2206.00364, Algorithm 2): S_churn, S_noise, and the sigmas between which it acts."""

    amount: float = 0.0
    noise: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        if not self.amount >= 0:
            raise ConfigError("amount", self.amount, "must not be negative", "Use 0 for deterministic sampling.")


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are made.

    Args:
        name: `ddim`, `ddpm` (ancestral) or `dpmpp_2m` (DPM-Solver++ multistep of order 2) for discrete and vp
            processes, `dpm_3s` (DPM-Solver singlestep of order 3) for vp, `heun` for edm; None is the process's own.
        steps: network evaluations, but for `heun` its steps: N of them take 2 N - 1 evaluations.
        eta: noise of ddim's steps: 0 is deterministic, 1 as noisy as ddpm.
        spacing: where the times lie, one of the process's `spacings`; None is its default.
        end: last time for a vp (default t_min) or edm process (default sigma_min).
        clip: keep estimates of x_0 inside [-1, 1]; for pixels, not for latents. ddim keeps the noise estimate of the
            estimate before clipping. Early in training `ddim` with eta 1 and clip gives the cleanest pictures.
        guidance_scale: classifier-free guidance: output = unconditional + scale x (conditional - unconditional).
        churn: heun's noise.
    """

    name: SamplerName | None = None
    steps: int = 50
    eta: float = 0.0
    spacing: Spacing | None = None
    end: float | None = None
    clip: bool = False
    guidance_scale: float = 1.0
    churn: ChurnConfig = field(default_factory=ChurnConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "sampling needs at least one step", "Use 50.")
        if not 0 <= self.eta <= 1:
            raise ConfigError("eta", self.eta, "must lie in [0, 1]", "Use 0 for deterministic sampling.")
        if self.eta and self.name not in ("ddim", None):
            raise ConfigError("eta", self.eta, f"{self.name} has no eta", "Leave it out, or use the ddim sampler.")
        if self.churn.amount and self.name not in ("heun", None):
            raise ConfigError("churn.amount", self.churn.amount, f"{self.name} has no churn", "Leave it out.")
        if self.name == "dpm_3s" and self.steps < 3:
            raise ConfigError("steps", self.steps, "a solver of order 3 needs three evaluations", "Use at least 3.")

    def for_process(self, process: Process) -> SamplerConfig:
        """This configuration with its sampler named.

        Raises:
            ConfigError: the sampler, spacing, end or number of steps does not fit the process.
        """
        named = replace(self, name=self.name or process.samplers[0])
        if named.name not in process.samplers:
            problem = f"does not sample a process in {process.unit}"
            raise ConfigError("name", named.name, problem, f"Choose from: {', '.join(process.samplers)}.")
        if named.name == "dpm_3s" and named.spacing not in ("log_snr", None):
            raise ConfigError("spacing", named.spacing, "dpm_3s steps evenly in log-SNR", "Leave it out.")
        process.sampling_times(named.steps, named.spacing, named.end)
        return named


def steps_of_budget(name: SamplerName, evaluations: int) -> int:
    """`SamplerConfig.steps` for exactly so many network evaluations.

    Raises:
        ConfigError: the solver cannot use exactly that many.
    """
    if name != "heun":
        return evaluations
    if evaluations % 2 == 0:
        problem = "heun takes two evaluations for each step but the last, so an odd number"
        raise ConfigError("evaluations", evaluations, problem, f"Use {evaluations - 1} or {evaluations + 1}.")
    return (evaluations + 1) // 2


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
    if config.clip and config.name not in ("ddim", "ddpm"):  # these clip by themselves

        def clipped(x: Tensor, t: float) -> Tensor:
            return denoise(x, t).clamp(-1, 1)

        return _solve(clipped, process, config, x_T, generators)
    return _solve(denoise, process, config, x_T, generators)


def _solve(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    if config.name == "dpm_3s":
        return _dpm_solver_singlestep(denoise, process, config, x)
    if config.name == "heun":
        return _heun(denoise, process, config, x, generators)
    times, landing = process.sampling_times(config.steps, config.spacing, config.end)
    scheduler = _scheduler(config, np.array([landing, *process.sigma_of(times[::-1])]))
    options = {"eta": config.eta} if config.name == "ddim" else {}
    for index, t in zip(range(config.steps, 0, -1), times.tolist(), strict=True):
        x = scheduler.step(denoise(x, t), torch.tensor(index), x, generator=generators, **options).prev_sample
    return x


def _scheduler(config: SamplerConfig, sigmas: np.ndarray) -> Any:
    """diffusers' scheduler whose timesteps are the ascending noise levels [steps + 1], to be run down to the first."""
    import diffusers

    scheduler: Any
    common: dict[str, Any] = {
        "num_train_timesteps": len(sigmas),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    if config.name in ("ddim", "ddpm"):
        kind: Any = diffusers.DDIMScheduler if config.name == "ddim" else diffusers.DDPMScheduler
        scheduler = kind(**common, clip_sample=config.clip)
        scheduler.set_timesteps(len(sigmas))
        scheduler.alphas_cumprod = torch.from_numpy(1 / (1 + sigmas**2))
        return scheduler
    scheduler = diffusers.DPMSolverMultistepScheduler(**common)
    scheduler.set_timesteps(timesteps=list(range(config.steps, 0, -1)))
    scheduler.sigmas = torch.from_numpy(sigmas[::-1].copy())
    return scheduler


def _heun(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """EDM's Algorithm 2, in float64: Heun steps in sigma, each after raising the noise by `churn`."""
    from diffusers.utils.torch_utils import randn_tensor

    times, landing = process.sampling_times(config.steps, config.spacing, config.end)
    churn, x = config.churn, x.double()
    for sigma, sigma_next in zip(times.tolist(), [*times[1:].tolist(), landing], strict=True):
        if churn.amount and churn.sigma_min <= sigma <= churn.sigma_max:
            raised = sigma * (1 + min(churn.amount / config.steps, math.sqrt(2) - 1))
            noise = randn_tensor(x.shape, generator=generators, device=x.device, dtype=x.dtype)
            x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise
            sigma = raised
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def _dpm_solver_singlestep(denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor) -> Tensor:
    """DPM-Solver-3 (2206.00927, Algorithm 2): steps even in log-SNR, the last ones of lower order to fit the budget."""
    whole, rest = divmod(config.steps, 3)
    orders = {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[rest]
    ends, landing = process.sampling_times(len(orders), "log_snr", config.end)
    edges = -np.log(np.array([*process.sigma_of(ends), landing]))
    for order, start, end in zip(orders, edges[:-1], edges[1:], strict=True):
        x = _dpm_solver_step(denoise, process, x, order, start, end - start)
    return x


def _dpm_solver_step(denoise: Denoise, process: Process, x: Tensor, order: int, start: float, h: float) -> Tensor:
    """From lambda = log(s / n) = start to start + h, with the inner points at thirds (order 3) or at the half (2)."""

    def scales(lam: float) -> tuple[float, float]:
        return (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5

    def noise_at(x: Tensor, lam: float) -> Tensor:
        s, n = scales(lam)
        return (x - s * denoise(x, float(process.time_of(np.exp(-lam))))) / n

    def move(r: float, correction: Tensor | float = 0.0) -> Tensor:
        """x at lambda = start + r h, from the noise at the start and a weighted difference of noises."""
        s, n = scales(start + r * h)
        return s / scales(start)[0] * x - n * (math.expm1(r * h) * noise + correction)

    noise = noise_at(x, start)
    if order == 1:
        return move(1)
    if order == 2:
        return move(1, math.expm1(h) * (noise_at(move(1 / 2), start + h / 2) - noise))
    first = noise_at(move(1 / 3), start + h / 3) - noise
    second = noise_at(move(2 / 3, 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * first), start + 2 * h / 3) - noise
    return move(1, 3 / 2 * (math.expm1(h) / h - 1) * second)
