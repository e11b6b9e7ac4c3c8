"""The optimizer of every engine and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import nn

from msdiff_dist.bounds import GREATEST_FLOAT, check_between
from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table


@dataclass(frozen=True)
class Optimizer:
    """An optimizer that a recipe can name.

    Args:
        build: makes a torch optimizer of (parameters, configuration, whether to use fused kernels).
        moments: fp32 numbers that it keeps for each parameter, for the plan's estimate of memory.
        degrees: by name of such a number in the optimizer's state, the power of the gradient that it averages: 1 for a
            mean of gradients, 2 for one of their squares. Without them a run cannot grow into decoders of other widths.
    """

    build: Callable[[list[nn.Parameter], OptimizerConfig, bool], torch.optim.Optimizer]
    moments: Callable[[OptimizerConfig], int]
    degrees: Mapping[str, int] = field(default_factory=dict)


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
    )


def _adam(parameters: list[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
    )


def _sgd(parameters: list[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
    )


_ADAMS_DEGREES = {"exp_avg": 1, "exp_avg_sq": 2}

OPTIMIZERS: Table[Optimizer] = Table(
    "optimizer",
    {
        "adamw": Optimizer(_adamw, lambda config: 2, _ADAMS_DEGREES),
        "adam": Optimizer(_adam, lambda config: 2, _ADAMS_DEGREES),
        "sgd": Optimizer(_sgd, lambda config: int(config.momentum > 0), {"momentum_buffer": 1}),
    },
)

_LEAST = 1e-37  # near the smallest normal number of fp32


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of every engine."""

    lr: float
    """Learning rate, see `lr_per`. It never depends on the number of ranks."""
    lr_per: Literal["run", "sample"] = "run"
    """`run`: `lr` is the learning rate. `sample`: the learning rate is `lr` times the global batch size, as LDM scales
    its base rate."""
    name: Annotated[str, OPTIMIZERS] = "adamw"
    """Optimizer."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of adamw's and adam's two moments."""
    eps: float = 1e-8
    """Term added to the denominator of adamw and adam."""
    weight_decay: float = 0.01
    """Weight decay: decoupled from the gradient in adamw, added to it in adam and sgd."""
    momentum: float = 0.0
    """Momentum of sgd."""
    grad_clip: float = 0.0
    """Greatest norm of the gradient of the whole model; 0: no clipping."""

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not value > _LEAST:
                raise ConfigError(name, value, "must be above 0 in fp32", "Adam usually takes lr 1e-4, eps 1e-8.")
        for name, most in (("lr", 1000.0), ("eps", 1000.0), ("weight_decay", 1000.0), ("grad_clip", GREATEST_FLOAT)):
            check_between(name, getattr(self, name), 0, most)
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "must lie in [0, 1)", "Use 0.9, or 0 for none.")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("betas", self.betas, "must lie in [0, 1)", "Use [0.9, 0.999].")

    def rate(self, batch_size: int) -> float:
        """Learning rate of a run with this global batch size, before the schedule."""
        return self.lr * batch_size if self.lr_per == "sample" else self.lr


@dataclass(frozen=True, kw_only=True)
class LrScheduleConfig:
    """Linear warm-up over `warmup_steps`, then constant, or a cosine that falls to `final_fraction` at the end."""

    kind: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0; 0: no warm-up."""
    first_step: Literal[0, 1] = 1
    """Number that the warm-up gives the first step, whose share of the rate is this over `warmup_steps`. score_sde and
    EDM count from 0, so that their first step has the rate 0."""
    final_fraction: float = 0.0
    """Fraction of the learning rate at the last step of a cosine."""

    def __post_init__(self) -> None:
        check_between("warmup_steps", self.warmup_steps, 0, 2**63 - 1)
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError("final_fraction", self.final_fraction, "must lie in [0, 1]", "Use 0 to decay fully.")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the learning rate of `step`, counted from 1, of `total_steps`."""
        number = step - 1 + self.first_step
        if number < self.warmup_steps:
            return number / self.warmup_steps
        if number == self.warmup_steps:
            return 1.0
        if self.kind == "constant":
            return 1.0
        # The cosine begins at the first step after the warm-up, which has the full rate.
        progress = min(1.0, (step - 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_factory(config: OptimizerConfig, fused: bool) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """A function from parameters to the configured torch optimizer; `fused` kernels on GPUs."""
    build = OPTIMIZERS.choose("optimizer.name", config.name).build
    return lambda parameters: build(parameters, config, fused)
