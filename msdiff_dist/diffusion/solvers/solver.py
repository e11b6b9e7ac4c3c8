"""The type of a solver. A solver carries noise to data and knows the network only as a function `Denoise`."""

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
"""denoise(x_t [n, ...], t) -> estimate of x_0 [n, ...]; t is in the process's unit, the same for all samples."""

StageOf = Callable[[float], int]
"""The stage whose decoder answers at a time, in the process's unit."""


def _one_each(evaluations: int) -> int:
    return evaluations


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver that a recipe and the command line can name.

    Args:
        run: called with (denoise, process, config, x_T [n, ...], generators), returns samples [n, ...]. It starts from
            x_T, noise of standard deviation `process.prior_std`, steps through the times of `process.sampling_times`,
            and draws all further noise from the generators, one per sample.
        fits: whether the solver can sample a process.
        options: those of `eta`, `churn` and `last` that the solver uses; a configuration that sets another one is
            refused.
        spacings: the spacings that the solver supports; None: all that the process offers.
        least_steps: smallest `SamplerConfig.steps`.
        steps_of: `SamplerConfig.steps` for a number of network evaluations. It raises `ConfigError` with the field
            `evaluations` where no number of steps takes exactly that many.
        clips: whether the solver applies `SamplerConfig.clip` itself. Otherwise `solve` clips the estimates of x_0.
        staged: `run` for models of several stages, with the stage of a time as well, of solvers that use estimates of
            earlier steps and begin anew at some times.
        restarts: these times.
    """

    run: Callable[[Denoise, Process, SamplerConfig, Tensor, list[torch.Generator]], Tensor]
    fits: Callable[[Process], bool]
    options: tuple[str, ...] = ()
    spacings: tuple[Spacing, ...] | None = None
    least_steps: int = 1
    steps_of: Callable[[int], int] = _one_each
    clips: bool = False
    staged: Callable[[Denoise, Process, SamplerConfig, Tensor, list[torch.Generator], StageOf], Tensor] | None = None
    restarts: Callable[[Process, SamplerConfig, StageOf], list[float]] | None = None
