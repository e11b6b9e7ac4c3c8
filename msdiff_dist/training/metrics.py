"""What is measured of every step. A new metric is a field of `StepMetrics`, filled by `Meter`; every sink takes it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from msdiff_dist.data.corruption import Corruption

LOSS_WINDOW = 100


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What every rank knows after a step.

    loss: over the global batch. loss_per_stage: mean of each stage. grad_norm: global, before clipping. stop_requested:
    some rank was asked to stop. busy_W: each rank's seconds of forward computation. corruption: shards and samples met
    by some rank, and before by none. seconds: wall time on this rank: waiting for `data` and for `routing`, `compute`,
    `optimizer`.
    """

    loss: float
    loss_per_stage: list[float]
    grad_norm: float
    stop_requested: bool
    busy_W: list[float]
    corruption: list[Corruption]
    seconds: dict[str, float]

    @property
    def balance(self) -> float:
        """Mean over max of the ranks' busy time."""
        return sum(self.busy_W) / len(self.busy_W) / max(self.busy_W)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl.

    step: optimizer steps done, counted from 1. loss: the objective over the global batch. loss_per_stage: mean over
    each stage's samples, before importance weights. grad_norm: global, before clipping. seconds: wall time of the step
    on rank 0 by part; `checkpoint`: how long training stood still for a checkpoint before this step. balance: mean over
    max of the ranks' busy time. petaflops: 1e15 floating-point operations of all steps so far, forward and backward.
    corrupt: shards and samples left out since the command was given, each counted once.
    """

    step: int
    loss: float
    loss_per_stage: list[float]
    grad_norm: float
    lr: float
    images_seen: int
    images_per_second: float
    seconds: dict[str, float]
    balance: float
    petaflops: float
    damaged: int

    def scalars(self) -> dict[str, float]:
        """Every number in it by a name of its own: `loss`, `loss_per_stage/0`, `seconds/data`."""
        found: dict[str, float] = {}
        for field in fields(self):
            _flatten(field.name, getattr(self, field.name), found)
        return found


def _flatten(name: str, value: Any, into: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}/{key}", item, into)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _flatten(f"{name}/{i}", item, into)
    elif value is not None:
        into[name] = float(value)


class Meter:
    """Makes each step's metrics from its outcome, and keeps what adds up over steps.

    Args:
        step_petaflops: of one step of the whole job, forward and backward.
    """

    def __init__(self, batch_size: int, step_petaflops: float) -> None:
        self._batch_size, self._step_petaflops = batch_size, step_petaflops
        self._corrupt = 0
        self.saving = 0.0
        """Seconds that training stood still for the checkpoint after the last step."""

    def measure(self, step: int, outcome: StepOutcome, lr: float, elapsed: float) -> StepMetrics:
        """Metrics of `step`, counted from 1, which took `elapsed` seconds."""
        self._corrupt += len(outcome.corruption)
        saving, self.saving = self.saving, 0.0
        return StepMetrics(
            step=step,
            loss=outcome.loss,
            loss_per_stage=outcome.loss_per_stage,
            grad_norm=outcome.grad_norm,
            lr=lr,
            images_seen=step * self._batch_size,
            images_per_second=self._batch_size / elapsed,
            seconds={**outcome.seconds, "checkpoint": saving},
            balance=outcome.balance,
            petaflops=step * self._step_petaflops,
            damaged=self._corrupt,
        )


@dataclass
class LossAverage:
    """The training loss, smoothed over about `LOSS_WINDOW` steps; the plain mean of the first ones."""

    value: float | None = None

    def update(self, step: int, loss: float) -> None:
        """Take in the loss of `step`, counted from 1."""
        self.value = loss if self.value is None else self.value + (loss - self.value) / min(step, LOSS_WINDOW)
