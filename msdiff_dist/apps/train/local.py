"""Several ranks on this machine, started together and watched until all are done or one has failed.

torchrun would do for running them; this supervisor also names the rank that failed first, passes signals on so that
ranks can save before they end, and imports the heavy libraries once for all ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import TCPStore

from msdiff_dist.errors import MsdiffError, TrainingError, UserError
from msdiff_dist.recipe import recipe_from

GRACE_S = 2.0  # after a failure, for the other ranks to tell what they saw of it
# What every rank imports; all but the first are pulled in late, by DeepSpeed's and torch's first use.
_PRELOAD = [
    "msdiff_dist.apps.train.rank",
    "torch._dynamo",
    "torch._refs",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


@dataclass(frozen=True)
class _Rank:
    rank: int
    process: ForkServerProcess
    result: Connection


@dataclass(frozen=True)
class _Report:
    """What a rank says at its end: the outcome, or its error and when it happened."""

    outcome: str | None
    error: MsdiffError | None = None
    at: float = 0.0


def run_local(recipe: dict[str, Any], run_dir: Path, nproc: int) -> str:
    """Train on `nproc` ranks of this machine; returns the outcome of `run_rank`.

    Rank 0 speaks to this terminal; every rank's output goes to the run folder's logs.

    Raises:
        UserError, TrainingError: what ended the rank that failed first.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    context = multiprocessing.get_context("forkserver")
    preload(context)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(nproc):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(rank, nproc, store.port, recipe, run_dir, send))
        process.start()
        send.close()
        ranks.append(_Rank(rank, process, receive))
    with _passing_signals(ranks):
        _watch(ranks, logs)
    return str(ranks[0].result.recv().outcome)


def preload(context: ForkServerContext) -> None:
    """Have the ranks that `context` starts share one import of the heavy libraries."""
    if not torch.cuda.is_available():  # a process that may touch CUDA must not fork
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context.set_forkserver_preload(_PRELOAD)


def _watch(ranks: Sequence[_Rank], logs: Path) -> None:
    """Wait for all ranks; at the first failure give the others a moment to fail too, then end them all."""
    running = {r.process.sentinel: r for r in ranks}
    while running:
        ready = wait(list(running))
        ended = [running.pop(sentinel) for sentinel in list(running) if sentinel in ready]
        if all(r.process.exitcode == 0 for r in ended):
            continue
        time.sleep(GRACE_S)
        dead = [r for r in ranks if not r.process.is_alive()]
        for r in ranks:
            r.process.kill()
            r.process.join()
        raise _first_failure(dead, logs)


def _first_failure(dead: Sequence[_Rank], logs: Path) -> MsdiffError:
    """The error that explains the others: a rank that died without a word, else the earliest reported."""
    reports: list[_Report] = []
    for r in dead:
        if r.process.exitcode == 0:
            continue
        try:
            reports.append(r.result.recv())
        except EOFError:
            code = r.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return TrainingError(
                f"rank {r.rank} {how}; its log is {logs / f'rank_{r.rank}.log'}. "
                "Give the same command again to go on from the newest checkpoint"
            )
    errors = [r.error for r in sorted(reports, key=lambda r: r.at) if r.error]
    return next((e for e in errors if isinstance(e, UserError)), errors[0])


@contextmanager
def _passing_signals(ranks: Sequence[_Rank]) -> Iterator[None]:
    """Hand SIGINT, SIGTERM and SIGUSR2 on to every rank: they save at the next step and end."""

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for r in ranks:
            if r.process.is_alive() and r.process.pid:
                os.kill(r.process.pid, signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    previous = {s: signal.signal(s, pass_on) for s in signals}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _rank_main(rank: int, nproc: int, port: int, recipe: dict[str, Any], run_dir: Path, result: Connection) -> None:
    """Body of one rank's process."""
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    with (run_dir / "logs" / f"rank_{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        from msdiff_dist.apps.train.rank import run_rank

        result.send(_Report(run_rank(recipe_from(recipe), run_dir, terminal)))
    except MsdiffError as e:
        traceback.print_exc()
        result.send(_Report(None, e, time.time()))
        sys.exit(1)
    except Exception as e:
        traceback.print_exc()
        log_file = run_dir / "logs" / f"rank_{rank}.log"
        result.send(
            _Report(None, TrainingError(f"rank {rank} failed: {type(e).__name__}: {e} (see {log_file})"), time.time())
        )
        sys.exit(1)


def _end_with_supervisor() -> None:
    """Once the process that started this rank is gone, ask the rank to save and end; while it starts, end it."""
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    supervisor.join()
    os.kill(os.getpid(), signal.SIGTERM)
