"""What a solver is: it carries noise to data, and knows the network only as `denoise(x_t, t) -> estimate of x_0`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process, Spacing

if TYPE_CHECKING:
    from msdiff_dist.diffusion.solvers.sampler import SamplerConfig

Denoise = Callable[[Tensor, float], Tensor]


def _one_each(evaluations: int) -> int:
    return evaluations


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver that a recipe and the command line can name.

    Args:
        run: (denoise, process, configuration, x_T [n, ...], n generators) to samples [n, ...]: from noise of standard
            deviation `process.prior_std`, at the times of `process.sampling_times`. The generators, one for each
            sample, are the source of all further noise.
        fits: whether it can sample a process.
        options: which of `eta` and `churn` it heeds; the others are refused.
        spacings: those it can take, None for all of the process's.
        least_steps: fewest `SamplerConfig.steps`.
        steps_of: `SamplerConfig.steps` for a number of network evaluations; raises `ConfigError` of the field
            `evaluations` where no steps take exactly that many.
        clips: it heeds `SamplerConfig.clip` by itself; otherwise its estimates of x_0 come clipped.
    """

    run: Callable[[Denoise, Process, SamplerConfig, Tensor, list[torch.Generator]], Tensor]
    fits: Callable[[Process], bool]
    options: tuple[str, ...] = ()
    spacings: tuple[Spacing, ...] | None = None
    least_steps: int = 1
    steps_of: Callable[[int], int] = _one_each
    clips: bool = False
