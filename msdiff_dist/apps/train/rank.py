"""One rank of a run: its process group, signal handlers, run folder, trainer and metric sinks, opened in this order."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from msdiff_dist.apps.train.branch import Branch
from msdiff_dist.apps.train.found_data import FoundData
from msdiff_dist.apps.train.loop import Outcome, train
from msdiff_dist.apps.train.phases import warnings_of
from msdiff_dist.apps.train.trainer import Corrupted, Trainer
from msdiff_dist.distributed.agree import on_rank_0
from msdiff_dist.distributed.cores import threads_per_rank
from msdiff_dist.distributed.environment import print_error, process_group
from msdiff_dist.distributed.facts import AskedGpus
from msdiff_dist.distributed.flight_recorder import set_nccl_defaults
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.kernels import choose_kernels
from msdiff_dist.distributed.lost_ranks import naming_lost_ranks
from msdiff_dist.distributed.precision import agree_on_precision
from msdiff_dist.distributed.progress import FINISH
from msdiff_dist.errors import TrainingError
from msdiff_dist.recipe import Recipe, comparable_mapping, recipe_mapping
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.preemption import StopRequest
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import Sinks, check_installed


def run_rank(
    recipe: Recipe,
    run_dir: Path,
    terminal: IO[str] | None = None,
    stop: StopRequest | None = None,
    found: FoundData | None = None,
    gpus_per_node: int = 0,
    branch: Branch | None = None,
    lost: Callable[[TrainingError], None] = print_error,
) -> Outcome:
    """Train `recipe` in `run_dir` as the rank that the environment names, from the newest checkpoint if there is one.

    Args:
        terminal: where rank 0 shows its progress; None: standard error.
        stop: records when a signal asked to stop; None: a new one.
        found: the recipe's data, if the command has read them; None: rank 0 reads them.
        gpus_per_node: GPUs that the job asked for on each node; 0: none by itself.
        branch: the run to begin from, if `run_dir` is a new run; it is looked at until `run_dir` has a recipe.
        lost: called, from a thread, when a rank is lost or hangs, before this process ends with status 1.

    Returns:
        "preempted" if a signal ended training early: everything is saved, and the same call resumes it.
    """
    folder = RunFolder(run_dir, comparable_mapping)
    with ExitStack() as stack:
        set_nccl_defaults(folder.path / "logs")
        limits = WaitLimits(
            step_s=recipe.train.timeout_s, start_s=max(recipe.train.timeout_s, recipe.train.start_timeout_s)
        )
        asked = _asked_gpus(recipe, gpus_per_node)
        env = stack.enter_context(process_group(limits, asked=asked, lost=lost))
        stack.enter_context(naming_lost_ranks(env))
        stop = stack.enter_context(stop or StopRequest())
        torch.set_num_threads(recipe.train.threads or threads_per_rank())
        so_far = on_rank_0(lambda: _precision_so_far(folder, branch))
        precision = agree_on_precision(recipe.train.precision, env.device, so_far)
        choose_kernels(env.device, recipe.train.tf32)
        recipe = replace(recipe, train=replace(recipe.train, precision=precision.precision))
        on_rank_0(lambda: check_installed(recipe.metrics))
        origin = on_rank_0(lambda: _opened(folder, recipe, branch, env.world_size, found))
        stack.callback(folder.close)
        sinks: Sinks | None = None
        corruption: Corrupted = {}

        def begun(trainer: Trainer) -> Sinks:
            """Say what this start, or another phase, is about to train."""
            nonlocal sinks
            lines = [trainer.describe(precision), *trainer.notes]
            if sinks is None:
                step = trainer.state.step
                changes = on_rank_0(lambda: folder.go_on(recipe_mapping(recipe), step))
                if changes and env.rank == 0:
                    trainer.evaluations.forget_later()
                changed = [f"changed since step {step}: {'; '.join(map(str, changes))}"] if changes else []
                warnings = [*env.warnings, *([precision.warning] if precision.warning else []), *warnings_of(recipe)]
                warned = [f"warning: {w}" for w in warnings]
                lines = [*origin, trainer.describe(precision), *changed, *warned, *trainer.notes]
                sinks = Sinks()
                if env.rank == 0:
                    context = SinkContext(
                        folder=folder,
                        first_step=step,
                        total_steps=recipe.train.steps,
                        terminal=terminal or sys.stderr,
                        recipe=recipe_mapping(recipe),
                    )
                    sinks = stack.enter_context(Sinks.of_run(recipe.metrics, context))
            for line in lines:
                sinks.say(line)
            return sinks

        def phase() -> Outcome:
            """Train from the newest checkpoint to the end of its phase. Nothing of it stays in memory."""
            with Trainer(recipe, folder, env, found, corruption) as trainer:
                told = begun(trainer)
                outcome = train(trainer, told, limits, lambda: stop.requested_at is not None or trainer.saver.failed)
            if outcome == "phase over":
                trainer.leave()
            return outcome

        while (outcome := phase()) == "phase over":
            gc.collect()  # engines hold each other in cycles
            if env.device.type == "cuda":
                torch.cuda.empty_cache()
        env.progress.enter(FINISH)
    # Here the last checkpoint is complete, and no rank waits for this one.
    if outcome == "finished" and env.rank == 0:
        from msdiff_dist.apps.report.write import report_at_end  # its libraries are no reason to start later

        print(report_at_end(folder.path), file=terminal or sys.stderr, flush=True)
    return outcome


def _precision_so_far(folder: RunFolder, branch: Branch | None) -> str | None:
    """The precision of the run that goes on; None for one that begins. For rank 0 alone."""
    if branch:
        branch.is_made(folder.path)
        return branch.precision(folder.path)
    stored = folder.stored_recipe()
    return stored["train"]["precision"] if stored else None


def _opened(
    folder: RunFolder, recipe: Recipe, branch: Branch | None, world_size: int, found: FoundData | None
) -> list[str]:
    """Open the run folder; the lines about its origin, if it is a branch that begins now. For rank 0 alone."""
    lines: list[str] = []

    def begin() -> None:
        assert branch is not None
        lines.extend(branch.begin(recipe, folder, world_size, found).lines())

    folder.open(recipe_mapping(recipe), begin if branch else None)
    return lines


def _asked_gpus(recipe: Recipe, gpus_per_node: int) -> AskedGpus | None:
    """The GPUs that the cluster file, the recipe or the allocation of a SLURM job asks for on each node."""
    if gpus_per_node:
        return AskedGpus(gpus_per_node, "gpus_per_node")
    if recipe.train.device == "cuda":
        return AskedGpus(1, "train.device=cuda: GPUs per rank")
    # SLURM sets it in steps whose job was given GPUs.
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return AskedGpus(1, "GPUs of the SLURM job") if allocated.isdigit() and int(allocated) else None
