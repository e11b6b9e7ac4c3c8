"""The clock: t in [0, 1], on which the times of all processes can be compared.

The paper (2312.09181) states stages and similarities on it. What t means depends on the process:

- VP-SDE: its own time;
- a discrete process: the fraction of its timesteps;
- any other process: the time at which the VP-SDE with beta from 0.1 to 20 has the same sigma.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess

GRID = 1000
"""Times on a grid of the clock, unless a caller asks for another number."""


def clock_times(process: Process, u: ArrayLike) -> np.ndarray:
    """Times of the process, of the shape of `u`, at u in [0, 1] on the clock.

    In continuous time, u below the VP-SDE's first time (1e-3, or the process's own `t_min`) is raised to it.
    """
    u = np.asarray(u, np.float64)
    if process.discrete:
        # The small term keeps u = k / T at timestep k where the product rounds to just below k.
        return np.minimum(np.floor(u * process.hi + 1e-9), process.hi - 1).astype(np.int64)
    vp = process if isinstance(process, VPProcess) else VPProcess(VPConfig())
    t = np.maximum(u, vp.lo)
    return t if vp is process else process.time_of(vp.sigma_of(t))


def clock_of(process: Process, times: ArrayLike) -> np.ndarray:
    """Clock times in [0, 1] of times of the process: the inverse of `clock_times`."""
    if process.discrete:
        return np.asarray(times, np.float64) / process.hi
    if isinstance(process, VPProcess):
        return np.asarray(times, np.float64)
    return VPProcess(VPConfig()).time_of(process.sigma_of(times))


def clock_grid(process: Process, size: int = GRID) -> np.ndarray:
    """Times of the process, ascending, evenly spaced on the clock.

    They lie at clock times 1/size, ..., 1. For a discrete process they are `size` evenly spaced timesteps from 0 on, or
    all of its timesteps where there are fewer.
    """
    if process.discrete:
        size = min(size, int(process.hi))
        return clock_times(process, np.arange(size) / size)
    return clock_times(process, np.arange(1, size + 1) / size)
