"""The tasks of cluster jobs, and how a job requeues itself.

submitit pickles a task at launch and calls it on every rank. So tasks hold plain values, and import torch and DeepSpeed
only when they are called.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from msdiff_dist.errors import TrainingError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.launch.restarts import Diary

CANCELLED_FILE = "cancelled"  # in the launch folder; while it exists the job is not requeued
_COUNTDOWN = 0  # time-outs that submitit would still allow: written to its log, and nothing else


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One rank of a launched run: joins the other ranks, trains from the newest checkpoint, and requeues after a stop.

    run_dir: the run folder. recipe: path of the resolved recipe in the launch's snapshot. signal_delay_s: seconds
    between the signal to stop and the kill. max_restarts: starts in a row without a new checkpoint, after which the job
    gives up. gpus_per_node: GPUs that the job asked for on each node. branch_of: the run that this one begins from,
    if it is a branch, and branch_from: the step of the checkpoint, if one was named.
    """

    run_dir: str
    recipe: str
    signal_delay_s: int
    max_restarts: int
    gpus_per_node: int = 0
    branch_of: str | None = None
    branch_from: int | None = None

    def __call__(self) -> str:
        job = submitit.JobEnvironment()
        # Set before submitit exports the variables of torch.distributed: it would draw a port that may be in use.
        os.environ.setdefault("MASTER_PORT", str(_port(job.job_id)))
        ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        launch_folder = Path(self.run_dir) / "launch"
        diary = Diary(launch_folder / "starts.jsonl", job.job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        try:
            if ranks.rank == 0:
                self._begin(diary, job, ranks.world_size)
            outcome, seconds = self._train(diary, ranks.rank)
        except SystemExit:  # from submitit's own signal handler, which has requeued the job
            diary.write_end("stopped by a signal before training began")
            raise
        except BaseException as e:
            diary.write_end(f"rank {ranks.rank}: {type(e).__name__}: {e}")
            raise
        if ranks.rank == 0:
            diary.write_end(outcome, seconds_to_stop=seconds)
        if outcome == "preempted":
            # A returned value would make submitit record the job as done, so the process exits instead. The status is
            # 0: at any other one srun ends the whole step, perhaps before rank 0 has asked for the requeue.
            if ranks.rank == 0:
                self._warn_if_slow(seconds)
                requeue(job, launch_folder)
            sys.stdout.flush()
            sys.exit(0)
        return outcome

    def checkpoint(self) -> DelayedSubmission | None:
        """What submitit requeues after a signal before training began: the same task, or None if it was cancelled."""
        return None if (Path(self.run_dir) / "launch" / CANCELLED_FILE).exists() else DelayedSubmission(self)

    def _begin(self, diary: Diary, job: submitit.JobEnvironment, world_size: int) -> None:
        """Rank 0: record this start in the diary.

        Raises:
            TrainingError: too many starts before this one made no progress.
        """
        from msdiff_dist.checkpoint.layout import complete_checkpoints

        checkpoints = complete_checkpoints(Path(self.run_dir) / "checkpoints")
        step = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
        nodes = list(job.hostnames)
        print(f"job {job.job_id}: {world_size} ranks on {', '.join(nodes)}, newest checkpoint: step {step}", flush=True)
        # Counted before this start is recorded: it has not had the chance to make progress.
        why_give_up = diary.starts_without_progress(step, self.max_restarts)
        diary.write_start(world_size, step, nodes=nodes)
        if why_give_up:
            raise TrainingError(why_give_up)

    def _train(self, diary: Diary, rank: int) -> tuple[str, float | None]:
        """Train; returns the outcome, and the seconds from the signal to stop until all was saved (None: no signal)."""
        from omegaconf import OmegaConf

        from msdiff_dist.apps.train.branch import Branch
        from msdiff_dist.apps.train.rank import run_rank
        from msdiff_dist.distributed.environment import print_error
        from msdiff_dist.recipe import recipe_from
        from msdiff_dist.training.preemption import StopRequest

        recipe = recipe_from(OmegaConf.to_container(OmegaConf.load(self.recipe)))

        def lost(error: TrainingError) -> None:
            print_error(error)
            diary.write_end(f"rank {rank}: {type(error).__name__}: {error}")

        stop = StopRequest()
        outcome = run_rank(
            recipe,
            Path(self.run_dir),
            stop=stop,
            gpus_per_node=self.gpus_per_node,
            branch=Branch(Path(self.branch_of), self.branch_from) if self.branch_of else None,
            lost=lost,
        )
        return outcome, None if stop.requested_at is None else time.time() - stop.requested_at

    def _warn_if_slow(self, seconds: float | None) -> None:
        if seconds is None:
            return
        print(f"stopped: {seconds:.1f} s from the signal until all was saved; allowed are {self.signal_delay_s} s")
        if seconds > 0.5 * self.signal_delay_s:
            print(
                f"WARNING: saving took {seconds:.0f} s of the {self.signal_delay_s} s between signal and kill. "
                f"Set signal_delay_s to {4 * max(1, round(seconds))} or more in the cluster file."
            )


@dataclass(frozen=True)
class CommandJob:
    """One part of a data job: an `msdiff` command that skips what is already done, so it may be started again.

    arguments: the words after `msdiff`. done_file: `FOLDER/parts/00000.done`, written when the command has succeeded.
    gpus: GPUs that the job asked for.
    """

    arguments: tuple[str, ...]
    done_file: str
    gpus: int = 0

    @property
    def done(self) -> bool:
        """Whether exactly this command has been done."""
        # The file holds the command: another command launched in the same folder is not done yet.
        path = Path(self.done_file)
        return path.exists() and path.read_text() == self._command

    def __call__(self) -> str:
        if not self.done:
            self._check_gpus()
            subprocess.run([sys.executable, "-m", "msdiff_dist.cli.main", *self.arguments], check=True)
            path = Path(self.done_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, self._command)
        return "done"

    def _check_gpus(self) -> None:
        """Refuse to compute on a CPU what was given a GPU.

        Raises:
            UserError: fewer GPUs than the job asked for.
        """
        from msdiff_dist.distributed.facts import AskedGpus, refused_gpus

        if error := refused_gpus(AskedGpus(self.gpus, "gpus_per_node"), socket.gethostname()):
            raise error

    @property
    def _command(self) -> str:
        return shlex.join(self.arguments) + "\n"

    def checkpoint(self) -> DelayedSubmission | None:
        """What submitit requeues after a time limit or a pre-emption: the same task, or None if it was cancelled."""
        launch_folder = Path(self.done_file).parents[1] / "launch"
        return None if (launch_folder / CANCELLED_FILE).exists() else DelayedSubmission(self)


def _port(job_id: str) -> int:
    """The port on which rank 0 listens, the same on every rank.

    It is below 32768, where Linux starts to give ports to programs that ask for any: one of those could be in use.
    """
    return random.Random(job_id).randrange(20_000, 32_768)


def requeue(job: submitit.JobEnvironment, launch_folder: Path) -> None:
    """Requeue this job, unless it was cancelled or SLURM is requeueing it already. A local job's process exits here."""
    if (launch_folder / CANCELLED_FILE).exists():
        print("cancelled: not requeued")
        return
    if shutil.which("scontrol") and "SLURM_JOB_ID" in os.environ:
        state = _slurm_state(os.environ["SLURM_JOB_ID"])
        if state not in ("RUNNING", "COMPLETING"):
            print(f"not requeued: the job is {state}")
            return
    job._requeue(_COUNTDOWN)


def _slurm_state(job_id: str) -> str:
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True)
    # "JobId=7 JobState=RUNNING Reason=None ..."
    words: dict[str, Any] = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
    return str(words.get("JobState", "unknown"))
