"""One rank of a run: its process group, its hold on the run folder, its signals, and the trainer between them."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from msdiff_dist.apps.train.found_data import FoundData
from msdiff_dist.apps.train.loop import Outcome, train
from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.distributed.agree import on_rank_0
from msdiff_dist.distributed.environment import process_group
from msdiff_dist.distributed.lost_ranks import naming_lost_ranks
from msdiff_dist.distributed.precision import PrecisionChoice, choose_precision
from msdiff_dist.recipe import Recipe, recipe_mapping
from msdiff_dist.training.preemption import StopRequest
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import SinkContext, Sinks


def run_rank(
    recipe: Recipe,
    run_dir: Path,
    terminal: IO[str] | None = None,
    stop: StopRequest | None = None,
    found: FoundData | None = None,
) -> Outcome:
    """Train `recipe` in `run_dir` as the rank that the environment names, from its newest checkpoint if it has one.

    Rank 0 shows its progress on `terminal`, or on standard error. Returns "preempted" when a signal ended it early:
    everything is saved, and the same call resumes. `stop`, if given, then knows when the signal came. `found` is the
    recipe's data, if it has been found before.
    """
    folder = RunFolder(run_dir)
    torch.set_num_threads(recipe.train.threads or _threads_per_rank())
    with ExitStack() as stack:
        env = stack.enter_context(process_group(recipe.train.timeout_s))
        stack.enter_context(naming_lost_ranks(env))
        stop = stack.enter_context(stop or StopRequest())
        precision = on_rank_0(lambda: _choose_precision(recipe, folder, env.device))
        recipe = replace(recipe, train=replace(recipe.train, precision=precision.precision))
        on_rank_0(lambda: folder.open(recipe_mapping(recipe)))
        stack.callback(folder.close)
        trainer = stack.enter_context(Trainer(recipe, folder, env, found))
        sinks = Sinks()
        if env.rank == 0:
            context = SinkContext(
                folder=folder,
                first_step=trainer.state.step,
                total_steps=recipe.train.steps,
                terminal=terminal or sys.stderr,
            )
            sinks = stack.enter_context(Sinks.of_run(recipe.metrics, context))
        warnings = [f"warning: {precision.warning}"] if precision.warning else []
        for line in (trainer.describe(precision), *warnings, *trainer.notes):
            sinks.say(line)
        return train(trainer, sinks, lambda: stop.requested_at is not None or trainer.saver.failed)


def _choose_precision(recipe: Recipe, folder: RunFolder, device: torch.device) -> PrecisionChoice:
    """The recipe's, or what the run here has, or what fits rank 0's device: one for all ranks."""
    stored = folder.stored_recipe()
    return choose_precision(recipe.train.precision, device, stored["train"]["precision"] if stored else None)


def _threads_per_rank() -> int:
    """What OMP_NUM_THREADS says, as the jobs of a cluster do, else an even share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdigit() and int(said):
        return int(said)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(1, len(os.sched_getaffinity(0)) // local_world)
