"""The division of time into stages. Only this module compares times with boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.diffusion.process import Process
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StagePartition:
    """Stages 0 to K - 1 as half-open intervals of the process's time. Stage 0 is nearest the data.

    Args:
        boundaries: the K - 1 inner boundaries, ascending. A boundary belongs to the stage above it.
        unit: what messages call a time: `timestep`, `t` or `sigma`.
        lo, hi: the process's times are in [lo, hi).
    """

    boundaries: tuple[float, ...]
    unit: str
    lo: float
    hi: float

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1

    def interval(self, stage: int) -> tuple[float, float]:
        """(first time, end) of a stage, whose times are in [first, end)."""
        edges = (self.lo, *self.boundaries, self.hi)
        return edges[stage], edges[stage + 1]

    @overload
    def stage_of(self, t: Tensor) -> Tensor: ...
    @overload
    def stage_of(self, t: np.ndarray) -> np.ndarray: ...
    def stage_of(self, t: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Stage of each time, int64 of t's shape. A time outside [lo, hi) belongs to the nearest stage."""
        if isinstance(t, Tensor):
            # float64, since float32 would round boundaries across nearby times.
            edges = torch.tensor(self.boundaries, dtype=torch.float64, device=t.device)
            return torch.bucketize(t.double(), edges, right=True)
        return np.searchsorted(np.array(self.boundaries), np.asarray(t, np.float64), side="right").astype(np.int64)


def build_partition(config: StagesConfig, process: Process) -> StagePartition:
    """The recipe's stages in `process`.

    Raises:
        ConfigError: a boundary outside the process, or between two timesteps of a discrete one.
    """
    for i, b in enumerate(config.boundaries):
        field = f"stages.boundaries[{i}]"
        if process.discrete and b != int(b):
            # A fraction is most likely a time on the clock, t in (0, 1).
            hint = f"Write {round(b * process.hi)}." if 0 < b < 1 else f"Write {round(b)}."
            raise ConfigError(field, b, "boundaries of a discrete process are whole timesteps", hint)
        if not process.lo < b < process.hi:
            problem = f"lies outside the process, whose {process.unit} runs from {process.lo} to {process.hi}"
            raise ConfigError(field, b, problem, "Choose a boundary between them.")
    partition = StagePartition(boundaries=config.boundaries, unit=process.unit, lo=process.lo, hi=process.hi)
    for k in range(partition.num_stages):
        lo, hi = partition.interval(k)
        if not process.mass(lo, hi) > 0:
            problem = f"training never draws a {process.unit} in stage {k}, [{lo}, {hi})"
            raise ConfigError("stages.boundaries", list(config.boundaries), problem, "Move the boundary.")
    return partition
