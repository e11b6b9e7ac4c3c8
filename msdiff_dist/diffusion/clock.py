"""The paper's clock: t in [0, 1], on which the times of every process can be compared.

It is VP-SDE's own time, the fraction of a discrete process's timesteps, and for any other process the time when its
sigma is that of VP-SDE (beta 0.1 to 20) at t.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess

GRID = 1000


def clock_times(process: Process, u: ArrayLike) -> np.ndarray:
    """The process's times at u in [0, 1] on the paper's clock, never before 1e-3 or the process's own first time."""
    u = np.asarray(u, np.float64)
    if process.discrete:
        return np.minimum(np.floor(u * process.hi + 1e-9), process.hi - 1).astype(np.int64)
    vp = process if isinstance(process, VPProcess) else VPProcess(VPConfig())
    t = np.maximum(u, vp.lo)
    return t if vp is process else process.time_of(vp.sigma_of(t))


def clock_of(process: Process, times: ArrayLike) -> np.ndarray:
    """Where times of the process lie on the paper's clock, in [0, 1]."""
    if process.discrete:
        return np.asarray(times, np.float64) / process.hi
    if isinstance(process, VPProcess):
        return np.asarray(times, np.float64)
    return VPProcess(VPConfig()).time_of(process.sigma_of(times))


def clock_grid(process: Process, size: int = GRID) -> np.ndarray:
    """Ascending times evenly spaced on the clock: t = 1/size, ..., 1, or the timesteps of a discrete process."""
    if process.discrete:
        size = min(size, int(process.hi))
        return clock_times(process, np.arange(size) / size)
    return clock_times(process, np.arange(1, size + 1) / size)
