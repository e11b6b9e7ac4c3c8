"""The recipe sections `diffusion` and `stages`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msdiff_dist.bounds import check_between
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
    """How time is divided into stages, and how many samples each stage gets."""

    boundaries: tuple[float, ...] = ()
    """The K - 1 inner boundaries of K stages, ascending, in the process's own unit (timestep, t or sigma). An empty
    list is a unified model."""
    sampling: StageSampling = "uniform"
    """Share of each stage in the samples, and in the objective unless there are `importance_weights`: `uniform` keeps
    the distribution of times, the process's own or that of `diffusion.times`; `equal` gives every stage 1/K, a list
    gives K relative weights. Inside a stage times always follow that distribution."""
    batch: Literal["mixed", "one_stage"] = "mixed"
    """`mixed`: each global batch holds samples of all stages. `one_stage`: it belongs to one stage, drawn with the
    probabilities of `sampling`, and only that stage's decoder steps, as in the official programs."""
    importance_weights: bool = False
    """Whether each loss is weighted by the probability of its stage under `sampling: uniform` over its share. The
    expected gradient is then that of `sampling: uniform`, and `sampling` only says how many samples each stage gets."""
    min_samples_per_step: int = 1
    """A decoder steps when its stage has had at least so many samples since its last step, on the mean gradient over
    them. The shared encoder steps on every batch."""

    def __post_init__(self) -> None:
        check_between("min_samples_per_step", self.min_samples_per_step, 1, 2**63 - 1)
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
