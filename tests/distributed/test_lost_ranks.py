"""Ranks that die, freeze, hang, never come or do not fit the others are named by those that remain.

Nothing watches the ranks but themselves, and rank 0 keeps the store, as where srun starts them. They wait in a sleep,
which like NCCL raises nothing when a peer is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import msdiff_dist
from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.cli import main
from msdiff_dist.distributed.environment import limit_waits, process_group
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.lost_ranks import naming_lost_ranks
from msdiff_dist.distributed.progress import COMPUTE, REDUCE

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def rank_main(what: str, start_s: float, environment: dict[str, str], output: str) -> None:
    """A rank that runs as a command of its own: with its environment, output, errors and exit status."""
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    main.app = lambda: run(what, start_s)  # type: ignore[assignment]
    main.main()


def run(what: str, start_s: float) -> None:
    limits = WaitLimits(step_s=4, start_s=start_s, silent_s=5, silent_patient_s=5)
    with process_group(limits) as env, naming_lost_ranks(env):
        env.progress.step = 41
        env.progress.enter(COMPUTE)
        if what == "raise" and env.rank == 1:
            raise RuntimeError("planted")
        dist.barrier()
        os.write(1, b"here\n")
        if what == "late":
            limit_waits(2)
            time.sleep(20 if env.rank == 1 else 0)
            dist.all_reduce(torch.zeros(1))
        if what == "hang" and env.rank == 1:
            time.sleep(1000)
        env.progress.enter(REDUCE)
        time.sleep(0 if what == "end" else 1000)


class Job:
    """Some of the ranks of a job."""

    def __init__(self, folder: Path, world_size: int, what: str, start_s: float = 60, ranks: int | None = None) -> None:
        folder.mkdir(parents=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._port = s.getsockname()[1]
        self._folder, self._world_size, self._call = folder, world_size, (what, start_s)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self.ranks: dict[int, ForkServerProcess] = {}
        for rank in range(world_size if ranks is None else ranks):
            self.start(rank)

    def environment(self, rank: int) -> dict[str, str]:
        job = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._world_size)}
        return job | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port), "OMP_NUM_THREADS": "1"}

    def start(self, rank: int, **environment: str) -> None:
        arguments = (*self._call, self.environment(rank) | environment, str(self._folder / str(rank)))
        self.ranks[rank] = self._context.Process(target=rank_main, args=arguments)
        self.ranks[rank].start()

    def wait_until_here(self) -> None:
        end = time.monotonic() + 60
        while not all(self.printed(rank, "out") for rank in self.ranks):
            assert time.monotonic() < end, [self.printed(rank, "err") for rank in self.ranks]
            time.sleep(0.1)

    def printed(self, rank: int, name: str) -> str:
        path = self._folder / f"{rank}.{name}"
        return path.read_text() if path.exists() else ""

    def errors(self, status: int, *ranks: int) -> list[str]:
        """The line of standard error with the error, of ranks that must end with this status."""
        found = []
        for rank in ranks:
            self.ranks[rank].join(60)
            assert self.ranks[rank].exitcode == status, self.printed(rank, "err")
            found += [line for line in self.printed(rank, "err").splitlines() if line.startswith("error")][:1]
        return found


NewJob = Callable[..., Job]


@pytest.fixture
def new_job(tmp_path: Path) -> Iterator[NewJob]:
    started: list[Job] = []

    def start(*arguments: object, **more: object) -> Job:
        started.append(Job(tmp_path / str(len(started)), *arguments, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for process in (process for job in started for process in job.ranks.values()):
        process.kill()
        process.join()


def test_a_killed_rank_is_named_with_its_step_and_phase(new_job: NewJob) -> None:
    job = new_job(3, "wait")
    job.wait_until_here()
    time.sleep(3)  # for a beat of the last phase
    job.ranks[1].kill()
    for error in job.errors(1, 0, 2):
        assert "rank 1: no sign of life for" in error
        assert "last in step 41, phase 'reduce gradients'" in error


def test_a_frozen_rank_0_that_keeps_the_store_is_named(new_job: NewJob) -> None:
    job = new_job(3, "wait")
    job.wait_until_here()
    os.kill(job.ranks[0].pid or 0, signal.SIGSTOP)
    for error in job.errors(1, 1, 2):
        assert "rank 0, which keeps the job's store, does not answer for" in error


def test_a_live_rank_that_hangs_is_named(new_job: NewJob) -> None:
    job = new_job(2, "hang")
    for error in job.errors(1, 0, 1):
        assert "rank 1: alive, but without progress for" in error
        assert "phase 'forward and backward'" in error


def test_the_cause_of_a_failure_reaches_the_other_ranks(new_job: NewJob) -> None:
    job = new_job(2, "raise")
    (error,) = job.errors(1, 0)
    assert "rank 1 failed: RuntimeError: planted" in error
    assert "RuntimeError: planted" in job.printed(1, "err")


def test_collectives_have_the_limit_of_training(new_job: NewJob) -> None:
    job = new_job(2, "late")
    (error,) = job.errors(1, 0)
    assert "rank 1: alive, but" in error


def test_ranks_that_end_well_leave_no_error(new_job: NewJob) -> None:
    job = new_job(2, "end")
    assert job.errors(0, 0, 1) == []


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(new_job: NewJob) -> None:
    job = new_job(3, "wait", start_s=10, ranks=2)
    for error in job.errors(1, 0, 1):
        assert "rank 2: no sign of life 10 s after rank 0 started" in error


def test_ranks_that_do_not_fit_the_others_are_refused_by_all(new_job: NewJob, tmp_path: Path) -> None:
    package = Path(msdiff_dist.__file__).parent
    other = shutil.copytree(package, tmp_path / "msdiff_dist", ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "__init__.py"
    init.write_text(init.read_text().replace(msdiff_dist.__version__, "0.0.9"))
    job = new_job(2, "wait", ranks=1)
    code = f"from {__name__} import rank_main; rank_main('wait', 60.0, {{}}, {str(tmp_path / 'other')!r})"
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | job.environment(1) | path, timeout=60)
    (error,) = job.errors(2, 0)
    assert "0.0.9 on rank 1" in error
    assert "the ranks have different versions" in error
    assert done.returncode == 2
    assert error in (tmp_path / "other.err").read_text()

    route = new_job(2, "wait", ranks=1)
    route.start(1, GLOO_SOCKET_IFNAME="ib77")
    errors = route.errors(2, 0, 1)
    assert len(errors) == 2
    assert all("GLOO_SOCKET_IFNAME = 'ib77'" in error and "no such network interface" in error for error in errors)
