"""The training loop: step, record, save, preview, until done or asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.distributed.environment import limit_waits
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.progress import EVALUATE, PREVIEW, READ, RECORD, VALIDATE
from msdiff_dist.training.metrics import Meter
from msdiff_dist.training.sinks import Sinks
from msdiff_dist.training.time_left import TimeLeft

Outcome = Literal["finished", "preempted", "phase over"]


def train(trainer: Trainer, sinks: Sinks, limits: WaitLimits, stop_requested: Callable[[], bool]) -> Outcome:
    """Train from the first step that is not done to the recipe's last, or to the last of a phase.

    Collective: every rank calls it.

    Args:
        limits: how long ranks may wait for each other in a step, and in previews.
        stop_requested: whether this rank asks all ranks to save and stop.

    Returns:
        "preempted" if some rank asked to stop before the last step: everything is saved, and the run can be resumed.
        "phase over" if the run trains other stages from the next step on: a new trainer takes it, once this one is
        closed.
    """
    recipe, progress = trainer.recipe, trainer.env.progress
    total, validation = recipe.train.steps, recipe.validation
    pauses = {
        "checkpoint": recipe.checkpoint.every,
        "preview": recipe.preview.every,
        "validation": validation.every if validation else 0,
        "evaluation": recipe.evaluation.every,
    }
    time_left = TimeLeft(total, pauses)
    meter = Meter(trainer.batch_size, trainer.peak_petaflops, time_left, corrupt=len(trainer.corruption))
    limit_waits(limits.step_s)
    trainer.begin_evaluation(sinks)  # if a start that was to begin it ended first
    for step in range(trainer.state.step + 1, total + 1):
        start, progress.step = time.perf_counter(), step
        progress.enter(READ)
        lr = trainer.rate * recipe.lr_schedule.factor(step, total)
        outcome = trainer.step(lr, stop_requested())
        progress.enter(RECORD)
        for corruption in outcome.corruption:
            sinks.say(f"skipped: {corruption}")
        metrics = meter.measure(step, outcome, lr, time.perf_counter() - start, trainer.compute_of(outcome))
        if trainer.validation_is_due():  # before the checkpoint, which is kept or not by its loss
            start = time.perf_counter()
            progress.enter(VALIDATE)
            limit_waits(limits.start_s)
            metrics = replace(metrics, validation=trainer.validate())
            limit_waits(limits.step_s)
            progress.enter(RECORD)
            metrics.seconds["validation"] = time.perf_counter() - start
            time_left.paused("validation", metrics.seconds["validation"])
        phase_is_over = trainer.phase_is_over()
        if phase_is_over:
            metrics = replace(metrics, phase=trainer.phase_event())
        sinks.write(metrics)
        start = time.perf_counter()
        if trainer.save_if_due(now=step == total or outcome.stop_requested or phase_is_over):
            meter.saving = time.perf_counter() - start
            time_left.paused("checkpoint", meter.saving)
        if outcome.stop_requested and step < total:
            return "preempted"
        if trainer.preview_is_due():
            start = time.perf_counter()
            progress.enter(PREVIEW)
            limit_waits(limits.start_s)
            sinks.grid(step, trainer.preview())
            limit_waits(limits.step_s)
            time_left.paused("preview", time.perf_counter() - start)
        trainer.begin_evaluation(sinks)
        if trainer.evaluations.active is not None:
            progress.enter(EVALUATE)
            limit_waits(limits.start_s)
            time_left.stood_still(trainer.evaluations.go_on(recipe.evaluation.pause_seconds, sinks))
            limit_waits(limits.step_s)
            if trainer.evaluations.active is None:
                time_left.cost("evaluation", trainer.evaluations.seconds)
        trainer.evaluations.look(sinks, now=phase_is_over)
        if phase_is_over:
            limit_waits(limits.start_s)
            return "phase over"
    progress.enter(EVALUATE)
    limit_waits(limits.start_s)
    trainer.evaluations.finish(sinks, stop_requested)
    images, petaflops = total * trainer.batch_size, trainer.petaflops
    sinks.say(f"trained {total} steps on {images} images, {petaflops:.4g} PFLOP")
    return "finished"
