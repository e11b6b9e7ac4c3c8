"""What is measured of every step.

A new metric is a field of `StepMetrics` that `Meter` fills; all sinks then write it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from msdiff_dist.data.corruption import Corruption
from msdiff_dist.training.time_left import TimeLeft

LOSS_WINDOW = 100
"""Steps over which the training loss is smoothed."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What every rank knows after a step; all but `seconds` is the same on every rank.

    Attributes:
        loss: the objective over the global batch.
        loss_per_stage: mean loss of each stage's samples, before importance weights; None for a stage without samples.
        samples_per_stage: samples of each stage in the global batch.
        grad_norm: norm of the gradient of all parts that step, before clipping.
        stop_requested: whether some rank was asked to stop.
        busy_W: each rank's seconds of forward computation.
        memory_W: most bytes that each rank has held so far, as `peak_bytes` counts them.
        corruption: corrupt shards and samples that some rank met in this step and none before.
        guide_loss: alignment with the teacher, mean over the global batch, before `guide.weight`; None in steps without
            a guide.
        seconds: wall time on this rank by activity: `data` and `routing` (waiting for them), `compute` and `optimizer`.
            On GPUs the last two are the device's, and like `busy_W` those of the newest step that it has finished.
    """

    loss: float
    loss_per_stage: list[float | None]
    samples_per_stage: list[int]
    grad_norm: float
    stop_requested: bool
    busy_W: list[float]
    memory_W: list[int]
    corruption: list[Corruption]
    seconds: dict[str, float]
    guide_loss: float | None = None

    @property
    def balance(self) -> float:
        """Mean over maximum of the ranks' busy time, in (0, 1]."""
        return sum(self.busy_W) / len(self.busy_W) / max(self.busy_W)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl, whose keys are these names.

    Attributes:
        step: number of the optimizer step, counted from 1.
        loss: the objective over the global batch.
        loss_per_stage: mean loss of each stage's samples, before importance weights; None for a stage without samples.
        samples_per_stage: samples of each stage in the global batch.
        grad_norm: norm of the gradient of all parts that step, before clipping.
        lr: learning rate of the step.
        images_seen: samples trained on so far, this step included.
        images_per_second: samples per second of wall time on rank 0.
        seconds: wall time on rank 0 by activity, as in `StepOutcome`; `checkpoint` is the time for which training stood
            still for a checkpoint before this step.
        balance: mean over maximum of the ranks' busy time.
        busy_seconds: each rank's seconds in forward passes, to four significant digits.
        slowest_rank: the rank with the most of them.
        memory_bytes: most bytes that the fullest rank has held since this start: tensors on a GPU, a process on a CPU.
        mfu: model FLOP/s utilization (2204.02311, appendix B): operations of the step over its wall time, as a
            share of what all GPUs compute at their peak; None on devices whose peak is not known.
        eta_seconds: expected seconds until the run ends, as `TimeLeft` has them.
        petaflops: 1e15 floating-point operations of all steps so far, forward and backward.
        damaged: corrupt shards and samples skipped since this start of the run, each counted once.
        guide_loss: alignment of the encoder with the teacher of `guide`, which `loss` does not include: the mean of one
            minus the cosine similarity, before `guide.weight`. None in steps without it.
        validation: held-out loss after this step, at steps that validate: `loss` (the objective), `loss_per_stage`,
            `loss_per_bin`, `unweighted`, `epsilon` and `epsilon_per_stage` (see `HeldOutLoss.summary`), `weights`
            (`ema` or `raw`), and under `raw` the same of the last weights.
        phase: at a step after which the run trains other stages: `grown`, whether it has grown out of a unified model,
            and `ended`, the stages that have ended.
    """

    step: int
    loss: float
    loss_per_stage: list[float | None]
    samples_per_stage: list[int]
    grad_norm: float
    lr: float
    images_seen: int
    images_per_second: float
    seconds: dict[str, float]
    balance: float
    busy_seconds: list[float]
    slowest_rank: int
    memory_bytes: int
    mfu: float | None
    eta_seconds: float | None
    petaflops: float
    damaged: int
    guide_loss: float | None = None
    validation: dict[str, Any] | None = None
    phase: dict[str, Any] | None = None

    def scalars(self) -> dict[str, float]:
        """Every number by a name of its own: `loss`, `loss_per_stage/0`, `seconds/data`.

        All but `busy_seconds`, of which there are as many as ranks (`balance` and `slowest_rank` stand for them), and
        `phase`, which is no measurement.
        """
        found: dict[str, float] = {}
        for field in fields(self):
            if field.name not in ("busy_seconds", "phase"):
                _flatten(field.name, getattr(self, field.name), found)
        return found


def _flatten(name: str, value: Any, into: dict[str, float]) -> None:
    """Add the numbers in `value` to `into`, under `name` and the keys or indices that lead to them."""
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}/{key}", item, into)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _flatten(f"{name}/{i}", item, into)
    elif value is not None and not isinstance(value, str):
        into[name] = float(value)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """1e15 floating-point operations of the whole job, forward and backward: of a step, and of all steps so far."""

    step: float
    total: float


class Meter:
    """Makes each step's metrics from its outcome, and keeps what adds up over steps.

    Args:
        batch_size: the global batch size.
        peak_petaflops: 1e15 floating-point operations that all devices compute in a second at most; None: not known.
        time_left: says how long the run will go on.
        corrupt: corrupt shards and samples skipped so far, since this start.

    Attributes:
        saving: seconds for which training stood still for the checkpoint after the last step.
    """

    def __init__(self, batch_size: int, peak_petaflops: float | None, time_left: TimeLeft, corrupt: int = 0) -> None:
        self._batch_size, self._peak_petaflops = batch_size, peak_petaflops
        self._time_left, self._corrupt = time_left, corrupt
        self.saving = 0.0

    def measure(self, step: int, outcome: StepOutcome, lr: float, elapsed: float, compute: Compute) -> StepMetrics:
        """Metrics of `step`, counted from 1, which has just ended and took `elapsed` seconds."""
        self._corrupt += len(outcome.corruption)
        saving, self.saving = self.saving, 0.0
        eta, peak = self._time_left.after(step), self._peak_petaflops
        return StepMetrics(
            step=step,
            loss=outcome.loss,
            loss_per_stage=outcome.loss_per_stage,
            samples_per_stage=outcome.samples_per_stage,
            grad_norm=outcome.grad_norm,
            lr=lr,
            images_seen=step * self._batch_size,
            images_per_second=self._batch_size / elapsed,
            seconds={**outcome.seconds, "checkpoint": saving},
            balance=outcome.balance,
            busy_seconds=[float(f"{busy:.4g}") for busy in outcome.busy_W],
            slowest_rank=max(range(len(outcome.busy_W)), key=outcome.busy_W.__getitem__),
            memory_bytes=max(outcome.memory_W),
            mfu=compute.step / elapsed / peak if peak else None,
            eta_seconds=None if eta is None else round(eta, 1),
            petaflops=compute.total,
            damaged=self._corrupt,
            guide_loss=outcome.guide_loss,
        )


@dataclass
class LossAverage:
    """The training loss, smoothed over about `LOSS_WINDOW` steps: their plain mean at first, then an exponential one.

    `value` is None before the first step.
    """

    value: float | None = None

    def update(self, step: int, loss: float) -> None:
        """Take in the loss of `step`, counted from 1."""
        self.value = loss if self.value is None else self.value + (loss - self.value) / min(step, LOSS_WINDOW)
