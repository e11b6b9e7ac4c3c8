"""diffusers' schedulers: ddim, ddpm and DPM-Solver++ multistep, in float64 coefficients.

Each sees the process as a noise schedule with one entry for each of the sampler's times, so any variance-preserving
process and any spacing works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.solvers.solver import Denoise

if TYPE_CHECKING:
    from msdiff_dist.diffusion.solvers.sampler import SamplerConfig


def ddim(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """DDIM (2010.02502), with a fraction `eta` of ddpm's noise."""
    from diffusers import DDIMScheduler

    def scheduler(sigmas: np.ndarray) -> Any:
        return _ancestral(DDIMScheduler, sigmas, config)

    return _run(scheduler, denoise, process, config, x, generators, eta=config.eta)


def ddpm(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """Ancestral sampling (2006.11239)."""
    from diffusers import DDPMScheduler

    def scheduler(sigmas: np.ndarray) -> Any:
        return _ancestral(DDPMScheduler, sigmas, config)

    return _run(scheduler, denoise, process, config, x, generators)


def dpmpp_2m(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """DPM-Solver++ multistep of order 2 (2211.01095)."""
    from diffusers import DPMSolverMultistepScheduler

    def scheduler(sigmas: np.ndarray) -> Any:
        made: Any = DPMSolverMultistepScheduler(**_common(sigmas))
        made.set_timesteps(timesteps=list(range(config.steps, 0, -1)))
        made.sigmas = torch.from_numpy(sigmas[::-1].copy())
        return made

    return _run(scheduler, denoise, process, config, x, generators)


def _run(
    scheduler_of: Callable[[np.ndarray], Any],
    denoise: Denoise,
    process: Process,
    config: SamplerConfig,
    x: Tensor,
    generators: list[torch.Generator],
    **options: float,
) -> Tensor:
    """Run a scheduler, made for ascending noise levels [steps + 1], down to the first of them."""
    times, landing = process.sampling_times(config.steps, config.spacing, config.end)
    scheduler = scheduler_of(np.array([landing, *process.sigma_of(times[::-1])]))
    for index, t in zip(range(config.steps, 0, -1), times.tolist(), strict=True):
        x = scheduler.step(denoise(x, t), torch.tensor(index), x, generator=generators, **options).prev_sample
    return x


def _ancestral(kind: Any, sigmas: np.ndarray, config: SamplerConfig) -> Any:
    scheduler = kind(**_common(sigmas), clip_sample=config.clip)
    scheduler.set_timesteps(len(sigmas))
    scheduler.alphas_cumprod = torch.from_numpy(1 / (1 + sigmas**2))
    return scheduler


def _common(sigmas: np.ndarray) -> dict[str, Any]:
    return {"num_train_timesteps": len(sigmas), "prediction_type": "sample", "timestep_spacing": "trailing"}
