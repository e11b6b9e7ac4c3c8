"""What runs in a cluster job: picklable, light to import, and asked to stop by signals only."""

from __future__ import annotations

import os
import random
import shlex
import shutil
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

STOPPED = "cancelled"  # a file of this name in the launch folder: do not requeue


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One run, as one task of a job: joins its peers, trains from the newest checkpoint, and goes on after a stop.

    run_dir: the run folder. recipe: the resolved recipe, kept at launch. signal_delay_s: the time a stop may take.
    max_restarts: starts in a row without a new checkpoint before the job gives up.
    """

    run_dir: str
    recipe: str
    signal_delay_s: int
    max_restarts: int

    def __call__(self) -> str:
        job = submitit.JobEnvironment()
        os.environ.setdefault("MASTER_PORT", str(_port(job.job_id)))
        ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        launch_folder = Path(self.run_dir) / "launch"
        diary = Diary(launch_folder / "starts.jsonl", job.job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        try:
            if ranks.rank == 0:
                self._begin(diary, job, ranks.world_size)
            outcome, seconds = self._train()
        except SystemExit:  # submitit's own handler, for a signal before training began
            diary.write_end("told to stop before training began")
            raise
        except BaseException as e:
            diary.write_end(f"rank {ranks.rank}: {type(e).__name__}: {e}")
            raise
        if ranks.rank == 0:
            diary.write_end(outcome, seconds_to_stop=seconds)
        if outcome == "preempted":
            # Nothing may be returned: submitit would take the job for done. Exit status 0: srun ends the whole step at
            # the first other one, perhaps before rank 0 has asked for the requeue.
            if ranks.rank == 0:
                self._warn_if_slow(seconds)
                requeue(job, launch_folder)
            sys.stdout.flush()
            sys.exit(0)
        return outcome

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit for a signal that comes before training has begun: start over, unless cancelled."""
        return None if (Path(self.run_dir) / "launch" / STOPPED).exists() else DelayedSubmission(self)

    def _begin(self, diary: Diary, job: submitit.JobEnvironment, world_size: int) -> None:
        from msdiff_dist.checkpoint.layout import complete_checkpoints

        checkpoints = complete_checkpoints(Path(self.run_dir) / "checkpoints")
        step = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
        nodes = list(job.hostnames)
        print(f"job {job.job_id}: {world_size} ranks on {', '.join(nodes)}, newest checkpoint: step {step}", flush=True)
        why_stop = diary.starts_without_progress(step, self.max_restarts)
        diary.write_start(world_size, step, nodes=nodes)
        if why_stop:
            raise TrainingError(why_stop)

    def _train(self) -> tuple[str, float | None]:
        """Outcome, and seconds from the signal to stop until everything was saved."""
        from omegaconf import OmegaConf

        from msdiff_dist.apps.train.rank import run_rank
        from msdiff_dist.recipe import recipe_from
        from msdiff_dist.training.preemption import StopRequest

        recipe = recipe_from(OmegaConf.to_container(OmegaConf.load(self.recipe)))
        stop = StopRequest()
        outcome = run_rank(recipe, Path(self.run_dir), stop=stop)
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
    """One part of a data job: an `msdiff` command that skips what is already done, so it may be started over."""

    arguments: tuple[str, ...]
    done_file: str

    @property
    def done(self) -> bool:
        """Whether exactly this command has been done."""
        path = Path(self.done_file)
        return path.exists() and path.read_text() == self._command

    def __call__(self) -> str:
        if not self.done:
            subprocess.run([sys.executable, "-m", "msdiff_dist.cli.main", *self.arguments], check=True)
            path = Path(self.done_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, self._command)
        return "done"

    @property
    def _command(self) -> str:
        return shlex.join(self.arguments) + "\n"

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit for the time limit or a pre-emption: start over, unless cancelled."""
        launch_folder = Path(self.done_file).parents[1] / "launch"
        return None if (launch_folder / STOPPED).exists() else DelayedSubmission(self)


def _port(job_id: str) -> int:
    """Where rank 0 listens: the same on every rank, and below the ports that Linux hands out by itself, which another
    program may hold at this moment."""
    return random.Random(job_id).randrange(20_000, 32_768)


def requeue(job: submitit.JobEnvironment, launch_folder: Path) -> None:
    """Have this job run again, unless it was cancelled or SLURM is requeueing it already."""
    if (launch_folder / STOPPED).exists():
        print("cancelled: not requeued")
        return
    if shutil.which("scontrol") and "SLURM_JOB_ID" in os.environ:
        state = _slurm_state(os.environ["SLURM_JOB_ID"])
        if state not in ("RUNNING", "COMPLETING"):
            print(f"not requeued: the job is {state}")
            return
    job._requeue(_ANY)


_ANY = 0  # submitit's remaining time-outs, only mentioned in its log


def _slurm_state(job_id: str) -> str:
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True)
    words: dict[str, Any] = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
    return str(words.get("JobState", "unknown"))
