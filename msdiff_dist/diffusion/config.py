"""The recipe sections `diffusion` and `stages`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from msdiff_dist.bounds import check_between
from msdiff_dist.config import section_of
from msdiff_dist.diffusion.denoiser import PredictionType, check_min_snr_gamma
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


@dataclass(frozen=True, kw_only=True)
class StageObjective:
    """What the network predicts in one stage, and the weight of its loss; null: as in the process's section."""

    prediction_type: PredictionType | None = None
    """What the network predicts in this stage: the noise, v = s eps - n x_0, or the clean sample."""
    min_snr_gamma: float | None = None
    """Weigh this stage's loss by min(SNR, gamma) (2303.09556), expressed for its prediction type."""

    def __post_init__(self) -> None:
        check_min_snr_gamma(self.min_snr_gamma)

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the process's section, with their values."""
        named = {"prediction_type": self.prediction_type, "min_snr_gamma": self.min_snr_gamma}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class AdaptiveSharesConfig:
    """Shares of the stages in the samples that follow the training. The first ones are those of `stages.sampling`."""

    by: Literal["gradient_variance", "progress"] = "gradient_variance"
    """`gradient_variance`: shares with the least variance of the decoders' gradients for their compute. `progress`: in
    proportion to how much a stage's training loss fell for its compute."""
    every: int = 500
    """Steps from one decision to the next. A decision holds from the fifth step after it."""
    min_share: float = 0.05
    """Least share of a stage."""
    rate: float = 0.5
    """How far shares move towards what is decided: 1: at once."""

    def __post_init__(self) -> None:
        check_between("every", self.every, 8, 2**63 - 1)
        for field_name, value in (("min_share", self.min_share), ("rate", self.rate)):
            if not 0 < value <= 1:
                raise ConfigError(field_name, value, "must lie in (0, 1]", "Use 0.05, or 0.5 for the rate.")


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
    objectives: tuple[StageObjective, ...] = ()
    """What the network predicts in each stage and how its loss is weighted, stage 0 first, such as
    `[{prediction_type: v_prediction}, {}, {prediction_type: sample}]`. An empty list: the same in all stages, as in the
    process's section."""
    adaptive: AdaptiveSharesConfig | None = None
    """Changes the shares during training; null: they stay."""

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
        if self.objectives and (len(self.objectives) != self.num_stages or self.num_stages == 1):
            count, one = len(self.objectives), self.num_stages == 1
            problem = "a model of one stage has one objective" if one else f"are not one for each of {self.num_stages}"
            remedy = "Write it in the process's section." if one else f"Give {self.num_stages}; {{}} changes nothing."
            raise ConfigError("objectives", count, problem, remedy)

        self._check_adaptive()

    def _check_adaptive(self) -> None:
        if self.adaptive is None:
            return
        if self.batch == "one_stage":
            raise ConfigError("batch", self.batch, "has no shares to adapt", "Use mixed, or leave stages.adaptive out.")
        if self.num_stages == 1:
            raise ConfigError("adaptive", "given", "there is one stage, with all samples", "Leave it out.")
        if self.adaptive.min_share * self.num_stages >= 1:
            problem = f"{self.num_stages} stages would have more than all samples, or no choice"
            raise ConfigError(
                "adaptive.min_share", self.adaptive.min_share, problem, f"Use less than {1 / self.num_stages:.3g}."
            )

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1


def settings_of_stages(config: DiffusionConfig, stages: StagesConfig) -> list[Any]:
    """The process's own dataclass with the objective of each stage.

    Raises:
        ConfigError: the process does not know such an objective.
    """
    settings, found = config.settings(), []
    for k, objective in enumerate(stages.objectives or [StageObjective()] * stages.num_stages):
        for name, value in objective.changes().items():
            if name not in type(settings).__dataclass_fields__:
                raise ConfigError(
                    f"stages.objectives[{k}].{name}", value, f"means nothing to the process {config.process}, whose "
                    "network predicts one thing at all times",
                    "Remove it, or use process discrete or vp.",
                )  # fmt: skip
        found.append(replace(settings, **objective.changes()))
    return found


def of_stage(config: DiffusionConfig, stages: StagesConfig, stage: int) -> DiffusionConfig:
    """The process of a unified model that is one of the stages."""
    return replace(config, section=settings_of_stages(config, stages)[stage]) if stages.objectives else config


def build_process(config: DiffusionConfig, stages: StagesConfig | None = None) -> Process:
    """The recipe's process.

    Args:
        stages: where they have objectives of their own, a time's prediction is that of its stage.

    Raises:
        ConfigError: the process does not know such an objective.
    """
    kind = PROCESSES[config.process]
    process = kind.build(config.settings())
    if stages is not None and stages.objectives:
        process.divide(
            stages.boundaries, [kind.build(settings).denoiser for settings in settings_of_stages(config, stages)]
        )
    return process


def build_times(config: DiffusionConfig, stages: StagesConfig | None = None) -> TrainingTimes:
    """The times that the recipe trains on.

    Raises:
        ConfigError: `diffusion.times` does not fit the process.
    """
    return TrainingTimes(build_process(config, stages), config.times)
