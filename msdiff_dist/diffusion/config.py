"""The recipe sections `diffusion` and `stages`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msdiff_dist.config import section_of
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes import PROCESSES
from msdiff_dist.diffusion.training_times import TimesConfig, TrainingTimes
from msdiff_dist.errors import ConfigError

StageSampling = Literal["uniform", "equal"] | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process. The section with the name of the process configures it; sections of others are refused."""

    process: Annotated[str, PROCESSES] = "discrete"
    """Diffusion process."""
    section: Any = field(default=None, metadata=section_of(PROCESSES, "process"))
    times: TimesConfig | None = None
    """Times drawn and weighted otherwise than by the process; null: as the process does."""

    def settings(self) -> Any:
        """The process's own dataclass, with its defaults where the recipe has no section."""
        return self.section or PROCESSES[self.process].config()


def build_process(config: DiffusionConfig) -> Process:
    """The recipe's process."""
    return PROCESSES[config.process].build(config.settings())


def build_times(config: DiffusionConfig) -> TrainingTimes:
    """The times that the recipe trains on.

    Raises:
        ConfigError: `diffusion.times` does not fit the process.
    """
    return TrainingTimes(build_process(config), config.times)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """How time is divided into stages, and how often each stage is trained."""

    boundaries: tuple[float, ...] = ()
    """The K - 1 inner boundaries of K stages, ascending, in the process's own unit (timestep, t or sigma). An empty
    list is a unified model."""
    sampling: StageSampling = "uniform"
    """Probability of each stage in the objective: `uniform` keeps the distribution of times, the process's own or
    that of `diffusion.times`; `equal` gives every stage 1/K, a list gives K relative weights. Inside a stage times
    always follow that distribution."""

    def __post_init__(self) -> None:
        if any(not math.isfinite(b) for b in self.boundaries):
            raise ConfigError("boundaries", list(self.boundaries), "must be finite numbers", "Give finite times.")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            remedy = f"Write {sorted(set(self.boundaries))}."
            raise ConfigError("boundaries", list(self.boundaries), "must ascend without repeats", remedy)
        if isinstance(self.sampling, tuple):
            if len(self.sampling) != self.num_stages:
                problem = f"has {len(self.sampling)} weights for {self.num_stages} stages"
                raise ConfigError("sampling", list(self.sampling), problem, f"Give {self.num_stages} weights.")
            if any(not (w > 0 and math.isfinite(w)) for w in self.sampling):
                raise ConfigError("sampling", list(self.sampling), "weights must be positive", "Give positive numbers.")

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1
