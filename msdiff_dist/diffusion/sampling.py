"""Sampling: calls of the network, each in one stage, with classifier-free guidance (2207.12598).

Each image has a noise generator of its own, so it depends on the seed and its number, not on how the images are
divided into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.solvers import SOLVERS, SamplerConfig, solve
from msdiff_dist.diffusion.stage_partition import StagePartition
from msdiff_dist.errors import ConfigError
from msdiff_dist.randomness import generator

ModelFn = Callable[[Tensor, Tensor, int, Tensor | None, Tensor | None], Tensor]
"""model_fn(x_in [n, C, H, W], t_in [n], stage, label [n] | None, context [n, T, C] | None) -> output [n, C, H, W]."""


@dataclass(frozen=True)
class Condition:
    """Class labels int64 [n] and context [n, T, C]; None for what the model does not take."""

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
    seen: Callable[[float, int, Tensor], object] | None = None,
) -> Tensor:
    """Samples [n, *shape], float32: the images, or latents, with the numbers `index_n`.

    Args:
        shape: [C, H, W] of a sample.
        condition: labels and context of all n samples; None: the model takes none.
        unconditional: labels and context that stand for dropped ones, which guidance needs.
        seen: called with time, stage and estimate of x0 [n, *shape] after each network call.

    Raises:
        ConfigError: guidance without an `unconditional` condition, or a sampler that does not fit the process.
    """
    condition = condition or Condition()
    guided = config.guidance_scale != 1
    if guided:
        if unconditional is None:
            problem = "guidance needs a model trained with dropped conditions"
            raise ConfigError("guidance_scale", config.guidance_scale, problem, "Use 1.")
        condition = Condition(
            _join(condition.label_n, unconditional.label_n), _join(condition.context_nTC, unconditional.context_nTC)
        )

    def stage_of(t: float) -> int:
        return int(partition.stage_of(np.array(t)))

    # Solvers may compute in float64; the network gets float32, but the time stays exact for the process's formulas.
    def denoise(x: Tensor, t: float) -> Tensor:
        stage = stage_of(t)
        x, t_n = x.float(), torch.full((len(x),), t, device=x.device, dtype=torch.float64)
        x_in, t_in = process.network_input(x, t_n)
        if guided:  # both halves in one call: first with the conditions, then without
            x_in, t_in = torch.cat([x_in, x_in]), torch.cat([t_in, t_in])
        output = model_fn(x_in, t_in, stage, condition.label_n, condition.context_nTC).float()
        if guided:
            conditional, without = output.chunk(2)
            output = without + config.guidance_scale * (conditional - without)
        estimate = process.denoised(output, x, t_n)
        if seen is not None:
            seen(t, stage, estimate)
        return estimate

    # Drawn on the CPU, so that an image does not depend on the device.
    generators = image_generators(seed, index_n)
    x_T = process.prior_std * torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    several = stage_of if partition.num_stages > 1 else None
    return solve(denoise, process, config, x_T.to(device), generators, several).float()


def sampler_times(process: Process, partition: StagePartition, config: SamplerConfig) -> list[tuple[float, int]]:
    """(time, stage) of every network call of `sample`, in order.

    They are found by running the solver on a single number, with a network that returns zero.

    Raises:
        ConfigError: the sampler does not fit the process.
    """
    times: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.zeros_like(x)

    solve(record, process, config, torch.zeros(1, 1), image_generators(0, [0]))
    return list(zip(times, partition.stage_of(np.array(times)).tolist(), strict=True))


def sampler_restarts(process: Process, partition: StagePartition, config: SamplerConfig) -> list[float]:
    """Times in another stage at which the solver begins anew: `SamplerConfig.restart`.

    Raises:
        ConfigError: the sampler does not fit the process.
    """
    config = config.for_process(process)
    restarts = SOLVERS[str(config.name)].restarts
    if restarts is None or not config.restart:
        return []
    return restarts(process, config, lambda t: int(partition.stage_of(np.array(t))))


def image_generators(seed: int, index_n: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, from which its initial noise and the noise of all steps are drawn."""
    seeds = [int(generator(seed, "sampling", i).integers(2**63)) for i in index_n]
    return [torch.Generator().manual_seed(s) for s in seeds]


def _join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])
