"""The training loop: step, average, record, preview, save, until done or asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from msdiff_dist.checkpoint.policy import LossAverage
from msdiff_dist.training.config import TrainConfig
from msdiff_dist.training.ema import ShardedEma
from msdiff_dist.training.feed import Feed
from msdiff_dist.training.metrics import MetricsWriter, StepMetrics
from msdiff_dist.training.optimizer import LrScheduleConfig
from msdiff_dist.training.step import TrainStep

Outcome = Literal["finished", "preempted"]


@dataclass(frozen=True)
class Occasions:
    """What happens after some steps: saving when it is due, previews every so many (0: never). Both are collective.

    save: of the averages alone, or a whole checkpoint.
    """

    save: Callable[[int, bool], None]
    save_due: Callable[[int], bool]
    snapshot_due: Callable[[int], bool]
    preview: Callable[[int], None]
    preview_every: int


def train(
    config: TrainConfig,
    train_step: TrainStep,
    feed: Feed,
    ema: ShardedEma,
    loss_average: LossAverage,
    optimizer_lr: float,
    lr_schedule: LrScheduleConfig,
    occasions: Occasions,
    writer: MetricsWriter | None,
    must_stop: Callable[[], bool],
    batch_size: int,
    step_petaflops: float,
    first_step: int,
) -> Outcome:
    """Train from `first_step` steps done to `config.steps`; every rank calls it alike.

    Args:
        writer: on rank 0 only.
        must_stop: whether this rank wants all ranks to save and stop.
    """
    saved, saving, damaged = first_step, 0.0, 0
    for done in range(first_step + 1, config.steps + 1):
        start = time.perf_counter()
        lr = optimizer_lr * lr_schedule.factor(done - 1, config.steps)
        outcome = train_step(lr, must_stop())
        ema.update(done)
        loss_average.update(done, outcome.loss)
        waited = feed.take_seconds()
        damaged += len(outcome.damage)
        if writer:
            for damage in outcome.damage:
                writer.say(f"left out: {damage}")
            elapsed = time.perf_counter() - start
            writer.write(
                StepMetrics(
                    step=done,
                    loss=outcome.loss,
                    loss_per_stage=outcome.loss_per_stage,
                    grad_norm=outcome.grad_norm,
                    lr=lr,
                    images_seen=done * batch_size,
                    images_per_second=batch_size / elapsed,
                    seconds={"data": waited.data, "routing": waited.routing, **outcome.seconds, "checkpoint": saving},
                    balance=outcome.balance,
                    petaflops=done * step_petaflops,
                    damaged=damaged,
                )
            )
        saving = 0.0
        last = done == config.steps or outcome.stop_requested
        checkpoint = last or occasions.save_due(done)
        if checkpoint or occasions.snapshot_due(done):
            start = time.perf_counter()
            occasions.save(done, checkpoint)
            saved, saving = done, time.perf_counter() - start
        if outcome.stop_requested and done < config.steps:
            return "preempted"
        if occasions.preview_every and (done == config.steps or done % occasions.preview_every == 0):
            occasions.preview(done)
    assert saved == config.steps or first_step >= config.steps
    if writer:
        images = config.steps * batch_size
        writer.say(f"trained {config.steps} steps on {images} images, {config.steps * step_petaflops:.4g} PFLOP")
    return "finished"
