"""Solvers by diffusers' schedulers: ddim, ddpm and DPM-Solver++ multistep, with coefficients in float64.

A scheduler is given a noise schedule of steps + 1 entries, one for each of the sampler's times and one for the end. It
steps through all of them, so it works for every variance-preserving process and every spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.solvers.solver import Denoise, StageOf

if TYPE_CHECKING:
    from msdiff_dist.diffusion.solvers.sampler import SamplerConfig

_FEW_STEPS = 10
_LONGER = 1.25  # ratio of a step to the one before beyond which it does not use the estimate of another stage


def ddim(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """DDIM (2010.02502), with the fraction `config.eta` of the noise of ddpm."""
    from diffusers import DDIMScheduler

    def scheduler(sigmas: np.ndarray) -> Any:
        return _ancestral(DDIMScheduler, sigmas, config)

    times = process.sampling_times(config.steps, config.spacing, config.end, config.last)
    return _run(scheduler, times, denoise, process, x, generators, eta=config.eta)


def ddpm(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """Ancestral sampling (2006.11239, Algorithm 2)."""
    from diffusers import DDPMScheduler

    def scheduler(sigmas: np.ndarray) -> Any:
        return _ancestral(DDPMScheduler, sigmas, config)

    times = process.sampling_times(config.steps, config.spacing, config.end)
    return _run(scheduler, times, denoise, process, x, generators)


def dpmpp_2m(
    denoise: Denoise,
    process: Process,
    config: SamplerConfig,
    x: Tensor,
    generators: list[torch.Generator],
    stage_of: StageOf | None = None,
) -> Tensor:
    """DPM-Solver++ multistep of order 2 (2211.01095, Algorithm 2).

    The first step is of order 1. So is the last one if it ends at clean data, where the log-SNR is infinite, or if the
    steps are fewer than ten, with which order 2 is unstable (as in the authors' code). So is that from each of
    `dpmpp_2m_restarts`.
    """
    from diffusers import DPMSolverMultistepScheduler

    def scheduler(sigmas: np.ndarray) -> Any:
        # Entry 0 is where sampling ends, so the timesteps are steps, ..., 1. The scheduler derives float32 sigmas from
        # its own betas; they are replaced by the exact ones, in descending order.
        final = "sigma_min" if sigmas[0] else "zero"
        few = config.steps < _FEW_STEPS
        made: Any = DPMSolverMultistepScheduler(**_common(sigmas), lower_order_final=few, final_sigmas_type=final)
        made.set_timesteps(timesteps=list(range(config.steps, 0, -1)))
        made.sigmas = torch.from_numpy(sigmas[::-1].copy())
        return made

    times = process.sampling_times(config.steps, config.spacing, config.end, config.last)
    anew = dpmpp_2m_restarts(process, config, stage_of) if stage_of else []
    return _run(scheduler, times, denoise, process, x, generators, anew)


def dpmpp_2m_restarts(process: Process, config: SamplerConfig, stage_of: StageOf) -> list[float]:
    """Times of `dpmpp_2m` in another stage than the one before from which its step is of order 1.

    A step of order 2 adds h / (2 h_before) times the difference to the estimate before, with h the steps in log-SNR.
    Between estimates of two decoders that is also a multiple of their disagreement. Where h is much longer,
    as near the data with times even in t, this does more harm than order 2 does good.
    """
    times, landing = process.sampling_times(config.steps, config.spacing, config.end, config.last)
    sigmas = np.array([*process.sigma_of(times), landing])
    with np.errstate(divide="ignore"):
        h = -np.diff(np.log(sigmas))
    return [
        float(times[i])
        for i in range(1, len(times))
        if stage_of(times[i]) != stage_of(times[i - 1]) and h[i] > _LONGER * h[i - 1]
    ]


def _run(
    scheduler_of: Callable[[np.ndarray], Any],
    sampling_times: tuple[np.ndarray, float],
    denoise: Denoise,
    process: Process,
    x: Tensor,
    generators: list[torch.Generator],
    anew: Collection[float] = (),
    **options: float,
) -> Tensor:
    """Run a scheduler down its noise schedule.

    Args:
        scheduler_of: makes the scheduler from sigmas [steps + 1], ascending: sigma of schedule entry i.
        sampling_times: of the process.
        anew: times from which a multistep scheduler uses no earlier estimates.
        options: passed to each of its steps.
    """
    times, landing = sampling_times
    scheduler = scheduler_of(np.array([landing, *process.sigma_of(times[::-1])]))
    for index, t in zip(range(len(times), 0, -1), times.tolist(), strict=True):
        if t in anew:
            scheduler.lower_order_nums = 0  # earlier estimates that the next step may use
        x = scheduler.step(denoise(x, t), torch.tensor(index), x, generator=generators, **options).prev_sample
    return x


def _ancestral(kind: Any, sigmas: np.ndarray, config: SamplerConfig) -> Any:
    """A ddim or ddpm scheduler whose entry i has noise level `sigmas[i]`."""
    scheduler = kind(**_common(sigmas), clip_sample=config.clip)
    # As many steps as entries: the previous timestep of i is then i - 1. 1 / (1 + sigma^2) is s^2 where s^2 + n^2 = 1.
    scheduler.set_timesteps(len(sigmas))
    scheduler.alphas_cumprod = torch.from_numpy(1 / (1 + sigmas**2))
    return scheduler


def _common(sigmas: np.ndarray) -> dict[str, Any]:
    """Arguments of all schedulers. `denoise` gives x_0 whatever the network predicts, so the prediction is "sample"."""
    return {"num_train_timesteps": len(sigmas), "prediction_type": "sample", "timestep_spacing": "trailing"}
