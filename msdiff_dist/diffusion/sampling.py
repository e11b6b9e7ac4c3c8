"""Sampling: diffusers' solvers driven with our processes, one network call and one stage at a time.

A solver sees the process as a noise schedule of exactly `steps` entries, one for each time where the network is called,
and the network as a function that returns its estimate of x_0. So any process, prediction type and spacing works with
any solver, and each picture depends on (seed, its index) alone, not on how the pictures are split into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process, Spacing
from msdiff_dist.diffusion.stage_partition import StagePartition
from msdiff_dist.errors import ConfigError
from msdiff_dist.randomness import generator

ModelFn = Callable[[Tensor, Tensor, int, Tensor | None, Tensor | None], Tensor]
"""model_fn(x_in [n, C, H, W], t_in [n], stage, label [n] | None, context [n, T, C] | None) -> output [n, C, H, W]."""

Denoise = Callable[[Tensor, float], Tensor]
"""denoise(x_t, t) -> estimate of x_0."""


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are made.

    Args:
        name: `ddim`, `dpmpp_2m` (DPM-Solver++ multistep of order 2) or `ddpm` (ancestral).
        steps: network evaluations (twice as many forwards under guidance, in one batch).
        eta: noise of ddim's steps: 0 is deterministic, 1 as noisy as ddpm.
        spacing: where the times lie, see `Process.sampling_times`.
        clip: keep estimates of x_0 inside [-1, 1]; for pixels, not for latents. ddim keeps the noise estimate of the
            estimate before clipping. Early in training `ddim` with eta 1 and clip gives the cleanest pictures.
        guidance_scale: classifier-free guidance: output = unconditional + scale x (conditional - unconditional).
    """

    name: Literal["ddim", "dpmpp_2m", "ddpm"] = "ddim"
    steps: int = 50
    eta: float = 0.0
    spacing: Spacing = "leading"
    clip: bool = False
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps", self.steps, "sampling needs at least one step", "Use 50.")
        if not 0 <= self.eta <= 1:
            raise ConfigError("eta", self.eta, "must lie in [0, 1]", "Use 0 for deterministic sampling.")
        if self.eta and self.name != "ddim":
            raise ConfigError("eta", self.eta, f"{self.name} has no eta", "Leave it out, or use the ddim sampler.")


@dataclass(frozen=True)
class Condition:
    """Class labels int64 [n] and context [n, T, C], each None where the model takes none."""

    label_n: Tensor | None = None
    context_nTC: Tensor | None = None


@torch.no_grad()
def sample(
    model_fn: ModelFn,
    process: Process,
    partition: StagePartition,
    config: SamplerConfig,
    *,
    seed: int,
    index_n: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    condition: Condition | None = None,
    unconditional: Condition | None = None,
) -> Tensor:
    """Samples [n, *shape], float32, of the pictures numbered `index_n`.

    Raises:
        ConfigError: guidance without an `unconditional` condition, or steps that the process does not have.
    """
    guided = config.guidance_scale != 1
    condition = condition or Condition()
    if guided and unconditional is None:
        problem = "guidance needs a model trained with dropped conditions"
        raise ConfigError("guidance_scale", config.guidance_scale, problem, "Use 1.")
    label = _join(condition.label_n, unconditional.label_n) if guided and unconditional else condition.label_n
    context = (
        _join(condition.context_nTC, unconditional.context_nTC) if guided and unconditional else condition.context_nTC
    )

    def denoise(x: Tensor, t: float) -> Tensor:
        stage = int(partition.stage_of(np.array(t)))
        t_n = torch.full((len(x),), t, device=x.device, dtype=torch.float64)
        x_in, t_in = process.network_input(x, t_n)
        if guided:
            x_in, t_in = torch.cat([x_in, x_in]), torch.cat([t_in, t_in])
        output = model_fn(x_in, t_in, stage, label, context).float()
        if guided:
            conditional, without = output.chunk(2)
            output = without + config.guidance_scale * (conditional - without)
        return process.denoised(output, x, t_n)

    return solve(denoise, process, config, image_generators(seed, index_n), shape, device)


def sampler_times(process: Process, partition: StagePartition, config: SamplerConfig) -> list[tuple[float, int]]:
    """(time, stage) of every network call of `sample`, in order: found by a dry run on a single number."""
    times: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.zeros_like(x)

    solve(record, process, config, image_generators(0, [0]), (1, 1, 1), "cpu")
    return list(zip(times, partition.stage_of(np.array(times)).tolist(), strict=True))


def image_generators(seed: int, index_n: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each picture: the source of its initial noise and of the noise of every step."""
    seeds = [int(generator(seed, "sampling", i).integers(2**63)) for i in index_n]
    return [torch.Generator().manual_seed(s) for s in seeds]


def solve(
    denoise: Denoise,
    process: Process,
    config: SamplerConfig,
    generators: list[torch.Generator],
    shape: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """Run the sampler from noise to data with any estimate of x_0; returns float32 [len(generators), *shape]."""
    from diffusers.utils.torch_utils import randn_tensor

    times = process.sampling_times(config.steps, config.spacing)
    scheduler, options = _scheduler(config, process.sigma_of(times[::-1]), generators)
    x = randn_tensor((len(generators), *shape), generator=generators, device=torch.device(device), dtype=torch.float32)
    for index, t in zip(scheduler.timesteps, times.tolist(), strict=True):
        x0 = denoise(x, t)
        if config.clip and config.name == "dpmpp_2m":
            x0 = x0.clamp(-1, 1)
        x = scheduler.step(x0, index, x, **options).prev_sample
    return x


def _scheduler(
    config: SamplerConfig, sigmas_S: np.ndarray, generators: list[torch.Generator]
) -> tuple[Any, dict[str, Any]]:
    """diffusers' scheduler over S ascending noise levels, its timesteps 0 .. S - 1, and the options of its step."""
    import diffusers

    alphas_cumprod = 1 / (1 + sigmas_S**2)
    common = {
        "num_train_timesteps": config.steps,
        "trained_betas": 1 - alphas_cumprod / np.array([1.0, *alphas_cumprod[:-1]]),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    scheduler: Any
    options: dict[str, Any] = {"generator": generators}
    if config.name == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=config.clip)
        options["eta"] = config.eta
    elif config.name == "ddpm":
        scheduler = diffusers.DDPMScheduler(**common, clip_sample=config.clip)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**common)
    scheduler.alphas_cumprod = torch.from_numpy(alphas_cumprod)  # float64: 1 - alpha is tiny near the data
    scheduler.set_timesteps(config.steps)
    return scheduler, options


def _join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])
